"""Shared fixtures: tiny encoders and tasks, made in memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers import shapes

shapes.install()  # before anything of the package is imported

import pytest
import torch
from helpers.encoders import TinyEncoder
from helpers.tasks import colour_task

from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone, assemble

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    shapes.check_sample(item.nodeid)


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return assemble("tiny", TinyEncoder(), Preprocessing(size=8), {"family": "tiny", "options": {}}, "cpu")


@pytest.fixture
def tasks() -> list[Task]:
    return [colour_task("warm", 3, 1), colour_task("cold", 5, 2)]
