"""Which module of the package imports which, read from its sources."""

from __future__ import annotations

import ast
from pathlib import Path

import taskvec

WINGS = """
core engine paper weights lab data encoders learning merging evaluation deploy study report command
""".split()  # noqa: SIM905
ROOT = Path(taskvec.__file__).parent
REPOSITORY = Path(__file__).parent.parent.parent


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
