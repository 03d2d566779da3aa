"""A step whose output changes has another version: what every kind of step writes, against numbers kept beside this.

``python tests/test_golden.py --write`` runs the studies and writes the numbers anew.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from helpers.timm_files import prepare
from safetensors.numpy import load_file

from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import STEP_TYPES, Config, Step
from taskvec.engine.store import NOTES, RECORD, Artifact, Store
from taskvec.merging.registry import METHODS
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.study.steps.loading import PrecisionConfig, choose_precision, compare_precisions

GOLDEN = Path(__file__).with_suffix(".json").with_stem("golden")
PACKAGES = ("torch", "timm", "numpy", "pillow", "matplotlib")
SHORT = """
probe: {steps: 3, batch_size: 4, warmup: 0, learning_rates: [0.01, 0.1], rate_per_task: true}
surgery: {steps: 2}
device: cpu
precision: float32
limit: 12
"""
STUDIES = {
    "regimes": """
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two"]
regimes:
- aligned
- joint
- {name: full, disentanglement: false}
- {name: linearised, disentanglement: false}
- {name: lora, disentanglement: false}
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept]
heatmap: {pairs: 1, points: 3, range: 1, samples: 4}
lora: {rank: 2}
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rate: 0.01}
""",
    "heads": """
backbones: ["lab:contrastive"]
tasks: ["lab:greek"]
regimes: [open]
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept, reprobed, surgery]
agreement: 4
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rate: 0.01}
""",
    "methods": """
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two", "lab:ink"]
methods:
- {name: task_arithmetic, scales: [0, 1]}
- {name: dare+ties, scales: [0, 1], config: {keep: [0.3, 0.9]}}
- {name: emr, scales: [0, 1]}
- {name: fisher, scales: [0, 1]}
heads: [kept]
scales: per-task
subsets: {sizes: [2], limit: 1, samples: 4, points: 2}
heatmap: {pairs: 1, points: 3, range: 1, samples: 4}
negation: {forget: one, control: ink, scales: "0:1:0.5"}
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rate: 0.01}
""",
    "racing": """
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two"]
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept]
search: racing
heatmap: {pairs: 0}
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rate: 0.01}
""",
    "convolutions": """
backbones: [{address: "timm:test_resnet@pre.safetensors", size: 32, batch_norm: reestimated}]
tasks: [{address: "folder:one", finetuned: tuned.safetensors}, "folder:two"]
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept]
heatmap: {pairs: 1, points: 3, range: 1, samples: 4}
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rates: [0.001, 0.01]}
""",
}
Outputs = dict[str, dict[str, Any]]


def run(folder: Path, name: str) -> Iterable[Artifact]:
    """Run a study, and return what its steps wrote."""
    text = f"name: {name}" + STUDIES[name] + SHORT
    file, store = StudyFile(parse_study(text, name), text, folder), Store(folder / "store")
    steps = pipeline.ordered(step for experiment in plan(file, store) for step in experiment.steps())
    return pipeline.run([*steps, choice_of_precision(steps)], store, open_executor(1), Quiet()).values()


def choice_of_precision(steps: list[Step]) -> Step:
    """Return the step that a study has on a GPU only, here on the CPU, where TF32 is float32."""
    encoder = next(step for step in steps if step.type.name == "load_backbone")
    tasks = [step for step in steps if step.type.name == "decode_task"]
    config = PrecisionConfig(wanted="tf32", scales=(0.0, 0.05), device="cpu")
    comparison = Step("compare", compare_precisions, config, {"backbone": encoder, "tasks": tasks})
    return Step("choose", choose_precision, Config(), {"comparison": comparison})


def outputs(folder: Path) -> Outputs:
    """Return by kind of step its version, and every file that its steps wrote in a few numbers."""
    write_folder_task(folder / "one", train=12)
    write_folder_task(folder / "two", ("red", "blue"), train=15, test=6)
    prepare(folder, "test_resnet")
    artifacts = {artifact.id: artifact for name in STUDIES for artifact in run(folder, name)}
    kinds: Outputs = {}
    for artifact in artifacts.values():
        about = artifact.json(RECORD)["about"]
        kind = kinds.setdefault(about["step"], {"version": about["version"], "wrote": []})
        kind["wrote"].append(summary(artifact.folder))
    return kinds


def summary(folder: Path) -> dict[str, Any]:
    """Return all files of an artifact by name, each in a few numbers."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, NOTES))
    return {path.relative_to(folder).as_posix(): content(path) for path in files}


def content(path: Path) -> Any:
    """Return numbers and shapes of a file; of one that is neither data nor arrays, nothing."""
    if path.suffix == ".json":
        return rounded(json.loads(path.read_text("utf-8")))
    if path.suffix == ".npy":
        return array(np.load(path))
    if path.suffix not in (".npz", ".safetensors"):
        return None
    arrays = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    norm = math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in arrays.values()))
    kept = {name: array(arrays[name]) for name in sorted(arrays)[:4]}
    return {"count": len(arrays), "norm": rounded(norm), "first": kept}


def array(value: np.ndarray) -> list[Any]:
    """Return type, shape and Euclidean norm."""
    norm = np.linalg.norm(value.astype(np.float64)) if value.dtype.kind in "biuf" else 0.0
    return [value.dtype.name, list(value.shape), rounded(float(norm))]


def rounded(value: Any) -> Any:
    """Return data with 4 digits of every number, and no text that differs between machines and releases."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items() if key not in ("packages", "versions", "bytes")}
    if isinstance(value, list):
        return [rounded(item) for item in value[:12]]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if not isinstance(value, str) or re.fullmatch(r"[A-Za-z_ +-]*", value) else "text"


def close(one: Any, two: Any) -> bool:
    """Whether two summaries are the same but for the last bits of sums."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(one, float) or isinstance(two, float):
        return isinstance(one, float | int) and math.isclose(one, two, rel_tol=2e-3, abs_tol=1e-5)
    return bool(one == two)


def unmatched(wrote: list[Any], golden: list[Any]) -> Iterator[Any]:
    """Yield what was written now and is none of the golden ones; the order of steps does not count."""
    left = list(golden)
    for one in wrote:
        place = next((place for place, other in enumerate(left) if close(one, other)), None)
        if place is None:
            yield one
        else:
            left.pop(place)


def complaint(name: str, now: dict[str, Any], golden: dict[str, Any], packages: dict[str, str]) -> str:
    """Say what to do about a kind of step that writes other things than its golden ones; empty if it does not."""
    changed = list(unmatched(now["wrote"], golden["wrote"]))
    count = len(now["wrote"]) - len(golden["wrote"])
    if now["version"] != golden["version"]:
        return f"{name}: version {now['version']}, was {golden['version']}: python tests/test_golden.py --write"
    if not changed and not count:
        return ""
    other = {package: version(package) for package, was in packages.items() if version(package) != was}
    return (
        f"{name} writes other things than before, and its version is still {now['version']}: raise the version that "
        "stands beside its function and run python tests/test_golden.py --write, or mend the change. "
        f"{len(changed)} of {len(now['wrote'])} outputs differ ({count:+} in number), first {json.dumps(changed[:1])}"
        + (f"; installed packages differ too: {other}" if other else "")
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return outputs(tmp_path_factory.mktemp("golden"))


def own_kinds() -> set[str]:
    """Return the kinds of step that the package itself has."""
    return {name for name, kind in STEP_TYPES.items() if kind.function.__module__.startswith("taskvec.study.steps.")}


def test_every_kind_of_step_is_run(measured: Outputs) -> None:
    assert set(measured) == own_kinds()


def test_a_step_whose_output_changes_has_another_version(measured: Outputs) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert set(golden["steps"]) == set(measured), "python tests/test_golden.py --write"
    told = (complaint(name, measured[name], golden["steps"][name], golden["packages"]) for name in measured)
    assert not [line for line in told if line]


def defaults() -> dict[str, Any]:
    """Return what steps and merging methods take where they are not told: no fingerprint holds these values."""
    steps = {name: STEP_TYPES[name].config.model_fields for name in sorted(own_kinds())}
    methods = {name: METHODS[name].config.model_fields for name in sorted(METHODS)}
    found = {
        name: {key: field.default for key, field in sorted(fields.items()) if not field.is_required()}
        for name, fields in (steps | methods).items()
    }
    return json.loads(json.dumps({name: values for name, values in found.items() if values}, default=str))


def test_a_default_that_changes_has_another_version() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    changed = [name for name, values in defaults().items() if values != golden["defaults"].get(name)]
    assert changed == [], (
        "raise the version of the step (of merge for a method), then python tests/test_golden.py --write"
    )


def test_a_changed_output_is_noticed_and_last_bits_are_not() -> None:
    golden = {"version": 1, "wrote": [{"a.json": {"x": 0.5}}, {"a.json": {"x": 0.25}}]}
    same = {"version": 1, "wrote": [{"a.json": {"x": 0.2500001}}, {"a.json": {"x": 0.5}}]}
    assert complaint("probe", same, golden, {}) == ""
    other = {"version": 1, "wrote": [{"a.json": {"x": 0.5}}, {"a.json": {"x": 0.26}}]}
    assert "raise the version" in complaint("probe", other, golden, {})
    assert "--write" in complaint("probe", other | {"version": 2}, golden, {})
    assert "raise the version" in complaint("probe", {"version": 1, "wrote": []}, golden, {})


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    with tempfile.TemporaryDirectory() as scratch:
        steps = outputs(Path(scratch))
    lines = ",\n".join(f'"{name}": {json.dumps(steps[name], sort_keys=True)}' for name in sorted(steps))
    packages = json.dumps({name: version(name) for name in sorted(PACKAGES)})
    values = json.dumps(defaults(), sort_keys=True)
    text = f'{{"packages": {packages},\n"defaults": {values},\n"steps": {{\n{lines}\n}}}}\n'
    GOLDEN.write_text(text, "utf-8")
