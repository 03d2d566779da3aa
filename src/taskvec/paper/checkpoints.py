"""The paper's checkpoints by name: where each is, how it sees images, and the shape of its transformer.

Nothing is read here, and no library is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue that encoders were trained with."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the paper (Table 2): its address, and how it is to see images.

    ``shape`` is its transformer's width, depth and patch in pixels, and ``projection`` the width of CLIP's embedding.
    ``repo`` is its repository on the Hub where the address does not name it, and ``file`` the file there where the
    address names an architecture only; ``timm`` is the model that a single file in timm's keys fits, where the address
    is of another kind.
    """

    address: str
    description: str
    mean: Channels
    std: Channels
    crop: float
    shape: tuple[int, int, int] = (768, 12, 16)
    projection: int = 0
    repo: str = ""
    file: str = ""
    timm: str = ""

    @property
    def repository(self) -> str:
        """Return its repository on the Hub."""
        kind, _, name = self.address.partition(":")
        return self.repo or (f"timm/{name}" if kind == "timm" else name)

    @property
    def has_text(self) -> bool:
        """Say whether it has a text tower: it is CLIP's."""
        return self.projection > 0


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
            repo=SCALING,
            file="Model-B-16_Data-400M_Samples-34B_lr-1e-3_bs-88k.pt",
        ),
        "vit-b16-clip-2b": Checkpoint(
            "open_clip:ViT-B-16",
            "ViT-B/16, CLIP on LAION-2B, 34B samples (open_clip; a pickle)",
            *CLIP,
            1.0,
            projection=512,
            repo=SCALING,
            file="Model-B-16_Data-2B_Samples-34B_lr-1e-3_bs-88k.pt",
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
            repo="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        ),
    }
)
"""The paper's checkpoints by the names of its rows (``paper.numbers.MODELS``)."""
