"""The two decoded caches: bit-equal views, whole images, crops as torchvision cuts them, and what they tell."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import TinyEncoder
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as reference
from typer.testing import CliRunner

from taskvec.command import runs
from taskvec.command.cli import app
from taskvec.core.errors import TaskvecError
from taskvec.core.files import write_json
from taskvec.core.notes import listen
from taskvec.core.progress import no_progress
from taskvec.core.settings import Finetune
from taskvec.data import decoding as decoded
from taskvec.data import tasks
from taskvec.data.augment import crop_box, cut
from taskvec.data.decoding import Whole, check_room, write_whole
from taskvec.data.folders import is_flat
from taskvec.data.images import Preprocessing, open_image, resize_and_crop, shrink
from taskvec.data.sources import parse
from taskvec.encoders.backbone import Backbone
from taskvec.engine import pipeline
from taskvec.engine.executors import Inline
from taskvec.engine.store import Store, content_of
from taskvec.learning.batches import cropped_batches, training_batches
from taskvec.learning.finetuning import finetune
from taskvec.learning.heads import random_head
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.study.steps import loading

TO = Preprocessing(16, 0.9)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_sizes(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(noise(height, width, index)).save(folder / f"{index:03}.png")
    return sorted(folder.iterdir())


def test_the_evaluation_cache_is_bit_equal_to_decoding_each_time(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    listing = tasks.list_task(f"folder:{root}")
    (tmp_path / "out").mkdir()
    tasks.write_task(f"folder:{root}", TO, None, tmp_path / "out")
    for split in tasks.SPLITS:
        cached = np.load(tmp_path / "out" / f"{split}.npy")
        for path, view in zip(listing.items[split], cached, strict=True):
            assert isinstance(path, Path)
            assert np.array_equal(view, resize_and_crop(open_image(path), TO))


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 90), st.integers(4, 90), st.sampled_from([1.0, 0.9, 0.5]))
def test_a_whole_image_keeps_its_aspect_and_is_never_upscaled(height: int, width: int, crop: float) -> None:
    to = Preprocessing(20, crop)
    image = Image.fromarray(noise(height, width))
    kept, short = shrink(image, to), int(20 / crop)
    if min(height, width) <= short:
        assert np.array_equal(kept, np.asarray(image).transpose(2, 0, 1))
    else:
        assert min(kept.shape[1:]) == short
        assert abs(kept.shape[1] / kept.shape[2] - height / width) * min(kept.shape[1:]) <= max(1, height / width)


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 60), st.integers(3, 200), st.integers(0, 1000))
def test_crops_are_cut_as_torchvision_cuts_them(height: int, width: int, seed: int) -> None:
    pixels = noise(height, width)
    top, left, high, wide = box = crop_box(height, width, np.random.default_rng(seed))
    assert 0 <= top <= height - high
    assert 0 <= left <= width - wide
    image = Image.fromarray(pixels)
    theirs = reference.resized_crop(image, top, left, high, wide, [16, 16], transforms.InterpolationMode.BICUBIC)
    assert np.array_equal(cut(pixels.transpose(2, 0, 1), box, 16), np.asarray(theirs).transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(240, 240), (200, 300)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, [0.9, 1.0], [3 / 4, 4 / 3]) for _ in range(600)], float)
    ours = np.array([crop_box(height, width, np.random.default_rng(seed)) for seed in range(600)], float)
    spread = theirs.std(0) * np.sqrt(2 / 600)
    assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) <= 5 * spread + 1e-9)
    assert np.allclose(np.quantile(ours, [0.1, 0.9], axis=0), np.quantile(theirs, [0.1, 0.9], axis=0), atol=8)


@pytest.mark.parametrize(("height", "width"), [(20, 300), (300, 20)])
def test_what_fits_no_box_gives_torchvisions_central_one(height: int, width: int) -> None:
    theirs = transforms.RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert crop_box(height, width, np.random.default_rng(0)) == tuple(theirs)


def test_an_images_crop_depends_on_seed_step_and_index_alone(tmp_path: Path) -> None:
    items = write_sizes(tmp_path / "in", [(20, 30), (50, 40), (9, 9), (64, 20)])
    (tmp_path / "out").mkdir()
    write_whole(items, TO, tmp_path / "out", False, no_progress)
    whole = decoded.read_whole(tmp_path / "out")
    for index, path in enumerate(items):
        assert np.array_equal(whole.image(index), shrink(open_image(path), TO))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(4) as four:
        together = whole.crops([3, 0, 2, 1], 7, 5, 16, four)
        assert np.array_equal(together, whole.crops([3, 0, 2, 1], 7, 5, 16, one))
        assert np.array_equal(together[2], whole.crops([2], 7, 5, 16, one)[0])
        assert not np.array_equal(together, whole.crops([3, 0, 2, 1], 8, 5, 16, one))
        assert not np.array_equal(together, whole.crops([3, 0, 2, 1], 7, 6, 16, one))


def test_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    items = write_sizes(tmp_path / "in", [(20 + i, 40 - i) for i in range(12)])
    (tmp_path / "out").mkdir()
    write_whole(items, TO, tmp_path / "out", False, no_progress)
    whole = decoded.read_whole(tmp_path / "out")
    few, many = (cropped_batches(whole, 5, 16, 3, workers) for workers in (1, 4))
    for _ in range(6):
        (a, x), (b, y) = next(few), next(many)
        assert torch.equal(a, b)
        assert np.array_equal(x, y)
    few.close()
    many.close()


def test_training_takes_crops_of_whole_images(tmp_path: Path, backbone: Backbone) -> None:
    root = write_folder_task(tmp_path / "t")
    to = replace(backbone.preprocessing, crop=0.875)
    task = tasks.load_task(f"folder:{root}", to)
    assert task.train.whole is not None
    assert len(task.train.whole.shapes) == len(task.train)
    (images, labels), (again, _) = (next(training_batches(backbone, task.train, 9, 4)) for _ in range(2))
    assert torch.equal(images, again)
    assert images.shape == (9, 3, 8, 8)
    brightness = images.mean((1, 2, 3))
    assert all(brightness[labels == low].max() < brightness[labels == low + 1].min() for low in (0, 1))
    torch.manual_seed(0)
    head = random_head(backbone.width, 3, 0)
    tuned = finetune(backbone, task, head, Finetune(steps=2, batch_size=8, warmup=0, learning_rate=1e-3))
    assert not torch.equal(tuned.flat, backbone.pretrained.flat)
    assert isinstance(backbone.module, TinyEncoder)


def test_the_lab_has_no_second_cache() -> None:
    assert not parse("lab:greek").source.has_whole
    assert all(
        parse(address).source.has_whole for address in ("folder:/x", "hf:a/b", "paper:dtd", "torchvision:CIFAR10@/x")
    )


def notes_of(root: Path, out: Path, skip: bool = False) -> list[str]:
    out.mkdir()
    with listen() as notes:
        tasks.write_task(f"folder:{root}", TO, None, out, skip_corrupt=skip)
    return notes


def test_images_in_two_splits_are_told_by_path(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    assert notes_of(root, tmp_path / "one") == []
    shutil.copy(root / "train" / "ant" / "004.png", root / "test" / "ant" / "copy.png")
    Image.open(root / "train" / "bee" / "005.png").save(root / "test" / "bee" / "copy.bmp")
    (note,) = notes_of(root, tmp_path / "two")
    assert note.startswith("2 images of the test split are in the train split too")
    assert "test/ant/copy.png', which is '" in note
    assert "train/ant/004.png" in note


def test_corrupt_images_stop_the_load_or_are_skipped_and_counted(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    (root / "test" / "bee" / "002.png").write_bytes(b"no image")
    listing = tasks.list_task(f"folder:{root}")
    bad = listing.items["train"][5]
    assert isinstance(bad, Path)
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(TaskvecError, match=r"cannot be read.*\n.*skip_corrupt: true"):
        notes_of(root, tmp_path / "no")
    notes = notes_of(root, tmp_path / "out", skip=True)
    assert [note.split(":")[0] for note in notes] == [
        "left out 1 images of the train split",
        "left out 1 images of the test split",
    ]
    assert str(bad) in notes[0]
    (tmp_path / "whole").mkdir()
    tasks.write_training(f"folder:{root}", TO, None, tmp_path / "whole", skip_corrupt=True)
    task = tasks.read_task(tmp_path / "out", "t", tmp_path / "whole")
    assert (len(task.train.images), len(task.train.labels), len(task.test)) == (32, 32, 11)
    assert task.train.whole is not None
    kept = [p for p in listing.items["train"] if p != bad]
    assert len(task.train.whole.shapes) == 32
    assert isinstance(kept[-1], Path)
    assert np.array_equal(task.train.images[-1], resize_and_crop(open_image(kept[-1]), TO))
    assert np.array_equal(task.train.whole.image(31), shrink(open_image(kept[-1]), TO))


def test_both_caches_hold_the_same_images_or_are_refused(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    address = f"folder:{root}"
    known = tasks.describe(address, Store(tmp_path / "store").tree_digest)
    for name in ("views", "whole", "later"):
        (tmp_path / name).mkdir()
    tasks.write_task(address, TO, None, tmp_path / "views", known=known)
    tasks.write_training(address, TO, None, tmp_path / "whole", known=known)
    task = tasks.read_task(tmp_path / "views", "t", tmp_path / "whole")
    first = sorted((root / "train" / "ant").iterdir())[0]
    shutil.copy(first, first.with_name("new.png"))
    with pytest.raises(TaskvecError, match=r"has changed since the run began: it had 48 images, now it has 49\n"):
        tasks.write_training(address, TO, None, tmp_path / "later", known=known)
    write_json(tmp_path / "preprocessing.json", TO.decoding())
    for decode in (loading.decode_task, loading.decode_training):
        with pytest.raises(TaskvecError, match="has changed since the run began"):
            config = loading.DecodeConfig(address=str(address), limit=None, source=known)
            decode.function(config, {"preprocessing": tmp_path}, tmp_path / "later", no_progress)
    first.unlink()  # as many as before, and others
    tasks.write_training(address, TO, None, tmp_path / "later", known=known)
    assert task.train.whole is not None
    assert len(tasks.read_whole(tmp_path / "later").shapes) == len(task.train.whole.shapes)
    with pytest.raises(TaskvecError, match=r"not of the same files.*\ntaskvec store --clear views, .* later"):
        tasks.read_task(tmp_path / "views", "t", tmp_path / "later")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (OSError(24, "Too many open files"), "Too many open files"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "no memory is left"),
    ],
)
def test_a_failing_system_is_not_taken_for_a_corrupt_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    items = write_sizes(tmp_path / "in", [(10, 10)])
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(TaskvecError, match=rf"000\.png' cannot be read: .*{message}"):
        list(decoded.decode(items, TO, skipped=decoded.Skipped()))


def test_links_to_nothing_and_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    root, store = write_folder_task(tmp_path / "t"), Store(tmp_path / "store")
    train = root / "train" / "ant"
    odd = train / os.fsdecode(b"caf\xe9.png")
    shutil.copy(sorted(train.iterdir())[0], odd)
    shutil.copy(odd, root / "test" / "ant" / odd.name)
    (train / "dead.png").symlink_to(tmp_path / "nowhere.png")
    about = tasks.describe(f"folder:{root}", store.tree_digest)
    assert about["content"] == tasks.describe(f"folder:{root}", store.tree_digest)["content"]
    with pytest.raises(TaskvecError, match=r"no image at '.*dead\.png'\n.*skip_corrupt: true"):
        notes_of(root, tmp_path / "no")
    notes = notes_of(root, tmp_path / "out", skip=True)
    assert "dead.png" in notes[0]
    assert r"caf\udce9.png" in notes[1]


def test_an_image_that_grows_beyond_all_bounds_is_refused(tmp_path: Path) -> None:
    items = write_sizes(tmp_path / "in", [(1, 65_000), (10, 10)])
    with pytest.raises(TaskvecError, match=r"000\.png' is suspiciously large: 14560000 x 224 pixels"):
        list(decoded.decode(items, Preprocessing(224)))
    skipped = decoded.Skipped()
    assert [place for place, _ in decoded.decode(items, Preprocessing(224), skipped=skipped)] == [1]


def test_a_class_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    for path in (root / "train" / "cow").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TaskvecError, match="nothing of the training images of class 'cow' can be read"):
        notes_of(root, tmp_path / "out", skip=True)


def test_a_bomb_is_refused_in_every_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write_sizes(tmp_path / "in", [(10, 10)] * 20 + [(30, 30)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow itself would only warn
    with pytest.raises(TaskvecError, match=r"020\.png.*suspiciously large"):
        list(decoded.decode(items, TO, workers=4))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    items = write_sizes(tmp_path / "in", [(40, 60)] * 4)
    assert decoded.whole_bytes(items, TO) == 4 * 3 * 17 * 26
    assert decoded.view_bytes(322_284, 224) == pytest.approx(48.5e9, rel=0.01)
    with pytest.raises(TaskvecError, match=r"decoding 4 images takes about 1,000 TB, and .* free"):
        check_room(1e15, tmp_path, "4 images")
    check_room(1.0, tmp_path, "4 images")


def write_images(folder: Path, count: int) -> None:
    """Write so many small images of random colours."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train/seg_train", "seg_test/seg_test"), ("train_images", "test_images"), ("images", "masks"),
        ("fold1", "fold2", "fold3"),
    ],
)  # fmt: skip
def test_splits_of_other_names_are_not_taken_for_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        for name in ("cat", "dog"):
            write_images(tmp_path / folder / name, 3)
    with pytest.raises(TaskvecError, match="are they splits, not classes"):
        tasks.list_task(f"folder:{tmp_path}")


def test_a_folder_of_splits_is_no_flat_tree(tmp_path: Path) -> None:
    for folder in ("2750", "allBands"):
        for name in ("Forest", "River"):
            write_images(tmp_path / folder / name, 1)
    assert not is_flat(tmp_path)  # so that a layout inside it is looked for
    assert is_flat(tmp_path / "2750")


def test_what_a_mac_leaves_in_archives_is_left_out(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 12)
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cat" / "._0.png").write_bytes(b"x")
    assert tasks.list_task(f"folder:{tmp_path}").classes == ("cat", "dog")


def test_a_class_that_the_hold_out_empties_is_told(tmp_path: Path) -> None:
    for name, count in [("cat", 12), ("dog", 12), *((f"rare{i}", 1) for i in range(8))]:
        write_images(tmp_path / "train" / name, count)
        write_images(tmp_path / "test" / name, 1)
    listing = tasks.list_task(f"folder:{tmp_path}")
    lacking = set(range(10)) - set(listing.labels["train"].tolist())
    assert lacking and any(f"no images of {len(lacking)} classes" in note for note in listing.notes)


def test_a_flat_tree_is_divided_by_a_seed(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t", train=30)
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    for name in ("train", "test"):
        shutil.rmtree(root / name)
    listing = tasks.list_task(f"folder:{root}")
    assert listing.sizes() == {"train": 72, "validation": 9, "test": 9}
    assert np.bincount(listing.labels["test"]).tolist() == [3, 3, 3]
    again = tasks.list_task(f"folder:{root}")
    assert all(again.items[split] == listing.items[split] for split in tasks.SPLITS)
    assert len({path for split in tasks.SPLITS for path in listing.items[split]}) == 90
    for path in sorted((root / "cow").iterdir())[2:]:
        path.unlink()
    with pytest.raises(TaskvecError, match="class 'cow' has 2 images, too few to divide"):
        tasks.list_task(f"folder:{root}")


def test_a_folder_of_tasks_is_not_a_task(tmp_path: Path) -> None:
    for name in ("birds", "cars"):
        write_folder_task(tmp_path / "all" / name)
    with pytest.raises(TaskvecError, match=r"has no train/ folder; it holds birds, cars"):
        tasks.list_task(f"folder:{tmp_path / 'all'}")


def test_whole_images_of_a_memory_map_are_not_read_at_once(tmp_path: Path) -> None:
    items = write_sizes(tmp_path / "in", [(20, 20)] * 3)
    (tmp_path / "out").mkdir()
    write_whole(items, TO, tmp_path / "out", False, no_progress)
    whole = decoded.read_whole(tmp_path / "out")
    assert isinstance(whole, Whole)
    assert isinstance(whole.pixels, np.memmap)
    assert whole.pixels.size == 3 * 3 * 17 * 17


def run_steps(text: str, folder: Path) -> Quiet:
    """Run a study's steps, without tables and figures."""
    watcher, store = Quiet(), Store(folder / "store")
    cells = plan(StudyFile(parse_study(text, "s"), text, folder), store)
    pipeline.run([step for cell in cells for step in cell.finetuned.values()], store, Inline(), watcher)
    return watcher


def test_a_study_trains_on_whole_images_and_tells_its_notes(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "one")
    shutil.copy(root / "train" / "ant" / "004.png", root / "test" / "ant" / "copy.png")
    (root / "train" / "bee" / "001.png").write_bytes(b"")
    text = (
        "name: s\nbackbones: ['lab:random']\ntasks: ['folder:one']\nskip_corrupt: true\n"
        "regimes: [aligned, joint]\nprobe: {steps: 2}\nfinetune: {steps: 2, batch_size: 8}\n"
    )
    first = run_steps(text, tmp_path)
    assert "decode whole training images of one (random)" in first.ran
    assert [note.split(": ")[1][:20] for note in first.notes] == ["left out 1 images of", "1 images of the test"]
    root.rename(tmp_path / "moved")
    again = run_steps(text.replace("folder:one", "folder:moved"), tmp_path)
    assert again.ran == []
    assert len(again.notes) == 2


def test_two_runs_may_build_the_same_cache_at_once(tmp_path: Path) -> None:
    root = write_folder_task(tmp_path / "t")
    begin = threading.Barrier(4)

    def build(_: int) -> str:
        store = Store(tmp_path / "store")
        folder = store.begin()
        begin.wait()
        tasks.write_task(f"folder:{root}", TO, None, folder)
        begin.wait()
        return store.finish(
            "ab" + "0" * 18, folder, {"function": "x:decode_task", "label": "decode t"}, content_of(folder)
        ).digest

    with ThreadPoolExecutor(4) as pool:
        digests_seen = set(pool.map(build, range(4)))
    assert len(digests_seen) == 1
    held = Store(tmp_path / "store").held()
    assert [(one.kind, one.label) for one in held] == [("decode_task", "decode t")]
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_the_store_is_listed_and_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for id, kind in (
        ("aa" + "1" * 18, "decode_task"),
        ("bb" + "1" * 18, "decode_training"),
        ("cc" + "1" * 18, "finetune"),
    ):
        folder = store.begin()
        (folder / "x.npy").write_bytes(bytes(2_000_000))
        store.finish(id, folder, {"step": kind, "label": f"{kind} of greek"}, content_of(folder))

    def say(*more: str) -> str:
        found = CliRunner().invoke(app, ["store", "--store", str(tmp_path / "store"), *more])
        return found.output

    listed = say()
    assert "2.0 MB  " + "aa" + "1" * 18 + "  decode_task of greek" in listed
    assert "2.0 MB  finetune: 1 steps" in listed
    assert "6.0 MB  in all" in listed
    assert "unknown part of the store 'decode'" in say("--clear", "decode")
    assert "removed 2 steps, 4.0 MB" in say("--clear", "decoded")
    assert [one.kind for one in Store(tmp_path / "store").held()] == ["finetune"]
    assert store.find("cc" + "1" * 18) is not None
    assert "removed 1 steps" in say("--clear", "cc" + "1" * 18)
    assert "in all" in say()
    for name in ("dd" + "1" * 18, "theses/thesis", "th/thesis", "th/ef" + "0" * 18, "ef/ef" + "0" * 17, "damaged/mine"):
        place = tmp_path / "store" / name if "/" in name else tmp_path / "store" / "dd" / name
        place.mkdir(parents=True)
        (place / "x.npy").write_bytes(bytes(3_000_000))
    elsewhere = tmp_path / "store" / "tmp" / "othermachine-1-abc"
    elsewhere.mkdir(parents=True)
    (elsewhere / "x.npy").write_bytes(bytes(1_000_000))
    mine = sorted((tmp_path / "store").rglob("x.npy"))
    assert "damaged" not in say() and "1.0 MB  unfinished: " in say()
    assert "removed 0 steps" in say("--clear", "all")
    assert Store(tmp_path / "store").find("dd" + "1" * 18) is None
    assert "3.0 MB  damaged: 1 steps" in say()
    assert "removed 1 steps, 3.0 MB" in say("--clear", "damaged")
    assert len(mine) == 7 and sorted((tmp_path / "store").rglob("x.npy")) == [p for p in mine if "dd1" not in str(p)]


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    thesis = tmp_path / "ab" / "ab" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    for more in ([], ["--clear", "all"], ["--clear", "damaged"]):
        found = CliRunner().invoke(app, ["store", "--store", str(tmp_path), *more])
        assert found.exit_code == 2 and "is no store" in found.output
    assert thesis.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(app, ["store", "--store", str(tmp_path / "empty")]).exit_code == 0
    Store(tmp_path).open()
    assert "removed 0 steps" in CliRunner().invoke(app, ["store", "--store", str(tmp_path), "--clear", "all"]).output
    assert thesis.read_text() == "mine"


def test_much_room_is_told_before_the_work(tmp_path: Path) -> None:
    watcher = Quiet()
    runs.say_size(48.5e9, Store(tmp_path / "none"), watcher)
    runs.say_size(1e6, Store(tmp_path / "none"), watcher)
    assert len(watcher.notes) == 1
    assert watcher.notes[0].startswith("decoded images: about 48 GB of evaluation views")
