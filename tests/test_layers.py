"""Data flows one way: a wing imports only wings above it, and no module imports itself by a detour."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys

import pytest
from helpers.layers import FILES, REPOSITORY, ROOT, WINGS, arrows, backward


def test_the_root_holds_the_wings_and_nothing_else() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WINGS)


def test_a_wing_imports_only_wings_above_it() -> None:
    assert backward(arrows(FILES)) == []
    assert backward({"weights.flat": {"study.schema"}}) == ["weights.flat imports study.schema"]


def test_no_module_imports_itself_by_a_detour() -> None:
    graphlib.TopologicalSorter(arrows(FILES)).prepare()
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"data.tasks": {"data.index"}, "data.index": {"data.tasks"}}).prepare()


def test_a_package_imports_nothing_by_itself() -> None:
    packages = {name: path for name, path in FILES.items() if path.name == "__init__.py"}
    assert len(packages) > len(WINGS)
    assert {name: found for name, found in arrows(packages).items() if found} == {}


def test_no_test_imports_another() -> None:
    """What two tests need is in tests/helpers."""
    statement = re.compile(r"^\s*(?:from|import) ((?:test_|conftest)\w*)", re.MULTILINE)
    texts = {path.name: path.read_text("utf-8") for path in (REPOSITORY / "tests").rglob("*.py")}
    assert {name: modules for name, text in texts.items() if (modules := statement.findall(text))} == {}
    assert statement.findall("    import test_run\nfrom conftest import backbone") == ["test_run", "conftest"]


def test_reports_need_no_torch() -> None:
    modules = [name for name in FILES if name.startswith("report.") and not name.endswith("__main__")]
    lines = [*(f"import taskvec.{name}" for name in modules), "import sys", "print('torch' in sys.modules)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("file", ["README.md", "docs/architecture.md"])
def test_the_wings_are_shown_in_their_order(file: str) -> None:
    text = (REPOSITORY / file).read_text("utf-8")
    assert re.findall(r"^(?:  |\| `)(\w+)/", text, re.MULTILINE) == WINGS
