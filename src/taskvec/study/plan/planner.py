"""What every part of a plan is given: the study, its sources, and how to make a step."""

from __future__ import annotations

from typing import Any

from taskvec.core.compute import choose_device, resolve_precision
from taskvec.core.notes import note
from taskvec.engine.pipeline import Step, StepType
from taskvec.engine.store import Store
from taskvec.learning.regimes import REGIMES
from taskvec.merging import plugins
from taskvec.study.experiment import Cell, Inputs
from taskvec.study.inputs import Sources
from taskvec.study.schema import StudyFile


class Planner:
    """A study on its way to steps; making one reads what its backbones and tasks are, and unknown addresses raise.

    ``backbones`` are the study's by name; ``about`` is the source of each task, and ``images`` about how many it has.
    """

    def __init__(self, file: StudyFile, store: Store, estimate: bool = False) -> None:
        self.study, self.plugins = file.study, plugins.use(file.plugins)
        for one in self.plugins:
            if not one.methods:
                note(f"plugin '{one.path}' registers no merging method")
            if beside := ", ".join(one.neighbours):
                note(f"plugin '{one.path}' imports {beside} from its folder: nothing tells when that changes")
        self.sources = Sources(file, store, estimate)
        device = file.study.device if estimate and file.study.device != "auto" else choose_device(file.study.device)
        self.device = {"device": device}
        self.addresses, self.brought = self.sources.addresses, self.sources.brought
        self.regimes = self.sources.regimes
        self.joint = self.regimes.get("joint")
        self.backbones = self.sources.backbones()
        self.sources.check_negation()
        self.about = {name: {"source": self.sources.describe(address)} for name, address in self.addresses.items()}
        self.images = {name: self._count(found["source"]) for name, found in self.about.items()}

    def step(
        self,
        type: StepType,
        label: str,
        config: dict[str, Any],
        inputs: Inputs | None = None,
        cost: float = 10,
        untracked: dict[str, Any] | None = None,
    ) -> Step:
        """Return a step with the study's threads; costs are in forward passes of one image.

        Which of several devices it runs on, and what its backbone is called, is no part of its identity.
        """
        inputs, untracked = inputs or {}, untracked or {}
        untracked |= {"name": inputs["backbone"][0].untracked["name"]} if "backbone" in inputs else {}
        if "device" in config:
            untracked |= {"device": config["device"]}
            config = config | {"device": config["device"].partition(":")[0]}
        return Step(label, type, config, inputs, self.study.threads, cost, untracked)

    def training(self, regime: str) -> dict[str, Any]:
        """Return what training steps are told: the device, and the precision that the study's setting means on it."""
        device, setting = self.device["device"], self.study.precision
        exact = REGIMES[regime].linearised and setting == "auto"
        return self.device | {"precision": "float32" if exact else resolve_precision(setting, device)}

    def on(self, cell: Cell) -> dict[str, Any]:
        """Return what steps that evaluate a cell's encoders are told: the device, and that they are linearised."""
        return self.device | cell.how.expansion

    def _count(self, source: dict[str, Any]) -> float:
        """Return about how many images a task has, for estimates of time."""
        return float(min(source["images"], 3 * (self.study.limit or source["images"])))
