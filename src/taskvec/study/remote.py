"""What is known of tasks and checkpoints that are not on this machine, for plans of studies with them.

Nothing is read or asked of the network, and no optional library is needed.
"""

from __future__ import annotations

import os
from pathlib import Path

from taskvec.data import tasks
from taskvec.encoders.addresses import PAPER, is_file, parse
from taskvec.paper.tasks import TASKS, PaperTask

TAGS = {"open_clip:ViT-L-14@laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"}
"""Where open_clip's tags are on the Hub, which only open_clip itself could tell."""
UNKNOWN_IMAGES = 10_000
"""Images that a data set of the Hub is taken to have until it is here."""
UNKNOWN_CLASSES = 20
"""Classes of a task that does not tell, which only the time of linear heads depends on."""


def absent_task(address: str) -> PaperTask | None:
    """Return what is known of a task of the paper without looking at it, None for other tasks."""
    kind, _, rest = address.partition(":")
    return TASKS.get(rest.partition("@")[0]) if kind == "paper" else None


def has_images(address: str) -> bool:
    """Say whether a task's images can be on this machine: in a folder, or in the cache of the Hub's data sets."""
    dataset = tasks.hub_dataset(address)
    if dataset is None:
        return True
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home() / "datasets")
    return (cache / dataset.partition("@")[0].replace("/", "___")).is_dir()


def absent_weights(address: str) -> str:
    """Return the Hub's repository of a checkpoint of the paper that its cache here does not hold; else nothing."""
    kind, name, file = parse(address)
    if kind != "paper" or file:
        return ""
    repo = repository(name)
    cache = Path(os.environ.get("HF_HUB_CACHE") or home() / "hub")
    return "" if (cache / f"models--{repo.replace('/', '--')}").is_dir() else repo


def repository(name: str) -> str:
    """Return the Hub's repository of a checkpoint of the paper."""
    checkpoint = PAPER[name]
    if checkpoint.hub:
        return checkpoint.hub[0]
    kind, model, tag = parse(checkpoint.address)
    if tag and not is_file(tag):
        return TAGS[checkpoint.address]
    return model if kind == "hf" else f"timm/{model}"


def home() -> Path:
    """Return the folder of the Hub's caches."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
