"""Races for a scale: what they may lose, what they look at, and that a study that races chooses as an exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.learning import tune
from helpers.reporters import Quiet
from helpers.tasks import colour_task, write_folder_task
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import listen
from taskvec.encoders.backbone import Backbone
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import Step, run
from taskvec.engine.store import Store
from taskvec.evaluation import racing
from taskvec.evaluation.accuracy import fine_tuned_accuracies
from taskvec.evaluation.scale_search import best_candidate, kept_curve, objective
from taskvec.merging.in_memory import merge_vectors
from taskvec.report.rows import results
from taskvec.study.files import parse_study
from taskvec.study.forecast.sizes import Sizes
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]
SIZES = (300, 150, 900)


def planted(seed: int, sizes: Sequence[int] = SIZES, fall: float = 0.2, scales: int = 5) -> list[np.ndarray]:
    """Return which images of each task are right at each scale: neighbours agree on most, the middle is best."""
    draw, places = np.random.default_rng(seed), np.linspace(-1, 1, scales)
    threshold = 0.9 - fall * places**2
    return [
        np.clip(draw.random(size) + 0.1 * draw.standard_normal((scales, size)), 0, 1) < threshold[:, None]
        for size in sizes
    ]


def values_of(tasks: list[np.ndarray], fine_tuned: Sequence[float]) -> list[float]:
    return [objective(row, fine_tuned) for row in zip(*(task.mean(axis=1) for task in tasks), strict=True)]


class Watched:
    """Hands out planted scores, and counts the passes of every image and scale."""

    def __init__(self, tasks: list[np.ndarray]) -> None:
        self.tasks, self.passes = tasks, [np.zeros(task.shape, dtype=int) for task in tasks]

    def __call__(self, task: int, scales: Sequence[float], places: np.ndarray) -> np.ndarray:
        at = np.ix_([GRID.index(scale) for scale in scales], places)
        self.passes[task][at] += 1
        scores: np.ndarray = self.tasks[task][at]
        return scores


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(("fall", "most"), [(0.5, 0.75), (0.04, 1.0)])
def test_of_a_hundred_seeded_races_ninety_five_lose_at_most_the_indifference(fall: float, most: float) -> None:
    regrets, passes = [], []
    for seed in range(100):
        tasks, tuned = planted(seed % 10, fall=fall), [0.9, 0.8, 0.95]
        watched, values = Watched(tasks), values_of(tasks, tuned)
        chosen = racing.race(watched, SIZES, tuned, GRID, seed)
        regrets.append(max(values) - values[GRID.index(chosen.scale)])
        passes.append(sum(map(np.sum, watched.passes)) / (len(GRID) * sum(SIZES)))
    assert sum(regret <= racing.INDIFFERENCE for regret in regrets) >= 95
    assert np.mean(passes) <= most


def test_bounds_from_above_hold_as_often_as_they_say() -> None:
    """Means over samples of all sorts of sizes, with differences as rare as those of neighbouring scales."""
    draw, log, failed = np.random.default_rng(0), math.log(20), 0
    sizes, counts, weights = [3000, 1000, 90], [800, 600, 90], np.array([0.3, 0.5, 0.2])
    for _ in range(50):
        tasks = [draw.choice([-1.0, 0.0, 1.0], (1, size), p=[0.02, 0.93, 0.05]) for size in sizes]
        truth = sum(weight * task.mean() for weight, task in zip(weights, tasks, strict=True))
        for _ in range(40):
            samples = [task[:, draw.permutation(len(task[0]))[:n]] for task, n in zip(tasks, counts, strict=True)]
            failed += racing.upper_bounds(samples, sizes, weights, log)[0] < truth - 1e-12
    assert failed <= 2 * math.exp(-log) * 2000


@given(hnp.arrays(np.int8, (2, 12), elements=st.integers(-1, 1)), st.integers(12, 40), st.floats(0.1, 3))
def test_bounds_are_those_of_the_slow_way(differences: np.ndarray, size: int, weight: float) -> None:
    [first, second] = racing.upper_bounds([differences.astype(float)], [size], np.array([weight]), 5.0)
    for bound, row in ((first, differences[0].tolist()), (second, differences[1].tolist())):
        shrink = min(1, (size - 12) / 12)
        slack = weight**2 / 144 * shrink * 5 / 2
        deviation = math.sqrt(weight**2 / 144 * shrink * sum(d * d for d in row) + slack) + math.sqrt(slack)
        rest = 2 / 3 * weight / 12 * 5 if size > 12 else 0
        assert bound == pytest.approx(weight * sum(row) / 12 + math.sqrt(10) * deviation + rest)


def test_bounds_of_whole_splits_are_the_differences_themselves() -> None:
    differences = [planted(0, [30], scales=3)[0].astype(float), planted(1, [50], scales=3)[0].astype(float)]
    exact = 0.5 * differences[0].mean(axis=1) + 0.25 * differences[1].mean(axis=1)
    assert np.allclose(racing.upper_bounds(differences, [30, 50], np.array([0.5, 0.25]), 7.0), exact, atol=1e-15)


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.2, 1), min_size=2, max_size=2))
def test_the_order_of_images_within_a_look_does_not_matter(seed: int, tuned: list[float]) -> None:
    tasks = [task[:, :128] for task in planted(seed, [200, 500], fall=0.8)]
    mixed = [task[:, np.random.default_rng(seed + 1).permutation(128)] for task in tasks]
    stays = racing.survivors(GRID, tasks, [200, 500], tuned, 5)
    assert racing.survivors(GRID, mixed, [200, 500], tuned, 5) == stays


@pytest.mark.parametrize("best", range(5))
def test_a_scale_that_dominates_wins_at_the_first_look(best: int) -> None:
    tasks = [np.tile(np.arange(size) % 4 == 0, (5, 1)) for size in SIZES]
    for task in tasks:
        task[best] = True
    watched = Watched(tasks)
    chosen = racing.race(watched, SIZES, [1.0, 0.9, 1.0], GRID)
    assert (chosen.scale, chosen.scales) == (GRID[best], (GRID[best],))
    assert all((passes[best] == 1).all() for passes in watched.passes)
    assert [passes.sum(axis=1).min() for passes in watched.passes] == [racing.LOOKS[0]] * 3


def test_no_image_passes_twice_and_what_is_returned_was_measured_on_whole_splits() -> None:
    tasks, tuned = planted(3, fall=0.6), [0.9, 0.9, 0.8]
    watched, values = Watched(tasks), values_of(tasks, tuned)
    chosen = racing.race(watched, SIZES, tuned, GRID, 4)
    for passes in watched.passes:
        assert passes.max() == 1
        assert all(passes[GRID.index(scale)].all() for scale in chosen.scales)
    assert chosen.values == pytest.approx([values[GRID.index(scale)] for scale in chosen.scales])


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.sampled_from([0.0, 0.5, 0.9]), min_size=2, max_size=2))
def test_small_splits_are_decided_exactly_and_ties_go_to_the_smaller_scale(seed: int, tuned: list[float]) -> None:
    tasks = [task[:, :12] for task in planted(seed, [12, 12])]
    values = values_of(tasks, tuned)
    assert racing.race(Watched(tasks), (12, 12), tuned, GRID).scale == best_candidate(GRID, values)


def test_scales_that_are_the_same_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample tells neighbours apart that differ nowhere: the smallest stays, once the bound is small enough."""
    monkeypatch.setattr(racing, "LOOKS", (9_000,))
    same = [np.tile(np.arange(20_000) % 3 > 0, (5, 1)) for _ in range(2)]
    watched = Watched(same)
    assert racing.race(watched, (20_000, 20_000), [1.0, 1.0], GRID).scales == (0.0,)
    assert all(passes.sum() == 5 * 9_000 + 11_000 for passes in watched.passes)


@given(st.integers(1, 6000))
def test_looks_add_up_to_the_split_and_a_last_scale_goes_over_all_of_it(size: int) -> None:
    looks = range(len(racing.LOOKS) + 1)
    assert len(racing.LEFT) == len(looks)
    assert sum(racing.images_added(look, size) for look in looks) == size
    assert [racing.images_of(look, 1, size) for look in looks] == [size] * len(looks)


# ---------------------------------------------------------------- encoders and studies


def test_a_race_of_an_encoder_chooses_the_scale_of_the_grid(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "LOOKS", (8, 16))
    tasks = [colour_task("warm", 3, 1), colour_task("cold", 5, 2)]
    heads, _, taus = tune(backbone, tasks)
    merged, tuned = merge_vectors(backbone.pretrained, taus), fine_tuned_accuracies(backbone, taus, tasks, heads)
    curves = [kept_curve(backbone, merged, *pair, GRID) for pair in zip(tasks, heads, strict=True)]
    values = [objective(row, tuned) for row in zip(*curves, strict=True)]
    raced = racing.race_scale(backbone, merged, tasks, heads, tuned, GRID)
    assert raced.scale == best_candidate(GRID, values)
    assert raced.values == pytest.approx([values[GRID.index(scale)] for scale in raced.scales])
    monkeypatch.setattr(racing, "PORTION", 10)
    places = np.array([5, 0, 3])
    scores = racing.scores_along(backbone, merged, tasks[0], heads[0], GRID, np.arange(24))
    assert scores.mean(axis=1).tolist() == curves[0]
    assert (racing.scores_along(backbone, merged, tasks[0], heads[0], GRID, places) == scores[:, places]).all()


STUDY = """
backbones: ["lab:random"]
tasks: ["folder:{root}/one", "folder:{root}/two"]
heads: [kept]
search: {search}
heatmap: {{pairs: 0}}
probe: {{steps: 20, batch_size: 16, warmup: 2, learning_rates: [0.03]}}
finetune: {{steps: 6, batch_size: 8, warmup: 2, learning_rate: 0.003}}
methods:
- {{name: task_arithmetic, scales: "0:2:0.5"}}
"""


def study_file(root: Path, search: str, tail: str = "") -> StudyFile:
    text = STUDY.format(root=root, search=search) + tail
    return StudyFile(parse_study(text, "raced"), text, root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_folder_task(root / "one", train=40)
    write_folder_task(root / "two", ("red", "blue"), train=40, test=6)
    return root


class Stopping(Quiet):
    """Stops the run before the first step whose label has some words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def started(self, step: Step) -> None:
        if self.words in step.label:
            raise KeyboardInterrupt


def test_a_study_that_races_is_resumed_and_chooses_as_the_exact_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "LOOKS", (3, 6))
    monkeypatch.setattr(racing, "upper_bounds", lambda samples, *_: np.array([x.mean() for x in samples[0]]))  # bold
    store, watcher, [exact] = Store(data / "store"), Quiet(), plan(study_file(data, "grid"), Store(data / "store"))
    grid = results("raced", [exact], run(exact.steps(), store, open_executor(1), Quiet()))
    [exp] = plan(study_file(data, "racing"), store)
    with pytest.raises(KeyboardInterrupt):
        run(exp.steps(), store, open_executor(1), Stopping("look 2: task_arithmetic"))
    [exp] = plan(study_file(data, "racing"), store)
    done = run(exp.steps(), store, open_executor(1), watcher)
    assert not [label for label in watcher.ran if "look 1: task_arithmetic" in label]
    assert [label for label in watcher.ran if "look 2: task_arithmetic" in label]
    rows = results("raced", [exp], done)
    rows = rows[(rows.heads == "kept") & (rows.task == "") & (rows.method == "task_arithmetic")]
    tried = rows[rows.split == "validation"].pivot_table(index="scale", columns="metric", values="value")
    assert list(tried.index) == exact.trials[0].grid  # all that were tried are told
    whole = tried.dropna()
    assert 0 in whole.index  # it is known
    assert len(whole) < len(tried)  # the others were measured on samples, which are not normalised
    exact_rows = grid[(grid.task == "") & (grid.method == "task_arithmetic") & (grid.metric == "normalised_accuracy")]
    values = exact_rows[exact_rows.split == "validation"].set_index("scale")["value"]
    assert whole["normalised_accuracy"].to_dict() == {scale: values[scale] for scale in whole.index}
    [scale] = rows[(rows.split == "test") & (rows.metric == "accuracy")]["scale"]
    assert whole["normalised_accuracy"][scale] == whole["normalised_accuracy"].max()
    assert not done[exp.trials[0].rounds[2]["one"]].json("curve.json").get("sampled")


def test_a_study_says_what_does_not_race(data: Path) -> None:
    with listen() as heard:
        cells = plan(study_file(data, "racing", tail="regimes: [aligned, linearised]\n"), Store(data / "store"))
    assert list(heard) == ["search: racing leaves linearised encoders out: two passes serve all their scales"]
    first, *others = [curves["one"] for curves in cells[0].trials[0].rounds]
    assert first.type.work(first, Sizes()).forward == 4 * 12  # scale 0 is cached; the first look takes all of the split
    assert [step.type.work(step, Sizes()).forward for step in others] == [0, 0]
    kinds = [{step.type.name for step in cell.trials[0].rounds[0].values()} for cell in cells]
    assert kinds == [{"raced_curve"}, {"kept_curve"}]
    masks = "- {name: tall_masks, scales: [0.5, 1.0], config: {k: [0.2, 0.8]}}\n"
    [exp] = plan(study_file(data, "racing", tail=masks), Store(data / "store"))
    assert exp.trials[1].per_task
    raced = [step for trial in (exp.trials[1], *exp.trials[1].options) for step in trial.rounds[1].values()]
    assert [(step.type.name, step.config.task) for step in raced] == [("raced_curve", 0), ("raced_curve", 1)] * 3
    with pytest.raises(TaskvecError, match="racing needs kept heads"):
        study_file(data, "racing", tail="regimes: [linearised]\n")
    with pytest.raises(TaskvecError, match="search"):
        study_file(data, "raced")
