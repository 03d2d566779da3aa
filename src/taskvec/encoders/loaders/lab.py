"""The lab's encoders, from the package or a file, at the end of their pre-training or along it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from taskvec.core.errors import TaskvecError
from taskvec.core.files import file_digest
from taskvec.data.images import Preprocessing
from taskvec.encoders.loaders.checkpoints import Reading, check_file, read_checkpoint, separate
from taskvec.encoders.loaders.requests import Family, Loaded, Outline, Request, State, Texts, no_projection
from taskvec.lab import encoders
from taskvec.weights.keys import CLASSIFIERS


def load(request: Request) -> Loaded:
    """Find one of the lab's encoders, in the package or in a file; ``random`` keeps its seeded random weights.

    ``NAME@STEP`` is pre-trained again up to that step of its run.
    """
    no_projection(request, "the lab's encoders end with their mean token")
    base, step = encoders.split_step(request.name)
    path = file_of(request, base)
    architecture, view = outline(request)

    def state(module: nn.Module) -> State | None:
        if step is None:
            return None if path is None else state_for(module, read_checkpoint(path, module.state_dict(), request.key))
        from taskvec.lab.pretraining.pretrain import snapshot

        return State(dict(snapshot(base, step).state_dict()))

    return Loaded(architecture, view, state, dict)


def outline(request: Request) -> Outline:
    """Return the architecture of one of the lab's encoders, and how it sees images."""
    options = encoders.options(encoders.split_step(request.name)[0]) | ({"size": request.size} if request.size else {})
    return {"family": "lab", "options": options}, lambda _: Preprocessing(size=options["size"])


def cost(request: Request) -> float:
    """Return the cost of loading an encoder in forward passes: much where it is trained up to a step."""
    return 10.0 + 200.0 * (encoders.split_step(request.name)[1] or 0)


def state_for(module: nn.Module, reading: Reading) -> State:
    """Return the tensors of a file for the module, without a classifier and what stands beside the encoder."""
    tensors, excluded = separate(reading.tensors, module.state_dict(), CLASSIFIERS)
    return State(tensors, (*excluded, *reading.unused))


def file_of(request: Request, base: str) -> Path | None:
    """Return the weights file: the one given, or the shipped one; None for random weights."""
    return check_file(request.file, request.allow_pickle) if request.file else encoders.path(base)


def identify(request: Request) -> dict[str, Any]:
    """Return the digest of the weights, and the recipe where they are trained again."""
    base, step = encoders.split_step(request.name)
    path = file_of(request, base)
    about: dict[str, Any] = {"content": file_digest(path) if path else None}
    if step is not None:  # the recipe counts and not only what came of it
        about["recipe"] = encoders.record(base)["recipe"]
    return about


def has_text(request: Request) -> bool:
    """Say whether an encoder comes with the text encoder that was trained together with it."""
    return not request.file and encoders.split_step(request.name)[1] is None and encoders.has_text(request.name)


def identify_text(request: Request) -> str:
    """Return the digest of the text encoder's file."""
    path = encoders.text_path(request.name)
    return file_digest(path) if path else ""


def texts(request: Request, captions: Sequence[str]) -> Texts:
    """Return the features of captions by the text encoder of the lab, and its logit scale."""
    from taskvec.lab.pretraining.contrastive import logit_scale, text_features

    return text_features(request.name, captions), logit_scale(request.name)


def build(options: dict[str, Any]) -> nn.Module:
    """Make the lab's small ViT."""
    from taskvec.lab.vit import VisionTransformer

    if set(options) != {"size", "patch", "width", "depth", "heads"}:
        what = f"the lab's encoder has size, patch, width, depth and heads, not {', '.join(sorted(options))}"
        raise TaskvecError(what, "restore the file that says so, or make it again")
    try:
        return VisionTransformer(**options)
    except ValueError as error:
        raise TaskvecError(
            f"the lab's encoder cannot be made for {options['size']} px: {error}", "choose a multiple of 8"
        ) from None


FAMILY = Family(
    (), load, build, identify, lambda _: "", has_text, identify_text, texts,
    outline=outline, cost=cost, reads_words=True,
)  # fmt: skip
