"""What stands in and beside files of heads: names of outputs in the order of their numbers, or one clear error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import taskvec as tv
from taskvec.core import notes
from taskvec.data.tasks import Split, Task
from taskvec.learning.external import read_head
from taskvec.learning.heads import Head, read_heads, save_heads
from taskvec.study.artifacts import find_head, scale_key

NAMES = ("ant", "bee", "cow")
ROWS = torch.arange(12.0).view(3, 4)
JUNK: list[Any] = [
    *(None, True, False, 0, 7, 10**30, 1.5, "", "x", [], ["ant"], ["ant", "bee", "cow", "dog"], ["ant", "ant", "bee"]),
    *([1, 2, 3], [None] * 3, [["ant"], ["bee"], ["cow"]], {}, {"0": "ant"}, {"weight": ["ant"]}, {"": None}, [{}] * 3),
    *(
        {"0": "ant", "2": "bee", "3": "cow"},
        {"a": "ant", "b": "bee", "c": "cow"},
        {"0": "ant", "00": "bee", "1": "cow"},
    ),
    *({"x": {"kind": "regression"}}, {"": {"normalised": 1}}, {"": {"kind": [1]}}, {"": {"rank": 1}}, ["\ud800"] * 3),
]


@pytest.fixture
def task() -> Task:
    split = Split(np.zeros((3, 3, 8, 8), np.uint8), np.arange(3))
    return Task("one", NAMES, split, split, split)


def heard(file: Path, task: Task, given: tuple[str, ...] = ()) -> tuple[torch.Tensor, str]:
    with notes.listen() as said:
        head = read_head(file, given, task, 4)
    return head.weight, "\n".join(said)


def place(folder: Path, where: str, value: Any) -> Path:
    """Write a head whose outputs are named by its metadata, or by a file beside it."""
    key, _, file = where.partition("@")
    text = value if isinstance(value, str) and value.startswith("[[") else json.dumps(value)
    save_file({"weight": ROWS}, folder / "head.safetensors", None if file else {key: text})
    if file and key == "tasks":
        (folder / file).write_text(json.dumps({"tasks": [{"name": "", "classes": value}]}))
    elif file:
        (folder / file).write_text(json.dumps({key: value}) if key else text)
    return folder / "head.safetensors"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("classes", ["cow", "ant", "bee"]),
        ("classes", {"": ["cow", "ant", "bee"], "other": ["x"]}),
        ("id2label@config.json", {"2": "bee", "0": "cow", "1": "ant"}),
        ("label_names@config.json", ["cow", "ant", "bee"]),
        ("tasks@model.json", ["cow", "ant", "bee"]),
    ],
)
def test_names_say_which_output_is_which(tmp_path: Path, task: Task, where: str, value: Any) -> None:
    weight, said = heard(place(tmp_path, where, value), task)
    assert torch.equal(weight, ROWS[[1, 2, 0]])
    assert said == ""


def test_labels_count_as_numbers_and_not_as_text(tmp_path: Path) -> None:
    many = tuple(f"c{i}" for i in range(12))
    split = Split(np.zeros((12, 3, 8, 8), np.uint8), np.arange(12))
    rows = torch.arange(48.0).view(12, 4)
    save_file({"weight": rows}, tmp_path / "head.safetensors")
    labels = {str(i): many[i] for i in sorted(range(12), key=str)}  # 0, 1, 10, 11, 2, ...
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    weight, said = heard(tmp_path / "head.safetensors", Task("one", many, split, split, split))
    assert torch.equal(weight, rows)
    assert said == ""


def test_numbers_name_classes_too(tmp_path: Path) -> None:
    split = Split(np.zeros((3, 3, 8, 8), np.uint8), np.arange(3))
    digits = Task("one", ("7", "8", "9"), split, split, split)
    weight, _ = heard(place(tmp_path, "classes", [9, 7, 8]), digits)
    assert torch.equal(weight, ROWS[[1, 2, 0]])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"0": "ant", "2": "bee", "3": "cow"}, "not numbered from 0 without a gap"),
        ({"1": "ant", "2": "bee", "3": "cow"}, "not numbered from 0 without a gap"),
        ({"a": "ant", "b": "bee", "c": "cow"}, "not numbered from 0 without a gap"),
        ({"0": "ant", "00": "bee", "1": "cow"}, "not numbered from 0 without a gap"),
        ({"0": "ant", "1": "bee"}, "names 2 classes, and the head beside it has 3 outputs"),
        ([str(i) for i in range(1000)], "names 1000 classes, and the head beside it has 3 outputs"),
    ],
)
def test_labels_that_do_not_name_every_output_are_told_and_not_used(
    tmp_path: Path, task: Task, value: Any, told: str
) -> None:
    weight, said = heard(place(tmp_path, "id2label@config.json", value), task)
    assert torch.equal(weight, ROWS)
    assert told in said
    assert "names no classes: its outputs are taken in the order of task 'one'" in said


@pytest.mark.parametrize("where", ["classes", "id2label@config.json", "tasks@model.json"])
@pytest.mark.parametrize("value", [[None] * 3, [["ant"], ["bee"], ["cow"]], [True, False, True], "ant", 5])
def test_names_that_are_none_are_an_error_that_names_the_file(
    tmp_path: Path, task: Task, where: str, value: Any
) -> None:
    file = place(tmp_path, where, value)
    with pytest.raises(tv.TaskvecError, match=(where.partition("@")[2] or file.name)) as told:
        heard(file, task)
    assert told.value.fix
    if where != "classes":  # the study's own names are taken before those of files beside it
        assert torch.equal(heard(file, task, ("cow", "ant", "bee"))[0], ROWS[[1, 2, 0]])


@pytest.mark.parametrize("where", ["heads", "classes", "@config.json", "@model.json"])
def test_deep_json_is_an_error(tmp_path: Path, task: Task, where: str) -> None:
    with pytest.raises(tv.TaskvecError, match=(where.partition("@")[2] or "head.safetensors")):
        heard(place(tmp_path, where, "[" * 100_000), task)


@pytest.mark.parametrize("seed", range(6))
def test_odd_metadata_and_files_beside_a_head_end_in_a_head_or_in_one_error(
    tmp_path: Path, task: Task, seed: int
) -> None:
    draw, heads = random.Random(seed), 0
    places = ("heads", "classes", "id2label@config.json", "label_names@config.json", "tasks@model.json")
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        value: Any = draw.choice(JUNK)
        value = draw.choice((value, value, [value] * 3, {"": value}, {"0": value, "1": value, "2": value}))
        try:
            weight, _ = heard(place(folder, draw.choice((*places, "@config.json", "@model.json")), value), task)
        except tv.TaskvecError as error:
            assert error.fix
        else:
            heads += 1
            assert sorted(weight[:, 0].tolist()) == sorted(ROWS[:, 0].tolist())
    assert heads


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"a.weight": ROWS}, "cannot have the shapes"),
        ({"a.weight": ROWS, "a.bias": torch.zeros(4)}, "cannot have the shapes"),
        ({"a.weight": ROWS[0], "a.bias": torch.zeros(4)}, "cannot have the shapes"),
        ({"a.weight": ROWS, "a.bias": torch.zeros(3), "a.down": torch.zeros(2, 4)}, "cannot have the shapes"),
        ({"a.weight": ROWS, "a.bias": torch.zeros(3), "b.bias": torch.zeros(3)}, "no file of heads: b.bias"),
        ({"a.weight": ROWS, "a.bias": torch.full((3,), torch.nan)}, "'a.bias' holds other than finite numbers"),
        ({"a.weight": ROWS.long(), "a.bias": torch.zeros(3)}, "'a.weight' holds other than finite numbers"),
    ],
)
def test_heads_that_do_not_fit_together_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], told: str
) -> None:
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(tv.TaskvecError, match=told):
        read_heads(tmp_path / "heads.safetensors")


def test_a_round_that_tried_no_scale_has_no_head_and_hides_none(tmp_path: Path) -> None:
    rounds = {tmp_path / "1": [0.0, 1.0], tmp_path / "2": [], tmp_path / "3": [0.5]}
    for folder, scales in rounds.items():
        folder.mkdir()
        heads = {scale_key(scale): Head(torch.full((3, 4), scale), torch.zeros(3)) for scale in scales}
        save_heads(heads, folder / "heads.safetensors")
    assert find_head(list(rounds), 0.5).weight.unique().tolist() == [0.5]


def test_a_head_of_whole_numbers_and_one_that_corrects_are_refused(tmp_path: Path, task: Task) -> None:
    save_file({"weight": ROWS.long()}, tmp_path / "whole.safetensors")
    with pytest.raises(tv.TaskvecError, match="which is none of weights"):
        read_head(tmp_path / "whole.safetensors", NAMES, task, 4)
    tensors = {f"{name}.{part}": torch.zeros(shape) for name in ("one", "two") for part, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(tv.TaskvecError, match="corrects the features of a merged encoder"):
        read_head(tmp_path / "two.safetensors", NAMES, task, 4)


SHAPES = {"weight": (3, 4), "bias": (3,), "down": (1, 4), "up": (4, 1)}
