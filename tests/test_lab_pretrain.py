"""The lab's encoder and its pre-training: shapes, reproducible bytes, and the shipped files."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from taskvec.command.cli import app
from taskvec.core.compute import seeded
from taskvec.core.errors import TaskvecError
from taskvec.core.training import Group, Schedule, train
from taskvec.lab import encoders
from taskvec.lab.drawing import worlds
from taskvec.lab.drawing.looks import stream
from taskvec.lab.pretraining import objective, pretrain
from taskvec.lab.pretraining.corpus import draw_pretraining, pretraining_code_points
from taskvec.lab.pretraining.supervised import SMOOTHING, Supervised
from taskvec.lab.vit import VisionTransformer, sine_positions

SHIPPED = encoders.pretrained()
LARGEST_PACKAGE = 25e6
"""Bytes of all weights together at most."""


class Killed(Exception):
    """Ends a run as a signal would."""


def test_encoder_shapes() -> None:
    encoder = VisionTransformer()
    images = torch.rand(2, 3, 32, 32)
    assert encoder(images).shape == (2, 128)
    assert encoder.tokens(images).shape == (2, 16, 128)
    torch.testing.assert_close(encoder(images), encoder.tokens(images).mean(1))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 875648
    assert not any("positions" in key for key in encoder.state_dict())


def test_other_architectures_and_grids() -> None:
    encoder = VisionTransformer(size=24, patch=4, width=16, depth=2, heads=2)
    assert encoder(torch.rand(1, 3, 24, 24)).shape == (1, 16)
    assert encoder.tokens(torch.rand(1, 3, 16, 8)).shape == (1, 8, 16)
    assert VisionTransformer(**encoder.architecture).state_dict().keys() == encoder.state_dict().keys()
    with pytest.raises(ValueError, match="must divide"):
        VisionTransformer(size=30)


def test_positions_of_a_finer_grid_cover_the_same_square() -> None:
    coarse, fine = sine_positions(2, 2, 16, 4), sine_positions(6, 6, 16, 4)
    assert fine.shape == (36, 16)
    torch.testing.assert_close(fine.view(6, 6, 16)[1::3, 1::3].reshape(4, 16), coarse)
    assert len({tuple(row.tolist()) for row in fine}) == 36


def test_patches_are_cut_row_by_row() -> None:
    encoder = VisionTransformer(size=4, patch=2, width=4, depth=1, heads=1)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    patches = encoder.patches(image)
    assert patches.shape == (1, 4, 12)
    torch.testing.assert_close(patches[0, 1].view(3, 2, 2), image[0, :, :2, 2:])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the figures on few images, and write a checkpoint every other step."""
    monkeypatch.setattr(objective, "HELD_OUT", 64)
    monkeypatch.setattr(pretrain, "EVERY", 2)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", pretrain.PRETRAININGS)
def test_a_run_that_was_killed_continues_and_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    def kill(share: float) -> None:
        if share == 3 / 4:
            raise Killed

    shares: list[float] = []
    whole = pretrain.pretrain(name, tmp_path / "a", steps=4)
    with pytest.raises(Killed):
        pretrain.pretrain(name, tmp_path / "b", steps=4, progress=kill)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [f".{name}.checkpoint"]
    torch.manual_seed(5)
    resumed = pretrain.pretrain(name, tmp_path / "b", steps=4, progress=shares.append)
    assert shares == [3 / 4, 1.0]
    made = sorted(path.name for path in whole.parent.iterdir())
    assert made == sorted(path.name for path in resumed.parent.iterdir())
    for file in made:
        if not file.endswith(".json"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    known, again = (json.loads(path.with_suffix(".json").read_text()) for path in (whole, resumed))
    assert known | {"seconds": 0} == again | {"seconds": 0}
    assert known["sha256"] == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert known["command"] == f"taskvec lab pretrain {name} --steps 4 --seed 0"
    assert math.isfinite(known["figures"]["final_loss"])


@pytest.mark.usefixtures("quick")
def test_the_seed_matters_and_a_checkpoint_of_another_run_does_not(tmp_path: Path) -> None:
    def kill(share: float) -> None:
        if share == 2 / 3:
            raise Killed

    first = pretrain.pretrain("supervised", tmp_path / "a", steps=3)
    with pytest.raises(Killed):
        pretrain.pretrain("supervised", tmp_path / "b", steps=3, seed=1, progress=kill)
    again = pretrain.pretrain("supervised", tmp_path / "b", steps=3)
    assert first.read_bytes() == again.read_bytes()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".supervised.checkpoint").write_bytes(b"cut off")
    other = pretrain.pretrain("supervised", tmp_path / "c", steps=3, seed=1)
    assert first.read_bytes() != other.read_bytes()


def test_the_recipe_is_the_plain_loop() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = VisionTransformer()
        head = torch.nn.Linear(128, len(pretraining_code_points()))
    generator = stream("supervised", "train", 0)

    def loss(step: int) -> torch.Tensor:
        images, labels = draw_pretraining(64, min(1.0, step / (0.6 * 7000)), generator)
        return torch.nn.functional.cross_entropy(head(encoder(images / 127.5 - 1)), labels, label_smoothing=SMOOTHING)

    groups = [Group([*encoder.parameters(), *head.parameters()], 1.5e-3)]
    train(groups, loss, range(2), Schedule(7000, warmup=350, weight_decay=0.05), steps=range(2))
    snapshot = pretrain.snapshot("supervised", 2)
    for mine, theirs in zip(encoder.parameters(), snapshot.parameters(), strict=True):
        torch.testing.assert_close(mine.half().float(), theirs, rtol=0, atol=1e-4)


def test_the_snapshot_at_step_0_is_the_random_start() -> None:
    start = Supervised(10, 0).encoder
    for mine, theirs in zip(start.parameters(), pretrain.snapshot("supervised", 0).parameters(), strict=True):
        assert torch.equal(mine.half().float(), theirs)
    with pytest.raises(TaskvecError, match="'supervised' has no step 7001"):
        pretrain.snapshot("supervised", 7001)


def test_few_classes_are_among_all() -> None:
    few = pretraining_code_points(few=True)
    assert len(few) == 130
    assert set(few) < set(pretraining_code_points())
    _, labels = draw_pretraining(2000, 0.0, stream("few"), few=True)
    assert labels.max() == 129


@pytest.mark.usefixtures("quick")
def test_what_is_made_already_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pretrain.pretrain("supervised", tmp_path, steps=1)
    assert pretrain.is_made("supervised", tmp_path, steps=1)
    assert not pretrain.is_made("supervised", tmp_path)
    assert not pretrain.is_made("supervised", tmp_path, steps=1, seed=1)
    assert not pretrain.is_made("contrastive", tmp_path)
    recipe = pretrain.PRETRAININGS["supervised"]
    with monkeypatch.context() as patch:  # the same command by another recipe makes another encoder
        patch.setattr(pretrain, "PRETRAININGS", {"supervised": replace(recipe, version=recipe.version + 1)})
        assert not pretrain.is_made("supervised", tmp_path, steps=1)
    path.write_bytes(path.read_bytes()[:-1])
    assert not pretrain.is_made("supervised", tmp_path, steps=1)


@pytest.mark.usefixtures("quick")
def test_other_files_of_an_encoders_name_are_kept(tmp_path: Path) -> None:
    place = tmp_path / "supervised.safetensors"
    place.write_text("mine")
    assert pretrain.pretrain("supervised", tmp_path, steps=1) == place
    assert (tmp_path / "changed" / "supervised.safetensors").read_text() == "mine"
    first = place.read_bytes()
    pretrain.pretrain("supervised", tmp_path, steps=1, seed=1)
    assert pretrain.is_made("supervised", tmp_path, steps=1, seed=1)
    assert (tmp_path / "changed" / "supervised-2.safetensors").read_bytes() == first
    place.unlink()
    place.mkdir()
    with pytest.raises(TaskvecError, match="supervised.safetensors' was not written by this command"):
        pretrain.pretrain("supervised", tmp_path, steps=1)
    with pytest.raises(TaskvecError, match="is no folder"):
        pretrain.pretrain("supervised", tmp_path / "supervised.json", steps=1)


@pytest.mark.usefixtures("quick")
def test_the_command_makes_what_a_folder_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "DESCRIPTIONS", {"supervised": "", "random": ""})
    call = ["lab", "pretrain", "all", "--steps", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, call)
    assert (first.exit_code, first.output) == (0, f"{tmp_path}/supervised.safetensors and its record supervised.json\n")
    made = (tmp_path / "supervised.json").stat().st_mtime_ns
    again = CliRunner().invoke(app, call)
    assert (again.exit_code, again.output) == (0, "supervised is there already\n")
    assert (tmp_path / "supervised.json").stat().st_mtime_ns == made


@pytest.mark.usefixtures("quick")
def test_bad_places_and_seeds_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    call = ["lab", "pretrain", "supervised", "--steps", "1"]
    found = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "file")])
    assert (found.exit_code, "is no folder" in found.output) == (2, True)
    assert CliRunner().invoke(app, [*call, "--seed", "9" * 25]).exit_code == 2


def test_a_checkpoint_of_other_versions_is_not_dropped_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"key": {"command": "another"}}, tmp_path / "kept")
    assert pretrain.Checkpoint(tmp_path / "kept", "this", 1).read() is None
    assert "begun anew" in capsys.readouterr().err


def test_a_mistyped_encoder_is_explained_without_torch() -> None:
    lines = (
        "import sys",
        "from taskvec.command.cli import app",
        "try: app(['lab', 'pretrain', 'contrastiv'], standalone_mode=False)",
        "finally: print('torch' in sys.modules)",
    )
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "did you mean 'contrastive'" in done.stderr
    assert done.stdout.strip() == "False"


def test_every_recipe_is_described_and_all_weights_are_small() -> None:
    assert tuple(pretrain.PRETRAININGS) == encoders.pretrained()
    assert sum(path.stat().st_size for path in encoders.WEIGHTS.iterdir()) < LARGEST_PACKAGE


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_encoder_is_the_recorded_one(name: str) -> None:
    known = encoders.record(name)
    assert pretrain.is_made(name, encoders.WEIGHTS)
    assert known["seed"] == 0
    assert known["seconds"] > 60
    assert known["mean"] == known["std"] == [0.5, 0.5, 0.5]
    made = Supervised(1, 0, **encoders.options(name)).encoder
    assert load_file(encoders.WEIGHTS / f"{name}.safetensors").keys() == made.state_dict().keys()


def encode(name: str, images: torch.Tensor) -> torch.Tensor:
    """Return standardised features of a shipped encoder, or of random weights."""
    encoder = seeded(lambda: VisionTransformer(**encoders.options(name)), 0)
    if name != "random":
        encoder.load_state_dict(load_file(encoders.WEIGHTS / f"{name}.safetensors"))
    features = objective.features(encoder, images)
    return features - features.mean(0)


def probe(features: torch.Tensor, labels: torch.Tensor, count: int) -> float:
    """Return the test accuracy of ridge regression onto the classes, fitted to the first ``count`` images."""
    scaled = features / features.std(0)
    known, targets = scaled[:count], torch.nn.functional.one_hot(labels[:count]).float()
    weight = torch.linalg.solve(known.T @ known + 0.1 * count * torch.eye(known.shape[1]), known.T @ targets)
    return float(((scaled[count:] @ weight).argmax(1) == labels[count:]).float().mean())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_linear_probe_is_far_above_random_weights(name: str) -> None:
    trained, control = [], []
    for task in ("chalk", "textures"):
        images, labels = (torch.from_numpy(array) for array in worlds.draw(task, "train", 1200))
        trained.append(probe(encode(name, images), labels, 800))
        control.append(probe(encode("random", images), labels, 800))
    assert sum(trained) > 1.3 * sum(control)
    assert sum(trained) - sum(control) > 2 * 0.15


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="did you mean 'supervised'"):
        pretrain.pretrain("supervized", tmp_path)
    with pytest.raises(TaskvecError, match="cannot pre-train for 0 steps"):
        pretrain.pretrain("supervised", tmp_path, steps=0)
