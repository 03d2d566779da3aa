"""Heatmaps and sets from some images: the half-width's coverage, the draws, and equality with whole samples."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.learning import tune
from helpers.reporters import Quiet
from helpers.tasks import colour_task, write_folder_task
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.files import read_json
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.engine import pipeline
from taskvec.engine.executors import Inline
from taskvec.engine.pipeline import Step
from taskvec.engine.store import Artifact, Store
from taskvec.evaluation import disentanglement as disentangling
from taskvec.evaluation import sampling
from taskvec.evaluation.accuracy import accuracy, sampled_accuracies
from taskvec.evaluation.disentanglement import BOX_AXIS, set_error, single_predictions
from taskvec.report.rows import HEATMAP_COLUMNS, heatmaps, results
from taskvec.study.experiment import Experiment
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

# ---------------------------------------------------------------- the bound


def stopped(size: int, shares: Sequence[float], tolerance: float, repeats: int, seed: int) -> tuple[float, float]:
    """Return in which part of simulated repeats the mean is within its half-width where it stops, and images used."""
    changed = np.repeat(np.round(np.array(shares) * size).astype(int)[:, None], repeats, 1)
    looks, generator = sampling.planned_looks(size, 1), np.random.default_rng(seed)
    counts, start = np.zeros_like(changed), 0
    open_ones, right, used = np.ones(repeats, bool), np.zeros(repeats, bool), np.zeros(repeats)
    for stop in looks:
        left = changed - counts
        counts += generator.hypergeometric(left, size - start - left, stop - start)
        seen, start = np.full(counts.shape, stop), stop
        width = sampling.half_width(counts / stop, seen, np.full(counts.shape, size), len(looks) - 1)
        ends = open_ones & (width <= tolerance)
        right[ends] = (np.abs(counts.mean(0) / stop - changed.mean(0) / size) <= width + 1e-12)[ends]
        used[ends], open_ones = stop, open_ones & ~ends
    assert not open_ones.any()  # a whole sample is exact
    return float(right.mean()), float(used.mean())


@pytest.mark.parametrize("share", [0.002, 0.01, 0.03, 0.2, 0.5])
@pytest.mark.parametrize(("size", "strata"), [(256, 1), (256, 4), (2048, 2), (2048, 6), (2048, 56)])
def test_the_mean_is_within_its_half_width_in_95_of_100_repeats(size: int, strata: int, share: float) -> None:
    """So it is where a rule stops at the first look that is narrow enough, also for rare and for uneven changes."""
    uneven = np.linspace(0, 2 * share, strata) if strata > 1 else [share]
    for shares in (np.full(strata, share), uneven):
        for tolerance in (0.0075, 0.03):
            covered, _ = stopped(size, shares, tolerance, 600, seed=strata)
            assert covered >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 600)


def test_many_pairs_need_a_part_of_the_images() -> None:
    _, used = stopped(2048, np.tile([0.05, 0.3], 28), 0.0075, 100, seed=0)
    assert used == 256
    _, alone = stopped(2048, [0.2, 0.5], 0.0075, 100, seed=0)
    assert alone == 2048  # of one pair the sample itself is little


@given(st.integers(1, 30), st.integers(130, 3000), st.data())
def test_whole_samples_are_exact_and_more_images_narrow_a_mean(strata: int, size: int, data: st.DataObject) -> None:
    shares = np.array(data.draw(st.lists(st.floats(0, 1), min_size=strata, max_size=strata)))
    sizes = np.full(strata, size)
    widths = [
        float(sampling.half_width(shares, np.minimum(looked, sizes), sizes, 4)) for looked in (2, 16, 128, size - 1)
    ]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] > 0
    assert sampling.half_width(shares, sizes, sizes, 4) == 0


@given(st.integers(1, 10_000), st.integers(1, 60), st.sampled_from([0.0, 0.005, 0.02]))
def test_looks_double_and_end_with_the_whole_sample(samples: int, strata: int, tolerance: float) -> None:
    looks = sampling.planned_looks(samples, tolerance)
    assert looks == sorted(set(looks))
    assert looks[-1] == samples
    assert looks[:-1] == [128 * 2**k for k in range(len(looks) - 1)]
    assert tolerance or looks == [samples]
    expected = sampling.expected_images(samples, strata, tolerance)
    assert min(128, samples) <= round(expected, 6) <= samples


def test_expected_images_are_those_of_uneven_variances() -> None:
    """The estimate of a plan holds within a quarter where variances are as it assumes."""
    generator = np.random.default_rng(1)
    for strata in (6, 20, 56):
        used = []
        for _ in range(40):
            variance = generator.uniform(*sampling.VARIANCES)
            share = (1 - np.sqrt(1 - 4 * variance)) / 2
            used.append(stopped(2048, np.full(strata, share), 0.0075, 20, seed=2)[1])
        assert sampling.expected_images(2048, strata, 0.0075) == pytest.approx(np.mean(used), rel=0.25)


# ---------------------------------------------------------------- draws


@given(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=4), st.integers(0, 5))
def test_draws_of_one_seed_take_every_image_once(count: int, ends: list[int], seed: int) -> None:
    edges = [0, *sorted(ends), 300]
    blocks = [sampling.drawn(count, a, b, seed, 1) for a, b in pairwise(edges)]
    assert sorted(np.concatenate(blocks)) == list(range(count))
    assert sampling.drawn(count, 0, count, seed).tolist() == list(range(count))


def test_pairs_tasks_and_points_draw_different_images() -> None:
    first = sampling.drawn(1000, 0, 100, 7, 0)
    assert first.tolist() == sampling.drawn(1000, 0, 100, 7, 0).tolist()
    for seed in ((7, 1), (8, 0), (7, 0, 1)):
        assert len(np.intersect1d(first, sampling.drawn(1000, 0, 100, *seed))) < 30


# ---------------------------------------------------------------- sets


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FEWEST", 8)


@pytest.fixture
def three() -> list[Task]:
    return [colour_task(str(seed), 3, seed, counts=(60, 24, 64)) for seed in (1, 2, 3)]


def test_the_error_of_a_set_is_near_that_of_all_images_and_says_how_near(
    backbone: Backbone, three: list[Task], few: None
) -> None:
    probed, _, taus = tune(backbone, three)
    images = [task.test.images for task in three]
    alone = [
        single_predictions(backbone, tau, head, own, BOX_AXIS)
        for tau, head, own in zip(taus, probed, images, strict=True)
    ]
    how = (backbone, taus, probed, images, alone, BOX_AXIS, 6, 3)
    whole = set_error(*how)
    assert (whole.half_width, whole.images) == (0, 64)
    part = set_error(*how, tolerance=0.5)
    assert 8 <= part.images < 64
    assert abs(part.value - whole.value) <= part.half_width <= 0.5
    assert set_error(*how, tolerance=1e-9) == whole
    assert set_error(*how, tolerance=0.5) == part
    assert {classes.dtype for classes in alone} == {np.dtype("int8")}


def test_sampled_accuracies_are_those_of_all_images_or_near(backbone: Backbone, three: list[Task], few: None) -> None:
    probed, tuned, _ = tune(backbone, three)
    splits = [task.test for task in three]
    exact = [accuracy(backbone, tuned[0], split, head) for split, head in zip(splits, probed, strict=True)]
    whole = sampled_accuracies(backbone, tuned[0], splits, probed, 0)
    assert (whole.shares.tolist(), whole.half_width, whole.images) == (exact, 0, 64)
    part = sampled_accuracies(backbone, tuned[0], splits, probed, 0.2)
    assert part.images < 64
    assert abs(part.shares.mean() - np.mean(exact)) <= part.half_width <= 0.2


@pytest.mark.parametrize(("largest", "kind"), [(0, "int8"), (127, "int8"), (128, "int16"), (40_000, "int32")])
def test_predictions_take_the_smallest_type_that_holds_them(largest: int, kind: str) -> None:
    assert disentangling.smallest_type(largest) == np.dtype(kind)


# ---------------------------------------------------------------- a study

STUDY = """
name: small
backbones: ["lab:random"]
tasks: ["folder:one", "folder:two", "folder:three"]
methods: [{{name: task_arithmetic, scales: [0, 1]}}]
heads: [kept]
heatmap: {{pairs: 3, points: 3, range: 2, samples: 32, tolerance: {tolerance}}}
subsets: {{sizes: [2], limit: 1, samples: 4, points: 2}}
probe: {{steps: 20, batch_size: 16, warmup: 0, learning_rates: [0.01]}}
finetune: {{steps: 4, batch_size: 8, warmup: 0, learning_rate: 0.02}}
"""


def planned(root: Path, tolerance: float, store: str = "store") -> tuple[list[Experiment], Store]:
    text, held = STUDY.format(tolerance=tolerance), Store(root / store)
    return plan(StudyFile(parse_study(text, "small"), text, root), held), held


class Counting(Quiet):
    """Counts the steps that run, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def started(self, step: Step) -> None:
        self.kinds.append(step.type.name)


def run(experiments: list[Experiment], store: Store) -> tuple[dict[Step, Artifact], list[str]]:
    counting = Counting()
    steps = [step for experiment in experiments for step in experiment.steps()]
    return pipeline.run(steps, store, Inline(), counting), counting.kinds


def frame(experiments: list[Experiment], done: dict[Step, Artifact]) -> pd.DataFrame:
    rows = heatmaps(experiments, done)
    assert rows is not None
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the study has looked at whole samples, in two stores."""
    root = tmp_path_factory.mktemp("sampled")
    for number, name in enumerate(("one", "two", "three")):
        write_folder_task(root / name, ("red", "blue", "grey")[: 2 + number % 2], train=20, test=12 + 4 * number)
    run(*planned(root, 0))
    shutil.copytree(root / "store", root / "killed")
    return root


def test_a_heatmap_from_some_images_is_near_that_from_all(root: Path, few: None) -> None:
    exact_plan, store = planned(root, 0)
    done, kinds = run(exact_plan, store)
    exact, sets = frame(exact_plan, done), results("small", exact_plan, done)
    assert kinds == []
    assert list(exact.columns) == HEATMAP_COLUMNS
    assert exact["half_width"].eq(0).all()
    assert exact["images"].equals(exact["n"])
    assert not sets["metric"].str.endswith("half_width").any()

    tolerance = 25
    rounds_plan, _ = planned(root, tolerance)
    done, kinds = run(rounds_plan, store)
    assert kinds.count("heatmap") == 9  # 8, 16 and all 32 images
    assert "single_task_predictions" not in kinds  # nor does any encoder look at its own axis again
    part = frame(rounds_plan, done)
    assert part["images"].isin([8, 16, 24, 32]).all()
    assert part["images"].nunique() > 1
    mean = (part["error_1"] + part["error_2"]).groupby([part["scale_1"], part["scale_2"]]).mean()
    whole = (exact["error_1"] + exact["error_2"]).groupby([exact["scale_1"], exact["scale_2"]]).mean()
    width = part.groupby(["scale_1", "scale_2"])["half_width"]
    assert width.nunique().eq(1).all()
    assert ((mean - whole).abs() <= width.first() + 1e-12).all()
    assert width.first().between(0, tolerance / 100).all()
    complete = part["half_width"].eq(0)
    columns = ["error_1", "error_2"]
    assert part.loc[complete, columns].equals(exact.loc[complete, columns])
    origin = part[(part["scale_1"] == 0) & (part["scale_2"] == 0)]
    assert origin[[*columns, "half_width"]].eq(0).all(axis=None)
    assert part.loc[part["scale_2"] == 0, "error_1"].eq(0).all()
    sampled = results("small", rounds_plan, done)
    for metric in ("accuracy", "disentanglement_error"):
        known = sampled[sampled["metric"] == f"{metric}_half_width"]["value"]
        assert known.between(0, tolerance / 100, inclusive="right").all()
        assert len(known) == sampled["metric"].eq(f"{metric}_images").sum()


def test_rounds_that_nothing_asks_for_pass_no_image(root: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tolerance that the first look meets: later rounds open no encoder."""
    experiments, store = planned(root, 200)
    done, _ = run(experiments, store)
    rounds = experiments[0].heatmaps.inputs["rounds"]  # type: ignore[union-attr]
    assert [len(pairs) for pairs in rounds] == [3, 3, 3]
    for number, pairs in enumerate(rounds):
        for step in pairs:
            counts = read_json(done[step].folder / "counts.json")
            assert (len(counts["cells"]), len(counts["counts"])) == ((0, 0) if number else (9, 9))


def test_a_study_that_is_killed_between_rounds_ends_with_the_same_bytes(root: Path, few: None) -> None:
    experiments, store = planned(root, 25)
    whole = frame(experiments, run(experiments, store)[0])
    experiments, store = planned(root, 25, "killed")
    first = experiments[0].heatmaps.inputs["rounds"][1][0].inputs["plan"]  # type: ignore[union-attr]
    pipeline.run([first], store, Inline(), Quiet())
    done, kinds = run(experiments, store)
    assert kinds.count("heatmap") == 6
    assert frame(experiments, done).equals(whole)


def test_singles_keep_no_pixels(root: Path, few: None) -> None:
    experiments, store = planned(root, 0)
    done, _ = run(experiments, store)
    axis = experiments[0].heatmaps.inputs["rounds"][0][0].inputs["singles"][0]  # type: ignore[union-attr]
    folder = done[axis].folder
    assert sorted(path.name for path in folder.glob("*.npy")) == ["indices.npy", "predictions.npy"]
    assert np.load(folder / "predictions.npy").dtype == np.int8
    assert np.load(folder / "indices.npy").tolist() == sorted(np.load(folder / "indices.npy").tolist())
