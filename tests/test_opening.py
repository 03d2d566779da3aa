"""Kept encoders are opened without random weights and where they lie, and consecutive steps share them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import TinyEncoder
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing
from taskvec.encoders.backbone import Backbone
from taskvec.encoders.loaders import families, skeletons
from taskvec.encoders.loaders.skeletons import skeleton, unkept
from taskvec.encoders.records import read_backbone, restore, write_backbone
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.store import NOTES, RECORD, Store
from taskvec.study import artifacts
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights.flat import Weights, align, all_finite, attach, bind, open_saved, pack, read, save

LAB = {"family": "lab", "options": {"size": 32, "patch": 8, "width": 128, "depth": 4, "heads": 4}}
KINDS = [
    LAB,
    *(
        {"family": "timm", "options": {"name": name, "size": size}}
        for name, size in (
            ("test_vit", 32), ("test_vit2", 32), ("test_resnet", 64), ("test_convnext", 64), ("test_efficientnet", 64),
            ("test_nfnet", 64), ("levit_128s", 224), ("eva02_tiny_patch14_224", 28), ("xcit_nano_12_p16_224", 32),
        )
    ),
]  # fmt: skip


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return module.state_dict(keep_vars=True)


@pytest.mark.parametrize("architecture", KINDS, ids=lambda kind: kind["options"].get("name", "lab"))
def test_a_skeleton_with_weights_is_the_module_that_was_made_with_them(architecture: dict[str, Any]) -> None:
    made, hollow = families.build(architecture).eval(), families.build_hollow(architecture)
    assert hollow is not None
    assert all(parameter.is_meta for parameter in hollow.parameters())
    weights = pack(state_of(made))
    assert pack(state_of(hollow)).layout == weights.layout
    parameters = list(hollow.parameters())
    attach(hollow, weights)
    assert all(one is other for one, other in zip(parameters, hollow.parameters(), strict=True))
    for one, other in zip(unkept(made), unkept(hollow), strict=True):
        assert torch.equal(one, other)
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in hollow.parameters()]
    images = torch.randn(2, 3, *[architecture["options"]["size"]] * 2)
    with torch.inference_mode():
        assert torch.equal(made(images), hollow.eval()(images))


class Computing(nn.Module):
    """A module with everything that is computed when it is made."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.twin = nn.Linear(3, 3), nn.Linear(3, 3)
        self.twin.weight = self.linear.weight
        self.table = torch.arange(3) * 2.0
        self.register_buffer("mask", torch.empty(3, 3).fill_(-1).triu_(1), persistent=False)
        self.register_buffer("index", torch.arange(3).flip(0))
        self.scales = nn.Parameter(torch.linspace(0, 1, 3), requires_grad=False)
        if how == "random buffer":
            self.register_buffer("noise", torch.randn(3), persistent=False)
        if how == "random attribute":
            self.parts = [{"noise": torch.rand(3)}]
        if how == "value":
            self.size = int(torch.rand(3).argmax())


def test_what_is_computed_has_its_values_and_ties_stay() -> None:
    module = skeleton(lambda: Computing(""))
    assert module is not None
    whole, drawn = Computing(""), torch.random.get_rng_state()
    attach(module, pack(state_of(whole)))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert module.twin.weight is module.linear.weight
    assert not module.scales.requires_grad
    for name in ("table", "mask", "index", "scales"):
        assert torch.equal(getattr(module, name), getattr(whole, name))


@pytest.mark.parametrize("how", ["random buffer", "random attribute", "value"])
def test_a_module_that_keeps_what_it_draws_has_no_skeleton(how: str) -> None:
    assert skeleton(lambda: Computing(how)) is None


def test_an_architecture_without_a_skeleton_is_opened_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_backbone(lab(), tmp_path)
    images = pixels(3)
    before = read_backbone(tmp_path).features(images)
    monkeypatch.setattr(families, "skeleton", lambda make: None)
    assert torch.equal(read_backbone(tmp_path).features(images), before)


def lab() -> Backbone:
    from taskvec.encoders.backbone import load_backbone

    return load_backbone("lab:random", device="cpu")


def pixels(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def no_pass(*_: object) -> int:
    raise AssertionError("a forward pass was made")


def test_opening_makes_no_random_weights_and_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, images = lab(), pixels(3)
    write_backbone(backbone, tmp_path)
    monkeypatch.setattr("taskvec.encoders.backbone.feature_width", no_pass)
    monkeypatch.setattr("taskvec.encoders.records.build", no_pass)
    opened = read_backbone(tmp_path)
    assert opened.width == backbone.width
    assert torch.equal(opened.features(images), backbone.features(images))
    assert torch.equal(copy.deepcopy(opened).features(images), backbone.features(images))


# ---------------------------------------------------------------- files in the order of their layout


def lies_in(weights: Weights, path: Path) -> bool:
    """Say whether a buffer is memory that the system maps from a file."""
    place = weights.flat.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.partition(" ")[0].partition("-")
        if int(start, 16) <= place < int(end, 16):
            return line.endswith(str(path.resolve()))
    return False


def odd() -> Weights:
    """Return weights whose names are not in the order of the alphabet, with all that is carried beside them."""
    state = {"z": torch.randn(3, 5), "many": torch.arange(3), "a": torch.randn(7), "flag": torch.tensor([True])}
    return pack({**state, "few": torch.tensor([1, 2], dtype=torch.int32), "none": torch.empty(0, 4)})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system")
def test_what_was_saved_is_opened_where_it_lies_and_never_written_to(tmp_path: Path) -> None:
    weights, path = odd(), tmp_path / "w.safetensors"
    save(weights, path, {"about": "it"})
    before = path.read_bytes()
    opened = open_saved(path, weights)
    assert lies_in(opened, path)
    assert not lies_in(align(read(path), weights, "it"), path)
    assert all(torch.equal(value, opened.state()[name]) for name, value in weights.state().items())
    assert {name: t.dtype for name, t in opened.carried.items()} == {n: t.dtype for n, t in weights.carried.items()}
    opened.flat.zero_()
    opened.carried["many"].zero_()
    assert path.read_bytes() == before
    replaced = open_saved(path, weights)
    path.unlink()
    assert torch.equal(replaced.flat, weights.flat)


def test_other_programs_read_what_was_saved(tmp_path: Path) -> None:
    weights, path = odd(), tmp_path / "w.safetensors"
    save(weights, path, {"about": "it"})
    assert {n: t.tolist() for n, t in load_file(path).items()} == {n: t.tolist() for n, t in weights.state().items()}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"about": "it"}


def test_a_file_in_another_order_is_read_and_checked(tmp_path: Path) -> None:
    weights, path = odd(), tmp_path / "w.safetensors"
    save_file({name: tensor.clone() for name, tensor in weights.state().items()}, path)
    opened = open_saved(path, weights)
    assert torch.equal(opened.flat, weights.flat)
    weights.flat[4] = torch.inf
    save_file({name: tensor.clone() for name, tensor in weights.state().items()}, path)
    with pytest.raises(TaskvecError, match="tensor 'z' holds NaN or infinity"):
        open_saved(path, weights)


def test_tied_entries_are_saved_under_all_their_names(tmp_path: Path) -> None:
    weights = bind(TinyEncoder())
    save(weights, tmp_path / "w.safetensors")
    assert torch.equal(open_saved(tmp_path / "w.safetensors", weights).flat, weights.flat)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    weights = odd()
    weights.flat[-1] = value
    with pytest.raises(TaskvecError, match="the weights to be written: tensor 'a' holds NaN or infinity"):
        save(weights, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((10,), 3e38))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))
    assert not all_finite(torch.tensor([1, torch.nan, 2]))


@pytest.mark.parametrize(
    ("change", "told"),
    [("name", "is missing a; has unexpected b"), ("shape", "has another shape for a"), ("type", "of type torch.int64")],
)
def test_a_kept_file_of_another_encoder_is_refused(tmp_path: Path, change: str, told: str) -> None:
    path, like = tmp_path / "w.safetensors", pack({"a": torch.randn(4), "n": torch.tensor(1)})
    other = {
        "name": {"b": torch.randn(4), "n": torch.tensor(1)},
        "shape": {"a": torch.randn(2, 2), "n": torch.tensor(1)},
        "type": {"a": torch.arange(4), "n": torch.tensor(1)},
    }[change]
    save(pack(other), path)
    with pytest.raises(TaskvecError, match=told):
        open_saved(path, like)


def test_a_kept_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    weights, path = odd(), tmp_path / "w.safetensors"
    save(weights, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TaskvecError, match="cannot be read as safetensors"):
        open_saved(path, weights)


def test_a_users_encoder_is_copied_and_checked(tmp_path: Path) -> None:
    backbone = lab()
    write_backbone(backbone, tmp_path)
    about, path = tmp_path / "backbone.json", tmp_path / "encoder.safetensors"
    opened = restore(about, path, "cpu", "mine")
    path.write_bytes(b"")  # as an editor or cp does, in place
    assert torch.equal(opened.pretrained.flat, backbone.pretrained.flat)
    backbone.pretrained.flat[3] = torch.nan
    save_file({name: tensor.clone() for name, tensor in backbone.pretrained.state().items()}, path)
    with pytest.raises(TaskvecError, match="holds NaN or infinity"):
        restore(about, path, "cpu", "mine")


# ---------------------------------------------------------------- shared by steps


STUDY = """
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two"]
finetune: {steps: 2, batch_size: 4, warmup: 0, learning_rate: 0.01}
probe: {steps: 3, batch_size: 4, warmup: 0, learning_rates: [0.01]}
device: cpu
precision: float32
limit: 4
regimes: [{name: linearised, disentanglement: false}, {name: full, disentanglement: false}]
methods: [{name: task_arithmetic, scales: [0, 1]}]
heads: [kept]
"""


def contents(folder: Path, store: Store) -> dict[str, dict[str, bytes]]:
    """Run the study and return every file that its steps wrote, by the step's label."""
    text = f"name: shared\n{STUDY}"
    steps = [step for one in plan(StudyFile(parse_study(text, "shared"), text, folder), store) for step in one.steps()]
    done = pipeline.run(steps, store, open_executor(1), Quiet())
    written = {step.label: [path for path in done[step].folder.iterdir() if path.is_file()] for step in steps}
    names = (RECORD, NOTES)
    return {label: {p.name: p.read_bytes() for p in paths if p.name not in names} for label, paths in written.items()}


def test_a_study_whose_steps_share_what_they_open_has_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_folder_task(tmp_path / name, train=12)
    opened: list[Path] = []
    reading = artifacts.records.read_backbone
    monkeypatch.setattr(artifacts.records, "read_backbone", lambda f, *how: opened.append(f) or reading(f, *how))
    artifacts.close()
    shared = contents(tmp_path, Store(tmp_path / "shared"))
    assert len(opened) == 1
    for name in ("BACKBONES", "TASKS"):
        monkeypatch.setattr(artifacts, name, artifacts.Shared(0))
    alone = contents(tmp_path, Store(tmp_path / "alone"))
    assert len(opened) > 5
    assert shared == alone


def test_what_is_shared_is_the_last_that_was_opened_and_dropped_before_the_next() -> None:
    shared, alive = artifacts.Shared[list[int]](2), []
    for key in (1, 2, 1, 3, 1, 2):
        shared.get(key, lambda key=key: alive.append((key, len(shared.entries))) or [key])
    assert alive == [(1, 0), (2, 1), (3, 1), (2, 1)]
    assert list(shared.entries) == [1, 2]


def test_an_artifact_that_was_made_again_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    artifacts.close()
    config = artifacts.OnDevice(backbone_name="lab")
    flats = []
    for seed in (1, 2):
        folder.mkdir()
        backbone = lab()
        backbone.pretrained.flat.mul_(seed)
        write_backbone(backbone, folder)
        flats.append(artifacts.open_backbone({"backbone": folder}, config).pretrained.flat.clone())
        folder.rename(tmp_path / f"gone{seed}")
    assert torch.equal(2 * flats[0], flats[1])
    with pytest.raises(FileNotFoundError):
        artifacts.open_backbone({"backbone": folder}, config)
    artifacts.close()


def test_regimes_share_the_module_and_not_what_they_are_told(tmp_path: Path) -> None:
    write_backbone(lab(), tmp_path)
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / artifacts.PRECISION).write_text(json.dumps({"precision": "tf32"}))
    told = {"backbone": tmp_path, "precision": tmp_path / "precision"}
    plain = artifacts.open_backbone({"backbone": tmp_path}, artifacts.OnDevice(backbone_name="a"))
    linear = artifacts.open_backbone(told, artifacts.OnDevice(backbone_name="b", linearised=True))
    assert linear.module is plain.module
    assert linear.lock is plain.lock
    assert (plain.name, plain.precision, plain.base) == ("a", "float32", None)
    assert (linear.name, linear.precision, linear.base) == ("b", "tf32", linear.pretrained)
    artifacts.close()


def test_a_skeleton_is_made_in_one_thread_and_not_in_others() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with skeletons.Uninitialised(), ThreadPoolExecutor(1) as pool:
        assert torch.rand(2).is_meta
        assert not pool.submit(torch.rand, 2).result().is_meta


def test_an_encoder_that_a_file_cannot_fill_is_refused_without_its_memory(tmp_path: Path) -> None:
    write_backbone(lab(), tmp_path)
    record = json.loads((tmp_path / "backbone.json").read_text())
    record["architecture"] = {"family": "timm", "options": {"name": "vit_giant_patch14_224", "size": 224}}
    record["preprocessing"]["size"] = 224
    (tmp_path / "backbone.json").write_text(json.dumps(record))
    with pytest.raises(TaskvecError, match="asks for [0-9]+ weights, and its files have"):
        read_backbone(tmp_path)
    assert Preprocessing(**record["preprocessing"]).size == 224
