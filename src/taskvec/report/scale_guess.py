"""How well feature alignment (CKA) foretells the re-probed accuracy of scales, and what choosing by it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from taskvec.core.settings import coarse
from taskvec.merging.variants import Variant
from taskvec.report.texts import MISSING, method_label, plain_scale, points, seconds_text
from taskvec.report.views import View, costs_of

GUESSING = "The scale of re-probed heads by the agreement of features"
HOW_GUESSES_READ = (
    "Agreement is the linear CKA between the merged encoder's features and those of each fine-tuned encoder on "
    "unlabelled training images, mean over tasks. It is compared with the re-probed normalised validation accuracy "
    "at every fifth scale, which re-probing tries first. *Regret* is what the scale of highest agreement loses against "
    "the best one; its time has one fitting of heads in it, at the scale picked. Means over seeds."
)


@dataclass(frozen=True)
class Guess:
    """How well the agreement of features foretells the re-probed accuracy of a method's scales, as means over seeds.

    ``correlation`` is of ranks; ``regret`` what its choice loses on validation (a fraction of the individual models);
    ``seconds`` and ``instead_of`` what choosing the scale takes with it and by re-probing.
    """

    method: Variant
    correlation: float
    regret: float
    scale: float
    best: float
    seconds: float
    instead_of: float


def guesses(view: View, costs: pd.DataFrame) -> list[Guess]:
    """Check for every method whose features were compared how well agreement foretells re-probed validation accuracy.

    They are compared at the coarse scales, which are fixed beforehand: those that re-probing tries later lie around its
    own best, where no guess can be far off. Agreement picks the highest, ties go to the smaller.
    """
    rows = view.rows[(view.rows["heads"] == "reprobed") & (view.rows["task"] == "")]
    spent = costs_of(view, costs)
    alignment = rows[rows["metric"] == "agreement"]
    accuracy = rows[(rows["metric"] == view.normalised) & (rows["split"] == "validation")]
    curves = alignment.merge(accuracy, on=["variant", "seed", "config", "scale"], suffixes=("_foretold", "_reached"))
    grids = {str(name): sorted(group["scale"].unique()) for name, group in alignment.groupby("variant")}
    per_seed = [
        _guess(
            view.variants[str(name)],
            group.sort_values("scale"),
            grids[str(name)],
            spent[(spent["variant"] == name) & (spent["seed"] == seed)],
        )
        for (name, seed), group in curves.groupby(["variant", "seed"], sort=False)
    ]
    frame = pd.DataFrame(map(vars, per_seed), columns=list(Guess.__dataclass_fields__))
    means = frame.groupby("method", sort=False).mean()
    return [Guess(method, *map(float, row)) for method, row in zip(means.index, means.to_numpy(), strict=True)]


def _guess(method: Variant, tried: pd.DataFrame, grid: list[float], costs: pd.DataFrame) -> Guess:
    """Compare the two curves of one seed at the coarse scales of a grid, in rising order of the scale.

    A scale that agreement has picked still needs its heads: one fitting of as many as there are scales tried beside 0.
    """
    coarse_rows = tried[tried["scale"].isin(coarse(grid))]
    foretold, reached = (coarse_rows[f"value_{name}"].reset_index(drop=True) for name in ("foretold", "reached"))
    scales = coarse_rows["scale"].reset_index(drop=True)
    picked, best = int(foretold.to_numpy().argmax()), int(reached.to_numpy().argmax())
    spent = costs.set_index("heads")["search_seconds"]
    fitting = float(spent.get("reprobed", math.nan))
    seconds = float(spent.get("agreement", math.nan)) + fitting / max(1, int((tried["scale"] != 0).sum()))
    regret = float(reached[best] - reached[picked])
    correlation = float(foretold.rank().corr(reached.rank())) if len(scales) > 1 else math.nan
    return Guess(method, correlation, regret, float(scales[picked]), float(scales[best]), seconds, fitting)


def guess_table(guesses: Sequence[Guess]) -> pd.DataFrame:
    """Put each method in one row: rank correlation, regret in points, both scales, both times, and what is saved."""
    return pd.DataFrame([_guess_row(guess) for guess in guesses])


def _guess_row(guess: Guess) -> dict[str, str]:
    saved = 1 - guess.seconds / guess.instead_of if guess.instead_of else math.nan
    return {
        "Method": method_label(guess.method),
        "Rank correlation": MISSING if math.isnan(guess.correlation) else f"{guess.correlation:+.2f}",
        "Regret (points)": points(guess.regret),
        "λ: by agreement": plain_scale(guess.scale),
        "λ: by re-probing": plain_scale(guess.best),
        "Time (s): by agreement": seconds_text(guess.seconds),
        "Time (s): by re-probing": seconds_text(guess.instead_of),
        "Time saved (%)": MISSING if math.isnan(saved) else f"{100 * saved:.0f}",
    }
