"""Task vectors beyond addition: forgetting by negation, and analogy (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskvec.core.errors import TaskvecError
from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import parse_scales
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.scale_search import kept_curve
from taskvec.learning.heads import Head
from taskvec.weights import vectors
from taskvec.weights.flat import Weights


@dataclass(frozen=True)
class Forgetting:
    """The outcome of a search for the scale of negation: what was chosen, and the validation accuracies it rests on.

    Scales are those of -tau, in rising order; accuracies (fractions) are of the task to forget and of the control task.
    """

    scale: float
    scales: tuple[float, ...]
    forgotten: tuple[float, ...]
    control: tuple[float, ...]
    keep: float

    @property
    def place(self) -> int:
        """The place of the chosen scale."""
        return self.scales.index(self.scale)


def choose_negation(
    scales: Sequence[float], forgotten: Sequence[float], control: Sequence[float], keep: float
) -> float:
    """Return the scale that forgets most while the control task keeps a share of its accuracy at scale 0.

    Ties go to the smaller scale. ``scales`` must hold 0, which always keeps all (arXiv 2212.04089, section 3).
    """
    floor = keep * control[list(scales).index(0.0)]
    trials = zip(forgotten, scales, control, strict=True)
    return min((accuracy, scale) for accuracy, scale, control_accuracy in trials if control_accuracy >= floor)[1]


def negate(
    backbone: Backbone,
    vector: Weights,
    tasks: tuple[Task, Task],
    heads: tuple[Head, Head],
    scales: str | Sequence[float] = "0:1:0.05",
    keep: float = 0.95,
    progress: Progress = no_progress,
) -> Forgetting:
    """Forget a task by theta_pre - scale * tau, while a control task keeps 95 % of its accuracy (arXiv 2212.04089).

    ``tasks`` and ``heads`` are those of the task to forget and of the control task; only their validation splits are
    looked at. Scales are 0 or more; 0 is tried in any case.
    """
    asked = parse_scales(scales) if isinstance(scales, str) else list(scales)
    if not all(scale >= 0 for scale in asked):
        raise TaskvecError(f"scales of negation are 0 or more, not {min(asked):g}", "negation puts the sign itself")
    if not 0 <= keep <= 1:
        raise TaskvecError(f"the control task cannot keep {keep:g} of its accuracy", "give a share from 0 to 1")
    grid = sorted({0.0, *asked})
    negated = vectors.scale(vector, -1.0)
    forgotten, control = (
        tuple(kept_curve(backbone, negated, task, head, grid, _half(progress, place)))
        for place, (task, head) in enumerate(zip(tasks, heads, strict=True))
    )
    return Forgetting(choose_negation(grid, forgotten, control, keep), tuple(grid), forgotten, control, keep)


def _half(progress: Progress, place: int) -> Progress:
    return lambda share: progress((place + share) / 2)


def analogy(tasks: Sequence[Task], task_vectors: Sequence[Weights]) -> Weights:
    """Return tau_a + (tau_b - tau_c): a is to the result as c is to b (arXiv 2212.04089, section 5).

    The three tasks, in the order a, b, c, must have the same classes, in any order: only then can one head serve them
    and the fourth task, whose images nobody trained on. Its scale is chosen as that of any merged vector.
    """
    if not len(tasks) == len(task_vectors) == 3:
        raise TaskvecError(f"an analogy has three task vectors, not {len(task_vectors)}", "give those of a, b and c")
    first = tasks[0]
    for other in tasks[1:]:
        if (first.kind, set(first.classes)) != (other.kind, set(other.classes)):
            raise TaskvecError(
                f"no analogy between '{first.name}' ({_labels(first)}) and '{other.name}' ({_labels(other)}): their "
                "labels differ, so no head fits both",
                "choose tasks with the same classes",
            )
    a, b, c = (vectors.matching(vector, task_vectors[0]) for vector in task_vectors)
    return a.with_flat(a.flat + (b.flat - c.flat))


def _labels(task: Task, most: int = 6) -> str:
    more = f" and {len(task.classes) - most} more" if len(task.classes) > most else ""
    return f"{task.kind}: {', '.join(task.classes[:most])}{more}"
