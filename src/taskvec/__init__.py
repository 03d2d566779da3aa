"""Edit pre-trained image classifiers in weight space: probe, fine-tune, add task vectors, measure what is kept."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.backbones import Backbone, load_backbone
    from taskvec.disentangling import disentanglement
    from taskvec.errors import TaskvecError
    from taskvec.evaluation import evaluate, normalised_accuracy
    from taskvec.finetuning import finetune, task_vector
    from taskvec.heads import Head, fit_head
    from taskvec.model import MultiTaskModel, load
    from taskvec.search import merge, search_scale
    from taskvec.settings import Finetune, Probe
    from taskvec.tasks import Task, load_task
    from taskvec.weights import Weights

_HOMES = {
    "Backbone": "backbones",
    "Finetune": "settings",
    "Head": "heads",
    "MultiTaskModel": "model",
    "Probe": "settings",
    "Task": "tasks",
    "TaskvecError": "errors",
    "Weights": "weights",
    "disentanglement": "disentangling",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "fit_head": "heads",
    "load": "model",
    "load_backbone": "backbones",
    "load_task": "tasks",
    "merge": "search",
    "normalised_accuracy": "evaluation",
    "search_scale": "search",
    "task_vector": "finetuning",
}

__all__ = [
    "Backbone",
    "Finetune",
    "Head",
    "MultiTaskModel",
    "Probe",
    "Task",
    "TaskvecError",
    "Weights",
    "disentanglement",
    "evaluate",
    "finetune",
    "fit_head",
    "load",
    "load_backbone",
    "load_task",
    "merge",
    "normalised_accuracy",
    "search_scale",
    "task_vector",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import taskvec`` takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec' has no attribute '{name}'")
    return getattr(importlib.import_module(f"taskvec.{_HOMES[name]}"), name)
