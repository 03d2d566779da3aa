"""What the documents show works: commands are understood, imports and names exist, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import timm
import typer
import yaml
from helpers.command import taskvec
from helpers.tasks import write_folder_task
from safetensors.torch import save_file

from taskvec.command import cli
from taskvec.encoders.addresses import listing
from taskvec.lab.encoders import DESCRIPTIONS
from taskvec.study.files import packaged, parse_study
from taskvec.study.schema import Study

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text("utf-8")
OUTSIDE = ("mine", "pets")
"""Studies that a reader writes."""
BY = {path.name: path.read_text("utf-8") for path in DOCUMENTS}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def every(language: str) -> list[tuple[str, str]]:
    return [(name, block) for name, text in BY.items() for block in blocks(text, language)]


def commands() -> Iterator[tuple[str, str]]:
    """Yield every command of this package: those in blocks, those in sentences, those in studies' first lines."""
    for name, text in BY.items():
        shown = [line for block in blocks(text, "sh") for line in block.splitlines()]
        told = re.findall(r"`(taskvec [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        yield from ((name, line) for line in (*shown, *told) if line.startswith("taskvec "))
    for study, text in packaged().items():
        yield from ((study, command) for command in re.findall(r"Command: (taskvec [^.;\n]*)", text))


def parsed(command: str) -> click.Context:
    """Parse a command as the real one does, without running it."""
    words = shlex.split(re.sub(r"[;,.]$", "", command.split(" #")[0].strip()))[1:]
    group = typer.main.get_command(cli.app)
    context = group.make_context("taskvec", list(words), resilient_parsing=False)
    while isinstance(group, type(typer.main.get_command(cli.app))):
        name, found, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        if found is None:
            raise AssertionError(f"no command {name}")
        group, context = found, found.make_context(name, rest, parent=context)
    return context


ABSTRACT = re.compile(
    r"\b[A-Z]{2,}\b|\.\.\.|^taskvec (run|plan|list|merge|diff|predict|store|lab)( --method \w+)?$|\[|\{"
)
"""Commands that stand for many, with a place to fill in."""


@pytest.mark.parametrize(("where", "command"), [one for one in commands() if not ABSTRACT.search(one[1])])
def test_every_command_shown_is_understood(where: str, command: str) -> None:
    context = parsed(command)
    if study := context.params.get("study"):
        path = ROOT / str(study)
        assert study in packaged() or path.is_file() or Path(study).stem in OUTSIDE, study
    if context.command.name == "list":
        assert context.params["kind"] in ("studies", "methods", "backbones", "tasks")


def test_commands_are_found_and_wrong_ones_are_not_understood() -> None:
    assert len(list(commands())) > 40
    with pytest.raises(Exception, match="No such option"):
        parsed("taskvec run quickstart --smokes")


@pytest.mark.parametrize(("where", "block"), every("python"))
def test_imports_of_python_blocks_resolve(where: str, block: str) -> None:
    compile(block, where, "exec")
    for line in re.findall(r"^(?:from|import) .*", block, re.MULTILINE):
        exec(line, {})


def test_one_liners_run() -> None:
    for where, block in every("sh"):
        for code in re.findall(r'python -c "([^"]*)"', block):
            exec(compile(code, where, "exec"), {})


def test_every_name_of_the_package_exists() -> None:
    """Names such as ``taskvec.encoders.loaders.timm`` or ``tv.merge``, in sentences and in blocks."""
    for where, text in BY.items():
        for name in re.findall(r"(?<![\w/.-])(?:taskvec|tv)((?:\.\w+)+)(?!\.?\w*[/@])", text):
            if name.rpartition(".")[2] not in ("yaml", "md", "json"):
                exists(f"taskvec{name}", where)


def exists(name: str, where: str) -> None:
    found = importlib.import_module("taskvec")
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            assert hasattr(found, "__path__"), f"{where}: {name}"
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)


@pytest.mark.parametrize("where", BY)
def test_links_lead_to_files_of_the_repository(where: str) -> None:
    folder = ROOT if where in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", BY[where]):
        if "://" not in target:
            path, _, part = target.partition("#")
            assert not path or (folder / path).exists(), target
            if part:
                text = (folder / path).read_text("utf-8") if path else BY[where]
                heads = re.findall(r"^#+ (.*)", text, re.MULTILINE)
                assert part in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_modules_that_sentences_name_exist() -> None:
    """Files of the package, such as ``steps/__init__.py``, by their names or their ends."""
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for where, text in BY.items():
        if where == "log.md":  # what was, at its date
            continue
        for name in re.findall(r"`([\w/]+\.py)`", text):
            assert any(file == name or file.endswith(f"/{name}") for file in files), f"{where}: {name}"


@pytest.mark.parametrize(("where", "block"), every("yaml"))
def test_every_key_shown_is_one_of_a_study(where: str, block: str, tmp_path: Path) -> None:
    shown = yaml.safe_load(block)
    assert set(shown) <= set(Study.model_fields), where
    defaults = {"backbones": ["lab:supervised"], "tasks": ["lab:greek"]}
    for name in shown.get("plugins", ()):
        (tmp_path / name).write_text(next(code for code in blocks(BY[where], "python") if "register(" in code))
    parse_study(yaml.safe_dump(defaults | {"name": "shown"} | shown), where, tmp_path)


def test_the_reference_of_study_files_names_every_key() -> None:
    reference = next(block for block in blocks(BY["study.md"], "yaml") if "name: my-study" in block)
    assert set(yaml.safe_load(reference)) == set(Study.model_fields)


def test_backbones_of_the_lab_and_tasks_that_are_named_exist() -> None:
    known = {f"lab:{name}" for name in DESCRIPTIONS} | set(cli._tasks()) | set(listing())
    for where, text in BY.items():
        for name in re.findall(r"\blab:[a-z][a-z-]*[a-z]", text):
            assert name in known, f"{where}: {name}"


# ---------------------------------------------------------------- what the README shows, run


def test_the_python_example_runs_and_prints_good_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks(README, "python")
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    accuracies = [float(value) for value in re.findall(r": (0\.\d+|1\.0)", printed)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.3


def test_the_study_example_runs_smoked_and_predicts(tmp_path: Path) -> None:
    """With a small random encoder in the place of DINOv2, and folders made on the fly."""
    [example] = blocks(README, "yaml")
    cars = tmp_path / "cars"
    for folder in (tmp_path / "pets", tmp_path / "plants", cars):
        write_folder_task(folder)
    small = example.replace("vit_small_patch14_dinov2", "test_vit").replace("size: 56", "size: 64")
    assert "timm:test_vit@dino.safetensors" in small
    (tmp_path / "pets.yaml").write_text(small.replace("/data/cars", str(cars)))
    module = timm.create_model("test_vit")
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, tmp_path / "dino.safetensors")
    done = taskvec("run", "pets.yaml", "--smoke", "--store", tmp_path / "store", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SMOKE RUN")
    image = next((tmp_path / "pets" / "test").rglob("*.png"))
    answers = taskvec("predict", tmp_path / "runs" / "pets-smoke", image)
    assert [line.split("\t")[1] for line in answers.stdout.splitlines()] == ["pets", "plants", "cars"]
