"""Shared fixtures: tiny encoders and tasks, made in memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

try:
    from helpers import shapes
except ImportError:  # a machine with a GPU may lack what checks shapes
    shapes = None  # type: ignore[assignment]
else:
    shapes.install()  # before anything of the package is imported

import torch
from helpers.encoders import TinyEncoder
from helpers.tasks import colour_task

from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone, assemble

torch.set_num_threads(1)
pytest_plugins = ["helpers.cuda"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if shapes is not None:
        shapes.check_sample(item.nodeid)


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return assemble("tiny", TinyEncoder(), Preprocessing(size=8), {"family": "tiny", "options": {}}, "cpu")


@pytest.fixture
def tasks() -> list[Task]:
    return [colour_task("warm", 3, 1), colour_task("cold", 5, 2)]
