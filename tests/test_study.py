"""The study file: defaults, short forms, and errors that say the line."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Heatmap, parse_scales
from taskvec.study.files import open_study, packaged, parse_study
from taskvec.study.schema import Study

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
        study, smoke = open_study(name).study, open_study(name).study.smoke()
        assert study.name == name
        assert Study.model_validate(smoke.model_dump(exclude_defaults=True)) == smoke
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
        (SMALL + "name: con", "line 3: 'name': a name that is kept for devices by Windows"),
        (SMALL + f"name: {'x' * 300}", "line 3: 'name': a name that has 300 bytes, more than 100"),
        (SMALL + "seeds: []", "line 3: 'seeds'"),
        (SMALL + "regimes: [{name: aligned, seeds: [0, 0]}]", "0 is given twice"),
        (SMALL + "regimes: [aligned, {name: joint, seeds: [3]}]", "joint has seed 3, which aligned has not"),
        (SMALL + "scales: per-task\nheads: [reprobed]", "per-task scales are those of task_arithmetic with kept heads"),
        (SMALL + "subsets: {sizes: [3]}", "s.yaml, line 3: subsets has sets of 3 tasks, and there are 2"),
        (SMALL + "heatmap: {range: 0.5}", "heatmap.range"),
        (BACKBONE.format("regimes: [full]"), "names the regime 'full', which the study does not run"),
        (BACKBONE.format("learning_rates: {full: 0.1}"), "names the regime 'full', which the study does not run"),
        (BACKBONE.format("paper: vit-b16-dno"), "did you mean 'vit-b16-dino'"),
        (BACKBONE.format("regimes: [joint]") + "regimes: [aligned, joint]", "takes part in joint and not in aligned"),
        ("tasks: ['lab:greek']", "'backbones' is missing"),
        ("backbones: [\ntasks: x", "line 1: not valid YAML: a bracket that nothing closes"),
        ("a: 1\na: 2", "line 2.*given twice"),
        ("just words", "a study is a mapping"),
        ("", "a study is a mapping"),
        (SMALL + "backbones: ['lab:random']", "line 3.*'backbones' is given twice"),
        (SMALL + "tasks_: !!python/object/apply:os.system ['true']", "line 3: the tag '.*os.system' is not known here"),
    ],
)
def test_mistakes_say_where_and_how_to_mend_them(text: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        parse_study(text, "s.yaml")


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
HUGE = ", ".join(f"0.{index:04}" for index in range(1, 200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS + SMALL, "more than 20,000 values, with every alias written out"),
        (MERGES + SMALL, "more than 20,000 values, with every alias written out"),
        ("a: &a [*a]\n" + SMALL, "line 1: nested more than 20 deep"),
        (SMALL + "notes: " + "[" * 5000 + "]" * 5000, "line 3: nested more than 20 deep"),
        (SMALL + "notes:\n" + "".join(" " * i + "-\n" for i in range(1, 300)), "nested more than 20 deep"),
        (SMALL + f"seeds: [{'9' * 5000}]", "line 3: a number of 5,000 characters"),
        (SMALL + f"limit: {'9' * 30}", "line 3: 'limit': should be less than or equal to 1000000000"),
        (SMALL + f"notes: [{'x' * 20_000}]", "line 3: a text of 20,000 characters"),
        (SMALL + 'notes: ["\\ud800"]', r"line 3: a character U\+D800 is no text"),
        (SMALL + 'notes: ["\\0"]', r"line 3: a character U\+0000 is no text"),
        (SMALL + "notes: [\0]", r"line 3: a character U\+0000 is no text"),
        (SMALL + "limit: !!int three", "line 3: the tag 'tag:yaml.org,2002:int' is not known"),
        (SMALL + "probe: {steps: 3, steps: 4}", "line 3: the key 'steps' is given twice, first on line 3"),
        (SMALL + "seeds: [1]\n\nseeds: [2]", "line 5: the key 'seeds' is given twice, first on line 3"),
        (SMALL + "probe:\n\tsteps: 3", "line 4: not valid YAML.*\nindent with spaces"),
        (SMALL + "---\n" + SMALL, "line 3: not valid YAML: a study is one document"),
        (SMALL + "? [a]\n: 3", "line 3: a key is a list or a mapping, where a word belongs"),
        (SMALL + "12: 3", "line 3: a key is a number, where a word belongs"),
        ("- a\n- b", "a study is a mapping"),
        (SMALL + f"methods: [{{name: dare+ties, config: {{drop: [{HUGE}], keep: [{HUGE}]}}}}]", "39,601 combinations"),
        (SMALL + f"methods: [{{name: ties, scales: [{', '.join([HUGE] * 10)}]}}]", "1,990 scales; give at most 1001"),
        (SMALL + "methods: [{name: ties, scales: '0:1:0.0000001'}]", "at most 1001 scales"),
        (SMALL + f"seeds: {list(range(5000))}", "'seeds': has 5000, at most 100 belong here"),
        (SMALL + "subsets: {sizes: all, limit: 100000000}", "'subsets.limit': should be less than or equal to 10000"),
    ],
)
def test_study_files_are_read_within_bounds(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(TaskvecError, match=message):
        parse_study(text, "s.yaml")
    assert time.process_time() - began < 5  # a bomb takes minutes


def test_yaml_is_read_as_it_is_written() -> None:
    text = (
        "backbones: ['lab:mae']\ntasks: [{address: 'lab:greek', name: 007}, {address: 'lab:signs', name: 2024-01-01}]"
    )
    study = parse_study(text + "\nmethods: [{name: ties, scales: 0:1:0.5}]\nlimit: 010\nallow_pickle: yes", "s.yaml")
    assert [task.name for task in study.tasks] == ["007", "2024-01-01"]
    assert (study.methods[0].grid(), study.limit, study.allow_pickle) == ([0, 0.5, 1], 10, True)
    shared = f"{SMALL}probe: &few {{steps: 3, warmup: 1}}\nfinetune: {{<<: *few, steps: 5}}"
    study = parse_study(shared, "s.yaml")
    assert (study.probe.steps, study.finetune.steps, study.finetune.warmup) == (3, 5, 1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{address: 'lab:signs', name: no}", "line 2: 'tasks.1.name': YAML reads no as yes or no.*\nput it.*: \"no\""),
        ("{address: 'lab:signs', name: 12}", "line 2: 'tasks.1.name': YAML reads 12 as a number.*\nput it.*: \"12\""),
        ("{address: 'lab:signs', name: ~}", "line 2: 'tasks.1.name': YAML reads ~ as nothing"),
        ("{address: x, head: h, finetuned: f, classes: [yes, No]}", "line 2: 'tasks.1.classes.1': YAML reads No as"),
        ("off", "line 2: 'tasks.1': YAML reads off as yes or no.*\nput it in quotes: \"off\""),
    ],
)
def test_text_that_yaml_reads_as_something_else_wants_quotes(task: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        parse_study(f"backbones: ['lab:mae']\ntasks: ['lab:greek', {task}]", "s.yaml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("heatmap: false", r"'heatmap': should be a mapping \(given: false\)"),
        ("heatmap:", r"'heatmap': should be a mapping \(given: nothing\)"),
        ("probe: 2000", r"'probe': should be a mapping \(given: 2000\)"),
        ("regimes: full", r"'regimes': should be a list .*\nput it in brackets: \[full\]"),
        ("methods: [TIES]", "'TIES'; did you mean 'ties'\\?"),
        ("methods: [{name: ties, density: 0.2}]", r"\nhyperparameters belong in config: {density: ...}"),
        ("steps: 100", r"unknown key 'steps'\nit belongs in surgery or probe or finetune"),
        ("workers: 2", r"unknown key 'workers'\nit is an option of the command: --workers"),
        ("device: gpu", r"'device': should be auto, cpu, cuda, cuda:N or mps \(given: 'gpu'\)"),
        ("name: my study", "'name': should have letters"),
        ("allow_pickle: maybe", "'allow_pickle': should be true or false"),
        ("notes: ['a", "line 3: not valid YAML: a quotation mark that nothing closes"),
        ("data: @x", "line 3: not valid YAML: text that begins with '@' needs quotes"),
        ("data: a: b", "line 3: not valid YAML: a second ': '"),
        ("  data: a", "line 3: not valid YAML: it is indented otherwise"),
        ("data: *x", "line 3: not valid YAML: an alias .* no anchor .* 'x'"),
    ],
)
def test_a_newcomers_mistakes_are_told_in_plain_words(more: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        parse_study(SMALL + more, "s.yaml")


def test_all_mistakes_are_told_at_once() -> None:
    text = """
backbones: ['lab:supervised']
tasks: [{adress: lab:greek}, {address: lab:signs, nam: s}]
probe: {stepz: 3, steps: many}
regimes: [alined]
methods: [tise]
"""
    with pytest.raises(TaskvecError) as caught:
        parse_study(text, "s.yaml")
    assert caught.value.problem.splitlines() == [
        "s.yaml has 6 mistakes:",
        "  line 3: unknown key 'tasks.0.adress'; did you mean 'address'?",
        "  line 3: unknown key 'tasks.1.nam'; did you mean 'name'?",
        "  line 4: 'probe.steps': should be a whole number (given: 'many')",
        "  line 4: unknown key 'probe.stepz'; did you mean 'steps'?",
        "  line 5: 'regimes.0': unknown regime 'alined'; did you mean 'aligned'?",
        "  line 6: 'methods.0': unknown merging method 'tise'; did you mean 'ties' or 'fisher'?",
    ]
    idle = SMALL + "subsets: {sizes: [3, 4]}\nlora: {rank: 3}"
    with pytest.raises(
        TaskvecError, match=r"3 mistakes:\n  line 3: .* 3 tasks.*\n  line 3: .* 4 tasks.*\n  line 4: lora"
    ):
        parse_study(idle, "s.yaml")
    with pytest.raises(TaskvecError, match=r"30 mistakes:(\n  line \d+: unknown key 'k\d+'){10}\n  and 20 more\n"):
        parse_study(SMALL + "".join(f"k{index}: 1\n" for index in range(30)), "s.yaml")
    with pytest.raises(
        TaskvecError, match=r"^s.yaml, line 1: unknown key 'backbones.0.adress'\ndid you mean 'address'"
    ):
        parse_study("backbones: [{adress: 'lab:mae'}]\ntasks: ['lab:greek']", "s.yaml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "finetune: {batch_size: 100, accumulate: 8}",
            "a batch of 100 cannot be split evenly into 8.*accumulate 5 can",
        ),
        ("finetune: {batch_size: 4, accumulate: 8}", "a batch of 4 cannot be split evenly into 8.*accumulate 4 can"),
        (
            "finetune: {batch_size: 8, accumulate: 8}\nregimes: [aligned, joint]",
            "joint needs an image of each of 2 tasks",
        ),
        ("finetune: {learning_rates: [1.0e-3, 1.0e-3]}", "learning_rates': 0.001 is given twice"),
        ("probe: {learning_rates: [0.1, .nan]}", "learning_rates.1': should be"),
        ("probe: {learning_rates: [0.1, true]}", "learning_rates is true, where a number belongs"),
        ("seeds: [0, true]", "seeds is true, where a number belongs"),
        ("methods: [{name: ties, scales: '1:0:0.1'}]", "start <= stop"),
        ("methods: [{name: ties, scales: '0:1:0'}]", "step > 0"),
        ("methods: [dare+ties, 'dare + ties']", r"dare\+ties is given twice"),
        ("heatmap: {points: 10}", "an even number of points leaves out 0; give 9 or 11"),
        ("heatmap: {pairs: 5}", "line 3: heatmap has 5 pairs of tasks, of which there are at most 1"),
        ("negation: {forget: s, control: s}", "cannot be forgotten and be the control"),
        ("negation: {forget: s, control: t, scales: '0-1'}", "'0-1' is not start:stop:step"),
        ("threads: 1000000", "line 3: 'threads'"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(more: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        parse_study(SMALL + more, "s.yaml")


NAMES = [
    "a+b",
    "a/b",
    "..",
    ".x",
    "x.",
    " x",
    "CON",
    "nul.txt",
    "x" * 101,
    "é" * 51,
    "a\\b",
    "a\nb",
    "a\u202eb",
    "a:b",
    "*",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_some_file_system_refuses_are_refused_when_the_study_is_read(name: str) -> None:
    for kind, other in (("backbones", "tasks"), ("tasks", "backbones")):
        text = json.dumps({kind: [{"address": "lab:mae", "name": name}], other: ["lab:mae"]})
        with pytest.raises(TaskvecError, match=f"'{kind}.0.name': a name that .* cannot stand in tables"):
            parse_study(text, "s.yaml")


def test_names_that_a_file_system_takes_for_one_are_refused() -> None:
    for first, second, message in (
        ("pets", "pets", "two are named 'pets'"),
        ("Pets", "pets", "'Pets' and 'pets' are one name to some disks"),
        ("caf\u00e9", "cafe\u0301", "are one name to some disks"),
    ):
        for kind, other in (("tasks", "backbones"), ("backbones", "tasks")):
            chosen = [{"address": "lab:x", "name": name} for name in (first, second)]
            with pytest.raises(TaskvecError, match=message):
                parse_study(json.dumps({kind: chosen, other: ["lab:mae"]}), "s.yaml")
    for name in ("bird songs", "Vögel", "نمی\u200cخواهم", "🦜", "vit-b16@400", "a.b"):
        text = json.dumps({"tasks": [{"address": "lab:greek", "name": name}], "backbones": ["lab:mae"]})
        assert parse_study(text, "s.yaml").tasks[0].name == name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SMALL.encode("utf-16"), "is UTF-16, not UTF-8 text"),
        (SMALL.encode() + "notes: [é]".encode("latin-1"), "line 3, is not UTF-8 text"),
        (bytes(range(256)), "is not UTF-8 text"),
        (b"# " + b"x" * 200_000, "more than 100,000 bytes"),
        (b"", "a study is a mapping"),
    ],
)
def test_files_that_are_no_study_are_told(tmp_path: Path, data: bytes, message: str) -> None:
    place = tmp_path / "s.yaml"
    place.write_bytes(data)
    with pytest.raises(TaskvecError, match=message):
        open_study(str(place))


def test_what_is_no_file_is_told_and_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, message in (
        ("pipe", "no regular file"),
        ("folder", "a folder"),
        ("none", "no study file"),
        ("a\0", "no st"),
    ):
        with pytest.raises(TaskvecError, match=message):
            open_study(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(TaskvecError, match="cannot use"):
        open_study("x" * 5000 + ".yaml")
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert open_study(str(tmp_path / "s.yaml")).text == SMALL


PIECES = [
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    "-",
    "'",
    '"',
    "&a",
    "*a",
    "<<: *a",
    "!!set",
    "|",
    ">",
    "\t",
    "\n",
    "  ",
    "#",
    "---\n",
    "~",
]
PIECES += [
    "\0",
    "\ud800",
    "\ufeff",
    "\u2028",
    "é",
    "no",
    "1e999",
    ".nan",
    "-1",
    "0",
    "9" * 50,
    "0:1:0.5",
    "2024-01-01",
    "%",
]


def mutated(text: str, generator: random.Random) -> str:
    """Cut, repeat, swap or put in a few pieces of a study file."""
    for _ in range(generator.randint(1, 6)):
        start, stop = sorted(generator.randrange(len(text) + 1) for _ in range(2))
        stop = min(stop, start + 40)
        piece = generator.choice([*PIECES, text[start:stop], generator.choice(text.split() or ["x"])])
        text = text[:start] + piece * generator.choice([1, 1, 1, 30]) + text[generator.choice([start, stop]) :]
    return text


@pytest.mark.parametrize("name", sorted(packaged()))
def test_mutated_studies_are_valid_or_refused(name: str, count: int = 16) -> None:
    text, generator = packaged()[name], random.Random(name)
    for _ in range(count):
        mutant = mutated(text, generator)
        try:
            study = parse_study(mutant, "s.yaml")
        except TaskvecError as error:
            str(error).encode()  # can be printed
        else:
            assert Study.model_validate(study.model_dump(exclude_defaults=True)) == study
            study.smoke()


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
