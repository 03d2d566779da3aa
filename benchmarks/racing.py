"""Races for the scale of a merge against the exact search: what they lose, and the passes that they make.

python benchmarks/racing.py [--lab] [--repeats 100]

Scores of single images are planted, with curves and correlations along lambda like those of real line searches, for
the paper's validation splits and for smaller ones. ``--lab`` also measures them: four tasks of the lab, fine-tuned
here, at all scales on 1500 images each (some minutes). Each repeat looks at the images in another seeded order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import norm

import taskvec as tv
from taskvec.data.tasks import Split
from taskvec.evaluation import racing
from taskvec.evaluation.accuracy import fine_tuned_accuracies
from taskvec.evaluation.scale_search import objective
from taskvec.lab.drawing import worlds
from taskvec.learning.finetuning import task_vector
from taskvec.merging.in_memory import merge_vectors

GRID = [round(0.05 * place, 10) for place in range(21)]
PAPER = (814, 376, 2160, 2664, 5000, 1890, 1985, 5000)
"""Validation images of the paper's eight tasks."""
LAB, IMAGES = ("street", "greek", "armenian", "signs"), 1500


@dataclass(frozen=True)
class Scores:
    """Which images a merge gets right at every scale of the grid, by task, and the fine-tuned accuracies."""

    tasks: list[np.ndarray]
    fine_tuned: list[float]

    @property
    def sizes(self) -> list[int]:
        """Return the images of each task."""
        return [task.shape[1] for task in self.tasks]

    def values(self) -> list[float]:
        """Return the objective at every scale, on whole splits."""
        return [objective(row, self.fine_tuned) for row in zip(*(task.mean(1) for task in self.tasks), strict=True)]


def planted(sizes: Sequence[int], seed: int, steep: float = 1.0, length: float = 0.4) -> Scores:
    """Return scores of tasks whose accuracy rises to a scale of 0.1 to 0.4, then falls by about ``steep``.

    An image is right where a Gaussian process along lambda, of correlation ``length``, is below a threshold.
    """
    draw, scales = np.random.default_rng(seed), np.array(GRID)
    covariance = np.exp(-0.5 * ((scales[:, None] - scales) / length) ** 2) + 1e-6 * np.eye(len(scales))
    root, tasks = np.linalg.cholesky(covariance), []
    for size in sizes:
        peak, start = draw.uniform(0.1, 0.4), draw.uniform(0.5, 0.85)
        gain, fall = draw.uniform(0, 0.1), steep * draw.uniform(0.3, 1.2)
        beyond = np.maximum(scales - peak, 0)
        accuracy = start + gain * np.sin(np.pi / 2 * np.minimum(scales / peak, 1)) - fall * beyond**1.3
        latent = root @ draw.standard_normal((len(scales), size))
        tasks.append(latent < norm.ppf(accuracy.clip(0.05, 0.99))[:, None])
    return Scores(tasks, [0.95] * len(sizes))


def lab() -> Scores:
    """Return the scores of a merge of tasks of the lab, fine-tuned here, on images that were never trained on."""
    backbone, tasks, heads, taus = tv.load_backbone("lab:supervised", device="cpu"), [], [], []
    for name in LAB:
        task = tv.load_task(f"lab:{name}", backbone.preprocessing)
        head = tv.fit_head(backbone, task, tv.Probe(steps=300, warmup=30, learning_rates=(0.01,)))
        settings = tv.Finetune(steps=60, batch_size=64, warmup=6, learning_rate=4e-4)
        taus.append(task_vector(backbone, tv.finetune(backbone, task, head, settings)))
        images, labels = worlds.draw(name, "test", IMAGES, seed=7)
        tasks.append(replace(task, validation=Split(images, labels)))
        heads.append(head)
    merged = merge_vectors(backbone.pretrained, taus, "task_arithmetic")
    places = np.arange(IMAGES)
    pairs = zip(tasks, heads, strict=True)
    scores = [racing.scores_along(backbone, merged, *pair, GRID, places) for pair in pairs]
    return Scores(scores, fine_tuned_accuracies(backbone, taus, tasks, heads))


@dataclass(frozen=True)
class Outcome:
    """What one race lost, in points of normalised accuracy, and the passes that it made over those of the exact search.

    ``passes`` are of the images of each look and of the rest, ``share`` of all.
    """

    regret: float
    share: float
    passes: list[float]


def outcome(scores: Scores, seed: int) -> Outcome:
    """Race once, in the order of images that a seed draws."""
    ends = (0, *racing.LOOKS, max(max(scores.sizes), racing.LOOKS[-1]))
    seen, passes = [0] * len(scores.sizes), np.zeros(len(ends) - 1)

    def measure(task: int, scales: Sequence[float], places: np.ndarray) -> np.ndarray:
        begin, seen[task] = seen[task], seen[task] + len(places)
        passes[:] += len(scales) * np.diff(np.clip(ends, begin, seen[task]))
        return scores.tasks[task][[GRID.index(scale) for scale in scales]][:, places]

    chosen = racing.race(measure, scores.sizes, scores.fine_tuned, GRID, seed)
    values = scores.values()
    exact = len(GRID) * np.diff([sum(min(size, end) for size in scores.sizes) for end in ends])
    share = float(passes.sum() / exact.sum())
    regret = 100 * (max(values) - values[GRID.index(chosen.scale)])
    return Outcome(regret, share, (passes / np.maximum(exact, 1)).tolist())


def searches(repeats: int, measured: Scores | None) -> Iterator[tuple[str, list[Outcome]]]:
    """Yield what was raced on, and the outcomes of all repeats."""
    splits = {"the paper's splits": PAPER, "8 x 400 images": (400,) * 8, "3 x 2000 images": (2000,) * 3}
    for name, sizes in splits.items():
        for slope, steep in (("steep", 1.0), ("flat", 0.2)):
            yield f"{name}, {slope}", [outcome(planted(sizes, seed, steep), seed) for seed in range(repeats)]
    if measured:
        yield f"lab, {len(LAB)} x {IMAGES} images", [outcome(measured, seed) for seed in range(repeats)]


def main() -> None:
    """Print a row for every kind of search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", action="store_true", help="also measure tasks of the lab")
    parser.add_argument("--repeats", type=int, default=100, help="races of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    looks = " ".join(f"{f'to {count}':>8}" for count in racing.LOOKS)
    print(f"{'':28} {'regret <= 0.2':>13} {'largest':>8} {'passes':>7} {looks} {'rest':>8}")
    for name, outcomes in searches(options.repeats, lab() if options.lab else None):
        within = sum(race.regret <= 100 * racing.INDIFFERENCE for race in outcomes)
        largest, share = max(race.regret for race in outcomes), np.mean([race.share for race in outcomes])
        passes = " ".join(f"{share:8.2f}" for share in np.mean([race.passes for race in outcomes], axis=0))
        print(f"{name:28} {f'{within} of {len(outcomes)}':>13} {largest:8.2f} {share:7.2f} {passes}", flush=True)


if __name__ == "__main__":
    main()
