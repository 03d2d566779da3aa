"""Decoding, preprocessing and class folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder_task
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from taskvec import tasks
from taskvec.errors import TaskvecError
from taskvec.folders import list_folder
from taskvec.images import Preprocessing, normalise, open_image, random_resized_crop, resize_and_crop
from taskvec.listing import validation_indices


@settings(deadline=None, max_examples=30)
@given(
    st.integers(5, 90), st.integers(5, 90), st.sampled_from([1.0, 0.9, 0.875]), st.sampled_from(["bicubic", "bilinear"])
)
def test_preprocessing_is_pixel_for_pixel_timms(width: int, height: int, crop: float, interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    to = Preprocessing(32, crop, interpolation, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    ours = torch.from_numpy(resize_and_crop(Image.fromarray(pixels), to))
    theirs = create_transform((3, 32, 32), interpolation=interpolation, mean=to.mean, std=to.std, crop_pct=crop)
    want = theirs(Image.fromarray(pixels))
    assert torch.allclose(normalise(ours[None], to, "cpu")[0], want, atol=1e-6)


def test_every_kind_of_image_becomes_upright_rgb(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([grey] * 3)).quantize(64).save(tmp_path / "palette.png")
    clear = np.dstack([grey, grey, grey, np.zeros_like(grey)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "grey.png"))[:, :, 0], grey)
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png"))[:, :, 1], grey)
    assert open_image(tmp_path / "palette.png").mode == "RGB"
    assert np.asarray(open_image(tmp_path / "clear.png")).min() == 255
    turned = Image.fromarray(np.dstack([grey[:, :4]] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (8, 4)
    for suffix in ("webp", "bmp", "tiff", "jpg"):
        Image.fromarray(grey).convert("RGB").save(tmp_path / f"a.{suffix}")
        assert open_image(tmp_path / f"a.{suffix}").size == (8, 8)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty"])
def test_a_corrupt_image_is_an_error_with_its_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    content = {"text": b"no image", "truncated": path.read_bytes()[:200], "empty": b""}[kind]
    path.write_bytes(content)
    with pytest.raises(TaskvecError, match=r"bad\.png"):
        open_image(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TaskvecError, match=r"bomb\.png.*large"):
        open_image(tmp_path / "bomb.png")


def test_augmentation_stays_inside_and_close_to_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.full((16, 3, 24, 24), 0.7)
    assert torch.allclose(random_resized_crop(constant, generator), constant, atol=1e-5)
    ramp = torch.linspace(0, 1, 24).expand(64, 3, 24, 24)
    moved = random_resized_crop(ramp, generator)
    assert float((moved - ramp).abs().max()) < 0.25
    assert not torch.equal(moved, ramp)
    whole = random_resized_crop(ramp, generator, smallest=1.0)
    assert whole.shape == ramp.shape


def test_a_folder_task_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "birds")
    task = tasks.load_task(f"folder:{root}", Preprocessing(16))
    assert task.name == "birds"
    assert task.classes == ("ant", "bee", "cow")
    assert (len(task.train), len(task.validation), len(task.test)) == (33, 3, 12)
    assert task.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert task.test.images[0].mean() < task.test.images[4].mean() < task.test.images[8].mean()


def test_a_class_that_is_not_tested_is_told(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    assert list_folder(str(root)).notes == ()
    shutil.rmtree(root / "test" / "bee")
    assert list_folder(str(root)).notes == ("the test split has no images of 1 classes, such as 'bee'",)
    (root / "test" / "bee").mkdir()
    assert list_folder(str(root)).notes == ("the test split has no images of 1 classes, such as 'bee'",)


def test_the_validation_split_is_the_papers() -> None:
    train, validation = validation_indices(60_000)
    assert (int(train[0]), int(validation[0])) == (36044, 30102)
    assert (len(train), len(validation)) == (55_000, 5_000)
    assert [len(part) for part in validation_indices(8144)] == [7330, 814]


@given(st.integers(10, 500))
def test_training_and_validation_are_disjoint_and_whole(count: int) -> None:
    train, validation = validation_indices(count)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))


def test_a_val_folder_is_used_as_it_is(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    shutil.copytree(root / "test", root / "val")
    task = tasks.load_task(f"folder:{root}", Preprocessing(16))
    assert (len(task.train), len(task.validation)) == (36, 12)


def test_decoding_to_a_folder_equals_decoding_to_memory(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    (tmp_path / "out").mkdir()
    tasks.write_task(f"folder:{root}", Preprocessing(16), 20, tmp_path / "out")
    there, here = tasks.read_task(tmp_path / "out", "t"), tasks.load_task(f"folder:{root}", Preprocessing(16), limit=20)
    assert len(here.train) == 20
    for name in tasks.SPLITS:
        assert np.array_equal(getattr(there, name).images, getattr(here, name).images)
        assert np.array_equal(getattr(there, name).labels, getattr(here, name).labels)


def break_folder(root: Path, how: str) -> None:
    if how == "no test":
        shutil.rmtree(root / "test")
    elif how == "class only in test":
        shutil.copytree(root / "test" / "ant", root / "test" / "zebra")
    elif how == "empty class":
        (root / "train" / "dog").mkdir()
    elif how == "no images":
        for path in root.rglob("*.png"):
            path.rename(path.with_suffix(".txt"))
    elif how == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif how == "one class":
        for name in ("bee", "cow"):
            shutil.rmtree(root / "train" / name)
            shutil.rmtree(root / "test" / name)
    elif how == "too few":
        for path in sorted(root.glob("train/*/*.png")):
            if path.name > "001.png":
                path.unlink()
    elif how == "two spellings":
        for name in ("caf\u00e9", "cafe\u0301"):
            shutil.copytree(root / "train" / "ant", root / "train" / name)
    elif how == "loose image":
        shutil.copy(root / "train" / "ant" / "000.png", root / "train" / "stray.png")
    elif how == "valid":
        shutil.copytree(root / "test", root / "valid")
    elif how == "missing":
        root.rename(root.with_name("task-b"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no task folder at .*task-a'\ndid you mean 'task-b'"),
        ("no test", "has no test/ folder; it holds train"),
        ("class only in test", "class 'zebra' is in .*test"),
        ("empty class", "train/dog' has no images"),
        ("no images", "has no images"),
        ("no classes", "holds no class folders"),
        ("one class", "one class only, 'ant'"),
        ("too few", "too few to hold out"),
        ("two spellings", "two class folders named 'caf\u00e9'"),
        ("loose image", r"train/stray\.png' is in no class folder"),
        ("valid", "holds valid/.*\nrename it to val/"),
    ],
)
def test_broken_folders_are_clear_errors(tmp_path: Path, how: str, message: str) -> None:
    root = write_folder_task(tmp_path / "task-a")
    break_folder(root, how)
    with pytest.raises(TaskvecError, match=message):
        tasks.list_task(f"folder:{root}")


@pytest.mark.parametrize(("split", "spelt"), [("train", "Train"), ("test", "testing"), ("val", "Dev")])
def test_splits_of_another_spelling_are_no_classes(tmp_path: Path, split: str, spelt: str) -> None:
    root = write_folder_task(tmp_path / "t")
    if split == "val":
        shutil.copytree(root / "test", root / "val")
    (root / split).rename(root / spelt)
    with pytest.raises(TaskvecError, match=f"holds {spelt}/, which would not be seen as {split}/\nrename it"):
        tasks.list_task(f"folder:{root}")
    (root / spelt).rename(root / split)
    assert "train" not in [name.lower() for name in tasks.list_task(f"folder:{root}").classes]


def test_hidden_files_are_left_out_links_followed_and_others_counted(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    ant = root / "train" / "ant"
    (ant / ".checkpoints").mkdir()
    shutil.copy(ant / "000.png", ant / ".checkpoints" / "x.png")
    shutil.copy(ant / "000.png", ant / "._000.png")
    (ant / "notes.txt").write_text("no image")
    (tmp_path / "more").mkdir()
    shutil.copy(ant / "000.png", tmp_path / "more" / "LINKED.PNG")
    (ant / "link").symlink_to(tmp_path / "more")
    (ant / "loop").symlink_to(ant)
    listing = list_folder(str(root))
    names = [path.name for path in listing.items["train"] if isinstance(path, Path) and "ant" in path.parts]
    assert names == [*(f"{i:03}.png" for i in range(12)), "LINKED.PNG"]
    assert listing.notes == (
        "1 images lie in folders below their class's, such as 'train/ant/link/LINKED.PNG'",
        "left out 1 files that are no images (1 .txt), such as 'train/ant/notes.txt'",
    )
    for folder in (ant, root / "train" / "bee", root / "test" / "ant", root / "test"):
        (folder / "Thumbs.db").write_bytes(b"no image")
    (told,) = [line for line in list_folder(str(root)).notes if line.startswith("left out")]
    assert told.startswith("left out 4 files that are no images (3 .db, 1 .txt), such as ")


def test_a_class_folder_whose_name_is_no_text_is_an_error(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    os.mkdir(os.fsencode(root / "train") + b"/caf\xe9")  # noqa: PTH102
    with pytest.raises(TaskvecError, match="not UTF-8"):
        list_folder(str(root))


@pytest.mark.parametrize("address", ["birds", "folders:/x", "lab:greeek", "lab:"])
def test_bad_task_addresses_are_clear_errors(address: str) -> None:
    with pytest.raises(TaskvecError, match=address.split(":")[-1] or address):
        tasks.describe(address, lambda root, files: "")
