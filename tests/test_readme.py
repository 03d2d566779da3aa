"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from taskvec.study import Study

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"no {language} block"
    return found.group(1)


def test_the_python_example_runs_and_prints_good_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python")
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    accuracies = [float(value) for value in re.findall(r": (0\.\d+|1\.0)", printed)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.3


def test_the_study_example_is_a_valid_study() -> None:
    study = Study.model_validate(yaml.safe_load(block("yaml")) | {"name": "pets"})
    assert [task.address for task in study.tasks] == ["folder:pets", "folder:plants", "folder:/data/cars"]


def test_every_module_has_its_line_in_the_tree() -> None:
    root = Path(__file__).parent.parent / "src" / "taskvec"
    tree = README.split("## Where things are")[1]
    for path in root.glob("*.py"):
        assert path.name in tree or path.name.startswith("__"), f"{path.name} is not in the README's tree"
