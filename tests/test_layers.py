"""Data flows one way: a wing imports only wings above it, and no module imports itself by a detour."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import taskvec

WINGS = """
core engine paper weights lab data encoders learning merging evaluation deploy study report command
""".split()  # noqa: SIM905
ROOT = Path(taskvec.__file__).parent
DOCS = Path(__file__).parent.parent


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in ROOT.rglob("*.py") if path.parent != ROOT}


def imported(text: str) -> set[str]:
    """Return the package's modules that a source imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("taskvec.") in FILES else base for name in names}
    return {name.removeprefix("taskvec.") for name in found if name.startswith("taskvec.")}


def arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    return {name: imported(path.read_text("utf-8")) for name, path in files.items()}


def backward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports of a wing that stands below."""
    place = {wing: index for index, wing in enumerate(WINGS)}

    def level(module: str) -> int:
        return place[module.partition(".")[0]]

    return [f"{name} imports {other}" for name in graph for other in graph[name] if level(other) > level(name)]


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
    texts = {path.name: path.read_text("utf-8") for path in (DOCS / "tests").rglob("*.py")}
    assert {name: modules for name, text in texts.items() if (modules := statement.findall(text))} == {}
    assert statement.findall("    import test_run\nfrom conftest import backbone") == ["test_run", "conftest"]


def test_reports_need_no_torch() -> None:
    modules = [name for name in FILES if name.startswith("report.") and not name.endswith("__main__")]
    lines = [*(f"import taskvec.{name}" for name in modules), "import sys", "print('torch' in sys.modules)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("file", ["README.md", "docs/architecture.md"])
def test_the_wings_are_shown_in_their_order(file: str) -> None:
    text = (DOCS / file).read_text("utf-8")
    assert re.findall(r"^(?:  |\| `)(\w+)/", text, re.MULTILINE) == WINGS
