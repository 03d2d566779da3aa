"""Kinds of task against slow references; the lab's ink and angle; tasks of all kinds merged in one study."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.reporters import Quiet
from helpers.tasks import colour_task, write_folder_task
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import taskvec as tv
from taskvec.core.settings import Finetune, Probe
from taskvec.core.task_types import TASK_TYPES
from taskvec.data import sources, tasks
from taskvec.data.images import Preprocessing, normalise
from taskvec.data.tasks import Split, Task
from taskvec.deploy.model import load
from taskvec.encoders.backbone import Backbone, assemble, encode, load_backbone
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.store import Store
from taskvec.evaluation.accuracy import paired_bootstrap, per_image_scores
from taskvec.evaluation.disentanglement import disentanglement
from taskvec.lab.drawing import scenes, worlds
from taskvec.lab.drawing.looks import Look, paint, stream
from taskvec.learning import heads
from taskvec.learning.batches import training_batches
from taskvec.learning.finetuning import encode_all, finetune_tasks
from taskvec.learning.heads import Head
from taskvec.report.rows import Done, results
from taskvec.study.experiment import Experiment
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights import vectors
from taskvec.weights.flat import save_tensors

QUICK = Probe(steps=60, batch_size=16, warmup=5, learning_rates=(0.003, 0.03))
TUNE = Finetune(steps=20, batch_size=16, warmup=2, learning_rate=3e-4)
DEGREES = st.floats(-720, 720)


@pytest.fixture
def transformer() -> Backbone:
    return load_backbone("lab:random", device="cpu")


def lab_task(name: str, counts: tuple[int, int, int] = (48, 16, 16)) -> Task:
    """Draw few images of a lab task, without decoding them."""
    drawn = [worlds.draw(name, split, count) for split, count in zip(("train", "train", "test"), counts, strict=True)]
    return Task(name, tuple(worlds.classes(name)), *(Split(*one) for one in drawn), kind=worlds.kind(name))


def unit(degrees: float, length: float = 1.0) -> torch.Tensor:
    angle = math.radians(degrees)
    return length * torch.tensor([[math.cos(angle), math.sin(angle)]])


def test_segmentation_is_classification_of_every_patch() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4))
    patches, images = TASK_TYPES["segmentation"], TASK_TYPES["classification"]
    each = [images.loss(scores[i, j][None], labels[i, j][None]) for i in range(5) for j in range(4)]
    assert torch.allclose(patches.loss(scores, labels), torch.stack(each).mean())
    shares = [np.mean([int(scores[i, j].argmax()) == labels[i, j] for j in range(4)]) for i in range(5)]
    assert patches.score(scores, labels).tolist() == shares
    scores[2, 1, 0] = torch.nan
    decided = patches.predict(scores)
    assert decided[2, 1] == -1
    assert int((decided < 0).sum()) == 1


def test_classification_scores_as_it_always_did() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(9, 4), torch.randint(0, 4, (9,))
    kind = TASK_TYPES["classification"]
    assert torch.equal(kind.loss(scores, labels), F.cross_entropy(scores, labels))
    assert torch.equal(kind.score(scores, labels), scores.argmax(1) == labels)
    assert kind.score(scores, labels).dtype == torch.bool


@given(DEGREES, DEGREES, st.floats(0.01, 100))
def test_angles_are_near_within_15_degrees_whatever_the_length(one: float, other: float, length: float) -> None:
    apart = abs((one - other + 180) % 360 - 180)
    if abs(apart - 15) > 0.05:
        assert bool(TASK_TYPES["regression"].score(unit(one, length), unit(other))) == (apart < 15)


@given(DEGREES, st.floats(0.01, 100))
def test_angles_agree_by_sectors_of_15_degrees(degrees: float, length: float) -> None:
    edge = abs((degrees - 7.5) % 15)
    if 0.05 < edge < 14.95:
        assert int(TASK_TYPES["regression"].predict(unit(degrees, length))) == math.floor((degrees + 7.5) / 15) % 24


def test_angles_that_are_not_numbers_are_wrong_and_in_no_sector() -> None:
    broken = torch.tensor([[torch.nan, 0.0], [torch.inf, 1.0], [1.0, 0.0]])
    kind, labels = TASK_TYPES["regression"], torch.tensor([[1.0, 0.0]]).expand(3, 2)
    assert kind.predict(broken).tolist() == [-1, -1, 0]
    assert kind.score(broken, labels).tolist() == [False, False, True]
    assert float(kind.loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))) == 0.5


def test_answers_are_a_class_a_count_of_patches_and_an_angle() -> None:
    assert TASK_TYPES["classification"].describe(torch.tensor([0.0, math.log(3)]), ["a", "b"]) == (
        "b",
        pytest.approx(0.75),
    )
    patches = torch.log(torch.tensor([[1.0, 3.0], [3.0, 1.0], [9.0, 1.0]]))
    assert TASK_TYPES["segmentation"].describe(patches, ["a", "b"]) == (
        "2 a, 1 b",
        pytest.approx((0.75 + 0.75 + 0.9) / 3),
    )
    assert TASK_TYPES["segmentation"].describe(patches[:1], ["a", "b"])[0] == "1 b"
    assert TASK_TYPES["regression"].describe(unit(-90, 0.5)[0], ["cosine", "sine"]) == (
        "270 degrees",
        pytest.approx(0.5),
    )
    assert TASK_TYPES["regression"].describe(unit(30, 2.0)[0], ["cosine", "sine"]) == ("30 degrees", 1.0)


def test_a_feature_a_patch_is_the_final_token(transformer: Backbone) -> None:
    images = lab_task("ink").test.images
    tokens = transformer.features(images, per_patch=True)
    assert tokens.shape == (16, 16, transformer.width)
    assert torch.allclose(tokens.mean(1), transformer.features(images), atol=1e-5)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    other = assemble("timm", module, Preprocessing(32), {}, "cpu")
    found = other.features(images[:3], batch_size=2, per_patch=True)
    with torch.inference_mode():
        inputs = normalise(torch.from_numpy(images[:3]), other.preprocessing, "cpu")
        want = other.module.eval().forward_features(inputs)  # type: ignore[operator]
    assert torch.allclose(found, want[:, 1:], atol=1e-5)  # the class token comes first


def test_encoders_that_do_not_fit_the_patches_say_so(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 20), ("test", 4)):
        monkeypatch.setitem(sources.LAB_COUNTS, split, count)
    ink = lab_task("ink")
    with pytest.raises(tv.TaskvecError, match="TinyEncoder gives no feature a patch"):
        tv.fit_head(backbone, ink, QUICK)
    small = load_backbone("lab:random", size=16, device="cpu")
    half = replace(ink, train=Split(ink.train.images[:, :, ::2, ::2], ink.train.labels))
    with pytest.raises(tv.TaskvecError, match="4 patches an image, but 16 are labelled"):
        tv.fit_head(small, half, QUICK)
    with pytest.raises(tv.TaskvecError, match="90% of their side"):
        tv.load_task("lab:ink", Preprocessing(32, crop=0.9), limit=2)


def test_one_pass_for_all_gives_each_task_its_own_features(transformer: Backbone) -> None:
    batches = [torch.randn(n, 3, 32, 32, generator=stream(n)) for n in (2, 3, 1)]
    module = transformer.module.eval()
    found = encode_all(module, batches, [False, True, False], transformer)
    for features, images, per_patch in zip(found, batches, [False, True, False], strict=True):
        assert torch.allclose(features, encode(module, images, per_patch), atol=1e-5)


def test_images_are_cropped_only_where_labels_stay_right(transformer: Backbone) -> None:
    split = lab_task("ink").train
    for kind in TASK_TYPES:
        images, labels = next(training_batches(transformer, split, 4, 0, kind))
        whole = normalise(torch.from_numpy(split.images), transformer.preprocessing, "cpu")
        same = [(split.labels == one.numpy()).all(1).nonzero()[0] for one in labels]
        found = all(any(torch.equal(image, whole[i]) for i in near) for image, near in zip(images, same, strict=True))
        assert found == (kind != "classification")


def test_heads_keep_their_kind_and_plain_ones_their_bytes(tmp_path: Path) -> None:
    plain = heads.random_head(4, 2, 0)
    odd = {"ink": replace(plain.on("cpu"), kind="segmentation"), "text": replace(plain.on("cpu"), normalised=True)}
    odd["plain"] = plain
    heads.save_heads(odd, tmp_path / "odd.safetensors")
    again = heads.read_heads(tmp_path / "odd.safetensors")
    assert {name: (head.kind, head.normalised) for name, head in again.items()} == {
        "ink": ("segmentation", False),
        "text": ("classification", True),
        "plain": ("classification", False),
    }
    heads.save_heads({"head": plain}, tmp_path / "plain.safetensors")
    early = {"head.weight": plain.weight, "head.bias": plain.bias}
    save_tensors(early, tmp_path / "early.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "early.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["ink", "angle"])
def test_probing_and_fine_tuning_learn_every_kind(transformer: Backbone, name: str) -> None:
    task = lab_task(name)
    head = tv.fit_head(transformer, task, QUICK)
    assert head.kind == task.kind
    tuned = tv.finetune(transformer, task, head, TUNE)
    features, labels = heads.features_of(transformer, task.train, task.kind)
    before = head.loss(features, labels)
    transformer.use(tuned)
    assert head.loss(*heads.features_of(transformer, task.train, task.kind)) < before
    scores = per_image_scores(transformer, tuned, task.test, head)
    assert tv.evaluate(transformer, tuned, [task], [head])[name] == scores.mean()
    assert scores.dtype == (bool if name == "angle" else np.float64)
    assert finetune_tasks(transformer, [task], [None], TUNE, head_learns=True).heads[0].kind == task.kind


def test_the_disentanglement_error_of_patches_is_a_share_of_patches(transformer: Backbone) -> None:
    pair = [lab_task("ink", (24, 8, 6)), lab_task("angle", (24, 8, 6))]
    probed = [tv.fit_head(transformer, task, QUICK) for task in pair]
    taus = [
        tv.task_vector(transformer, tv.finetune(transformer, t, h, TUNE)) for t, h in zip(pair, probed, strict=True)
    ]
    images = (pair[0].test.images, pair[1].test.images)
    errors = disentanglement(transformer, (taus[0], taus[1]), (probed[0], probed[1]), images, [0.0, 2.0])
    transformer.use(vectors.add(vectors.add(transformer.pretrained, taus[0], 2.0), taus[1], 2.0))
    both = [decided(transformer, *one) for one in zip(probed, images, strict=True)]
    for term, tau, head, own, merged in zip((errors.first, errors.second), taus, probed, images, both, strict=True):
        transformer.use(vectors.add(transformer.pretrained, tau, 2.0))
        assert term[1, 1] == np.mean(decided(transformer, head, own) != merged)
    assert errors.xi()[0, 0] == 0


def decided(backbone: Backbone, head: Head, images: np.ndarray) -> np.ndarray:
    found: np.ndarray = head.predict(backbone.features(images, per_patch=head.kind == "segmentation")).numpy()
    return found


def test_the_interval_of_shares_covers_as_a_plain_bootstrap_does() -> None:
    generator = np.random.default_rng(0)
    ours = {"ink": generator.integers(5, 17, 200) / 16, "greek": generator.random(150) < 0.7}
    base = {"ink": generator.integers(3, 17, 200) / 16, "greek": generator.random(150) < 0.6}
    tuned = {"ink": 0.8, "greek": 0.5}
    gain = paired_bootstrap(ours, base, of=tuned)
    draws = []
    for _ in range(4000):
        means = []
        for name in ours:
            picked = generator.integers(0, len(ours[name]), len(ours[name]))
            means.append((ours[name][picked].mean() - base[name][picked].mean()) / tuned[name])
        draws.append(np.mean(means))
    assert gain.mean == pytest.approx(np.mean([(ours[n].mean() - base[n].mean()) / tuned[n] for n in ours]))
    assert (gain.low, gain.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)


def test_letters_are_turned_as_pillow_turns_them() -> None:
    masks = scenes.letters(scenes.TURNABLE).masks.float() / 255
    upright = scenes.turned(masks, torch.zeros(len(masks)))
    for degrees in (30.0, 90.0, 200.0):
        ours = scenes.turned(masks, torch.full((len(masks),), math.radians(degrees)))
        for mine, start in zip(ours, upright, strict=True):
            turned = Image.fromarray(start.numpy()).rotate(degrees, Image.Resampling.BILINEAR)
            assert np.corrcoef(mine.flatten(), np.asarray(turned).ravel())[0, 1] > 0.97


def test_the_label_of_an_angle_turns_its_letter_back() -> None:
    images, labels = scenes.draw_angle(12, stream("test"), Look())
    masks = scenes.letters(scenes.TURNABLE).masks.float() / 255
    upright = paint(scenes.turned(masks, torch.zeros(len(masks))), Look(), stream("none"))[:, 0].flatten(1).float()
    assert torch.allclose(labels.norm(dim=1), torch.ones(12))

    def likeness(image: torch.Tensor, degrees: float) -> float:
        back = Image.fromarray(image[0].numpy()).rotate(degrees, Image.Resampling.BILINEAR)
        stacked = torch.cat([torch.from_numpy(np.array(back)).flatten()[None].float(), upright])
        return float(torch.corrcoef(stacked)[0, 1:].max())

    for image, (cosine, sine) in zip(images, labels.tolist(), strict=True):
        degrees = math.degrees(math.atan2(sine, cosine))
        right = likeness(image, -degrees)
        assert right > 0.9
        assert right > max(likeness(image, -degrees + off) for off in (60, 120, 180, 240, 300))


def test_without_clutter_the_patches_with_ink_are_the_glyphs() -> None:
    images, labels = scenes.draw_ink(40, stream("test"), Look(shrink=0.5))
    shares = images[:, 0].float().reshape(40, 4, 8, 4, 8).mean((2, 4)).flatten(1) / 255
    clear = (shares - 1 / 8).abs() > 0.01
    assert torch.equal(labels[clear], (shares > 1 / 8).long()[clear])
    assert set(labels.flatten().tolist()) == {0, 1}


def test_a_patch_goes_to_what_covers_it_most_and_hidden_clutter_does_not_count() -> None:
    ink, clutter = torch.zeros(2, 1, 1, 32, 32)
    ink[..., :8, :8] = 1  # the glyph hides the clutter
    clutter[..., :8, :16] = 1  # and beside it clutter alone
    ink[..., 8:16, :2], clutter[..., 8:16, 2:8] = 1, 1  # more clutter than glyph
    ink[..., 16:18, 16:19] = 1  # too little for a label
    want = [[1, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scenes.label_patches(ink, clutter).view(4, 4).tolist() == want


@pytest.mark.parametrize("name", list(scenes.SCENES))
def test_scenes_are_drawn_alike_for_the_same_arguments(name: str) -> None:
    images, labels = worlds.draw(name, "train", 30)
    again, same = worlds.draw(name, "train", 30)
    assert images.shape == (30, 3, 32, 32)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same)
    assert not np.array_equal(images, worlds.draw(name, "test", 30)[0])
    assert name not in worlds.TASKS
    assert worlds.captions(name) is None


def test_all_patch_classes_are_frequent() -> None:
    labels = worlds.draw("ink", "test", 200)[1]
    assert labels.dtype == np.int64
    assert (np.bincount(labels.ravel()) / labels.size).min() > 0.2
    angles = worlds.draw("angle", "test", 400)[1]
    quarters = np.bincount((np.arctan2(angles[:, 1], angles[:, 0]) // (np.pi / 2)).astype(int) + 2)
    assert angles.dtype == np.float32
    assert quarters.min() > 70


STUDY = """
name: mixed
backbones: ["lab:supervised"]
tasks: ["folder:{root}/one", "lab:ink", "lab:angle", "folder:{root}/two"]
regimes: [aligned, joint]
methods: [{{name: task_arithmetic, scales: "0:1:0.25"}}]
scales: per-task
heatmap: {{pairs: 2, points: 3, range: 1, samples: 4}}
subsets: {{sizes: [2], limit: 6, samples: 8, points: 2}}
probe: {{steps: 60, batch_size: 16, warmup: 2, learning_rates: [0.003, 0.03], rate_per_task: true}}
finetune: {{steps: 4, batch_size: 16, warmup: 2, learning_rate: 0.001}}
"""
METRICS = {"one": "accuracy", "ink": "patch_accuracy", "angle": "within_15_degrees", "two": "accuracy"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, list[Experiment], Done]:
    root = tmp_path_factory.mktemp("mixed")
    write_folder_task(root / "one")
    write_folder_task(root / "two", ("red", "blue"), train=15, test=6)
    text = STUDY.format(root=root)
    with pytest.MonkeyPatch.context() as patch:
        for split, count in (("train", 160), ("test", 32)):
            patch.setitem(sources.LAB_COUNTS, split, count)
        store = Store(root / "store")
        cells = plan(StudyFile(parse_study(text, "mixed"), text, root), store)
        steps = [step for cell in cells for step in cell.steps()]
        done = pipeline.run(steps, store, open_executor(1), Quiet())
    return results("mixed", cells, done), cells, done


def test_every_task_of_a_mixed_study_has_its_own_metric(mixed: tuple[pd.DataFrame, list[Experiment], Done]) -> None:
    rows = mixed[0][mixed[0].tasks == "one+ink+angle+two"]
    merges = [("task_arithmetic", ""), ("task_arithmetic", "per-task")]
    for method, scaling in [*((method, "") for method in ("probing", "fine_tuned", "joint")), *merges]:
        test = rows[(rows.method == method) & (rows.scaling == scaling)]
        test = test[(test.split == "test") & (test.heads == "kept")]
        for task, metric in METRICS.items():
            own = test[(test.task == task) & test.metric.isin(METRICS.values())]
            assert own.metric.tolist() == [metric]
            assert own.value.between(0, 1).all()


def test_normalised_rows_are_ratios_to_the_tasks_own_fine_tuned_value(
    mixed: tuple[pd.DataFrame, list[Experiment], Done],
) -> None:
    rows = mixed[0][mixed[0].tasks == "one+ink+angle+two"]
    place = ["method", "scaling", "config", "heads", "scale", "split"]
    tuned = rows[(rows.method == "fine_tuned") & rows.metric.isin(METRICS.values()) & (rows.config == "{}")]
    tuned = tuned.set_index(["split", "task"]).value
    seen = 0
    for (method, scaling, _, _, _, split), group in rows.groupby(place):
        by = group.set_index(["metric", "task"]).value
        if "normalised_metric" not in set(group.metric):  # learning rates that were tried, scales tried on samples
            assert method in ("probing", "fine_tuned", "joint") or scaling == "per-task"
            continue
        seen += 1
        ratios = {t: by[METRICS[t], t] / tuned[split, t] for t in METRICS}
        for task, ratio in ratios.items():
            assert by["normalised_metric", task] == ratio
        assert by["normalised_metric", ""] == pytest.approx(np.mean(list(ratios.values())), abs=1e-12)
        assert by["normalised_accuracy", ""] == pytest.approx((ratios["one"] + ratios["two"]) / 2, abs=1e-12)
        assert by["accuracy", ""] == pytest.approx((by["accuracy", "one"] + by["accuracy", "two"]) / 2, abs=1e-12)
    assert seen > 10


def test_lambda_is_chosen_by_the_mean_over_all_kinds(mixed: tuple[pd.DataFrame, list[Experiment], Done]) -> None:
    rows = mixed[0][(mixed[0].tasks == "one+ink+angle+two") & (mixed[0].method == "task_arithmetic")]
    rows = rows[rows.scaling == ""]
    for kind in ("kept", "reprobed"):
        means = rows[(rows.heads == kind) & (rows.metric == "normalised_metric") & (rows.task == "")]
        tried = means[means.split == "validation"]
        best = tried[tried.value == tried.value.max()].scale.min()
        assert set(rows[(rows.heads == kind) & (rows.split == "test")].scale) == {best}


def test_gains_are_in_each_tasks_own_metric_and_normalised_in_the_mean(
    mixed: tuple[pd.DataFrame, list[Experiment], Done],
) -> None:
    rows = mixed[0][(mixed[0].tasks == "one+ink+angle+two") & (mixed[0].split == "test") & (mixed[0].heads == "kept")]
    rows = rows[rows.scaling == ""]
    methods = ("probing", "task_arithmetic", "fine_tuned")
    base, ours, tuned = (rows[rows.method == m].set_index(["metric", "task"]).value for m in methods)
    gained = [ours[metric, task] - base[metric, task] for task, metric in METRICS.items()]
    assert [ours["gain_over_probing", t] for t in METRICS] == pytest.approx(gained)
    shares = [gain / tuned[metric, task] for gain, (task, metric) in zip(gained, METRICS.items(), strict=True)]
    assert ours["gain_over_probing", ""] == pytest.approx(np.mean(shares))
    assert ours["normalised_metric", ""] - base["normalised_metric", ""] == pytest.approx(np.mean(shares))


def test_pairs_of_one_kind_in_a_mixed_study_are_as_ever(mixed: tuple[pd.DataFrame, list[Experiment], Done]) -> None:
    rows = mixed[0]
    plain = rows[(rows.tasks == "one+two") & (rows.metric != "disentanglement_error")]
    assert set(plain.metric) == {"accuracy", "normalised_accuracy"}
    other = rows[(rows.tasks == "ink+angle") & (rows.metric != "disentanglement_error")]
    assert set(other.metric) == {"patch_accuracy", "within_15_degrees", "normalised_metric"}


def test_the_model_of_a_mixed_study_answers_for_every_kind(
    mixed: tuple[pd.DataFrame, list[Experiment], Done], tmp_path: Path
) -> None:
    _, cells, done = mixed
    assert cells[0].model is not None
    model = load(done[cells[0].model].folder, "cpu")
    image = worlds.draw("angle", "test", 1)[0][0]
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "letter.png")
    answers = {answer.task: answer for answer in model.predict([tmp_path / "letter.png"])}
    assert list(answers) == list(METRICS)
    assert 0 <= int(answers["angle"].label.removesuffix(" degrees")) < 360
    assert sum(int(part.split()[0]) for part in answers["ink"].label.split(", ")) == 16
    assert answers["one"].label in ("ant", "bee", "cow")
    assert all(0 <= answer.probability <= 1 for answer in answers.values())
    assert model.predict([tmp_path / "letter.png"], "ink") == [answers["ink"]]


def test_a_plain_study_tells_of_no_kind(tasks_folder: Path) -> None:
    tasks.write_task(f"folder:{tasks_folder}", Preprocessing(16), 12, tasks_folder)
    assert not (tasks_folder / "kind.json").exists()
    assert tasks.read_task(tasks_folder, "t").kind == "classification"
    assert colour_task("warm", 3, 1).kind == "classification"


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Path:
    return write_folder_task(tmp_path / "one")
