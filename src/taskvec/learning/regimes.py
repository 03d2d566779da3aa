"""The registry of fine-tuning regimes: what learns, from which head, and how reports speak of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Start = Literal["probed", "zero-shot", "random"]


@dataclass(frozen=True)
class Regime:
    """One regime of fine-tuning; only the record in ``REGIMES`` says what sets it apart from others.

    ``start`` is the head that training starts from. ``head_learns`` with the encoder, else the head is frozen. With
    ``lora`` low-rank adapters learn in the encoder's place, with the study's settings of that key. A ``linearised``
    encoder is its first-order expansion around the pre-trained weights. A ``joint`` regime trains one encoder on all
    tasks, with the heads of the aligned one. ``meaning`` explains it in reports.
    """

    name: str
    meaning: str
    start: Start = "probed"
    head_learns: bool = False
    lora: bool = False
    linearised: bool = False
    joint: bool = False

    @property
    def opens(self) -> bool:
        """Whether it starts from a zero-shot head, which needs a text tower and captions (open vocabulary)."""
        return self.start == "zero-shot"


REGIMES = {
    regime.name: regime
    for regime in (
        # Section 3.1 of the paper.
        Regime("aligned", "*Aligned*: the head is probed first and frozen, then the encoder is fine-tuned."),
        # Appendix G.
        Regime(
            "full", "*Full*: the encoder and a random head are fine-tuned together.", start="random", head_learns=True
        ),
        # Appendix H, twice.
        Regime(
            "open",
            "*Open*: the head comes from the class names and stays frozen, the encoder is fine-tuned.",
            start="zero-shot",
        ),
        Regime(
            "open-full",
            "*Open-full*: encoder and head are fine-tuned together, the head from the class names at first.",
            start="zero-shot",
            head_learns=True,
        ),
        Regime("joint", "*Joint* is one encoder fine-tuned on all tasks at once.", joint=True),
        # Task arithmetic in the tangent space, arXiv 2305.12827.
        Regime(
            "linearised",
            "*Linearised*: as aligned, of the encoder's first-order expansion around its pre-trained weights.",
            linearised=True,
        ),
        # LoRA, arXiv 2106.09685.
        Regime(
            "lora",
            "*LoRA*: as aligned, of adapters of low rank, whose product is added to the encoder's weights.",
            lora=True,
        ),
    )
}
