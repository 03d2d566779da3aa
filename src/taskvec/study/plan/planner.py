"""What every part of a plan is given: the study, its inputs, and how to make a step."""

from __future__ import annotations

from typing import Any

from taskvec.core.compute import resolve_precision, study_device
from taskvec.core.errors import TaskvecError
from taskvec.core.notes import note
from taskvec.engine.pipeline import Config, Inputs, Step, StepType
from taskvec.engine.store import Store
from taskvec.learning.regimes import REGIMES
from taskvec.merging import plugins
from taskvec.study.inputs import StudyInputs
from taskvec.study.schema import StudyFile


class Planner:
    """A study on its way to steps; making one reads what its backbones and tasks are, and unknown addresses raise.

    ``backbones`` are the study's by name; ``about`` is the source of each task, and ``images`` about how many it has.
    """

    def __init__(self, file: StudyFile, store: Store, estimate: bool = False) -> None:
        self.study, self.plugins = file.study, plugins.use(file.plugins)
        for plugin in self.plugins:
            if not plugin.methods:
                note(f"plugin '{plugin.path}' registers no merging method")
            if beside := ", ".join(plugin.neighbours):
                note(f"plugin '{plugin.path}' imports {beside} from its folder: nothing tells when that changes")
        self.sources = StudyInputs(file, store, estimate)
        self.addresses, self.brought = self.sources.addresses, self.sources.brought
        setting = file.study.device
        device = setting if estimate and setting != "auto" else study_device(setting)
        self.device = device.partition(":")[0]  # which GPU it is, its worker is told by the environment
        check_precision(file.study.evaluation_precision, self.device)
        self.regimes = self.sources.regimes
        self.joint = self.regimes.get("joint")
        self.backbones = self.sources.backbones()
        self.sources.check_negation()
        self.about = {name: self.sources.describe(address) for name, address in self.addresses.items()}
        self.images = {name: self._count(source) for name, source in self.about.items()}

    def step(self, type: StepType, label: str, config: Config, inputs: Inputs | None = None, cost: float = 10) -> Step:
        """Return a step with the study's threads; costs are in forward passes of one image."""
        return Step(label, type, config, inputs or {}, self.study.threads, cost)

    def on(self, backbone: str, regime: str = "") -> dict[str, Any]:
        """Return what steps are told that look through a regime's encoder: the device, and that it is linearised."""
        return {
            "device": self.device,
            "backbone_name": backbone,
            "linearised": bool(regime) and REGIMES[regime].linearised,
        }

    def precision(self, regime: str) -> str:
        """Return the precision that the study's setting means on its device."""
        setting = self.study.precision
        exact = REGIMES[regime].linearised and setting == "auto"
        return "float32" if exact else resolve_precision(setting, self.device)

    def _count(self, source: dict[str, Any]) -> float:
        """Return about how many images a task has, for estimates of time."""
        return float(min(source["images"], 3 * (self.study.limit or source["images"])))


def check_precision(setting: str, device: str) -> None:
    """Raise where a device has not the precision that a study wants for evaluation."""
    if setting not in ("auto", "float32") and not device.startswith("cuda"):
        raise TaskvecError(
            f"evaluation_precision '{setting}' needs a CUDA GPU, and the study runs on '{device}'",
            "take auto, which is float32 there",
        )
