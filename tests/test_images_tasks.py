"""Decoding, preprocessing and class folders."""

from __future__ import annotations

import os
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tasks import write_folder_task
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from timm.data import create_transform

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import listen
from taskvec.data import tasks
from taskvec.data.augment import crop_grids, crop_parts
from taskvec.data.folders import list_folder
from taskvec.data.images import Encoded, PixelBudget, Preprocessing, normalise, open_image, resize_and_crop
from taskvec.data.splits import validation_indices


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


RAMP = np.tile(np.linspace(0, 255, 32).astype(int), (32, 1))
"""Greys from black to white, and what every file of them should become."""


def write_tiff(path: Path, data: bytes, bits: int, order: str = "<", **tags: Any) -> Path:
    """Write a grey TIFF of 32 x 32 pixels; ``tags`` are t262=... (a float, or a whole number)."""
    entries = {256: 32, 257: 32, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 32, 279: len(data)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    kinds = {float: (11, "f"), int: (9, "i")}
    packed = b"".join(
        struct.pack(f"{order}HHI{kinds[type(value)][1]}", number, kinds[type(value)][0], 1, value)
        for number, value in sorted(entries.items())
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(entries)) + packed + b"\0" * 4)
    return path


def write_png(
    path: Path, pixels: np.ndarray, *chunks: tuple[bytes, bytes], head: tuple[int, int, int] | None = None
) -> Path:
    """Write a grey or coloured PNG of 8 or 16 bits, or packed rows with a head, with chunks of one's own."""
    width, height, bits = head or (*pixels.shape[1::-1], 8 * pixels.dtype.itemsize)
    kind = {2: 0, 3: 2}[pixels.ndim]
    raw = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    packed = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", packed), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    return path


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack numbers of so many bits one after another, the highest bit first."""
    return np.packbits((values.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1).tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_a_tiff_is_scaled_by_its_bits_and_by_what_zero_is(tmp_path: Path, bits: int, white: int, order: str) -> None:
    values = RAMP * (2**bits - 1) // 255
    data = values.astype(f"{order}u2").tobytes() if bits == 16 else pack_bits(values, bits)
    row = np.asarray(open_image(write_tiff(tmp_path / "a.tif", data, bits, order, t262=white)))[:, :, 0].astype(int)
    want = values * 255 / (2**bits - 1)
    assert np.abs(row - (want if white else 255 - want)).max() <= 0.5


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize(
    ("kind", "numbers", "low", "high"),
    [("u2", RAMP * 4095 // 255, 0, 4095), ("f4", RAMP / 255, 0.0, 1.0), ("f4", RAMP * 2.0 - 100, -100.0, 410.0)],
)
def test_a_tiff_may_say_the_range_of_its_numbers(
    tmp_path: Path, kind: str, numbers: np.ndarray, low: float, high: float, white: int
) -> None:
    data, format_ = numbers.astype(f"<{kind}").tobytes(), 3 if kind == "f4" else 1
    bits, tags = 8 * np.dtype(kind).itemsize, {"t262": white, "t339": format_}
    path = write_tiff(tmp_path / "a.tif", data, bits, t340=low, t341=high, **tags)
    row = np.asarray(open_image(path))[:, :, 0].astype(int)
    assert np.abs(row - (RAMP if white else 255 - RAMP)).max() <= 1


@pytest.mark.parametrize(("kind", "code"), [("f4", 3), ("i1", 2), ("i2", 2), ("u4", 1), ("i4", 2)])
def test_numbers_without_a_range_are_refused(tmp_path: Path, kind: str, code: int) -> None:
    data = RAMP.astype(f"<{kind}").tobytes()
    path = write_tiff(tmp_path / "a.tif", data, 8 * np.dtype(kind).itemsize, t339=code)
    with pytest.raises(TaskvecError, match=r"a\.tif' cannot be read: its values are .* numbers without a range"):
        open_image(path)


TURNED = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.T,
    lambda a: np.rot90(a, -1),
    lambda a: a[::-1, ::-1].T,
    lambda a: np.rot90(a),
]
"""What is seen of pixels with the orientations 1 to 8 (EXIF 2.3, tag 274)."""


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_depth_is_turned_upright(
    tmp_path: Path, orientation: int, mode: str, suffix: str
) -> None:
    pixels = np.arange(24).reshape(4, 6) * 10
    file = pixels.astype(np.uint16) * 257 if mode == "I;16" and suffix != "webp" else pixels.astype(np.uint8)
    image = Image.fromarray(file).convert("RGB") if mode == "RGB" else Image.fromarray(file)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    found = np.asarray(open_image(tmp_path / f"a.{suffix}"))[:, :, 0]
    assert np.array_equal(found, TURNED[orientation - 1](pixels))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_of_few_bits_is_laid_on_white(tmp_path: Path, bits: int) -> None:
    values = np.tile(np.arange(2**bits), 16)[:32].reshape(2, 16)
    for clear in range(min(2**bits, 4)):
        path = tmp_path / f"{clear}.png"
        rows = np.frombuffer(pack_bits(values, bits), np.uint8).reshape(2, -1)
        write_png(path, rows, (b"tRNS", struct.pack(">H", clear)), head=(16, 2, bits))
        want = np.where(values == clear, 255, values * 255 // (2**bits - 1))
        assert np.array_equal(np.asarray(open_image(path))[:, :, 0], want)


TWELVE = (RAMP * 4095 // 255).astype(np.uint16)
SAYS_TWELVE = (b"sBIT", bytes([12]))


@pytest.mark.parametrize(
    ("pixels", "chunks", "want"),
    [
        (TWELVE, (SAYS_TWELVE,), RAMP),
        (TWELVE * 16 + TWELVE // 256, (SAYS_TWELVE,), RAMP),
        (TWELVE // 16 * 16, (SAYS_TWELVE,), RAMP // 16),
        ((RAMP * 257).astype(np.uint16), (), RAMP),
        ((RAMP * 257).astype(np.uint16), ((b"tRNS", b"\0\0"),), np.where(RAMP, RAMP, 255)),
        (np.dstack([RAMP * 257] * 3).astype(np.uint16), (), RAMP),
    ],
    ids=["low bits", "by the standard", "dark", "all bits", "transparent", "colours"],
)
def test_sixteen_bits_of_a_png(tmp_path: Path, pixels: np.ndarray, chunks: Any, want: np.ndarray) -> None:
    row = np.asarray(open_image(write_png(tmp_path / "a.png", pixels, *chunks)))[:, :, 0].astype(int)
    assert np.abs(row - want).max() <= 1


def test_sixteen_bits_of_a_pgm_are_what_its_head_says(tmp_path: Path) -> None:
    for most, values in ((4095, TWELVE), (65535, RAMP.astype(np.uint16))):
        (tmp_path / "a.pgm").write_bytes(b"P5 32 32 %d\n" % most + values.astype(">u2").tobytes())
        shown = np.asarray(open_image(tmp_path / "a.pgm"))[:, :, 0].astype(int)
        assert np.abs(shown - values.astype(int) * 255 / most).max() <= 0.6


def test_inks_and_lab_become_the_same_greys(tmp_path: Path) -> None:
    grey = Image.fromarray(np.dstack([RAMP.astype(np.uint8)] * 3))
    grey.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(grey, *profiles, outputMode="LAB")  # type: ignore[misc]
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    for name in ("ink.jpg", "lab.tif"):
        assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - RAMP[:, :, None]).max() <= 6


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"k\0\0" + zlib.compress(b"x" * 3_000_000)),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 30_000_000)),
        (b"iCCP", b"k\0\0" + zlib.compress(b"x" * 3_000_000)),
        (b"eXIf", b"MM\0*\0\0\xff\xffnothing that can be read"),
        (b"eXIf", b"nothing that can be read"),
    ],
    ids=["zTXt", "iTXt", "iCCP", "eXIf", "eXIf without a head"],
)
def test_what_stands_beside_the_pixels_does_not_spoil_them(tmp_path: Path, chunk: tuple[bytes, bytes]) -> None:
    path = write_png(tmp_path / "a.png", RAMP.astype(np.uint8), chunk)
    assert np.array_equal(np.asarray(open_image(path))[:, :, 1], RAMP)


def test_a_long_text_may_turn_the_image(tmp_path: Path) -> None:
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + b" " * 2_000_000 + b'tiff:Orientation="6"'
    path = write_png(tmp_path / "a.png", RAMP[:8].astype(np.uint8), (b"iTXt", text))
    assert open_image(path).size == (8, 32)


def test_only_promised_formats_are_opened_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", start)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    for source in (tmp_path / "a.png", Encoded((tmp_path / "a.png").read_bytes(), "a.png")):
        with pytest.raises(TaskvecError, match=r"a\.png' cannot be read: it is no PNG, JPEG, .* or WEBP"):
            open_image(source)


def test_sizes_are_looked_at_before_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("pixels were read")

    write_png(tmp_path / "a.png", np.zeros((60_000, 1), np.uint8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(TaskvecError, match=r"a\.png' is suspiciously large: 224 x 13440000 pixels"):
        open_image(tmp_path / "a.png", Preprocessing(224))


def test_large_images_wait_for_each_other() -> None:
    room, most, held = PixelBudget(100), [0], [0]

    def take(pixels: int) -> None:
        with room.taken(pixels):
            held[0] += min(pixels, 100)
            most[0] = max(most[0], held[0])
            time.sleep(0.002)
            held[0] -= min(pixels, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [30, 500, 60, 10, 100, 45, 99, 1] * 4))
    assert most[0] <= 100
    assert room.left == 100


@pytest.mark.parametrize("suffix", ["JPEG", "jpe", "Jfif", "TIF", "apng", "pbm"])
def test_suffixes_of_images_in_any_case(tmp_path: Path, suffix: str) -> None:
    root = write_folder_task(tmp_path / "t")
    kind = {"apng": "PNG", "pbm": "PPM", "TIF": "TIFF"}.get(suffix, "JPEG")
    Image.fromarray(RAMP.astype(np.uint8)).save(root / "train" / "ant" / f"x.{suffix}", format=kind)
    listing = list_folder(str(root))
    assert root / "train" / "ant" / f"x.{suffix}" in list(listing.items["train"])
    assert listing.notes == ()


def test_a_split_that_is_dark_as_twelve_bits_in_sixteen_is_told(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    for path in root.rglob("*.png"):
        write_png(path, np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16)
    (tmp_path / "out").mkdir()
    with listen() as notes:
        tasks.write_task(f"folder:{root}", Preprocessing(16), None, tmp_path / "out")
    (note,) = notes
    assert note.startswith("images of 16 bits in the train, validation, test split have no value above 3")
    assert note.endswith("where they are numbers of 12 bits, multiply them by 16")


def test_augmentation_stays_inside_and_close_to_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.full((16, 3, 24, 24), 0.7)
    assert torch.allclose(crop_grids(constant, crop_parts(len(constant), generator)), constant, atol=1e-5)
    ramp = torch.linspace(0, 1, 24).expand(64, 3, 24, 24)
    moved = crop_grids(ramp, crop_parts(len(ramp), generator))
    assert float((moved - ramp).abs().max()) < 0.25
    assert not torch.equal(moved, ramp)
    whole = crop_grids(ramp, crop_parts(len(ramp), generator, smallest=1.0))
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
