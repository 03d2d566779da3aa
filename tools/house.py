"""Print the numbers of the house: order of imports, lengths, shapes, calls to a training step, files to touch."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests")]

from helpers.layers import FILES, ROOT, arrows, backward  # noqa: E402

LONGEST_MODULE = 400
SHAPE = re.compile(r"""\b(?:Shaped|Bool|U?Int\d*|Float\d*|Num|Real|Integer)\[[^\[\]"']+, ["']""")
STUDY = """
name: house
backbones: ["lab:random"]
tasks: ["folder:one"]
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept]
"""
GOALS = {"merging method": 2, "backbone loader": 2, "task source": 1, "regime": 2, "metric with a figure": 4}
"""Files to touch for each change, at most."""


def sources() -> dict[Path, str]:
    """Return the text of every module."""
    return {path: path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}


def code_lines(text: str) -> set[int]:
    """Return the numbers of lines that are neither blank, nor comment, nor docstring."""
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    strings = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    texts = [node for node in strings if isinstance(node.value.value, str)]
    return lines - {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def body_lengths(text: str) -> Iterator[int]:
    """Yield the lines of code of every function's body."""
    lines = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield sum(line in lines for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1))


def cycles(graph: dict[str, set[str]]) -> int:
    """Return whether a module imports itself by a detour, as 0 or 1."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return 1
    return 0


def shapes(text: str) -> int:
    """Count the shapes in a source."""
    return len(SHAPE.findall(text))


def checklists(text: str) -> dict[str, list[str]]:
    """Return the files that each check-list of CONTRIBUTING.md names."""
    sections = re.findall(r"^## An? (.+)\n((?:(?!^## ).*\n)*)", text, re.MULTILINE)
    return {name: re.findall(r"^\d+\. `([^`]+)`", body, re.MULTILINE) for name, body in sections}


def calls_to_training(folder: Path) -> list[str]:
    """Return the package's functions from ``taskvec run`` to one loop of training, the first time that one begins."""
    from helpers.tasks import write_folder_task

    from taskvec.command import cli
    from taskvec.core import training
    from taskvec.learning import finetuning, heads

    found: list[str] = []

    def train(*arguments: object, **named: object) -> object:
        if not found:
            frames = traceback.extract_stack()[:-1]
            inside = [f for f in frames if Path(f.filename).is_relative_to(ROOT)]
            found.extend(f"{Path(f.filename).relative_to(ROOT).with_suffix('')}:{f.name}" for f in inside)
        return original(*arguments, **named)

    original = training.train
    write_folder_task(folder / "one")
    (folder / "house.yaml").write_text(STUDY)
    places = [module for module in (training, finetuning, heads) if hasattr(module, "train")]
    with mock.patch.multiple(training, train=train), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for module in places[1:]:
            mock.patch.object(module, "train", train).start()
        cli.run(str(folder / "house.yaml"), folder / "out", True, folder / "store", 1)
    mock.patch.stopall()
    begin = next(place for place, name in enumerate(found) if name == "command/cli:run")
    return [*found[begin:], "core/training:train"]


def main() -> None:
    """Print all numbers."""
    texts, graph = sources(), arrows(FILES)
    lengths = sorted(length for text in texts.values() for length in body_lengths(text))
    sizes = {path.relative_to(ROOT).as_posix(): len(text.splitlines()) for path, text in texts.items()}
    print(f"Python files in the root: {len(list(ROOT.glob('*.py')))}")
    print(f"cycles: {cycles(graph)}, arrows back: {len(backward(graph))}")
    tenth = lengths[len(lengths) * 9 // 10]
    print(f"function bodies: median {statistics.median(lengths):g}, p90 {tenth}, max {lengths[-1]}")
    large = [f"{name} {size}" for name, size in sizes.items() if size > LONGEST_MODULE]
    print(f"modules over {LONGEST_MODULE} lines: {', '.join(large) or 0}")
    print(f"lines of code: {sum(len(code_lines(text)) for text in texts.values()):,}")
    from helpers.shapes import WINGS

    checked = {path: shapes(text) for path, text in texts.items() if path.relative_to(ROOT).parts[0] in WINGS}
    print(f"shapes in annotations: {sum(map(shapes, texts.values()))}, checked in tests: {sum(checked.values())}")
    for name, files in checklists((REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")).items():
        print(f"files to touch for a {name}: {len(files)} (goal {GOALS[name]})")
    with tempfile.TemporaryDirectory() as folder:
        calls = calls_to_training(Path(folder))
    print(f"calls from taskvec run to a training step: {len(calls)}\n  " + "\n  ".join(calls))


if __name__ == "__main__":
    main()
