"""The study file: defaults, short forms, and errors that say the line."""

from __future__ import annotations

import pytest

from taskvec.errors import TaskvecError
from taskvec.settings import Heatmap, parse_scales
from taskvec.study_files import open_study, packaged, parse_study

SMALL = "backbones: ['lab:supervised']\ntasks: ['lab:greek', {address: 'lab:signs', name: s}]\n"
BACKBONE = "backbones: [{{address: 'lab:supervised', {}}}]\ntasks: ['lab:greek']\n"


def test_everything_but_backbones_and_tasks_has_a_default() -> None:
    study = parse_study(SMALL, "my study.yaml")
    assert study.name == "my-study"
    assert [task.address for task in study.tasks] == ["lab:greek", "lab:signs"]
    assert study.methods[0].grid() == [round(0.05 * i, 10) for i in range(21)]
    assert (study.probe.steps, study.probe.batch_size, study.finetune.warmup) == (2000, 128, 200)
    assert study.heads == ("kept", "reprobed")


def test_every_packaged_study_is_valid_and_says_what_to_expect() -> None:
    for name, text in packaged().items():
        assert open_study(name).study.name == name
        top = text.split("\nname:")[0]
        assert f"taskvec run {name}" in top
        assert "Expected" in top
        assert "Time" in top


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "finetune: {stepz: 3}", r"line 3: unknown key 'finetune.stepz'\ndid you mean 'steps'"),
        (SMALL + "regime: [aligned]", r"line 3: unknown key 'regime'\ndid you mean 'regimes'"),
        (SMALL + "probe:\n  steps: many", r"line 4: 'probe.steps'.*many"),
        (SMALL + "methods: [task_aritmetic]", "did you mean 'task_arithmetic'"),
        (SMALL + "regimes: [alined]", "did you mean 'aligned'"),
        (SMALL + "methods: [{name: task_arithmetic, scales: 0-1}]", "start:stop:step"),
        (SMALL + "methods: [{name: task_arithmetic, scales: 0.5}]", "start:stop:step or a list"),
        (SMALL + "methods: [{name: task_arithmetic, scales: [.nan]}]", "finite number"),
        (SMALL + "methods: [{name: task_arithmetic, scales: '0:inf:1'}]", "'0:inf:1' is not start:stop:step"),
        (SMALL + "methods: [{name: task_arithmetic, scales: '0:1:0.6'}]", "do not end at stop"),
        (SMALL + "methods: [task_arithmetic, task_arithmetic]", "task_arithmetic is given twice"),
        (SMALL + "seeds: [1, 1]", "1 is given twice"),
        (SMALL + "heads: [kept, kept]", "kept is given twice"),
        (SMALL + "seeds: [99999999999999999999999]", "line 3: 'seeds.0'"),
        (SMALL + "finetune: {weight_decay: .inf}", "line 3: 'finetune.weight_decay'"),
        (SMALL + "device: meta", "line 3: 'device'"),
        (SMALL + "heads: [both]", "line 3: 'heads.0'"),
        (SMALL + "name: a/b", "line 3: 'name'"),
        (SMALL + "seeds: []", "line 3: 'seeds'"),
        (SMALL + "regimes: [{name: aligned, seeds: [0, 0]}]", "0 is given twice"),
        (SMALL + "regimes: [aligned, {name: joint, seeds: [3]}]", "joint has seed 3, which aligned has not"),
        (SMALL + "scales: per-task\nheads: [reprobed]", "per-task scales are those of task_arithmetic with kept heads"),
        (SMALL + "subsets: {sizes: [3]}", "s.yaml: subsets has sets of 3 tasks, and there are 2"),
        (SMALL + "heatmap: {range: 0.5}", "heatmap.range"),
        (BACKBONE.format("regimes: [full]"), "names the regime 'full', which the study does not run"),
        (BACKBONE.format("learning_rates: {full: 0.1}"), "names the regime 'full', which the study does not run"),
        (BACKBONE.format("paper: vit-b16-dno"), "did you mean 'vit-b16-dino'"),
        (BACKBONE.format("regimes: [joint]") + "regimes: [aligned, joint]", "takes part in joint and not in aligned"),
        ("tasks: ['lab:greek']", "'backbones' is missing"),
        ("backbones: [\ntasks: x", "line 2: not valid YAML"),
        ("a: 1\na: 2", "line 2.*given twice"),
        ("just words", "a study is a mapping"),
        ("", "a study is a mapping"),
        (SMALL + "backbones: ['lab:random']", "line 3.*'backbones' is given twice"),
        (SMALL + "tasks_: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_say_where_and_how_to_mend_them(text: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        parse_study(text, "s.yaml")


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(TaskvecError, match="did you mean 'quickstart'"):
        open_study("quickstrat")
    with pytest.raises(TaskvecError, match="no study file at 'nowhere.yaml'"):
        open_study("nowhere.yaml")


def test_scales_have_both_ends_and_no_drift() -> None:
    assert parse_scales("0:1:0.05")[3] == 0.15
    assert parse_scales("0:3:0.1")[-1] == 3.0
    assert parse_scales("-0.9:0.9:0.3") == [-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9]
    assert str(parse_scales("-0.9:0.9:0.3")[3]) == "0.0"
    assert Heatmap(points=11, range=3).scales() == [-3.0, -2.4, -1.8, -1.2, -0.6, 0.0, 0.6, 1.2, 1.8, 2.4, 3.0]


def test_smoke_shortens_any_study() -> None:
    study = parse_study(SMALL, "s.yaml").smoke()
    assert (study.probe.steps, study.finetune.steps, study.limit, study.name) == (2, 2, 32, "s-smoke")
    assert (study.finetune.batch_size, study.methods[0].grid()) == (4, [0.0, 0.5, 1.0])
    heat, sets = study.heatmap, study.subsets
    assert (heat.pairs, heat.points, heat.samples, sets.limit, sets.samples, sets.points) == (2, 3, 8, 3, 8, 1)
    methods = "methods: [adamerging, fisher, {name: wudi, config: {learning_rate: [1.0e-4, 1.0e-3]}}]"
    regimes = "seeds: [3, 4]\nregimes: [aligned, {name: full, seeds: [3, 4]}]\nagreement: 512"
    costly = f"{methods}\n{regimes}\nbackbones: ['lab:mae']\ntasks: ['lab:greek', 'lab:street']"
    short = parse_study(costly, "s.yaml").smoke()
    assert (short.seeds, short.regimes[1].seeds, short.agreement) == ((3,), (3,), 8)
    configs = [one.config for one in short.methods]
    assert configs == [{"steps": 2}, {"examples": 8}, {"learning_rate": 1e-4, "steps": 2}]
    searched = "finetune: {batch_size: 128, accumulate: 16, learning_rates: [1.0e-6, 1.0e-5, 1.0e-4]}"
    text = f"{searched}\nbackbones: ['lab:mae']\ntasks: ['lab:greek']"
    tuned = parse_study(text, "s.yaml").smoke().finetune
    assert (tuned.learning_rates, tuned.batch_size, tuned.accumulate) == ((1e-6, 1e-5), 4, 1)
    text = "backbones: ['lab:mae@400', {address: 'lab:mae@1', name: early}, 'lab:mae']\ntasks: ['lab:greek']"
    shortened = [(one.address, one.name) for one in parse_study(text, "s.yaml").smoke().backbones]
    assert shortened == [("lab:mae@2", "mae@400"), ("lab:mae@1", "early"), ("lab:mae", "")]


def test_yes_and_no_are_no_numbers() -> None:
    for key in (
        "probe: {steps: true}",
        "limit: true",
        "methods: [{name: ties, config: {keep: true}}]",
    ):
        with pytest.raises(TaskvecError, match="true|True|bool"):
            parse_study(f"{key}\nbackbones: ['lab:mae']\ntasks: ['lab:greek']", "s.yaml")
