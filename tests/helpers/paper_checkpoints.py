"""The paper's eight checkpoints at full size with seeded random weights, each written by its own library.

``python tests/helpers/paper_checkpoints.py ROOT`` writes them all into a hub cache (4 GB), and the paper's tasks as
tiny fixtures of the real formats, so that the paper's studies run with nothing downloaded:

    HF_HOME=ROOT/hub TASKVEC_DATA=ROOT/data HF_HUB_OFFLINE=1 taskvec run paper-table1 --smoke
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from taskvec.paper.checkpoints import PAPER, SCALING

Features = Callable[[torch.Tensor], torch.Tensor]
REVISION = "0" * 40
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def by_timm(name: str, classes: int, file: Path) -> Features:
    """Write a timm model's state."""
    import timm

    model = timm.create_model(name, num_classes=classes).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return lambda x: model.forward_features(x)[:, 0]


def by_transformers(model: str, config: str, folder: Path, **options: Any) -> Features:
    """Write the folder of a transformers model."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    made.save_pretrained(folder)
    encoder = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return lambda x: encoder(x).last_hidden_state[:, 0]


def by_open_clip(name: str, file: Path) -> Features:
    """Write an open_clip model as its training does (.pt), or as the hub has it (.safetensors)."""
    import open_clip

    model = open_clip.create_model(name, pretrained=None).eval()
    if file.suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return model.encode_image


def write_vit_l(folder: Path) -> Features:
    """Write google's ViT-L/16 with the file that says how it sees images."""
    import transformers

    transformers.ViTImageProcessor().save_pretrained(folder)
    return by_transformers("ViTModel", "ViTConfig", folder, **LARGE)


WRITERS: dict[str, tuple[str, str, Callable[[Path], Features]]] = {
    "vit-b16-in1k": (
        "timm/vit_base_patch16_224.augreg_in1k",
        "model.safetensors",
        lambda file: by_timm("vit_base_patch16_224.augreg_in1k", 1000, file),
    ),
    "vit-b16-in21k": (
        "timm/vit_base_patch16_224.augreg_in21k",
        "model.safetensors",
        lambda file: by_timm("vit_base_patch16_224.augreg_in21k", 21843, file),
    ),
    "vit-b16-mae": (
        "timm/vit_base_patch16_224.mae",
        "model.safetensors",
        lambda file: by_timm("vit_base_patch16_224.mae", 0, file),
    ),
    "vit-b16-dino": (
        "timm/vit_base_patch16_224.dino",
        "model.safetensors",
        lambda file: by_timm("vit_base_patch16_224.dino", 0, file),
    ),
    "vit-b16-clip-400m": (
        SCALING,
        "Model-B-16_Data-400M_Samples-34B_lr-1e-3_bs-88k.pt",
        lambda file: by_open_clip("ViT-B-16", file),
    ),
    "vit-b16-clip-2b": (
        SCALING,
        "Model-B-16_Data-2B_Samples-34B_lr-1e-3_bs-88k.pt",
        lambda file: by_open_clip("ViT-B-16", file),
    ),
    "vit-l16-in21k": ("google/vit-large-patch16-224-in21k", "", write_vit_l),
    "vit-l14-clip-2b": (
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "open_clip_model.safetensors",
        lambda file: by_open_clip("ViT-L-14", file),
    ),
}
"""Behind each row of the paper: the hub's repository, the file there (or all of the folder), and what writes it."""


def write_checkpoint(row: str, home: Path) -> tuple[Path, Features]:
    """Write a row's checkpoint into a hub cache; return the file or folder, and what the library computes from it."""
    repo, file, write = WRITERS[row]
    held = home / "hub" / f"models--{repo.replace('/', '--')}"
    (held / "refs").mkdir(parents=True, exist_ok=True)
    (held / "refs" / "main").write_text(REVISION)
    path = held / "snapshots" / REVISION / file
    (path.parent if file else path).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(sorted(PAPER).index(row))
    return path, write(path)


if __name__ == "__main__":
    import paper_layouts as layouts  # beside this file

    layouts.TRAIN, layouts.TEST = 4, 2  # of each class: eight encoders of this size see them
    root = Path(sys.argv[1])
    for row in PAPER:
        print(write_checkpoint(row, root / "hub")[0])
    layouts.write_all(root / "data")
