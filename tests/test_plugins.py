"""Plugins: methods from files that a study names, known in workers, and made again when their source changes."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from safetensors.numpy import load_file, save_file

from taskvec.command import runs
from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json
from taskvec.core.notes import listen
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.store import Store
from taskvec.merging import plugins
from taskvec.merging.entries import Part
from taskvec.merging.recipes import apply
from taskvec.merging.registry import ADDITION, BUILT_IN, METHODS, Method, find_recipe, register
from taskvec.report import run_folder
from taskvec.study.files import open_study, parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

MINE = """
from taskvec.merging import Method, register
from taskvec.settings import Settings

class Mine(Settings):
    times: float = 1.0

def mine(vectors, part, config):
    return config.times * vectors.sum(0) * part.whole

def survey(entries, config):
    return 1.0 if sum(len(found) for _, found in entries) else 0.0

register(Method("mine", mine, "a sum", "here", config=Mine, survey=survey, elementwise=True))
"""
STUDY = """
name: own
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two"]
methods: [{name: task_arithmetic, scales: [0, 1]}, {name: mine, scales: [0, 1], config: {times: [1.0, 0.5]}},
          {name: lines+mine, scales: [0, 1]}]
plugins: [own/mine.py]
heads: [kept]
heatmap: {pairs: 0}
probe: {steps: 2, batch_size: 16, warmup: 1, learning_rates: [0.01]}
finetune: {steps: 2, batch_size: 8, warmup: 1, learning_rate: 0.003}
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no plugin's method behind."""
    yield
    plugins.use(())
    assert dict(METHODS) == BUILT_IN


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_folder_task(tmp_path / "one")
    write_folder_task(tmp_path / "two", ("red", "blue"), train=15, test=6)
    return tmp_path


def write(path: Path, text: str = MINE) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def error_of(*paths: Path) -> str:
    with pytest.raises(TaskvecError) as found:
        plugins.use(paths)
    assert dict(METHODS) == BUILT_IN
    return found.value.problem


def test_a_plugin_is_known_while_it_is_used_and_may_be_named_and_imported_twice(tmp_path: Path) -> None:
    path, other = write(tmp_path / "mine.py"), write(tmp_path / "other.py", MINE.replace('"mine"', '"other"'))
    first, second = plugins.use([path, tmp_path / "." / "mine.py", other])
    assert (list(first.methods), list(second.methods)) == (["mine"], ["other"])
    assert plugins.use([path]) == [first]
    assert set(METHODS) - set(BUILT_IN) == {"mine"}
    write(path, MINE.replace("vectors.sum(0)", "vectors.mean(0)"))
    [changed] = plugins.use([path])
    assert changed.digest != first.digest
    [(method, config)] = find_recipe("mine", {"times": 2.0}).stages
    part = replace(Part("w", torch.zeros(3), "vector"), global_statistics=1)
    assert method.function(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), part, config).tolist() == [4, 4, 4]
    assert not (tmp_path / "__pycache__").exists()
    measuring = MINE.replace("elementwise=True", "measure=f'{__name__}:survey'")
    [method] = plugins.use([write(tmp_path / "measuring.py", measuring)])[0].methods.values()
    module, _, name = method.measure.partition(":")
    assert getattr(importlib.import_module(module), name) is method.survey


def test_what_is_wrong_with_a_plugin_is_told_with_its_line(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.py") == f"no plugin file at '{tmp_path / 'no.py'}'"
    assert error_of(tmp_path) == f"no plugin file at '{tmp_path}'"
    assert "no plugin file at" in error_of(Path("a\0b"))
    cases = {
        "x = 1\n1 / 0": "line 2: ZeroDivisionError: division by zero",
        "import no_such_package": "line 1: ModuleNotFoundError: No module named 'no_such_package'",
        "a = 1\ndef f(:": "line 2: SyntaxError: invalid syntax",
        "x = 1\0": "null bytes",
        "raise SystemExit": "line 1: SystemExit",
        "def f():\n    raise ValueError('a\\nb')\nf()": "line 2: ValueError: a",
        MINE.replace('"mine"', '"ties"'): "a method named 'ties' is registered already",
        MINE.replace('"mine"', '"probing"'): "'probing' names something else in results",
        MINE.replace('"mine"', '"a b"'): "'a b' is no name",
        MINE.replace("config=Mine", "config=dict"): "the config of 'mine' is no class of taskvec.settings.Settings",
        MINE.replace("config=Mine", "config=Mine, scales='x'"): "want three numbers",
        MINE + "1 / 0": "line 15: ZeroDivisionError",
        "from taskvec.merging import METHODS\nMETHODS['ties'] = METHODS['dare']": "it replaces a method",
        "from taskvec.merging import METHODS\ndel METHODS['ties']": "it replaces a method",
    }
    for text, told in cases.items():
        path = tmp_path / "bad.py"
        path.write_text(text)
        found = error_of(path)
        assert found.startswith(f"plugin '{path}'"), found
        assert told in found
    path.write_bytes(b"x = '\xff'")
    assert "SyntaxError" in error_of(path)
    two = write(tmp_path / "one.py"), write(tmp_path / "two.py")
    assert "two.py', line" in error_of(*two)


@pytest.mark.parametrize(
    ("result", "told"),
    [("vectors.mean()", "()"), ("vectors", "(2, 3)"), ("vectors.sum(0)[:1]", "(1,)"), ("None", "('nothing',)")],
)
def test_a_result_of_another_shape_is_no_result(tmp_path: Path, result: str, told: str) -> None:
    text = MINE.replace("config.times * vectors.sum(0) * part.whole", result)
    plugins.use([write(tmp_path / "mine.py", text)])
    entries = [(Part("w", torch.zeros(3), "vector"), torch.ones(2, 3))]
    with pytest.raises(TaskvecError, match=re.escape(f"method 'mine' makes {told} of 'w', where (3,) belongs")):
        list(apply(find_recipe("mine"), entries))


def test_what_a_plugin_imports_from_its_own_folder_is_told(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tasks / "own"
    write(own / "mine.py", MINE + "import one_helper, torch.nn\ndef f():\n    from a_package.part import x\n")
    monkeypatch.syspath_prepend(own)
    write(own / "one_helper.py", "x = 1")
    write(own / "a_package" / "__init__.py", "")
    with listen() as heard:
        plan(study(tasks), Store(tasks / "store"))
    path = own / "mine.py"
    assert heard == [f"plugin '{path}' imports a_package, one_helper from its folder: nothing tells when that changes"]


def study(folder: Path, text: str = STUDY) -> StudyFile:
    write(folder / "s.yaml", text)
    return open_study(str(folder / "s.yaml"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("plugins: own/mine.py", "'plugins': should be a list"),
        ("plugins: [1]", "'plugins.0': YAML reads 1 as a number, where text belongs"),
        ("plugins: ['']", "'plugins.0': should have some text"),
        ("plugins: [no.py]", "no plugin file at"),
        ("plugins: []", "unknown merging method 'mine'"),
        ("plugin: [own/mine.py]", "unknown merging method 'mine'|did you mean 'plugins'"),
    ],
)
def test_bad_plugins_of_a_study_are_errors(tmp_path: Path, key: str, told: str) -> None:
    write(tmp_path / "own" / "mine.py")
    with pytest.raises(TaskvecError, match=told):
        study(tmp_path, STUDY.replace("plugins: [own/mine.py]", key))


def run(folder: Path, text: str = STUDY, workers: int = 1) -> list[str]:
    """Do what is not done of a study's merges, and return the labels of what was."""
    watcher, store = Quiet(), Store(folder / "store")
    merges = [step for cell in plan(study(folder, text), store) for step in pipeline.ordered(cell.steps())]
    merges = [step for step in merges if step.type.name in ("merge", "choose_option")]
    pipeline.run(merges, store, open_executor(workers), watcher)
    return watcher.ran


def merges_by(*names: str) -> list[str]:
    return [f"merge by {name} (random, aligned, seed 0)" for name in names]


def test_a_study_runs_by_its_plugin_in_workers_and_only_what_uses_it_is_made_again(tasks: Path) -> None:
    path = write(tasks / "own" / "mine.py")
    ran = [label for label in run(tasks, workers=2) if label.startswith("merge")]
    assert sorted(ran) == sorted(merges_by("task_arithmetic", "mine", "mine times=0.5", "lines+mine"))
    assert run(tasks) == []  # the same in this process
    write(path, MINE.replace("vectors.sum(0)", "-vectors.sum(0)"))
    ran = [label for label in run(tasks) if not label.startswith(("scales", "choose"))]
    assert ran == merges_by("mine", "mine times=0.5", "lines+mine")
    path.rename(tasks / "own" / "renamed.py")
    assert run(tasks, STUDY.replace("mine.py", "renamed.py")) == []


def test_a_plugin_that_changes_during_a_run_or_registers_nothing_is_told(tasks: Path) -> None:
    path, store = write(tasks / "own" / "mine.py"), Store(tasks / "store")
    empty = write(tasks / "own" / "empty.py", "x = 1")
    file = study(tasks, STUDY.replace("[own/mine.py]", "[own/mine.py, own/empty.py]"))
    [cell] = plan(file, store)
    [merge] = [one.merged for one in cell.trials if one.name == "lines+mine"]
    assert set(merge.config.sources) == {"mine"}
    assert str(tasks) not in str(merge.config.tracked())
    write(path, MINE + "\n# changed")
    with pytest.raises(TaskvecError, match="the plugin of 'mine' has changed since the run began"):
        merge.config.recipe()
    watcher = Quiet()
    runs.run_study(file, tasks / "out", store, 1, watcher, "taskvec run own")
    assert watcher.notes[0] == f"plan: plugin '{empty}' registers no merging method"
    lock = read_json(tasks / "out" / run_folder.LOCK)
    assert [one["label"] for one in lock["notes"] if "registers no" in one["text"]] == ["plan"]
    assert lock["plugins"] == {f"own/{one.name}": hashlib.sha256(one.read_bytes()).hexdigest() for one in (path, empty)}
    board = (tasks / "out" / "leaderboard.md").read_text()
    assert "| mine " in board and "| lines+mine " in board


def test_studies_do_not_share_plugins_and_a_programs_own_method_is_refused_with_a_way_on(tasks: Path) -> None:
    write(tasks / "own" / "mine.py")
    first = study(tasks)
    with pytest.raises(TaskvecError, match="unknown merging method 'mine'"):
        parse_study(STUDY.replace("plugins: [own/mine.py]", ""), "other.yaml")
    assert plan(first, Store(tasks / "store"))  # is itself again
    plugins.use(())
    register(Method("mine", lambda vectors, part, config: vectors.sum(0), "a sum", "here"))
    try:
        text = STUDY.replace("plugins: [own/mine.py]", "").replace("config: {times: [1.0, 0.5]}", "config: {}")
        file = StudyFile(parse_study(text, "s"), text, tasks)
        with pytest.raises(TaskvecError, match=r"'mine' was registered by a program.*\nput it into a file of its own"):
            plan(file, Store(tasks / "store"))
    finally:
        del METHODS["mine"]


def test_files_are_merged_by_a_plugin(tmp_path: Path) -> None:
    write(tmp_path / "mine.py")
    for name, value in (("base", 1.0), ("one", 2.0), ("two", 4.0)):
        save_file({"w": np.full((2, 3), value, np.float32)}, tmp_path / f"{name}.safetensors")
    names = [f"{name}.safetensors" for name in ("base", "one", "two")]
    command = [sys.executable, "-m", "taskvec", "merge", *names, "--scale", "1", "--method", "mine"]
    command += ["--set", "times=0.5", "--out", "m.safetensors"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (failed.returncode, "unknown merging method 'mine'" in failed.stderr) == (2, True)
    done = subprocess.run([*command, "--plugin", "mine.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(load_file(tmp_path / "m.safetensors")["w"], np.full((2, 3), 3, np.float32))
    write(tmp_path / "mine.py", "1 / 0")
    bad = subprocess.run([*command, "--plugin", "mine.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, "line 1: ZeroDivisionError" in bad.stderr, "Traceback" in bad.stderr) == (2, True, False)


def test_the_documented_study_file_shows_the_key_and_addition_needs_no_plugin() -> None:
    assert plugins.sources(find_recipe(f"lines+{ADDITION}"), ()) == {}
    text = (Path(__file__).parent.parent / "docs" / "study.md").read_text("utf-8")
    assert "plugins: []" in text
