"""Edit pre-trained image classifiers in weight space: probe, fine-tune, add task vectors, measure what is kept."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.core.errors import TaskvecError
    from taskvec.core.settings import Finetune, Probe
    from taskvec.data.tasks import Task, load_task
    from taskvec.deploy.model import MultiTaskModel, load
    from taskvec.encoders.backbone import Backbone, load_backbone
    from taskvec.evaluation.accuracy import evaluate, normalised_accuracy
    from taskvec.evaluation.disentanglement import disentanglement
    from taskvec.evaluation.scale_search import search_scale
    from taskvec.learning.finetuning import finetune, task_vector
    from taskvec.learning.heads import Head, fit_head
    from taskvec.merging.in_memory import merge
    from taskvec.weights.flat import Weights

_HOMES = {
    "Backbone": "encoders.backbone",
    "Finetune": "core.settings",
    "Head": "learning.heads",
    "MultiTaskModel": "deploy.model",
    "Probe": "core.settings",
    "Task": "data.tasks",
    "TaskvecError": "core.errors",
    "Weights": "weights.flat",
    "disentanglement": "evaluation.disentanglement",
    "evaluate": "evaluation.accuracy",
    "finetune": "learning.finetuning",
    "fit_head": "learning.heads",
    "load": "deploy.model",
    "load_backbone": "encoders.backbone",
    "load_task": "data.tasks",
    "merge": "merging.in_memory",
    "normalised_accuracy": "evaluation.accuracy",
    "search_scale": "evaluation.scale_search",
    "task_vector": "learning.finetuning",
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


_SHORT = {
    "taskvec.arithmetic": "taskvec.evaluation.negation",
    "taskvec.file_commands": "taskvec.command.weight_files",
    "taskvec.merging.parts": "taskvec.merging.entries",
    "taskvec.settings": "taskvec.core.settings",
    "taskvec.study_files": "taskvec.study.files",
    "taskvec.testing": "taskvec.merging.testing",
}
"""Short names of modules for users and their plugins, whatever wing the module lives in."""


class _ShortNames(MetaPathFinder, Loader):
    """Imports a module by its short name: the same module, not a copy."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _SHORT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(_SHORT[module.__name__])


sys.meta_path.append(_ShortNames())
