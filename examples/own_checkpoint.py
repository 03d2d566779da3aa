"""Fine-tune a timm classifier in plain PyTorch, as one would without taskvec: a checkpoint for real-brought.yaml.

    python examples/own_checkpoint.py examples/real/ucidigits examples/real/ucidigits-own.safetensors

Encoder and head are trained together, 100 steps of 32 images by AdamW at 1e-3 from the weights of
efficientnet_lite.py. Images are seen as the model's own configuration says, which is how taskvec will see them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

STEPS, WARMUP, BATCH = 100, 10, 32


def main(folder: str, out: str) -> None:
    """Train, print the accuracy on the test folder, and write encoder and classifier with the names of the classes."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    see = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)})
    train, test = (ImageFolder(Path(folder) / split, see) for split in ("train", "test"))
    model.load_state_dict(load_file("examples/real/efficientnet_lite0.safetensors"))
    model.reset_classifier(len(train.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [WARMUP])
    step, batches = 0, DataLoader(train, BATCH, shuffle=True, drop_last=True)
    while step < STEPS:
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == STEPS:
                break
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(test, 256))
    print(f"{len(test)} test images, {100 * right / len(test):.1f} % right")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out, {"classes": json.dumps(train.classes)})


if __name__ == "__main__":
    main(*sys.argv[1:])
