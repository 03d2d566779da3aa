"""Addresses of backbones, ``kind:name[@file]``: which kinds there are, and the paper's checkpoints by name.

Nothing is loaded here, not even torch, so that the command lists and refuses addresses at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from taskvec.core.errors import TaskvecError, did_you_mean, unknown
from taskvec.weights.formats import WEIGHT_SUFFIXES

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue that encoders were trained with."""

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "lab:NAME@STEP": "an encoder of the lab after so many steps of its pre-training",
        "timm:NAME": "any timm classifier without its head, with timm's own weights (cached, or downloaded)",
        "timm:NAME@FILE": "the same with weights from a file, in timm's keys",
        "hf:REPO": "a vision model of transformers from the Hugging Face hub (extra: hf)",
        "hf:FOLDER": "the same from a folder that save_pretrained wrote",
        "open_clip:MODEL@TAG": "a CLIP image tower with its projection, weights by open_clip's tag (extra: clip)",
        "open_clip:MODEL@FILE": "the same with weights from a file",
    }
)
"""The forms of address beside plain names, with what each gives."""
KINDS = ("lab", "timm", "hf", "open_clip", "paper")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the paper (Table 2): its address, and how it is to see images.

    ``shape`` is its transformer's width, depth and patch in pixels, and ``projection`` the width of CLIP's embedding.
    ``hub`` is repository and file where the address names an architecture only; ``timm`` is the model that a single
    file in timm's keys fits, where the address is of another kind.
    """

    address: str
    description: str
    mean: Channels
    std: Channels
    crop: float
    shape: tuple[int, int, int] = (768, 12, 16)
    projection: int = 0
    hub: tuple[str, str] | None = None
    timm: str = ""


SCALING = "laion/scaling-laws-openclip"
PAPER: Mapping[str, Checkpoint] = MappingProxyType(
    {
        "vit-b16-in1k": Checkpoint(
            "timm:vit_base_patch16_224.augreg_in1k", "ViT-B/16, supervised on ImageNet-1k (timm)", HALF, HALF, 0.9
        ),
        "vit-b16-in21k": Checkpoint(
            "timm:vit_base_patch16_224.augreg_in21k", "ViT-B/16, supervised on ImageNet-21k (timm)", HALF, HALF, 0.9
        ),
        "vit-b16-mae": Checkpoint(
            "timm:vit_base_patch16_224.mae", "ViT-B/16, masked autoencoder, ImageNet-1k (timm)", *IMAGENET, 0.9
        ),
        "vit-b16-dino": Checkpoint(
            "timm:vit_base_patch16_224.dino", "ViT-B/16, DINO, ImageNet-1k (timm)", *IMAGENET, 0.9
        ),
        "vit-b16-clip-400m": Checkpoint(
            "open_clip:ViT-B-16",
            "ViT-B/16, CLIP on LAION-400M, 34B samples (open_clip; a pickle)",
            *CLIP,
            1.0,
            projection=512,
            hub=(SCALING, "Model-B-16_Data-400M_Samples-34B_lr-1e-3_bs-88k.pt"),
        ),
        "vit-b16-clip-2b": Checkpoint(
            "open_clip:ViT-B-16",
            "ViT-B/16, CLIP on LAION-2B, 34B samples (open_clip; a pickle)",
            *CLIP,
            1.0,
            projection=512,
            hub=(SCALING, "Model-B-16_Data-2B_Samples-34B_lr-1e-3_bs-88k.pt"),
        ),
        "vit-l16-in21k": Checkpoint(
            "hf:google/vit-large-patch16-224-in21k",
            "ViT-L/16, supervised on ImageNet-21k (transformers)",
            HALF,
            HALF,
            1.0,
            shape=(1024, 24, 16),
            timm="vit_large_patch16_224.orig_in21k",
        ),
        "vit-l14-clip-2b": Checkpoint(
            "open_clip:ViT-L-14@laion2b_s32b_b82k",
            "ViT-L/14, CLIP on LAION-2B (open_clip)",
            HALF,
            HALF,
            1.0,
            shape=(1024, 24, 14),
            projection=768,
        ),
    }
)
"""The paper's checkpoints by the names of its rows (``paper.MODELS``)."""


def parse(address: str) -> tuple[str, str, str]:
    """Split ``kind:name[@file]``, or raise and say which kinds there are.

    ``lab:NAME@STEP`` keeps its step in the name, and an ``hf:`` folder whatever signs it has.
    """
    kind, colon, rest = address.partition(":")
    if not colon or not rest:
        raise TaskvecError(
            f"backbone address '{address}' is not of the form kind:name", "for example lab:supervised or timm:NAME@FILE"
        )
    if kind not in KINDS:
        raise TaskvecError(f"unknown kind of backbone '{kind}' in '{address}'", did_you_mean(kind, KINDS))
    name, _, after = rest.partition("@")
    if kind == "hf" or (kind == "lab" and after and not is_file(after)):
        return kind, rest, ""
    if kind == "paper" and name not in PAPER:
        raise unknown("checkpoint of the paper", name, PAPER)
    return kind, name, after


def is_file(after: str) -> bool:
    """Say whether what follows the @ of an address is a file: it has a path separator or a weight suffix."""
    return "/" in after or any(Path(name).suffix in WEIGHT_SUFFIXES for name in (after, after.rpartition("#")[0]))


def split_key(given: str) -> tuple[str, str]:
    """Split ``FILE#KEY``, which names a part of a file; where there is a file of the whole name, that is meant."""
    file, _, key = given.rpartition("#")
    known = not Path(given).expanduser().exists() and Path(file).expanduser().exists()
    return (file, key) if file and key and known else (given, "")


def default_name(address: str) -> str:
    """Return the name a backbone gets when none is given: without organisation or folder."""
    kind, name, _ = parse(address)
    return Path(name).name if kind == "hf" else name


def listing() -> dict[str, str]:
    """Return every form of address and the paper's names, with one line each."""
    return dict(FORMS) | {f"paper:{name}": checkpoint.description for name, checkpoint in PAPER.items()}
