"""A study as a list of steps: who reads what. Nothing is loaded here but the addresses' identities."""

from __future__ import annotations

from taskvec.core.notes import note
from taskvec.engine.store import Store
from taskvec.learning.regimes import REGIMES
from taskvec.study.experiment import Experiment, SharedSteps
from taskvec.study.plan.disentanglement import disentanglement
from taskvec.study.plan.learning import finetune_all, make_heads
from taskvec.study.plan.loading import plan_backbone
from taskvec.study.plan.measuring import keep_model, negate, test_all
from taskvec.study.plan.merging import scale_per_task, try_method, unraced
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import RegimeChoice, StudyFile


def plan(file: StudyFile, store: Store, estimate: bool = False) -> list[Experiment]:
    """Return the steps of a study, by backbone, regime and seed; unknown addresses raise here, before any work.

    For an ``estimate`` no image is read: the paper's tasks need not be there, and the device of the study neither.
    """
    planner, study = Planner(file, store, estimate), file.study
    for exact in unraced(planner):
        note(exact)
    backbones = [plan_backbone(planner, name, choice) for name, choice in planner.backbones.items()]
    planner.sources.check_open()
    return [
        plan_experiment(planner, shared, regime, seed)
        for shared in backbones
        for regime in study.regimes
        if not REGIMES[regime.name].joint and planner.sources.takes_part(shared.choice, regime.name)
        for seed in regime.seeds or study.seeds
    ]


def plan_experiment(planner: Planner, shared: SharedSteps, regime: RegimeChoice, seed: int) -> Experiment:
    """Return the steps of one backbone, regime and seed."""
    opens = REGIMES[regime.name].opens
    captions = planner.sources.captions_for(shared.choice) if opens else {}
    chosen = tuple(t for t in planner.addresses if not opens or captions[t])
    first = seed == (regime.seeds or planner.study.seeds)[0]
    exp = Experiment(shared.backbone, regime.name, seed, chosen, shared.encoder, first)
    rates = make_heads(planner, exp, shared)
    finetune_all(planner, exp, shared, regime)
    for method in planner.study.methods:
        try_method(planner, exp, method, shared, rates)
    if first and planner.study.scales == "per-task":
        scale_per_task(planner, exp, shared)
    negate(planner, exp, shared)
    test_all(planner, exp, shared)
    keep_model(planner, exp, shared)
    if first and regime.disentanglement:
        disentanglement(planner, exp, shared)
    return exp
