"""What is loaded once for all regimes of a backbone: the encoder, decoded tasks, cached features."""

from __future__ import annotations

from typing import Any

from taskvec.encoders import identity
from taskvec.engine.pipeline import Step
from taskvec.study.experiment import Ground
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import BackboneChoice
from taskvec.study.steps import loading as steps


def lay_ground(planner: Planner, name: str, choice: BackboneChoice) -> Ground:
    """Plan what all regimes of a backbone read."""
    encoder = load(planner, name, choice)
    view = planner.step(steps.preprocessing, f"preprocessing of {name}", {}, {"backbone": [encoder]})
    data = {t: decode(planner, t, name, view) for t in planner.addresses}
    whole = {t: decode_whole(planner, t, name, view) for t, a in planner.addresses.items() if a.source.has_whole}
    features = {t: cache_features(planner, t, name, encoder, data[t]) for t in data}
    return Ground(name, choice, encoder, data, features, whole)


def load(planner: Planner, name: str, choice: BackboneChoice) -> Step:
    """Plan to load a backbone; where an estimate does without its weights, by what its address is."""
    address = planner.sources.address_of(choice)
    about: dict[str, Any] = {"absent": address.absent, "address": str(address)}
    if not planner.sources.is_absent(choice):
        about = identity.describe(address, choice.size, planner.study.allow_pickle, choice.projection)
    config: dict[str, Any] = {"source": about, "size": choice.size}
    config |= {} if choice.projection is None else {"projection": choice.projection}
    config |= {"batch_norm": choice.batch_norm} if choice.batch_norm != "merged" else {}
    untracked = {"address": str(address), "name": name, "allow_pickle": planner.study.allow_pickle}
    return planner.step(steps.load_backbone, f"load {name}", config, None, identity.load_cost(address), untracked)


def decode(planner: Planner, task: str, backbone: str, view: Step) -> Step:
    """Plan the evaluation views of a task, as a backbone sees them."""
    label, cost = f"decode {task} ({backbone})", 0.8 * planner.images[task]
    config, untracked = planner.sources.source(planner.addresses[task], planner.about[task])
    return planner.step(steps.decode_task, label, config, {"preprocessing": [view]}, cost, untracked)


def decode_whole(planner: Planner, task: str, backbone: str, view: Step) -> Step:
    """Plan the whole training images of a task, which training cuts crops from."""
    label, cost = f"decode whole training images of {task} ({backbone})", 0.8 * planner.images[task]
    config, untracked = planner.sources.source(planner.addresses[task], planner.about[task])
    return planner.step(steps.decode_training, label, config, {"preprocessing": [view]}, cost, untracked)


def cache_features(planner: Planner, task: str, backbone: str, encoder: Step, data: Step) -> Step:
    """Plan the frozen encoder's features of a task."""
    inputs = {"backbone": [encoder], "task": [data]}
    return planner.step(
        steps.features, f"features of {task} ({backbone})", planner.device, inputs, planner.images[task]
    )
