"""The command: one subcommand, one function call. Torch is imported only when a command needs it."""

from __future__ import annotations

import contextlib
import functools
import io
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from typer.core import TyperGroup

from taskvec.command.terminal import say, say_outcome, say_table
from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.notes import listen, note, print_note

if TYPE_CHECKING:
    pass

DECODED = {"decode_task": "decoded", "decode_training": "decoded"}
"""The kinds of steps that keep decoded images."""

EXIT_CODES = "exit codes: 0 done; 1 an error of this program; 2 a mistake to mend; 130, 143 interrupted"


class Group(TyperGroup):
    """A group of commands; what is told of a wrong option or argument has no control characters of the user's."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command; a mistake in its options is told and exits with 2."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except Exception as error:
            show = getattr(error, "show", None)  # typer's own click, or the package
            if show is None:
                raise
            with contextlib.redirect_stderr(io.StringIO()) as told:
                show()
            say(told.getvalue().rstrip("\n"), sys.stderr)
            code = getattr(error, "exit_code", 2)
        return sys.exit(code or 0) if standalone_mode else code


def print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from importlib import metadata

        say(f"taskvec {metadata.version('taskvec')}")
        raise typer.Exit


app = typer.Typer(
    help="Edit pre-trained image classifiers in weight space.",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)
lab = typer.Typer(help="The embedded miniature: its encoders.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lab, name="lab")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Edit pre-trained image classifiers in weight space."""


Given = ParamSpec("Given")


def guarded(command: Callable[Given, None]) -> Callable[Given, None]:
    """Turn a user's mistake into one message and exit code 2; what is noted goes to standard error, once."""

    @functools.wraps(command)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            with listen(print_note):
                command(*args, **kwargs)
        except TaskvecError as error:
            say(f"error: {error}", sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


StudyName = Annotated[str, typer.Argument(help="a study file, or the name of a packaged study (taskvec list studies)")]
StoreFolder = Annotated[
    Path | None, typer.Option(help="where finished steps are kept; $TASKVEC_STORE or ~/.cache/taskvec by default")
]
Base = Annotated[Path, typer.Argument(help="pre-trained weights: a .safetensors file, or a folder with a model")]
Tuned = Annotated[list[Path], typer.Argument(metavar="TUNED...", help="weights fine-tuned from it, one or more")]
FormerExclude = Annotated[list[str] | None, typer.Option("--keep", hidden=True)]


@app.command()
@guarded
def run(
    study: StudyName,
    out: Annotated[Path | None, typer.Option(help="the run folder; runs/NAME by default")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="2 steps and 32 images a split: does everything work?")
    ] = False,
    store: StoreFolder = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="steps at once; by default one a core, on GPUs one each, or several of small encoders"
        ),
    ] = None,
) -> None:
    """Run a study, or what is not done of it yet, and write tables, figures, a page and models."""
    say(f"{'SMOKE RUN: ' if smoke else ''}reading {study}", sys.stderr)
    from taskvec.study.files import open_study

    file = open_study(study)
    counts = f"backbones: {len(file.study.backbones)}, tasks: {len(file.study.tasks)}"
    say(f"planning {file.study.name} ({counts})", sys.stderr)
    from taskvec.command.progress import Terminal
    from taskvec.command.runs import run_study
    from taskvec.core.formatting import duration_text
    from taskvec.engine.store import Store, default_store

    if smoke:
        file = file.shortened()
    folder = (out or Path("runs") / file.study.name).expanduser()
    command = f"taskvec run {shlex.quote(study)}" + (" --smoke" if smoke else "")
    console, begin = Console(stderr=True), time.monotonic()
    reporter = Terminal(console)
    try:
        outcome = run_study(file, folder, Store((store or default_store()).expanduser()), workers, reporter, command)
    finally:
        reporter.close()
    say_outcome(outcome, duration_text(time.monotonic() - begin))


@app.command("plan")
@guarded
def plan_(
    study: StudyName,
    device: Annotated[
        str | None,
        typer.Option(help="h200, h100, a100, cpu, or here (what taskvec bench measured): whose hours; all by default"),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="of the run with 2 steps and 32 images a split")] = False,
    store: StoreFolder = None,
    workers: Annotated[int | None, typer.Option(min=1, help="steps at once on a CPU; one a core by default")] = None,
) -> None:
    """Say what a study takes before it runs: steps, images, FLOPs, hours, disk, memory, downloads."""
    from taskvec.study.files import open_study

    file = open_study(study)
    from taskvec.engine.store import Store, default_store
    from taskvec.study.forecast.estimate import forecast, report
    from taskvec.study.forecast.rates import DEVICES, HERE, find_device
    from taskvec.study.forecast.workers import cpu_workers
    from taskvec.study.plan.experiments import plan

    if device is not None and device not in (*DEVICES, HERE):
        raise unknown("device", device, (*DEVICES, HERE))
    held, chosen = Store((store or default_store()).expanduser()), file.study.smoke() if smoke else file.study
    devices = [find_device(name, held.folder) for name in ([device] if device else DEVICES)]
    found = forecast(chosen.name, plan(replace(file, study=chosen), held, estimate=True), held)
    for line in report(found, devices, workers or cpu_workers(chosen.threads)):
        say(line, hang=10, wrap=True)


@app.command()
@guarded
def bench(
    study: Annotated[
        str | None, typer.Argument(help="a study, whose backbones are measured; a few usual ones where none is given")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="keep the rates in the store, for taskvec plan")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N; the study's, or auto")] = None,
    store: StoreFolder = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes at once on a CPU; as many as a run has")] = None,
) -> None:
    """Measure this machine in about two minutes: passes, training, opening, linear heads, decoding, files."""
    from taskvec.command.bench import lines, measure
    from taskvec.engine.store import Store, default_store
    from taskvec.study.files import open_study
    from taskvec.study.forecast.rates import save_rates

    file = open_study(study) if study else None
    place = Store((store or default_store()).expanduser())
    wanted = device or (file.study.device if file else "auto")
    rates = measure(file, wanted, place, workers, lambda text: say(text, sys.stderr))
    for line in lines(rates):
        say(line)
    if save:
        say(f"saved as {save_rates(rates, place.folder)}", hang=4)


@app.command()
@guarded
def predict(
    model: Annotated[Path, typer.Argument(help="a run folder, or a model folder in its models/")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    task: Annotated[str | None, typer.Option(help="ask one task's head only")] = None,
) -> None:
    """Classify images with a study's best model, by every task's head or by one."""
    from taskvec.deploy.model import load
    from taskvec.report.texts import one_line

    found = load(model)
    for answer in found.predict(images, task):
        names = (one_line(name) for name in (answer.image, answer.task, answer.label))
        say("\t".join([*names, f"{answer.probability:.3f}"]))


def excluded(exclude: list[str] | None, keep: list[str] | None) -> list[str]:
    """Return the patterns of --exclude and of its former name, which is noted."""
    if keep:
        note("--keep is called --exclude now, and still works")
    return [*(exclude or ()), *(keep or ())]


@app.command()
@guarded
def merge(
    base: Base,
    tuned: Tuned,
    scale: Annotated[float, typer.Option(help="lambda: how far to go along the merged direction")],
    out: Annotated[Path, typer.Option(help="a .safetensors file, or a new folder (for shards, or a file a task)")],
    method: Annotated[
        str, typer.Option(help="a merging method (taskvec list methods), or several with +")
    ] = "task_arithmetic",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a hyperparameter")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="tensors that stay the base's, such as 'head.*'")
    ] = None,
    keep: FormerExclude = None,
    dtype: Annotated[str | None, typer.Option(help="store as float32, bfloat16, ...; as the base by default")] = None,
    shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="largest file, such as 5GB")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of methods that draw")] = 0,
    plugin: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="a Python file that registers methods; it is run")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU for methods that compute much")] = "auto",
) -> None:
    """Merge fine-tuned weights of any architecture in little memory; no model is built."""
    from taskvec.command import weight_files as file_commands
    from taskvec.command.progress import passes

    begin = time.monotonic()
    patterns = excluded(exclude, keep)
    given = (base, tuned, out, scale, method, settings or (), patterns, dtype, shard_size, seed, plugin or (), device)
    request = file_commands.Merge(*given)
    with passes("merging", Console(stderr=True)) as watch:
        lines = request.run(watch)
    for line in (*lines, f"in {time.monotonic() - begin:.1f} s"):
        say(line, hang=4)


@app.command()
@guarded
def diff(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path | None, typer.Option(help="a folder for a figure (png, pdf) and tables (csv)")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="tensors to leave out, such as 'head.*'")
    ] = None,
    keep: FormerExclude = None,
) -> None:
    """Compare fine-tuned weights with their base: norms by layer, cosines, share of changed entries."""
    from taskvec.command import weight_files as file_commands
    from taskvec.command.progress import passes

    if out is not None:
        file_commands.check_out(out, [base, *tuned])
    with passes("comparing", Console(stderr=True)) as watch:
        found = file_commands.compare(base, tuned, excluded(exclude, keep), watch)
    for title, frame in file_commands.tables(found).items():
        say_table(title, frame)
    if out is not None:
        say(f"written to {out}: {', '.join(file_commands.write(found, out))}", hang=4)


@app.command("store")
@guarded
def store_(
    clear: Annotated[
        str | None, typer.Option(help="remove what is of this kind, or has this id; decoded: all decoded images; all")
    ] = None,
    store: StoreFolder = None,
) -> None:
    """List what the store keeps: decoded images one by one, other steps by kind. With --clear, remove some of it."""
    from taskvec.core.formatting import bytes_text
    from taskvec.engine.store import Store, default_store

    place = Store((store or default_store()).expanduser())
    if store is not None and not place.folder.is_dir():
        raise TaskvecError(f"no store at '{store}'", "give the folder that taskvec run was given as --store")
    if place.folder.exists() and not place.is_store():
        raise TaskvecError(f"'{place.folder}' is no store", "give the folder that taskvec run was given as --store")
    every = place.held()
    if clear:
        place.sweep()
        chosen = [one for one in every if clear in ("all", one.kind, one.id, DECODED.get(one.kind))]
        if not chosen and clear != "all":
            raise unknown("part of the store", clear, {"all", "decoded", *(one.kind for one in every)})
        gone = place.clear(chosen)
        say(f"removed {len(gone)} steps, {bytes_text(sum(one.size for one in gone))}, from {place.folder}")
        return
    for one in (one for one in every if one.kind in DECODED):
        say(f"{bytes_text(one.size):>9}  {one.id}  {one.label}")
    for kind in sorted({one.kind for one in every} - set(DECODED)):
        sizes = [one.size for one in every if one.kind == kind]
        say(f"{bytes_text(sum(sizes)):>9}  {kind}: {len(sizes)} steps")
    if (left := place.unfinished()) > 0:
        say(f"{bytes_text(left):>9}  unfinished: being written now, or left in {place.folder / 'tmp'} by others")
    say(f"{bytes_text(sum(one.size for one in every)):>9}  in all, in {place.folder}")


@app.command("list")
@guarded
def list_(kind: Annotated[str, typer.Argument(help="studies, methods, backbones or tasks")]) -> None:
    """List what the package knows by name."""
    listings = {"studies": _studies, "methods": _methods, "backbones": _backbones, "tasks": _tasks}
    if kind not in listings:
        raise unknown("kind of list", kind, listings)
    for name, text in listings[kind]().items():
        say(f"{name:<24} {text}", hang=25)


def _studies() -> dict[str, str]:
    from taskvec.study.files import packaged

    return {name: text.splitlines()[0].lstrip("# ") for name, text in packaged().items()}


def _methods() -> dict[str, str]:
    from taskvec.merging.registry import METHODS

    return {method.name: method.about for method in METHODS.values()}


def _backbones() -> dict[str, str]:
    from taskvec.encoders.addresses import listing
    from taskvec.lab.encoders import DESCRIPTIONS

    return {f"lab:{name}": text for name, text in DESCRIPTIONS.items()} | listing()


def _tasks() -> dict[str, str]:
    from taskvec.data.sources import listing

    return listing()


@lab.command()
@guarded
def pretrain(
    encoder: Annotated[str, typer.Argument(help="an encoder of the lab (taskvec list backbones), or all")],
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps; the shipped encoder's by default")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of weights and images")] = 0,
    out: Annotated[Path, typer.Option(help="the folder to write the encoder and its record to")] = Path(),
) -> None:
    """Pre-train one of the lab's encoders, or all, where OUT lacks it; what was stopped continues."""
    from taskvec.lab.encoders import pretrained

    if encoder not in (*pretrained(), "all"):
        raise unknown("pre-trained lab encoder", encoder, (*pretrained(), "all"))
    from rich.progress import Progress

    from taskvec.lab.pretraining.pretrain import is_made
    from taskvec.lab.pretraining.pretrain import pretrain as make

    for name in pretrained() if encoder == "all" else (encoder,):
        if is_made(name, out, steps, seed):
            say(f"{name} is there already")
            continue
        with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task(f"pre-training {name}", total=1.0)
            path = make(name, out, steps, seed, lambda share: bar.update(task, completed=share))  # noqa: B023
        say(f"{path} and its record {path.with_suffix('.json').name}")
