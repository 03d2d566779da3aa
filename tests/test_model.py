"""The kept model: whatever an image is given as, from any number of threads, and damaged in many ways."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.core import notes
from taskvec.data.images import Preprocessing
from taskvec.deploy import model
from taskvec.encoders.backbone import Backbone, assemble, linearised
from taskvec.encoders.loaders.families import build
from taskvec.learning.heads import Head, random_head
from taskvec.merging import in_memory as buffers
from taskvec.merging.registry import find_recipe
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

TINY = {"size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
KINDS = {"letters": "classification", "ground": "segmentation", "turn": "regression"}
CLASSES = {"letters": ("a", "b", "c"), "ground": ("paper", "ink"), "turn": ("cosine", "sine")}
ABOUT = {"method": "emr", "heads": "kept", "scale": 0.7, "validation": 0.5}


def encoder(family: str = "lab", options: dict[str, Any] = TINY, size: int = 16) -> Backbone:
    architecture = {"family": family, "options": options}
    return assemble("tiny", build(architecture), Preprocessing(size), architecture, "cpu")


def wander(backbone: Backbone, seed: int, distance: float = 0.2) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    flat = backbone.pretrained.flat
    return backbone.pretrained.with_flat(distance * torch.randn(flat.shape, generator=generator))


def keep(
    folder: Path, backbone: Backbone, per_task: bool = False, kinds: dict[str, str] = KINDS, seed: int = 0
) -> tuple[dict[str, Head], list[Weights]]:
    """Write a model of random heads, at a random place or with random directions; return heads and directions."""
    taus = [wander(backbone, seed + place) for place in range(len(kinds))]
    heads = {
        name: random_head(backbone.width, len(CLASSES[name]), seed + place, kind)
        for place, (name, kind) in enumerate(kinds.items())
    }
    classes = [CLASSES[name] for name in kinds]
    directions, weights = None, vectors.add(backbone.pretrained, taus[0])
    if per_task:
        directions = buffers.task_directions(find_recipe("emr"), buffers.Buffers(backbone.pretrained, taus))
        weights, taus = backbone.pretrained, [directions.of(place) for place in range(len(kinds))]
    model.save_model(folder, backbone, weights, heads, classes, ABOUT, directions)
    return heads, taus


def pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


# ---------------------------------------------------------------- threads

ENCODERS: dict[str, Callable[[], Backbone]] = {
    "transformer": encoder,
    "linearised": lambda: linearised(encoder()),
    "batch norm": lambda: encoder("timm", {"name": "test_resnet", "size": 32}, 32),
}


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_threads_that_share_a_model_get_the_answers_of_one_alone(tmp_path: Path, kind: str, per_task: bool) -> None:
    backbone = ENCODERS[kind]()
    kinds = {"letters": "classification"} | ({} if kind == "batch norm" else {"ground": "segmentation"})
    heads, taus = keep(tmp_path, backbone, per_task, kinds | {"turn": "regression"})
    kept, images = tv.load(tmp_path, "cpu"), pictures(6, backbone.preprocessing.size)
    jobs = [(image, task) for image in images for task in [*heads, None]]
    want = [kept.predict(*job) for job in jobs]
    if per_task:
        for place, (name, head) in enumerate(heads.items()):
            alone = np.ascontiguousarray(images[:1].transpose(0, 3, 1, 2))
            with backbone.at(vectors.add(backbone.pretrained, taus[place], 0.7)):
                scores = head.logits(backbone.features(alone, per_patch=head.task_type.per_patch))
            [own] = kept.predict(images[0], name)
            assert (own.label, own.probability) == head.task_type.describe(scores[0], CLASSES[name])
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda job: kept.predict(*job), jobs * 3)) == want * 3


def test_the_encoder_of_a_per_task_model_is_back_where_a_pass_fails(tmp_path: Path) -> None:
    keep(tmp_path, encoder(), per_task=True)
    kept = tv.load(tmp_path, "cpu")
    before = kept.backbone.bound.flat.clone()
    hook = kept.backbone.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kept.predict(pictures(1)[0], "letters")
    hook.remove()
    assert torch.equal(kept.backbone.bound.flat, before)


def test_threads_may_share_an_image_that_pillow_has_not_read_yet(kept: tv.MultiTaskModel) -> None:
    data = png(pictures(1, 200)[0])
    want = kept.predict(data)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            shared = [Image.open(io.BytesIO(data))] * 8
            assert list(pool.map(kept.predict, shared)) == [want] * 8


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tv.MultiTaskModel:
    folder = tmp_path_factory.mktemp("kept")
    keep(folder, encoder())
    return tv.load(folder, "cpu")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def answer(kept: tv.MultiTaskModel, image: Any) -> tuple[str, float]:
    [found] = kept.predict(image, "letters")
    return found.label, found.probability


def test_one_image_in_any_form_has_one_answer(kept: tv.MultiTaskModel, tmp_path: Path) -> None:
    pixels = pictures(1)[0]
    file = tmp_path / "a.png"
    file.write_bytes(png(pixels))
    want = answer(kept, file)
    opaque = np.dstack([pixels, np.full((16, 16), 255, np.uint8)])
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms: list[Any] = [str(file), file, Image.open(file), pixels, opaque, np.asfortranarray(pixels), chw]
    forms += [file.read_bytes(), bytearray(file.read_bytes()), memoryview(file.read_bytes()), io.BytesIO(png(pixels))]
    forms += [Image.fromarray(opaque), np.str_(file)]
    for form in forms:
        assert answer(kept, form) == want
    with file.open("rb") as opened:
        assert answer(kept, opened) == want
    several = kept.predict(iter([str(file), pixels, chw]), "letters")
    assert [one.image for one in several] == [str(file), "image 1", "image 2"]
    assert {one.label for one in several} == {want[0]}
    assert [one.probability for one in several] == pytest.approx([want[1]] * 3)
    for batch in (np.stack([pixels] * 2), torch.stack([chw] * 2), [pixels, pixels]):
        assert [one.image for one in kept.predict(batch, "letters")] == ["image 0", "image 1"]
    assert kept.predict([]) == kept.predict(np.zeros((0, 16, 16, 3), np.uint8)) == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_images_of_pillow_count_as_what_they_show(kept: tv.MultiTaskModel, tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(pictures(1)[0][:, :, 0]).convert("RGB")
    image = image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)
    image.save(tmp_path / "a.tif") if mode != "HSV" else image.convert("RGB").save(tmp_path / "a.tif")
    assert answer(kept, image) == answer(kept, tmp_path / "a.tif")


def test_an_image_of_pillow_is_turned_upright(kept: tv.MultiTaskModel, tmp_path: Path) -> None:
    pixels = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert answer(kept, image) == answer(kept, pixels) == answer(kept, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (
            np.zeros((16, 16, 3)),
            r"image 0 is an array of float64 values in the shape \[16, 16, 3\]\n.*uint8.*255 times",
        ),
        (np.zeros((3, 16, 16), np.uint8), r"in the shape \[3, 16, 16\]\ngive uint8 values as \[height, width\]"),
        (torch.zeros(3, 16, 16), r"image 0 is a tensor of torch.float32 values.*\n.*\[3, height, width\]"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), r"tensor of torch.uint8 .*\[16, 16, 3\]"),
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "tensor of torch.bfloat16"),
        (np.zeros((0, 16, 3), np.uint8), r"in the shape \[0, 16, 3\]"),
        ([np.zeros((2, 16, 16, 3), np.uint8)], r"in the shape \[2, 16, 16, 3\]"),
        (np.zeros((16, 16), bool), "of bool values"),
        (b"", "image 'image 0' is empty"),
        (io.StringIO("text"), "image 0 is a str\n.*opened in binary mode"),
        (3, "a int is no image"),
        (None, "a NoneType is no image"),
        ([None], "image 0 is a NoneType\ngive a path"),
        ("none.png", "no image at 'none.png'"),
        ("a\0b", r"image 'a.b' cannot be read"),
        (Image.new("F", (4, 4)), "image 'image 0' cannot be read: its values are floating-point"),
        (Image.new("I", (4, 4)), "image 'image 0' cannot be read: its values are .* numbers without a range"),
        (Image.new("RGB", (0, 4)), "image 'image 0' cannot be read: it has no pixels"),
        (io.BytesIO(), "image 'image 0' is empty\n.*opened again"),
        (np.array(3, np.uint8), r"image 0 is an array of uint8 values in the shape \[\]"),
    ],
)
def test_what_is_no_image_is_told(kept: tv.MultiTaskModel, image: Any, told: str) -> None:
    with pytest.raises(tv.TaskvecError, match=told):
        kept.predict(image)


def test_a_folder_is_no_image(kept: tv.MultiTaskModel, tmp_path: Path) -> None:
    with pytest.raises(tv.TaskvecError, match="is a folder, not an image\n"):
        kept.predict(tmp_path)


def test_an_unknown_task_is_answered_with_those_that_there_are(kept: tv.MultiTaskModel) -> None:
    with pytest.raises(tv.TaskvecError, match="unknown task 'birds'\nknown: ground, letters, turn"):
        kept.predict(pictures(1)[0], "birds")
    with pytest.raises(tv.TaskvecError, match="unknown task"):
        kept.predict(pictures(1)[0], ["letters"])  # type: ignore[arg-type]


def test_many_images_are_looked_at_by_and_by(kept: tv.MultiTaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = pictures(40), []
    want = kept.predict(images)
    scores = type(kept).scores
    monkeypatch.setattr(model, "CHUNK", 16)
    monkeypatch.setattr(
        type(kept), "scores", lambda self, views, tasks: sizes.append(len(views)) or scores(self, views, tasks)
    )
    found = kept.predict(image for image in images)
    assert sizes == [16, 16, 8]
    assert [(one.image, one.task, one.label) for one in found] == [(one.image, one.task, one.label) for one in want]


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    backbone = encoder()
    keep(tmp_path, backbone)
    kept = tv.load(tmp_path, "cpu")
    kept.backbone.use(kept.backbone.pretrained.with_flat(1e30 * kept.backbone.pretrained.flat))
    with pytest.raises(tv.TaskvecError, match="are no numbers"):
        kept.predict(pictures(1)[0])


# ---------------------------------------------------------------- damage

JUNK = [None, True, -1, 0, 3, 10**9, 10**400, 0.5, -1e300, "", "x", "\ud800\0", [], ["x"], [1, 2, 3], {}, {"a": 1}]


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value in a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(way for key, child in children for way in places(child, (*here, key)))]


def change_json(folder: Path, draw: random.Random) -> None:
    """Replace, drop, rename or double one value of model.json, or write what Python writes and JSON does not know."""
    file = folder / "model.json"
    record = json.loads(file.read_text())
    *way, last = draw.choice(places(record)[1:])
    home = record
    for key in way:
        home = home[key]
    how, value = draw.choice(("replace", "replace", "drop", "rename", "double", "wrap", "nan")), home[last]
    if how in ("drop", "rename"):
        del home[last]
    if how == "rename" and isinstance(home, dict):
        home[last + "s"] = value
    elif how == "replace":
        home[last] = draw.choice(JUNK)
    elif how == "double" and isinstance(home, list):
        home.append(value)
    elif how in ("wrap", "nan"):
        home[last] = [value] if how == "wrap" else float("nan")
    file.write_text(json.dumps(record))


def change_tensor(folder: Path, draw: random.Random) -> None:
    """Drop, rename, reshape or fill one tensor of a file, or give it another type or the file other metadata."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    name = draw.choice(sorted(tensors))
    tensor, how = tensors[name], draw.choice(("drop", "rename", "shape", "longer", "nan", "type", "huge", "metadata"))
    if how in ("drop", "rename"):
        del tensors[name]
    if how == "rename":
        tensors[name + draw.choice((".weight", "x"))] = tensor
    elif how == "shape":
        tensors[name] = draw.choice(
            (tensor.flatten(), tensor[None], tensor.flatten()[None].mT.contiguous(), tensor[..., :0].clone())
        )
    elif how == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif how in ("nan", "huge") and tensor.is_floating_point():
        tensors[name] = tensor.clone().fill_(draw.choice((torch.nan, torch.inf)) if how == "nan" else 3e38)
    elif how == "type":
        tensors[name] = tensor.to(draw.choice((torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8)))
    elif how == "metadata":
        junk = draw.choice((*JUNK, {"letters": {"kind": "x"}}, {"letters": 1}, {"turn": {"more": 1}}, {"x": {}}))
        text = draw.choice((json.dumps(junk), "[" * 100_000, "nan", "1" * 5000))
        metadata = {draw.choice(("heads", "names", "classes")): text}
    save_file(tensors, file, metadata)


def change_bytes(folder: Path, draw: random.Random) -> None:
    """Cut a file, flip some of its bytes, empty it, or nest it deeply."""
    file = draw.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    how = draw.choice(("cut", "flip", "flip", "empty", "deep", "text"))
    if how == "cut":
        del data[draw.randrange(len(data)) :]
    elif how == "flip":
        end = len(data) if draw.random() < 0.5 else min(len(data), 600)
        for _ in range(draw.choice((1, 4, 40))):
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    else:
        data = bytearray({"empty": b"", "deep": b"[" * 200_000, "text": b"\xff\xfe<html>"}[how])
    file.write_bytes(data)


def change_files(folder: Path, draw: random.Random) -> None:
    """Remove a file, turn it into a folder, or take that of another model or another name."""
    file = draw.choice(sorted(folder.iterdir()))
    others = [other for one in sorted(folder.parent.glob("model*")) for other in sorted(one.iterdir())]
    how = draw.choice(("remove", "folder", "swap", "swap", "swap"))
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "swap":
        same = [other for other in others if other.name == file.name]
        shutil.copyfile(draw.choice(same if draw.random() < 0.7 else others), file)
    elif how == "remove" and draw.random() < 0.3:
        other = draw.choice(others)
        shutil.copyfile(other, folder / other.name)


def check_damaged(home: Path, seed: int) -> bool:
    """Damage a copy of a model; it is refused with one error, or its answers are sound. Say whether it was refused."""
    draw, folder = random.Random(seed), home / f"damaged{seed}"
    shutil.copytree(draw.choice(sorted(home.glob("model*"))), folder)
    draw.choice((change_json, change_json, change_tensor, change_tensor, change_bytes, change_files))(folder, draw)
    try:
        with notes.listen():
            answers = tv.load(folder, "cpu").predict(pictures(2))
    except tv.TaskvecError as error:
        assert len(str(error)) < 2000
        assert error.fix
        return True
    finally:
        shutil.rmtree(folder)
    assert answers
    assert all(0 <= answer.probability <= 1.000001 and isinstance(answer.label, str) for answer in answers)
    return False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    keep(home / "model0", encoder())
    keep(home / "model1", encoder(), per_task=True)
    keep(home / "model2", linearised(encoder()), seed=5)
    keep(home / "model3", encoder("lab", TINY | {"width": 8}), kinds={"letters": "classification"}, seed=9)
    return home


@pytest.mark.parametrize("name", ["heads.safetensors", "encoder.safetensors", "directions.safetensors"])
def test_a_file_of_another_run_that_would_fit_is_refused(tmp_path: Path, name: str) -> None:
    for seed in (0, 1):
        keep(tmp_path / str(seed), encoder(), per_task=True, seed=10 * seed)
    flat = encoder().pretrained
    model.save(flat.with_flat(flat.flat + 1), tmp_path / "1" / "encoder.safetensors")
    shutil.copyfile(tmp_path / "1" / name, tmp_path / "0" / name)
    with pytest.raises(tv.TaskvecError, match=rf"0/{name}' is not the file that model\.json was written with"):
        tv.load(tmp_path / "0", "cpu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r["tasks"].reverse(), "scales or directions are not those of the tasks turn, ground, letters"),
        (lambda r: r.update(scales=[0.1, 0.2]), "scales or directions are not those of the tasks"),
        (lambda r: r.update(scale=1e308), "scale: Input should be less than"),
        (lambda r: r["tasks"][0].update(classes=["a", "a", "b"]), "tasks.0.classes: .* two classes are named 'a'"),
    ],
    ids=["order", "scales", "huge", "classes"],
)
def test_what_says_what_its_numbers_mean_is_checked(tmp_path: Path, change: Callable[[Any], None], told: str) -> None:
    keep(tmp_path, encoder(), per_task=True)
    record = json.loads((tmp_path / "model.json").read_text())
    change(record)
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(tv.TaskvecError, match=rf"model\.json': .*{told}"):
        tv.load(tmp_path, "cpu")


def test_a_per_task_model_without_its_directions_is_no_other_model(tmp_path: Path) -> None:
    keep(tmp_path, encoder(), per_task=True)
    record = json.loads((tmp_path / "model.json").read_text())
    del record["bytes_per_task"]
    (tmp_path / "model.json").write_text(json.dumps(record))
    (tmp_path / "directions.safetensors").unlink()
    with pytest.raises(tv.TaskvecError, match=r"directions\.safetensors' is not the file"):
        tv.load(tmp_path, "cpu")


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_a_damaged_model_is_refused_or_sound(models: Path, start: int) -> None:
    refused = [check_damaged(models, seed) for seed in range(start, start + 20)]
    assert sum(refused) > 5
