"""Data sets in tables (parquet, save_to_disk): what a label means is what its own file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from taskvec.core.errors import TaskvecError
from taskvec.data import hf_tables as hub
from taskvec.data import tasks
from taskvec.data.images import Preprocessing
from taskvec.data.sources import parse
from taskvec.engine.store import Store

LEVELS = {"ant": 20, "bee": 120, "cow": 220}
"""Each class is a brightness, so that an image itself tells what it shows."""
THREE, TWO = list(LEVELS), ["ant", "cow"]
TO = Preprocessing(8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def table(shown: list[str], labels: list[Any], kind: Any, column: str = "label") -> datasets.Dataset:
    images = [Image.new("L", (8, 8), LEVELS[name] + place) for place, name in enumerate(shown)]
    features = datasets.Features({"image": datasets.Image(), column: kind})
    return datasets.Dataset.from_dict({"image": images, column: labels}, features=features)


def named(shown: list[str], names: list[str]) -> datasets.Dataset:
    return table(shown, [names.index(name) for name in shown], datasets.ClassLabel(names=names))


def texts(shown: list[str]) -> datasets.Dataset:
    return table(shown, shown, datasets.Value("string"))


def numbers(shown: list[str], names: list[str], kind: str = "int64") -> datasets.Dataset:
    return table(shown, [names.index(name) for name in shown], datasets.Value(kind))


def write(folder: Path, **files: datasets.Dataset) -> str:
    """Write parquet files ``train_0=...`` as ``train-0.parquet`` and return the task's address."""
    folder.mkdir(parents=True)
    for name, rows in files.items():
        with (folder / f"{name.replace('_', '-')}.parquet").open("wb") as file:
            rows.to_parquet(file)
    return f"hf:{folder}"


def check(address: str) -> tasks.Task:
    """Load a task and hold every label against what its image shows."""
    task = tasks.load_task(address, TO)
    for split in (task.train, task.validation, task.test):
        shown = [min(LEVELS, key=lambda name: abs(LEVELS[name] + 8 - float(image.mean()))) for image in split.images]
        assert [task.classes[label] for label in split.labels] == shown
    return task


MANY, FEW = THREE * 5, TWO * 3


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        (named(MANY, THREE), named(FEW, TWO)),
        (named(MANY, THREE), named(FEW, ["cow", "bee", "ant"])),
        (named(MANY, THREE), texts(FEW)),
        (texts(MANY), named(FEW, ["cow", "ant"])),
    ],
    ids=["lacks a class", "other order", "texts to test", "texts to train"],
)
def test_each_split_is_read_by_its_own_names(
    tmp_path: Path, train: datasets.Dataset, test: datasets.Dataset, saved: bool
) -> None:
    if saved:
        datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "t", num_shards={"train": 2, "test": 2})
        task = check(f"hf:{tmp_path / 't'}")
    else:
        task = check(write(tmp_path / "t", train=train, test=test))
    assert (task.classes, len(task.train), len(task.test)) == (("ant", "bee", "cow"), 14, 6)


def test_each_file_of_a_split_is_read_by_its_own_names(tmp_path: Path) -> None:
    files = {"train_0": named(MANY, THREE), "train_1": named(MANY, THREE[::-1]), "train_2": texts(MANY)}
    task = check(write(tmp_path / "t", **files, test_0=named(FEW, TWO), test_1=named(FEW, TWO[::-1])))
    assert (len(task.train), len(task.test)) == (41, 12)


def test_one_saved_data_set_is_divided(tmp_path: Path) -> None:
    named(THREE * 10, THREE).save_to_disk(tmp_path / "t")
    assert len(check(f"hf:{tmp_path / 't'}").test) == 3


def test_numbers_without_names_are_read_by_the_only_names_there_are_and_told(tmp_path: Path) -> None:
    address = write(tmp_path / "one", train=named(MANY, THREE), test=numbers(FEW, THREE))
    check(address)
    (note, *_) = tasks.list_task(address).notes
    assert note == (
        "'test.parquet' has numbers for labels and no class names: they are read by those of 'train.parquet'"
    )
    for other in (texts(MANY), named(MANY, THREE[::-1])):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(TaskvecError, match=r"'test.parquet' has numbers for labels and no class names"):
            tasks.list_task(write(folder, train=named(MANY, THREE), train_2=other, test=numbers(FEW, THREE)))
    with pytest.raises(TaskvecError, match=r"'test.parquet' has the label 2 in column 'label', .* none of its 2"):
        tasks.list_task(write(tmp_path / "range", train=named(FEW * 3, TWO), test=numbers(["cow"] * 3, THREE)))


def test_a_card_beside_the_tables_names_their_numbers(tmp_path: Path) -> None:
    address = write(tmp_path / "t", train=numbers(MANY, THREE), test=numbers(FEW, THREE))
    names = "\n".join(f"          '{place}': {name}" for place, name in enumerate(THREE))
    card = (
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:"
    )
    (tmp_path / "t" / "README.md").write_text(f"---\n{card}\n        names:\n{names}\n---\n")
    assert check(address).classes == ("ant", "bee", "cow")
    with (tmp_path / "t" / "test.parquet").open("wb") as file:
        named(FEW, TWO[::-1]).to_parquet(file)
    check(address)
    (note, *_) = tasks.list_task(address).notes
    assert note.startswith("'test.parquet' names its classes otherwise than is declared beside it, and is read by its")


@pytest.mark.parametrize("kinds", [("int64", "float64"), ("float32", "string"), ("uint8", "int32"), ("string", "int8")])
def test_a_number_is_the_same_class_in_every_type(tmp_path: Path, kinds: tuple[str, str]) -> None:
    labels = [[THREE.index(name) for name in shown] for shown in (MANY, FEW)]
    values = [list(map(str, own)) if kind == "string" else own for own, kind in zip(labels, kinds, strict=True)]
    train, test = (
        table(shown, own, datasets.Value(kind))
        for shown, own, kind in zip((MANY, FEW), values, kinds, strict=True)
    )  # fmt: skip
    listing = tasks.list_task(write(tmp_path / "t", train=train, test=test))
    assert listing.classes == ("0", "1", "2")
    assert listing.labels["test"].tolist() == labels[1]


def test_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    values = [str(place) for place in range(11)] * 3
    address = write(tmp_path / "t", train=table(["ant"] * 33, values, datasets.Value("string")))
    assert tasks.list_task(address).classes == tuple(map(str, range(11)))


@pytest.mark.parametrize(
    ("test", "how"),
    [
        (table(FEW, [-1] * 6, datasets.ClassLabel(names=THREE)), "minus one"),
        (table(FEW, [None] * 6, datasets.Value("int64")), "none"),
        (table(FEW, [""] * 6, datasets.Value("string")), "empty texts"),
        (table(FEW, [float("nan")] * 6, datasets.Value("float64")), "not a number"),
        (table(FEW, ["x"] * 6, datasets.Value("string"), column="name"), "no column"),
    ],
    ids=str,
)
def test_a_split_without_labels_is_left_out_and_told(tmp_path: Path, test: datasets.Dataset, how: str) -> None:
    train = named(THREE * 10, THREE)
    address = write(tmp_path / "t", train=train, test=test, validation=named(FEW, TWO))
    assert len(check(address).test) == 6
    notes = tasks.list_task(address).notes
    assert notes[0].endswith("the test split has no labels and is left out")
    assert notes[1].endswith("has no test split: its validation split is tested on")
    assert tasks.list_task(write(tmp_path / "two", train=train, test=test)).sizes()["test"] == 3


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (named(FEW * 3, TWO), named(MANY, THREE), "class 'bee' of task .* has no training images"),
        (named(FEW * 3, TWO), texts(["bee"] * 3), "class 'bee' of task .* has no training images"),
        (table(MANY, [0.5] * 15, datasets.Value("float64")), named(FEW, TWO), "row 0 of the train split has a float"),
        (table(FEW, [0, -1] * 3, datasets.ClassLabel(names=TWO)), named(FEW, TWO), "label -1 in column 'label'"),
        (named(MANY, THREE), table(FEW, [True, False] * 3, datasets.Value("bool")), "class '(True|False)' of task"),
        (table(FEW, [True, False] * 3, datasets.Value("bool")), numbers(FEW, TWO), "which number means which class"),
        (
            table(FEW, [0, 1] * 3, datasets.ClassLabel(names=["caf\u00e9", "cafe\u0301"])), named(FEW, TWO),
            "names the class 'caf\u00e9' twice",
        ),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_mapped_are_clear_errors(
    tmp_path: Path, train: datasets.Dataset, test: datasets.Dataset, message: str
) -> None:
    with pytest.raises(TaskvecError, match=message):
        tasks.list_task(write(tmp_path / "t", train=train, test=test))


def test_a_test_file_whose_name_is_in_capitals_is_no_training_file(tmp_path: Path) -> None:
    address = write(tmp_path / "t", Train=named(MANY, THREE), TEST=named(MANY, THREE))
    with pytest.raises(TaskvecError, match=r"TEST\.parquet' would be read as training images"):
        tasks.list_task(address)


def test_a_label_of_minus_one_that_may_be_a_class_is_told(tmp_path: Path) -> None:
    rows = table(["ant", "bee", "cow"] * 4, [-1, 0, 1] * 4, datasets.Value("int64"))
    listing = tasks.list_task(write(tmp_path / "t", train=rows, test=rows))
    assert listing.classes == ("-1", "0", "1")
    assert listing.notes[0].startswith("the label -1 is taken for a class")


def test_class_names_that_differ_in_blanks_or_capitals_only_are_told(tmp_path: Path) -> None:
    rows = table(["ant", "bee", "cow"] * 4, ["ant", "Ant ", "cow"] * 4, datasets.Value("string"))
    listing = tasks.list_task(write(tmp_path / "t", train=rows, test=rows))
    assert listing.notes[0] == "'Ant ' and 'ant' are two classes: their names differ in capitals or blanks only"


def test_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    names = [["caf\u00e9", "cow"], ["cow", "cafe\u0301"]]
    train, test = (
        table(FEW * 3, [own.index(name if name == "cow" else own[own[0] == "cow"]) for name in FEW * 3],
              datasets.ClassLabel(names=own))
        for own in names
    )  # fmt: skip
    listing = tasks.list_task(write(tmp_path / "t", train=train, test=test))
    assert listing.classes == ("caf\u00e9", "cow")
    assert [listing.classes[label] for label in listing.labels["test"]] == ["caf\u00e9", "cow"] * 9


def test_a_table_that_is_replaced_with_its_time_kept_is_read_again(tmp_path: Path) -> None:
    store, train = Store(tmp_path / "store"), named(MANY, THREE)
    address = write(tmp_path / "t", train=train, test=named(FEW, TWO))
    path = tmp_path / "t" / "test.parquet"
    os.utime(path, (1, 1))
    first = tasks.describe(address, store.tree_digest)
    images = tasks.load_task(address, TO).test.images
    named(FEW[::-1], TWO).to_parquet(str(tmp_path / "new"))
    os.utime(tmp_path / "new", (1, 1))
    (tmp_path / "new").replace(path)
    assert tasks.describe(address, store.tree_digest)["content"] != first["content"]
    assert not np.array_equal(check(address).test.images, images)


@pytest.mark.parametrize(
    "name", ["a@b", "a:b", "a#b, c", "a\nb", "a[1]", "a*b", "a?b", "a::b", "a%20{b,c}", "-x", os.fsdecode(b"caf\xe9")]
)
def test_a_path_is_a_path(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a b", train=texts(["cow"] * 30), test=texts(["cow"] * 30))  # what a pattern would match
    address = write(tmp_path / "in" / name, train=named(MANY, THREE), test=named(FEW, TWO))
    assert str(parse(f"hf:{name}", tmp_path / "in")) == address
    assert parse(address).default_name == name
    assert len(check(address).train) == 14


def test_a_data_set_of_the_hub_whose_files_have_other_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t", train=named(MANY, THREE), test=named(FEW, TWO))
    builder = datasets.load_dataset_builder(str(tmp_path / "t"))
    with pytest.raises(TaskvecError, match=r"test.parquet' names the classes of column 'label' otherwise.*\ndownload"):
        hub.check_class_names(builder, datasets.load_dataset(str(tmp_path / "t")))
    write(tmp_path / "same", train=named(MANY, THREE), test=named(FEW, THREE))
    found = datasets.load_dataset(str(tmp_path / "same"))
    assert hub.check_class_names(datasets.load_dataset_builder(str(tmp_path / "same")), found) is found


def test_tables_that_may_not_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = write(tmp_path / "t" / "more", train=named(MANY, THREE), test=named(FEW, TWO))
    scan = os.scandir

    def refuse(place: Any) -> Any:
        if str(place).endswith("more"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TaskvecError, match=r"cannot be read at '.*more': Permission denied"):
        tasks.list_task(address)


def test_an_empty_file_among_others_counts_nothing(tmp_path: Path) -> None:
    empty = named([], ["cow"])
    task = check(write(tmp_path / "t", train_0=empty, train_1=named(MANY, THREE), test_0=named(FEW, TWO), test_1=empty))
    assert (len(task.train), len(task.test)) == (14, 6)
    with pytest.raises(TaskvecError, match="has no images in its test split"):
        tasks.list_task(write(tmp_path / "two", train=named(MANY, THREE), test=empty))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    address = write(tmp_path / "t", train=named(MANY, THREE), test=named(FEW, TWO))
    (tmp_path / "t" / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskvecError, match=r"test\.parquet' cannot be read as a data set"):
        tasks.list_task(address)
