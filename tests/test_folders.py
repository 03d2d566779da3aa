"""Class folders as people have them: what is a class, what is a split, what is left out, and what may not be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tasks import write_folder_task
from PIL import Image

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import listen
from taskvec.data import folders, tasks
from taskvec.data.images import Preprocessing
from taskvec.data.index import Listing
from taskvec.data.sources import parse
from taskvec.engine.store import Store

GENERATOR = np.random.default_rng(0)


def put(root: Path, *places: str, count: int = 12) -> Path:
    """Write images of noise into folders."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = GENERATOR.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{number}.png")
    return root


def listed(root: Path) -> Listing:
    return tasks.list_task(f"folder:{root}")


def shown(listing: Listing) -> set[tuple[str, str]]:
    """Return pairs of a class and the folder that its images lie in, from the listing's root on."""
    return {
        (listing.classes[label], item.parent.relative_to(listing.root).as_posix())
        for split, items in listing.items.items()
        for item, label in zip(items, listing.labels[split], strict=True)
        if isinstance(item, Path)
    }


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train"),
        ("rest", "test", "val"),
        ("dev", "ops"),
        ("Validation", "other"),
        ("Training", "running", "Val"),
    ],
)
def test_a_class_may_be_called_as_a_split_is(tmp_path: Path, classes: tuple[str, ...]) -> None:
    listing = listed(put(tmp_path / "t", *classes))
    assert listing.classes == tuple(sorted(classes))
    assert sum(listing.sizes().values()) == 12 * len(classes)
    called = [name for name in sorted(classes) if name.casefold() in folders.SPELT]
    assert listing.notes == tuple(
        f"'{name}' is taken for a class: it holds images and no class folders" for name in called
    )


def test_a_class_of_a_split_may_be_called_so_too(tmp_path: Path) -> None:
    listing = listed(put(tmp_path, "train/train", "train/test", "test/train", "test/test"))
    assert listing.classes == ("test", "train")
    assert listing.sizes() == {"train": 22, "validation": 2, "test": 24}


@pytest.mark.parametrize("name", ["images", "Images", "img"])
@pytest.mark.parametrize("split", [True, False])
def test_images_may_lie_in_a_folder_within_the_class(tmp_path: Path, name: str, split: bool) -> None:
    tops = ("train/", "test/") if split else ("",)
    root = put(tmp_path / "t", *(f"{top}n0{i}/{name}" for top in tops for i in range(3)))
    for top in tops:
        (root / f"{top}n00" / "n00_boxes.txt").write_text("0.png 1 2 3 4\n")
    listing = listed(root)
    assert listing.classes == ("n00", "n01", "n02")
    assert shown(listing) == {(c, f"{top}{c}/{name}") for c in listing.classes for top in tops}
    assert listing.notes == (
        f"left out {len(tops)} files that are no images ({len(tops)} .txt), such as '{tops[0]}n00/n00_boxes.txt'",
    )


def test_one_folder_of_another_name_in_each_class_is_no_split(tmp_path: Path) -> None:
    listing = listed(put(tmp_path, "n01/rgb", "n02/rgb"))
    assert shown(listing) == {("n01", "n01/rgb"), ("n02", "n02/rgb")}


@pytest.mark.parametrize("direct", [True, False])
def test_masks_are_no_images_of_a_class(tmp_path: Path, direct: bool) -> None:
    own = "" if direct else "/images"
    root = put(tmp_path / "t", *(f"{c}{kind}" for c in ("COVID", "Normal") for kind in (own, "/masks")))
    listing = listed(root)
    assert shown(listing) == {(c, f"{c}{own}") for c in ("COVID", "Normal")}
    assert listing.notes == ("left out 24 images in folders beside a class's own images, such as 'COVID/masks/0.png'",)


def test_folders_beside_the_splits_are_told(tmp_path: Path) -> None:
    listing = listed(put(tmp_path, "train/a", "train/b", "test/a", "test/b", "heldout/a", "unlabeled"))
    assert listing.sizes() == {"train": 22, "validation": 2, "test": 24}
    assert listing.notes == ("left out heldout, unlabeled: of no split, which are train, val and test",)


def test_folders_below_a_class_are_the_classes_and_told(tmp_path: Path) -> None:
    listing = listed(put(tmp_path, "cat/persian", "cat/siamese", "dog/poodle", "dog/beagle"))
    assert listing.classes == ("cat", "dog")
    assert listing.notes == ("48 images lie in folders below their class's, such as 'cat/persian/0.png'",)


def test_train_and_val_are_tested_on_val_and_told(tmp_path: Path) -> None:
    listing = listed(put(tmp_path / "t", "train/a", "train/b", "val/a", "val/b"))
    assert listing.sizes() == {"train": 22, "validation": 2, "test": 24}
    assert shown(listing) == {(c, f"{split}/{c}") for c in "ab" for split in ("train", "val")}
    assert listing.notes[0] == f"'{tmp_path / 't'}' has no test split: its validation split is tested on"


@pytest.mark.parametrize("inner", ["t", "images", "t/t"])
@pytest.mark.parametrize("splits", [("train/", "test/"), ("",)])
def test_one_folder_in_a_folder_is_entered_as_archives_leave_it(
    tmp_path: Path, inner: str, splits: tuple[str, ...]
) -> None:
    root = put(tmp_path / "t", *(f"{inner}/{split}{c}" for split in splits for c in "ab"))
    (root / "README.md").write_text("x")
    (root / "__MACOSX").mkdir()
    listing = listed(root)
    assert (listing.classes, listing.root) == (("a", "b"), root / inner)
    assert listing.notes == (f"'{root}' holds one folder only: the task is read from '{root / inner}'",)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("train", "test"), "'.*test' is called as a split is, and holds images and no class folders"),
        (("train/images", "train/labels", "valid/images", "valid/labels"), "called as a split is"),
        (("cat",), "has one class only, 'cat'"),
        (("train/cat", "test/cat"), "has one class only, 'cat'"),
        (("train/a", "train/b"), "has no test/ folder; it holds train"),
        (("train/a", "train/b", "test"), "test' holds no class folders"),
        (("train/a", "train/b", "val/images", "test/images"), "test' holds no class folders"),
        (("Train/a", "Train/b", "Test/a", "Test/b"), "holds Test/, which would not be seen as test/"),
        (("train/a", "train/b", "test/A", "test/b"), "class 'A' is in '.*test' but not in train/"),
        (("val/a", "val/b", "test/a", "test/b"), "has no train/ folder; it holds test, val"),
        (("fold1/a", "fold1/b", "fold2/a", "fold2/b"), "are they splits, not classes"),
    ],
)
def test_what_is_no_task_is_refused_with_what_is_wrong(tmp_path: Path, places: tuple[str, ...], message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        listed(put(tmp_path / "t", *places, count=3))


def test_an_empty_class_folder_of_a_flat_tree_is_refused(tmp_path: Path) -> None:
    (put(tmp_path / "t", "a", "b") / "c").mkdir()
    with pytest.raises(TaskvecError, match=r"t/c' has no images"):
        listed(tmp_path / "t")


def test_all_left_out_files_of_a_task_are_one_line(tmp_path: Path) -> None:
    root = put(tmp_path / "t", *(f"{split}/c{i:02}" for split in ("train", "test") for i in range(30)), count=1)
    for place in root.glob("*/*"):
        (place / "Thumbs.db").write_bytes(b"x")
        (place / ".DS_Store").write_bytes(b"x")
    for place in root.glob("test/*"):
        (place / "desktop.ini").write_bytes(b"x")
    listing = listed(root)
    lines = [note for note in listing.notes if note.startswith("left out")]
    assert lines == ["left out 90 files that are no images (60 .db, 30 .ini), such as 'train/c00/Thumbs.db'"]


@pytest.mark.parametrize("junk", ["@eaDir", "lost+found", "$RECYCLE.BIN"])
def test_what_systems_leave_is_no_class_and_no_image(tmp_path: Path, junk: str) -> None:
    root = put(tmp_path / "t", "a", "b", junk, f"a/{junk}/0.png")
    assert shown(listed(root)) == {("a", "a"), ("b", "b")}


@pytest.mark.parametrize("name", ["a@b", "a:b", "hf:x", "#1, 2", "a\nb", "[1]*?", "a b", "-x", os.fsdecode(b"caf\xe9")])
def test_any_path_is_a_path(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "a", "b")
    address = str(parse(f"folder:{name}", tmp_path))
    task = tasks.load_task(address, Preprocessing(8))
    assert (task.name, len(task.train)) == (name, 20)
    assert tasks.describe(address, Store(tmp_path / "store").tree_digest)["images"] == 24


def test_a_link_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "birds").symlink_to(put(tmp_path / "v1.2-final", "a", "b"))
    assert parse(f"folder:{tmp_path / 'birds'}").default_name == "birds"
    assert parse(f"folder:{tmp_path / 'birds' / 'a' / '..'}/").default_name == "birds"
    monkeypatch.chdir(tmp_path)
    assert parse("folder:birds/").default_name == "birds"
    assert parse("folder:.").default_name == tmp_path.name


def test_an_image_under_two_classes_is_told(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    for name in ("000.png", "001.png"):
        shutil.copy(root / "test" / "ant" / name, root / "test" / "bee" / f"copy-{name}")
        shutil.copy(root / "test" / "ant" / name, root / "test" / "ant" / f"copy-{name}")  # of the same class: no error
    (tmp_path / "out").mkdir()
    with listen() as notes:
        tasks.write_task(f"folder:{root}", Preprocessing(16), None, tmp_path / "out")
    (note,) = notes
    assert note.startswith("2 images of the test split are there with another label too, such as '")
    assert note.endswith("test/ant/000.png'") and "test/bee/copy-000.png', which is '" in note


def refuse(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of the system that refuses one folder."""

    def guarded(place: Any, *rest: Any, **more: Any) -> Any:
        if os.fspath(place).endswith(name):
            raise PermissionError(13, "Permission denied", os.fspath(place))
        return call(place, *rest, **more)

    return guarded


@pytest.mark.parametrize("place", ["t", "train", "train/ant", "train/ant/more"])
def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    root = put(write_folder_task(tmp_path / "t"), "train/ant/more")
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(place, getattr(os, name)))
    with pytest.raises(TaskvecError, match=rf"task 'folder:.*' cannot be read at '.*{place}': Permission denied\nmend"):
        listed(root)


def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, store = write_folder_task(tmp_path / "t"), Store(tmp_path / "store")
    monkeypatch.setattr(os, "stat", refuse("ant/003.png", os.stat))
    with pytest.raises(TaskvecError, match=r"'.*ant/003\.png': Permission denied"):
        tasks.describe(f"folder:{root}", store.tree_digest)
    with pytest.raises(TaskvecError, match=r"cannot use '.*ant/003\.png': Permission denied"):
        store.tree_digest(root, ["train/ant/003.png"])


def test_what_hides_from_a_walk_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        list(folders.visible(tmp_path / "none"))


@pytest.mark.parametrize("how", ["rename", "write", "copy"])
def test_an_image_that_is_replaced_with_its_size_and_time_kept_is_another(tmp_path: Path, how: str) -> None:
    root, store = tmp_path / "t", Store(tmp_path / "store")
    for split in ("train", "test"):
        for index, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (8, 8), (index * 90, number, 0)).save(root / split / name / f"{number}.bmp")
    path, new = root / "train" / "a" / "3.bmp", tmp_path / "new.bmp"
    before, times = tasks.describe(f"folder:{root}", store.tree_digest), path.stat()
    assert store.known_digest(root, ["train/a/3.bmp"]).startswith("not read")
    Image.new("RGB", (8, 8), (200, 200, 200)).save(new)
    if how == "write":
        path.write_bytes(new.read_bytes())
    elif how == "copy":
        shutil.copy(new, path)
    os.utime(new if how == "rename" else path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if how == "rename":
        new.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = tasks.describe(f"folder:{root}", store.tree_digest)
    assert after["content"] != before["content"]
    path.touch()
    assert tasks.describe(f"folder:{root}", store.tree_digest) == after
