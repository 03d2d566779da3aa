"""Notes: what steps and libraries tell is shown with any number of workers, kept, and never told twice."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATHS, noisy_steps
from helpers.reporters import Quiet
from helpers.tasks import CLASSES, write_folder_task
from helpers.timm_files import prepare

from taskvec.command import runs
from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json, write_json
from taskvec.core.notes import library_warnings, listen, note, note_lines
from taskvec.engine import pipeline
from taskvec.engine.executors import Inline, Processes, message_of
from taskvec.engine.pipeline import Step
from taskvec.engine.store import NOTES, RECORD, Store
from taskvec.report import run_folder
from taskvec.report.figures import drawing as figures
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.study.steps.searching import ChoiceConfig, choose_scale

STUDY = """
backbones: [{address: "timm:test_vit@pre.safetensors", size: 32}]
tasks: [{address: "folder:one", name: 'o&amp;ne', finetuned: pre.safetensors}]
methods: [{name: task_arithmetic, scales: [0, 1]}]
regimes: [full]
heads: [kept]
heatmap: {pairs: 0}
"""
TOLD = ["odd classes", "UserWarning: odd values", "some.library: odd weights", "PIL.Image: odd header"]


def step(label: str, function: str = "tell", **config: Any) -> Step:
    return Step(label, getattr(noisy_steps, function), noisy_steps.Telling(**config))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers import the steps."""
    monkeypatch.setenv("PYTHONPATH", PATHS)


def executor(workers: int) -> Inline | Processes:
    return Inline() if workers == 1 else Processes(workers)


@pytest.mark.filterwarnings("default", "ignore:soon gone")
@pytest.mark.parametrize("count", [1, 2])
def test_all_that_a_step_and_libraries_tell_is_a_note_once(
    tmp_path: Path, workers: None, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    one, other = step("one"), step("other", value="2")
    watcher = Quiet()
    done = pipeline.run([one, other], Store(tmp_path), executor(count), watcher)
    assert done[one].notes() == done[other].notes() == TOLD
    assert sorted(watcher.notes) == sorted(f"{label}: {text}" for label in ("one", "other") for text in TOLD)
    said = capfd.readouterr().err.splitlines()
    assert {"printed by Python", "written by C"} <= set(said)
    assert not [line for line in said if "odd" in line]
    again = Quiet()
    pipeline.run([one, other], Store(tmp_path), executor(count), again)
    assert again.ran == []
    assert sorted(again.notes) == sorted(watcher.notes)


@pytest.mark.filterwarnings("default", "ignore:soon gone")
@pytest.mark.parametrize("count", [1, 2])
def test_a_failing_step_tells_its_notes_before_its_error(
    tmp_path: Path, workers: None, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = Quiet()
    with pytest.raises(TaskvecError, match="bad: the step failed"):
        pipeline.run([step("bad", fail=True)], Store(tmp_path), executor(count), watcher)
    assert watcher.notes == [f"bad: {text}" for text in TOLD]


@pytest.mark.filterwarnings("default", "ignore:soon gone")
def test_steps_that_are_joined_tell_their_notes_too(tmp_path: Path) -> None:
    class Late(Inline):
        slots = 2

    watcher = Quiet()
    pipeline.run([step("one"), step("same")], Store(tmp_path), Late(), watcher)
    assert (watcher.ran, watcher.kept) == (["one"], ["same"])
    assert watcher.notes == [f"{label}: {text}" for label in ("one", "same") for text in TOLD]


def test_damaged_notes_are_told_and_stop_nothing(tmp_path: Path) -> None:
    id = "ab" * 10
    folder = tmp_path / "ab" / id
    folder.mkdir(parents=True)
    (folder / RECORD).write_text('{"about": {"function": "m:f", "label": "x"}, "files": {}}')
    for text in ("{", '{"a": 1}', "[1]", "7"):
        (folder / NOTES).write_text(text)
        found = Store(tmp_path).find(id)
        assert found is not None
        assert found.notes() == ["what this step noted is damaged; taskvec store --clear " + id + " makes it again"]


def test_listening_is_undone_in_any_order_and_each_note_is_heard_once(capsys: pytest.CaptureFixture[str]) -> None:
    with listen() as outer:
        with listen() as inner:
            note("a\x1b[31m")
            note("a\x1b[31m")
        note("b")
    note("c")
    assert (inner, outer) == (["a\\x1b[31m"], ["b"])
    assert capsys.readouterr().err == "c\n"
    first, second = listen(), listen()
    heard, later = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    note("d")
    second.__exit__(None, None, None)
    assert (heard, later) == ([], ["d"])


@pytest.mark.filterwarnings("default")
def test_what_a_library_says_while_it_is_imported_is_no_note_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import warnings, logging\nwarnings.warn('old package')\nlogging.getLogger('noisy').warning('old driver')\n"
    for name in ("noisy_library", "noisy_too"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    handled = logging.Logger.callHandlers
    with warnings.catch_warnings(record=True) as shown, listen() as heard, library_warnings():
        import noisy_library  # noqa: F401

        for call in (lambda: note("from a thread"), lambda: importlib.import_module("noisy_too")):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
    assert heard == ["from a thread"]
    assert [str(one.message) for one in shown] == ["old package", "old package"]
    assert logging.Logger.callHandlers is handled


def test_a_library_that_logs_wrongly_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("careless.library")
    logger.propagate = False  # pytest raises what logging only prints
    with listen() as heard, library_warnings():
        logger.warning("%d files", "two")
        logger.warning("after it")
    assert heard == ["careless.library: after it"]
    assert "%d files" in capfd.readouterr().err


def test_equal_notes_of_many_steps_are_one_line() -> None:
    told = [{"label": f"step {i}", "text": "left out"} for i in range(240)] + [{"label": "x", "text": "own"}]
    assert note_lines(told) == ["step 0, step 1, step 2 and 237 more: left out", "x: own"]


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_no_memory_is_a_clear_error_on_every_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delattr(torch, "OutOfMemoryError", raising=False)  # torch 2.3 has none of that name
    with pytest.raises(TaskvecError, match="no memory left in step 'big'\nlower batch_size"):
        pipeline.run([step("big", "starve", kind=kind)], Store(tmp_path), Inline(), Quiet())
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        pipeline.run([step("crash", "crash")], Store(tmp_path), Inline(), Quiet())


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_cannot_import_says_what(tmp_path: Path, workers: None, count: int) -> None:
    with pytest.raises(TaskvecError, match="step 'lost' cannot import what it needs: No module named 'no_such_module'"):
        pipeline.run([step("lost", "lack")], Store(tmp_path), executor(count), Quiet())
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_step_whose_own_module_a_worker_cannot_import_says_what(tmp_path: Path) -> None:
    lost = Step("lost", noisy_steps.crash, noisy_steps.Telling())  # a worker does not find the tests
    with pytest.raises(TaskvecError, match="step 'lost' cannot import what it needs: No module named"):
        pipeline.run([lost], Store(tmp_path), Processes(2), Quiet())
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_worker_that_cannot_start_is_told_with_its_last_words(
    tmp_path: Path, workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "import os\nos.write(2, b'the driver is too old\\n')\nos._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(TaskvecError, match="step 'one' was ended with exit code 3. the driver is too old\nits last"):
        pipeline.run([step("one")], Store(tmp_path / "store"), Processes(2), Quiet())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(TaskvecError, match="no worker process can be started"):
        pipeline.run([step("one")], Store(tmp_path / "store"), Processes(2), Quiet())


def test_what_a_worker_prints_at_its_start_is_passed_on_and_stops_nothing(
    tmp_path: Path, workers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(1, b'hello\\n17\\nno end of line')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    one = step("one")
    done = pipeline.run([one], Store(tmp_path / "store"), Processes(2), Quiet())
    assert done[one].notes() == TOLD
    assert {"hello", "17", "no end of line"} <= set(capfd.readouterr().err.splitlines())
    assert message_of('{"seconds": 1}\n') == {"seconds": 1}
    assert message_of('{"odd": 1}') == {"said": '{"odd": 1}'}
    assert message_of('{"seco') == {"said": '{"seco'}


# ---------------------------------------------------------------- runs


def brought(data: Path) -> StudyFile:
    """Return a study whose checkpoint is the pre-trained encoder itself, and whose folder holds other files."""
    prepare(data)
    for folder in (data / "one").glob("*/*"):
        (folder / "Thumbs.db").write_bytes(b"no image")
    text = STUDY + "probe: {steps: 2, batch_size: 16, warmup: 1, learning_rates: [0.01]}\n"
    return StudyFile(parse_study(text, "brought"), text, data)


def run(file: StudyFile, out: Path, store: Path, count: int) -> tuple[runs.Outcome, list[str], dict[str, Any]]:
    watcher = Quiet()
    outcome = runs.run_study(file, out, Store(store), count, watcher, "taskvec run brought")
    return outcome, watcher.notes, read_json(out / run_folder.LOCK)


def test_notes_are_shown_with_any_number_of_workers_on_every_run_and_in_every_report(tmp_path: Path) -> None:
    write_folder_task(tmp_path / "one", CLASSES, train=12)
    file, store = brought(tmp_path), tmp_path / "store"
    _, told, lock = run(file, tmp_path / "out", store, 1)
    parts = ("left out 2 tensors", "left out 6 files", "vector is zero", "names no classes")
    assert [sum(part in line for line in told) for part in parts] == [1, 1, 1, 1]
    assert sorted(told) == sorted(f"{one['label']}: {one['text']}" for one in lock["notes"])
    again, retold, _ = run(file, tmp_path / "out", store, 1)
    assert (again.ran, again.written, sorted(retold)) == (0, False, sorted(told))
    _, of_two, lock_of_two = run(file, tmp_path / "out2", tmp_path / "store2", 2)
    assert sorted(of_two) == sorted(told)
    assert lock_of_two["notes"] == lock["notes"]
    assert lock_of_two["fingerprint"] == lock["fingerprint"]
    page, tables = ((tmp_path / "out" / name).read_text() for name in ("report.html", "tables.md"))
    assert (tmp_path / "out2" / "report.html").read_text() == page
    assert "o&amp;amp;ne" in page
    assert "its task vector is zero" in page and "names no classes" in page
    assert r"checkpoint of o\&amp;ne" in tables.split("## What was noted")[1].split("##")[0]


def test_a_folder_written_before_its_notes_changed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder_task(tmp_path / "one")
    text = 'backbones: ["lab:random"]\ntasks: ["folder:one"]\nheatmap: {pairs: 0}\nheads: [kept]\n'
    study = parse_study(text, "small").smoke()
    file = StudyFile(study, text, tmp_path)
    _, told, _ = run(file, tmp_path / "out", tmp_path / "store", 1)
    plan = runs.plan

    def noting(*given: Any) -> Any:
        note("the plan has something to say")
        return plan(*given)

    monkeypatch.setattr(runs, "plan", noting)
    outcome, more, lock = run(file, tmp_path / "out", tmp_path / "store", 1)
    assert (outcome.ran, outcome.written) == (0, True)
    assert more == ["plan: the plan has something to say", *told]
    assert lock["notes"][0] == {"label": "plan", "text": "the plan has something to say"}
    assert "the plan has something to say" in (tmp_path / "out" / "report.html").read_text()


def test_the_terminal_gets_a_note_of_several_steps_once_and_then_their_names() -> None:
    watcher = Quiet()
    counter = runs.Counter(watcher)
    for label in (runs.PLANNING, "decode a", "decode a", "decode b", "decode c"):
        counter.note(label, "left out 3 files")
    counter.note("load x", "own")
    counter.repeat()
    assert watcher.notes == ["plan: left out 3 files", "load x: own", "also decode b, decode c: left out 3 files"]


def test_what_is_noted_while_figures_are_drawn_is_kept_whoever_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [figures.Planned(f"f{i}", "gains", "b", "r", lambda: None) for i in range(2)]  # type: ignore[arg-type]
    monkeypatch.setattr(figures, "plan", lambda *_: drawn)
    monkeypatch.setattr(figures, "save", lambda _, folder, stem: note(f"{stem}: no font has this letter"))
    with listen() as heard:
        figures.write(None, None, tmp_path)  # type: ignore[arg-type]
    assert heard == ["f0: no font has this letter", "f1: no font has this letter"]


def test_commands_tell_each_note_once_on_standard_error(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "one")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "s.yaml").write_text('backbones: ["lab:random", "lab:mae"]\ntasks: ["folder:one"]\n')
    command = [sys.executable, "-m", "taskvec", "plan", "s.yaml", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out 1 files that are no images (1 .db), such as 'train/ant/Thumbs.db'") == 1
    assert "left out" not in done.stdout


# ---------------------------------------------------------------- what steps and plans note


def choice(folder: Path, scales: list[float], values: list[float], refine: int) -> list[str]:
    """Choose a scale by one curve, and return what is noted."""
    for name, content in (
        ("curve.json", {"scales": scales, "validation": values}),
        ("metrics.json", {"validation": 1.0}),
    ):
        write_json(folder / name, content)
    with listen() as heard:
        config = ChoiceConfig(grid=scales, refine=refine)
        choose_scale.function(config, {"rounds": [[folder]], "finetuned": [folder]}, folder, lambda _: None)
    return heard


def test_a_grid_that_ended_too_early_is_noted(tmp_path: Path) -> None:
    told = "the largest scale that was tried, 1, is the best: a wider grid (scales) may give more"
    assert choice(tmp_path, [0.0, 0.5, 1.0], [0.1, 0.2, 0.3], 0) == [told]
    assert choice(tmp_path, [0.0, 0.5, 1.0], [0.1, 0.3, 0.3], 0) == []
    assert choice(tmp_path, [0.0, 0.5, 1.0], [0.1, 0.2, 0.3], 1) == []  # another round follows
    assert choice(tmp_path, [1.0], [0.3], 0) == []


def test_what_an_open_regime_leaves_out_is_noted(tmp_path: Path) -> None:
    write_folder_task(tmp_path / "one")
    text = 'backbones: ["lab:contrastive", "lab:mae"]\ntasks: ["lab:greek", "folder:one"]\nregimes: [aligned, open]\n'
    with listen() as heard:
        plan(StudyFile(parse_study(text, "s"), text, tmp_path), Store(tmp_path / "store"))
    assert heard == [
        "regime 'open' leaves out one for backbone contrastive: their classes have no captions",
        "regime 'open' leaves out backbone mae, which has no text tower",
    ]
