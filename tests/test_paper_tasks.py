"""The paper's eight tasks in every layout, by their real loaders: one order of classes, the protocol's splits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from helpers.paper_layouts import (
    FOLDERS,
    TEST,
    TRAIN,
    VARIANTS,
    class_folders,
    colour,
    write_all,
    write_cars,
    write_gtsrb,
    write_mnist,
    write_resisc45,
)
from helpers.tasks import write_folder_task
from PIL import Image
from scipy.io import loadmat, savemat

from taskvec.core.errors import TaskvecError
from taskvec.data import sources, tasks
from taskvec.data.decoding import opened_item
from taskvec.data.hf_datasets import read_splits
from taskvec.data.images import Preprocessing, resize_and_crop
from taskvec.data.index import Items, Listing
from taskvec.data.paper_layouts import FIXTURE, check_classes, check_sizes, list_paper
from taskvec.data.sources import parse
from taskvec.data.splits import split_classes, validation_indices
from taskvec.data.torchvision_sets import list_torchvision
from taskvec.paper import tasks as papertasks
from taskvec.weights.hub import answers

CASES = [(task, layout) for task, layouts in VARIANTS.items() for layout in layouts]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def shown_by(items: Items, place: int) -> Image.Image:
    """Return an image of a listing."""
    with opened_item(items, place, Preprocessing(16)) as image:
        return image


def label_by_colour(task: str, image: Image.Image) -> str:
    """Say what class an image shows, from its pixels alone."""
    mean = np.asarray(image).reshape(-1, 3).mean(0)
    index = min(range(len(FOLDERS[task])), key=lambda i: float(np.abs(colour(task, i) - mean).sum()))
    return papertasks.canonical(task, FOLDERS[task][index])


@pytest.mark.parametrize(("task", "layout"), CASES)
def test_every_layout_gives_the_same_classes_and_the_right_labels(tmp_path: Path, task: str, layout: str) -> None:
    VARIANTS[task][layout](tmp_path)
    listing = list_paper(f"{task}@{tmp_path}")
    assert listing.classes == papertasks.in_order(task, [papertasks.canonical(task, n) for n in FOLDERS[task]])
    total = sum(listing.sizes().values())
    unused = 4 * len(FOLDERS[task]) if layout == "timm/resisc45" else 0
    assert total == len(FOLDERS[task]) * (TRAIN + TEST) - unused
    for split in tasks.SPLITS:
        for index in range(0, len(listing.labels[split]), 5):
            shown = label_by_colour(task, shown_by(listing.items[split], index))
            assert listing.classes[listing.labels[split][index]] == shown
    assert any("taken for a fixture" in note for note in listing.notes)


@pytest.mark.parametrize("task", sorted(papertasks.TASKS))
def test_validation_is_the_protocols_share_of_the_training_images(tmp_path: Path, task: str) -> None:
    next(iter(VARIANTS[task].values()))(tmp_path)
    sizes = list_paper(f"{task}@{tmp_path}").sizes()
    count = len(FOLDERS[task]) * TRAIN
    held_out = 2 * len(FOLDERS[task]) if task == "eurosat" else int(0.1 * count)
    assert (sizes["train"], sizes["validation"]) == (count - held_out, held_out)
    train, validation, test = papertasks.TASKS[task].sizes
    if task != "eurosat":
        assert [len(part) for part in validation_indices(train + validation)] == [train, validation]
    assert sum(sizes.values()) < FIXTURE * (train + validation + test)


@pytest.mark.parametrize(
    ("name", "task"), [("StanfordCars", "cars"), ("DTD", "dtd"), ("GTSRB", "gtsrb"), ("MNIST", "mnist")]
)
def test_torchvision_reads_the_fixtures_and_we_read_what_it_reads(tmp_path: Path, name: str, task: str) -> None:
    {**VARIANTS[task], "torchvision": next(iter(VARIANTS[task].values()))}["torchvision"](tmp_path)
    split = {"train": False} if name == "MNIST" else {"split": "test"}
    theirs = getattr(torchvision.datasets, name)(str(tmp_path), **split)
    ours = list_torchvision(f"{name}@{tmp_path}")
    assert len(theirs) == len(ours.labels["test"])
    for index in range(0, len(theirs), 3):
        image, label = theirs[index]
        if name != "GTSRB":
            assert ours.labels["test"][index] == label
        pixels = shown_by(ours.items["test"], index)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(pixels))


def test_sizes_are_those_of_the_paper() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text("utf-8")
    for name, task in papertasks.TASKS.items():
        assert "| ".join(["", f"`paper:{name}` ", *(f"{n} " for n in (task.classes, *task.sizes)), ""]) in text
    images = sum(sum(task.sizes) for task in papertasks.TASKS.values())
    assert round(images * 3 * 224 * 224 / 1e9) in (48, 49)


def listing_of(sizes: papertasks.Sizes, classes: int) -> Listing:
    labels = {split: np.zeros(n, np.int64) for split, n in zip(tasks.SPLITS, sizes, strict=True)}
    return Listing(tuple(f"{i:03}" for i in range(classes)), {}, labels)


def test_real_data_must_have_exactly_the_protocols_sizes() -> None:
    cars, land = papertasks.TASKS["cars"], papertasks.TASKS["eurosat"]
    assert check_sizes("cars", cars, listing_of(cars.sizes, 196)) == ()
    half = (3384 // 2, 376 // 2, 1880 // 2)
    with pytest.raises(TaskvecError, match=r"has 1692 to train, .* 23 classes; the paper has 3384.*\n.*less than 2%"):
        check_sizes("dtd", papertasks.TASKS["dtd"], listing_of(half, 23))
    for sizes, classes in (((7330, 814, 8040), 196), (cars.sizes, 195), ((2000, 814, 8041), 196)):
        with pytest.raises(TaskvecError, match="the paper has 7330 to train, 814 to validate, 8041 to test"):
            check_sizes("cars", cars, listing_of(sizes, classes))
    assert "lacks images" in check_sizes("eurosat", land, listing_of((19440, 2160, 2700), 10))[0]
    assert "fixture" in check_sizes("cars", cars, listing_of((100, 10, 90), 10))[0]


def test_a_flat_tree_is_divided_by_270_images_a_class() -> None:
    counts = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]  # EuroSAT's
    labels = np.repeat(np.arange(10), counts)
    listing = Listing(tuple("abcdefghij"), {"train": [Path(str(i)) for i in range(27000)]}, {"train": labels})
    divided = split_classes(listing, 270)
    assert divided.sizes() == {"train": 21600, "validation": 2700, "test": 2700}
    assert np.bincount(divided.labels["test"]).tolist() == [270] * 10
    assert len({path for items in divided.items.values() for path in items}) == 27000
    assert all(np.array_equal(split_classes(listing, 270).labels[s], divided.labels[s]) for s in tasks.SPLITS)


@pytest.mark.parametrize(
    ("task", "spellings"),
    [
        ("sun397", ("a_apse_indoor", "/a/apse/indoor", "apse indoor")),
        ("mnist", ("3 - three", "3")),
        ("eurosat", ("AnnualCrop", "annual crop", "annual crop land")),
        ("gtsrb", ("00014", "14", "stop")),
        ("resisc45", ("baseball_diamond", "baseball diamond")),
        ("cars", ("Ram C/V Cargo Van Minivan 2012",)),
    ],
)
def test_spellings_of_a_class_have_one_name(task: str, spellings: tuple[str, ...]) -> None:
    assert len({papertasks.canonical(task, name) for name in spellings}) == 1
    assert len(papertasks.SIGNS) == 43
    assert len({names[0] for names in papertasks.SIGNS}) == 43


def test_all_eight_are_found_under_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "data")
    monkeypatch.setenv(sources.DATA, str(tmp_path / "data"))
    for task in papertasks.TASKS:
        address = str(parse(f"paper:{task}", tmp_path))
        assert tasks.list_task(address).classes
        assert parse(address).default_name == task
        assert tasks.list_task(parse(f"paper:{task}", tmp_path, "data")).labels.keys() == set(tasks.SPLITS)
    assert str(parse("paper:dtd@hf", tmp_path)) == "paper:dtd@hf"
    assert str(parse("paper:dtd@x", tmp_path)) == f"paper:dtd@{tmp_path / 'x'}"


def test_a_folder_may_be_the_data_sets_own(tmp_path: Path) -> None:
    write_all(tmp_path)
    for task, place in (("dtd", "dtd/dtd"), ("cars", "stanford_cars"), ("mnist", "MNIST"), ("svhn", "svhn")):
        assert list_paper(f"{task}@{tmp_path / place}").sizes() == list_paper(f"{task}@{tmp_path}").sizes()
    with pytest.raises(TaskvecError, match="not in"):
        list_paper(f"dtd@{tmp_path / 'svhn'}")


def break_layout(root: Path, how: str) -> str:
    if how == "nothing there":
        return "dtd"
    if how == "missing image":
        write_cars(root)
        next((root / "stanford_cars" / "cars_test").iterdir()).unlink()
        return "cars"
    if how == "missing list":
        write_resisc45(root)
        (root / "resisc45" / "resisc45-test.txt").unlink()
        return "resisc45"
    if how == "listed and not there":
        write_resisc45(root)
        next((root / "resisc45" / "NWPU-RESISC45" / "wetland").iterdir()).unlink()
        return "resisc45"
    if how == "no test table":
        write_gtsrb(root)
        (root / "gtsrb" / "GT-final_test.csv").unlink()
        return "gtsrb"
    if how == "one class twice":
        class_folders("sun397", root / "sun397", {"train": "train", "test": "val"})
        for split in ("train", "val"):
            (root / "sun397" / split / "a_abbey").rename(root / "sun397" / split / "a_apse indoor")
        return "sun397"
    write_mnist(root)
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0" * 20)
    return "mnist"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing there", "paper:dtd is not in .*holds nothing\nexpected dtd/.*paper:dtd@hf downloads"),
        ("missing image", r"cars_test/.* is listed and not there"),
        ("missing list", "no list at .*resisc45-test.txt"),
        ("listed and not there", "wetland_.*jpg' in .*is not in"),
        ("no test table", "torchvision cannot read GTSRB"),
        ("one class twice", "'apse indoor' and 'apse indoor' are one class"),
        ("bad idx", "torchvision cannot read MNIST"),
    ],
)
def test_broken_layouts_are_clear_errors(tmp_path: Path, how: str, message: str) -> None:
    task = break_layout(tmp_path, how)
    with pytest.raises(TaskvecError, match=message):
        list_paper(f"{task}@{tmp_path}")


def test_unknown_names_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="unknown task of the paper 'dtt'\ndid you mean 'dtd'"):
        list_paper("dtt")
    with pytest.raises(TaskvecError, match="no task 'CIFAR11'.*\n.*CIFAR10"):
        list_torchvision(f"CIFAR11@{tmp_path}")
    with pytest.raises(TaskvecError, match="needs its folder"):
        list_torchvision("CIFAR10")


def test_other_data_sets_of_torchvision_have_usable_splits(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / "FashionMNIST")
    listing = tasks.list_task(f"torchvision:FashionMNIST@{tmp_path}")
    assert listing.classes[0] == "T-shirt/top"
    assert listing.sizes() == {"train": 126, "validation": 14, "test": 40}


def test_a_local_data_set_of_parquet_is_a_task(tmp_path: Path) -> None:
    VARIANTS["dtd"]["tanganke/dtd"](tmp_path)
    address = str(parse("hf:tanganke/dtd", tmp_path))
    assert address == f"hf:{tmp_path / 'tanganke/dtd'}"
    listing = tasks.list_task(address)
    assert listing.classes == FOLDERS["dtd"]
    assert listing.sizes() == {"train": 51, "validation": 5, "test": 16}
    source = tasks.describe(address, lambda root, files: str(sorted(files)))
    assert "train-00000-of-00001.parquet" in source["content"]
    task = tasks.load_task(address, Preprocessing(16))
    for place in (0, 17, 50):
        want = resize_and_crop(shown_by(listing.items["train"], place), Preprocessing(16))
        assert np.array_equal(task.train.images[place], want)


def test_labels_may_be_plain_values_and_one_split_is_divided(tmp_path: Path) -> None:
    import datasets

    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(30)]
    data = {"img": images, "label": ["b", "a", "c"] * 10}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "t").mkdir()
    datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "t" / "train.parquet")
    listing = tasks.list_task(f"hf:{tmp_path / 't'}")
    assert listing.classes == ("a", "b", "c")
    assert listing.sizes() == {"train": 24, "validation": 3, "test": 3}


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("string", ["a", None, "b"], "row 1 of the train split has no label in column 'label'"),
        ("class", [0, None, 1], "row 1 of the train split has no label in column 'label'"),
        ("list", [["a"], ["b"], ["a"]], "row 0 of the train split has a list for a label in column 'label'"),
        ("path", ["a", "b", "a"], r"row 0' is not in the table, which names '.*0\.png'\n.*folder:PATH"),
    ],
)
def test_rows_that_cannot_be_used_are_clear_errors(tmp_path: Path, kind: str, labels: list[Any], message: str) -> None:
    import datasets
    import pyarrow.parquet

    value = {"class": datasets.ClassLabel(names=["a", "b"]), "list": datasets.List(datasets.Value("string"))}
    features = datasets.Features({"image": datasets.Image(), "label": value.get(kind, datasets.Value("string"))})
    data = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)], "label": labels}
    if kind == "path":
        data["image"] = [{"path": str(tmp_path / f"{i}.png"), "bytes": None} for i in range(3)]
    (tmp_path / "t").mkdir()
    table = datasets.Dataset.from_dict(data, features=features)
    pyarrow.parquet.write_table(table.data.table, tmp_path / "t" / "train.parquet")
    with pytest.raises(TaskvecError, match=message):
        read_splits(f"{tmp_path / 't'}").items["train"][0]


def test_a_folder_of_images_is_no_table(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    with pytest.raises(TaskvecError, match=r"holds no \.parquet or \.arrow files\n.*read as folder:"):
        tasks.describe(f"hf:{root}", lambda root, files: "")


@pytest.mark.parametrize("task", ["eurosat", "gtsrb", "mnist", "svhn"])
def test_a_class_of_another_data_set_is_refused(task: str) -> None:
    known = papertasks.TASKS[task]
    names = tuple(one[0] for one in known.names)
    check_classes(task, known, Listing(names, {}, {}))
    with pytest.raises(TaskvecError, match=f"paper:{task} has no class 'cat'"):
        check_classes(task, known, Listing((*names[1:], "cat"), {}, {}))


@pytest.mark.parametrize("how", ["no images", "no train", "no folder", "nothing"])
def test_unusable_data_sets_are_clear_errors(tmp_path: Path, how: str) -> None:
    import datasets

    (tmp_path / "t").mkdir()
    if how in ("no images", "no train"):
        name = "train" if how == "no images" else "test"
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "t" / f"{name}.parquet")
    address = f"hf:{tmp_path / 't'}" if how != "no folder" else f"hf:{tmp_path / 'tt'}"
    wanted = {"no images": "0 columns of images", "no train": "no train split", "no folder": "no data set folder"}
    with pytest.raises(TaskvecError, match=wanted.get(how, "cannot be read as a data set")):
        tasks.list_task(address)


@pytest.mark.parametrize("address", ["hf:tanganke/dtd", "paper:dtd@hf", "paper:svhn"])
def test_without_a_network_the_error_names_the_data_set_and_the_way_out(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    begin = time.monotonic()
    wanted = "cannot be had from http://127.0.0.1:9.*\n.*pass the folder of its parquet files: hf:/path/to/"
    with pytest.raises(TaskvecError, match=wanted):
        tasks.describe(address, lambda root, files: "")
    assert time.monotonic() - begin < 10


def test_a_silent_server_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("taskvec.weights.hub.SECONDS", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        begin = time.monotonic()
        assert not answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - begin < 3


def test_the_lists_of_tasks_need_no_torch() -> None:
    code = "import sys; import taskvec.paper.tasks; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_the_same_content_has_the_same_identity_wherever_it_lies(tmp_path: Path) -> None:
    from taskvec.engine.store import Store

    store = Store(tmp_path / "store")
    for root in ("one", "two"):
        write_cars(tmp_path / root)
        VARIANTS["svhn"]["torchvision"](tmp_path / root)
    for task in ("cars", "svhn"):
        one, two = (tasks.describe(f"paper:{task}@{tmp_path / root}", store.tree_digest) for root in ("one", "two"))
        assert one == two
    path = tmp_path / "two" / "svhn" / "test_32x32.mat"
    found = loadmat(path)
    savemat(path, {"X": found["X"], "y": found["y"][::-1]})
    changed = tasks.describe(f"paper:svhn@{tmp_path / 'two'}", store.tree_digest)
    assert changed["listing"] != two["listing"]  # a changed label is another task
    listing = list_paper(f"svhn@{tmp_path / 'two'}")
    labels = listing.labels | {"test": listing.labels["test"][::-1]}
    assert tasks.listing_digest(replace(listing, labels=labels)) == one["listing"]
