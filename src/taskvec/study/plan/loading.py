"""What is loaded once for all regimes of a backbone: the encoder, decoded tasks, cached features."""

from __future__ import annotations

from typing import Any

from taskvec.encoders import identity
from taskvec.engine.pipeline import Config, Step
from taskvec.evaluation.precision import PREDICTED
from taskvec.study.artifacts import OnDevice
from taskvec.study.experiment import SharedSteps
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import BackboneChoice
from taskvec.study.steps import loading as steps


def plan_backbone(planner: Planner, name: str, choice: BackboneChoice) -> SharedSteps:
    """Plan what all regimes of a backbone read."""
    encoder = load(planner, name, choice)
    view = planner.step(steps.preprocessing, f"preprocessing of {name}", Config(), {"backbone": encoder})
    data = {t: decode(planner, t, name, view) for t in planner.addresses}
    whole = {t: decode_whole(planner, t, name, view) for t, a in planner.addresses.items() if a.source.has_whole}
    shared = SharedSteps(name, choice, encoder, data, {}, whole, choose_precision(planner, name, encoder, data))
    shared.features.update({t: cache_features(planner, t, shared) for t in data})
    return shared


def load(planner: Planner, name: str, choice: BackboneChoice) -> Step:
    """Plan to load a backbone; where an estimate does without its weights, by what its address is."""
    address, pickle = planner.sources.address_of(choice), planner.study.allow_pickle
    source: dict[str, Any] = {"absent": address.absent, "address": str(address)}
    if not planner.sources.is_absent(choice):
        source = identity.describe(address, choice.size, pickle, choice.projection)
    config = steps.BackboneConfig(
        source=source,
        size=choice.size,
        projection=choice.projection,
        batch_norm=choice.batch_norm,
        address=str(address),
        name=name,
        allow_pickle=pickle,
    )
    return planner.step(steps.load_backbone, f"load {name}", config, cost=identity.load_cost(address))


def decode(planner: Planner, task: str, backbone: str, view: Step) -> Step:
    """Plan the evaluation views of a task, as a backbone sees them."""
    label, inputs = f"decode {task} ({backbone})", {"preprocessing": view}
    return planner.step(steps.decode_task, label, decode_config(planner, task), inputs, 0.8 * planner.images[task])


def decode_whole(planner: Planner, task: str, backbone: str, view: Step) -> Step:
    """Plan the whole training images of a task, which training cuts crops from."""
    label, inputs = f"decode whole training images of {task} ({backbone})", {"preprocessing": view}
    return planner.step(steps.decode_training, label, decode_config(planner, task), inputs, 0.8 * planner.images[task])


def decode_config(planner: Planner, task: str) -> steps.DecodeConfig:
    """Return which images of a task are decoded."""
    study, address = planner.study, planner.addresses[task]
    return steps.DecodeConfig(
        source=planner.about[task], limit=study.limit, skip_corrupt=study.skip_corrupt, address=str(address)
    )


def choose_precision(planner: Planner, backbone: str, encoder: Step, data: dict[str, Step]) -> Step | None:
    """Plan the choice of the precision of passes; there is none where all are float32, as on a CPU."""
    wanted = planner.study.evaluation_precision
    if wanted == "float32" or not planner.device.startswith("cuda"):
        return None
    grids = [method.grid() for method in planner.study.methods]
    middle = max((grid[len(grid) // 2] for grid in grids), key=abs)
    scales = tuple(dict.fromkeys((*steps.NEAR, middle)))
    config = steps.PrecisionConfig(wanted=wanted, scales=scales, **planner.on(backbone))
    inputs = {"backbone": encoder, "tasks": list(data.values())}
    label = f"compare precisions of {backbone}"
    comparison = planner.step(steps.compare_precisions, label, config, inputs, 6 * PREDICTED)
    return planner.step(steps.choose_precision, f"precision of {backbone}", Config(), {"comparison": comparison})


def cache_features(planner: Planner, task: str, shared: SharedSteps) -> Step:
    """Plan the frozen encoder's features of a task."""
    config, inputs = OnDevice(**planner.on(shared.backbone)), {**shared.looks, "task": shared.data[task]}
    label = f"features of {task} ({shared.backbone})"
    return planner.step(steps.features, label, config, inputs, planner.images[task])
