"""What a step is kept under: change a thing, and what is run again is exactly what it can change."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task

from taskvec.core import compute
from taskvec.engine import pipeline
from taskvec.engine.executors import Inline
from taskvec.engine.pipeline import Step, StepType
from taskvec.engine.store import Store
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights.flat import save_tensors

STUDY = """
name: small
backbones: [{{address: "{address}", size: 32, name: {name}}}]
tasks: ["folder:{root}/one", "{task}"]
methods: [{{name: task_arithmetic, scales: [0, 1]}}, {{name: ties, scales: [0, 1]}}]
heatmap: {{pairs: 1, points: 3, range: 1, samples: 4}}
probe: {{steps: 2, learning_rates: [0.01, 0.1]}}
finetune: {{steps: 2, batch_size: 4}}
threads: {threads}
device: {device}
limit: 12
"""
DECODING = {"decode_task", "decode_training"}
DISENTANGLEMENT = {"single_task_predictions", "heatmap", "heatmap_errors"}
MERGING = {"merge", "kept_curve", "reprobed_curve", "test_task", "heatmap", "single_task_predictions"}
TRAINING = {"features", "probe_task", "finetune"} | MERGING
"""Steps whose sums depend on threads and torch; the others decode, choose among numbers, or add vectors."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identity")
    write_folder_task(root / "one")
    return root


def planned(root: Path, estimate: bool = False, **change: str) -> list[Step]:
    """Return all steps of the study with a change."""
    how = {"address": "lab:random", "task": "lab:greek", "name": "net", "threads": "1", "device": "cpu"} | change
    text = STUDY.format(root=root, **how)
    cells = plan(StudyFile(parse_study(text, "small"), text, root), Store(root / "store"), estimate)
    return pipeline.ordered(step for cell in cells for step in cell.steps())


def identities(steps: list[Step]) -> list[tuple[str, str]]:
    """Return the kind of every step, and its identity but for the content that it reads."""
    return [(step.type.name, pipeline.step_id(step, {})) for step in steps]


def differing(before: list[tuple[str, str]], after: list[tuple[str, str]]) -> set[str]:
    """Name the kinds of step whose identity differs."""
    return {kind for (kind, old), (_, new) in zip(before, after, strict=True) if old != new}


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Pretend that other versions of some packages are installed."""
    true = pipeline.version
    monkeypatch.setattr(pipeline, "version", lambda name: "0.0" if name in packages else true(name))


@pytest.mark.parametrize(
    ("package", "kinds"),
    [
        ("torch", TRAINING | DECODING | {"load_backbone", "build_model"}),  # it draws splits
        ("numpy", DECODING | {"finetune", "merge", "gains"} | DISENTANGLEMENT),  # random orders, bootstrap
        ("pillow", DECODING),
        ("matplotlib", {"decode_task"}),  # its fonts, which the lab draws
        ("scikit-learn", set()),
        ("safetensors", set()),
        ("timm", set()),
    ],
)
def test_a_package_counts_in_the_steps_that_compute_with_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, package: str, kinds: set[str]
) -> None:
    before = identities(planned(root))
    install(monkeypatch, package)
    assert differing(before, identities(planned(root))) == kinds


def test_fonts_do_not_count_for_photographs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder_task(root / "two")
    before = identities(planned(root, task="folder:two"))
    install(monkeypatch, "matplotlib", "scikit-learn")
    assert differing(before, identities(planned(root, task="folder:two"))) == set()


def test_the_library_of_an_encoder_counts_where_it_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "timm:test_vit@encoder.safetensors"
    save_tensors(timm.create_model("test_vit").state_dict(), root / "encoder.safetensors")
    before = identities(planned(root, address=address))
    install(monkeypatch, "timm")
    steps = planned(root, address=address)
    assert differing(before, identities(steps)) == {"load_backbone"}
    done = pipeline.run(steps[:1], Store(root / "store"), Inline(), Quiet())
    assert done[steps[0]].json("backbone.json")["packages"] == {"timm": "0.0"}  # what all that reads the encoder sees


def test_a_patch_release_of_python_counts_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identities(planned(root))
    monkeypatch.setattr(pipeline.platform, "python_version", lambda: "3.99.9")
    assert differing(before, identities(planned(root))) == set()


def test_threads_count_where_sums_are_made(root: Path) -> None:
    assert differing(identities(planned(root)), identities(planned(root, threads="2"))) == TRAINING


def test_threads_do_not_count_on_a_gpu_but_for_a_merge_that_measures_nothing(root: Path) -> None:
    one, two = (identities(planned(root, True, device="cuda", threads=count)) for count in "12")
    assert differing(one, two) == {"merge"}


def test_a_probe_counts_the_device_that_is_no_cpu(root: Path) -> None:
    on_cpu, on_gpu = (
        [s for s in planned(root, True, device=d) if s.type.name == "probe_task"] for d in ("cpu", "cuda")
    )
    assert all("device" not in step.config.tracked() for step in on_cpu)
    assert {step.config.tracked()["device"] for step in on_gpu} == {"cuda"}


def test_which_gpu_of_several_counts_nowhere(root: Path) -> None:
    one, two = (planned(root, True, device=f"cuda:{index}") for index in (0, 1))
    assert differing(identities(one), identities(two)) == set()
    assert {device for step in two if (device := getattr(step.config, "device", ""))} == {
        "cuda"
    }  # the only one it sees


@pytest.mark.parametrize(("device", "kinds"), [("cpu", {"finetune"}), ("cuda", set())])
def test_the_tiles_of_a_cpu_count_where_it_trains(
    root: Path, monkeypatch: pytest.MonkeyPatch, device: str, kinds: set[str]
) -> None:
    found = []
    for tiles in (True, False):
        monkeypatch.setattr(compute, "has_tiles", lambda tiles=tiles: tiles)
        found.append(identities(planned(root, True, device=device)))
    assert differing(*found) == kinds


def test_a_display_name_counts_in_the_model_that_tells_it(root: Path) -> None:
    assert differing(identities(planned(root)), identities(planned(root, name="other"))) == {"build_model"}


def test_a_label_names_one_step(root: Path) -> None:
    text = STUDY.format(root=root, address="lab:random", task="lab:greek", name="net", threads=1, device="cpu")
    text += "heads: [kept, reprobed, surgery]\nscales: per-task\n"
    cells = plan(StudyFile(parse_study(text, "small"), text, root), Store(root / "store"))
    steps = pipeline.ordered(step for cell in cells for step in cell.steps())
    assert len({step.label for step in steps}) == len(steps)


def test_a_pure_move_of_code_counts_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identities(planned(root))
    monkeypatch.setattr(StepType, "place", property(lambda kind: f"elsewhere:{kind.name}"))
    assert differing(before, identities(planned(root))) == set()


def test_what_is_run_again_is_what_counts_and_what_reads_other_content(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(**change: str) -> set[str]:
        watcher, steps = Quiet(), planned(root, **change)
        kinds = {step.label: step.type.name for step in steps}
        pipeline.run(steps, Store(root / "store"), Inline(), watcher)
        return {kinds[label] for label in watcher.ran}

    assert ran()
    assert ran() == set()
    assert ran(name="other") == {"build_model"}
    install(monkeypatch, "pillow")
    assert ran() == DECODING  # the images come out the same, and what reads them stays
