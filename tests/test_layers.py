"""Data flows one way: a module imports only modules above it (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import taskvec

ORDER = """
errors notes locks formats addresses keys compute settings store publishing network files weights shards pipeline
executors images training kinds
papertasks listing decoded folders hub torch_sets layouts
lab lab.glyphs lab.looks lab.scenes lab.textures lab.worlds lab.corpus lab.vit lab.encoders
lab.objective lab.supervised lab.masked lab.distillation lab.contrastive lab.pretrain
templates tasks loaders.checkpoints loaders.hub loaders.requests loaders.lab
loaders.timm loaders.open_clip loaders.processors loaders.saved loaders.transformers loaders
tangents backbones batch_norm heads surgery brought vectors agreement adapters finetuning
merging.parts merging.ranks merging.averaging merging.sparsity merging.directions merging.spectral merging.adaptive
merging.measuring merging.recipes merging merging.plugins merging.buffers matching merging.streaming differences
evaluation search arithmetic disentangling model opening
steps.loading steps.learning steps.merging steps.measuring steps paper study study_files cells absent sources
plan.planner plan.loading plan.learning plan.merging plan.measuring plan anatomy workload forecast
results costs views texts evidence verdict comparison claims leaderboard tables
figures.style figures.curves figures.dots figures.maps figures.counts figures.emergence figures.differences
figures.costs figures figures.__main__ page
runs progress file_commands studies cli __main__
""".split()  # noqa: SIM905
ROOT = Path(taskvec.__file__).parent
EXEMPT = {"", "__init__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Return the package's modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names}
    return {name.removeprefix("taskvec").lstrip(".") for name in found if name.split(".")[0] == "taskvec"}


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split(".")[1:])
    return name.startswith("taskvec.") and (place.with_suffix(".py").exists() or (place / "__init__.py").exists())


def violations(files: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in files.items()
        for other in others
        if other == "" or ORDER.index(other) >= ORDER.index(name)
    ]


def test_every_module_imports_only_modules_above_it() -> None:
    files = {module_name(path): imported(path) for path in ROOT.rglob("*.py")}
    files = {name: others for name, others in files.items() if name not in EXEMPT}
    assert set(files) == set(ORDER)
    assert violations(files) == []


def test_the_check_sees_an_import_of_a_lower_module() -> None:
    assert violations({"weights": {"study"}}) == ["weights imports study"]


def test_reports_need_no_torch() -> None:
    reports = ORDER[ORDER.index("views") : ORDER.index("page") + 1]
    for name in (*reports, "study", "results", "progress"):
        place = ROOT.joinpath(*name.split("."))
        source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text("utf-8")
        names = {
            n.name.split(".")[0] for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Import) for n in x.names
        }
        assert "torch" not in names


def test_the_documented_order_is_the_tested_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text("utf-8")
    assert text.rsplit("```", 2)[1].split() == ORDER
