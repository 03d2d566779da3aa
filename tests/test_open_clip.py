"""CLIP models of open_clip: the image tower's own features, texts, the paper's checkpoints, clear refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from PIL import Image
from safetensors.torch import load_file, save_file

from taskvec.command import runs
from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json
from taskvec.data import prompts as templates
from taskvec.data import tasks
from taskvec.data.images import normalise, resize_and_crop
from taskvec.data.index import Listing
from taskvec.encoders import backbone as backbones
from taskvec.encoders import identity
from taskvec.encoders.addresses import parse
from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.loaders.checkpoints import separate
from taskvec.encoders.loaders.open_clip import build, preprocessing, tag_config
from taskvec.encoders.loaders.requests import Request
from taskvec.engine.store import Store
from taskvec.learning import heads
from taskvec.paper.checkpoints import PAPER
from taskvec.study.files import parse_study
from taskvec.study.schema import StudyFile
from taskvec.weights.hub import asked_once
from taskvec.weights.keys import TEXTS

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Teach open_clip a tiny model and let it write a file of seeded random weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "ViT-Tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "ViT-Tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-Tiny", pretrained=None).eval()
    path = folder / "tiny.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    yield path, model


def inputs_for(backbone: backbones.Backbone) -> tuple[np.ndarray, torch.Tensor]:
    size = backbone.preprocessing.size
    images = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    return images, normalise(torch.from_numpy(images), backbone.preprocessing, "cpu")


def test_features_are_the_librarys_own(tiny: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, model = tiny
    backbone = load_backbone(f"open_clip:ViT-Tiny@{path}")
    assert "of a text tower (" in capsys.readouterr().err
    assert {key.split(".")[0] for key in backbone.left_out} >= {"logit_scale", "text_projection", "transformer"}
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        assert torch.allclose(backbone.features(images), model.encode_image(x), atol=1e-5)
    assert backbone.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    assert backbone.origin["from"] == str(path) and len(backbone.origin["sha256"]) == 64


def test_half_precision_at_another_size(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = tiny
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    halved = load_backbone(f"open_clip:ViT-Tiny@{tmp_path / 'half.pt'}", size=48, allow_pickle=True)
    whole = load_backbone(f"open_clip:ViT-Tiny@{path}", size=48)
    images, _ = inputs_for(whole)
    with torch.inference_mode():
        assert torch.allclose(halved.features(images), whole.features(images), atol=2e-2)


def test_another_size_and_no_projection(tiny: tuple[Path, Any]) -> None:
    path, model = tiny
    wide = open_clip.create_model("ViT-Tiny", pretrained=str(path), force_image_size=48).eval()
    backbone = load_backbone(f"open_clip:ViT-Tiny@{path}", size=48)
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        assert torch.allclose(backbone.features(images), wide.encode_image(x), atol=1e-5)
    plain = load_backbone(f"open_clip:ViT-Tiny@{path}", projection=False)
    images, x = inputs_for(plain)
    with torch.inference_mode():
        assert torch.allclose(plain.features(images) @ model.visual.proj, model.encode_image(x), atol=1e-5)
    assert plain.width == 64 and "visual.proj" in plain.left_out


def test_a_training_checkpoint_needs_allow_pickle(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = tiny
    wrapped = {f"module.{key}": value for key, value in load_file(path).items()}
    pickled = tmp_path / "epoch_32.pt"
    torch.save({"epoch": 32, "name": "run", "state_dict": wrapped}, pickled)
    with pytest.raises(TaskvecError, match="allow_pickle: true"):
        load_backbone(f"open_clip:ViT-Tiny@{pickled}")
    found = load_backbone(f"open_clip:ViT-Tiny@{pickled}", allow_pickle=True)
    assert torch.equal(found.pretrained.flat, load_backbone(f"open_clip:ViT-Tiny@{path}").pretrained.flat)


def test_the_configuration_beside_a_file_counts(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "open_clip_model.safetensors"
    path.write_bytes(tiny[0].read_bytes())
    plain = load_backbone(f"open_clip:ViT-Tiny@{path}")
    before = identity.describe(f"open_clip:ViT-Tiny@{path}", None)
    seen = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
    config: dict[str, Any] = {"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": seen}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    for address in (f"open_clip:ViT-Tiny@{path}", f"open_clip:ViT-Tiny@{tmp_path}"):
        found = load_backbone(address)
        assert found.architecture["options"]["quick_gelu"] and not plain.architecture["options"]["quick_gelu"]
        assert found.preprocessing.mean == (0.1, 0.2, 0.3)
        assert (found.preprocessing.interpolation, found.preprocessing.squash) == ("bilinear", True)
        assert identity.describe(address, None) != before
    for odd, message in [
        ([], "holds a list, not an object"),
        ({}, "has no model_cfg"),
        (config | {"preprocess_cfg": seen | {"mean": None}}, "mean is 'None', not three numbers"),
        (config | {"preprocess_cfg": seen | {"std": [0.5]}}, "std is"),
        (config | {"preprocess_cfg": seen | {"interpolation": "random"}}, "interpolation is 'random', known are"),
        (config | {"preprocess_cfg": seen | {"resize_mode": "longest"}}, "resize_mode is 'longest'"),
    ]:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(odd))
        with pytest.raises(TaskvecError, match=message):
            load_backbone(f"open_clip:ViT-Tiny@{path}")
    sizes: list[tuple[Any, int]] = [(64, 64), ([64, 64], 64), (None, 32)]
    for size, wanted in sizes:
        told = {"model_cfg": {}, "preprocess_cfg": seen | {"size": size}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
        assert load_backbone(f"open_clip:ViT-Tiny@{path}").preprocessing.size == wanted
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told | {"preprocess_cfg": {"size": [64, 32]}}))
    with pytest.raises(TaskvecError, match="are not square"):
        load_backbone(f"open_clip:ViT-Tiny@{path}")


def test_a_file_of_a_published_model_sees_images_as_its_weights_do() -> None:
    request = Request("open_clip:ViT-B-16-SigLIP@x.safetensors", "open_clip", "ViT-B-16-SigLIP", "x.safetensors")
    assert preprocessing(tag_config(request), 224).mean == (0.5, 0.5, 0.5)
    assert preprocessing(tag_config(request), 224).squash
    request = Request("open_clip:ViT-L-14@x.safetensors", "open_clip", "ViT-L-14", "x.safetensors")
    assert tag_config(request) == {}  # its weights differ


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod."])
def test_wrapped_models_have_their_texts(tiny: tuple[Path, Any], tmp_path: Path, prefix: str) -> None:
    wrapped = tmp_path / "wrapped.safetensors"
    save_file({prefix + key: value for key, value in load_file(tiny[0]).items()}, wrapped)
    address, plain = f"open_clip:ViT-Tiny@{wrapped}", f"open_clip:ViT-Tiny@{tiny[0]}"
    assert torch.equal(load_backbone(address).pretrained.flat, load_backbone(plain).pretrained.flat)
    if prefix.count(".") == 1:
        assert identity.has_text(address)
    found, scale = backbones.text_features(address, ["a photo of a cat."])
    expected, other = backbones.text_features(plain, ["a photo of a cat."])
    assert torch.equal(found, expected) and scale == other


def test_a_tokenizer_of_the_hub_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    begin = time.monotonic()
    with asked_once() as alone, pytest.raises(OSError, match="connect|offline"):
        assert alone
        open_clip.get_tokenizer("ViT-B-16-SigLIP")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"weights\.safetensors.* is missing visual\.ln_pre\.weight"),
        ("unexpected", r"weights\.safetensors.* has unexpected visual\.ln_extra"),
        ("shape", r"weights\.safetensors.* another shape for visual\.ln_pre\.weight \[3\] instead of \[64\]"),
        ("truncated", r"weights\.safetensors' cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused(tiny: tuple[Path, Any], tmp_path: Path, how: str, message: str) -> None:
    state, path = load_file(tiny[0]), tmp_path / "weights.safetensors"
    if how == "missing":
        del state["visual.ln_pre.weight"]
    elif how != "truncated":
        state["visual.ln_extra" if how == "unexpected" else "visual.ln_pre.weight"] = torch.zeros(3)
    save_file(state, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"open_clip:ViT-Tiny@{path}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("open_clip:ViT-B-16", "names no weights\n.*laion2b_s34b_b88k"),
        ("open_clip:ViT-B-61@openai", "unknown open_clip model 'ViT-B-61'\ndid you mean"),
        ("open_clip:ViT-B-16@laion2b", "has no weights 'laion2b' of 'ViT-B-16'\ndid you mean"),
        ("open_clip:ViT-B-16@laion2b_s34b_b88k", "HF_HUB_OFFLINE is set\n.*open_clip:ViT-B-16@FILE"),
        ("paper:vit-l14-clip-2b", "CLIP-ViT-L-14-laion2B-s32B-b82K.*HF_HUB_OFFLINE is set\n.*@FILE"),
        ("paper:vit-b16-clip-400m", "Data-400M_Samples-34B.*not a .safetensors file.*\n.*allow_pickle: true"),
        ("paper:vit-b16-clip", "unknown checkpoint of the paper 'vit-b16-clip'"),
    ],
)
def test_bad_addresses_and_no_network_are_clear_errors(address: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        load_backbone(address)


def test_a_head_of_several_captions_is_their_mean(tiny: tuple[Path, Any]) -> None:
    path, model = tiny
    captions = templates.captions(["forest", "sea_lake"], ["EuroSAT"])
    assert captions[1][0] == "a centered satellite photo of sea lake."
    texts, scale = backbones.text_features(f"open_clip:ViT-Tiny@{path}", [c for group in captions for c in group])
    got = heads.zero_shot_head(heads.class_texts(texts, [3, 3]), scale).weight
    tokenize = open_clip.get_tokenizer("ViT-Tiny")
    with torch.inference_mode():
        each = [model.encode_text(tokenize(group), normalize=True).mean(0) for group in captions]
        want = torch.stack([mean / mean.norm() for mean in each]) * model.logit_scale.exp()
    assert torch.allclose(got, want, atol=1e-4)


def test_published_sentences_belong_to_the_papers_data_sets() -> None:
    assert set(templates.TEMPLATES) == {"cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"}
    counts = [len(set(templates.templates_of([name]))) for name in ("Cars", "dtd", "resisc45", "GTSRB", "birds")]
    assert counts == [8, 8, 18, 3, 2]
    assert all(text.count("{}") == 1 for texts in templates.TEMPLATES.values() for text in texts)
    assert templates.captions(["3"], ["svhn"]) == [['a photo of the number: "3".']]


def test_a_text_tower_is_noticed(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    assert identity.has_text(f"open_clip:ViT-Tiny@{tiny[0]}")
    assert not identity.has_text(f"open_clip:ViT-Tiny@{tiny[0]}", projection=False)
    assert identity.has_text("open_clip:ViT-B-16@laion2b_s34b_b88k")
    alone = {key: value for key, value in load_file(tiny[0]).items() if key.startswith("visual.")}
    save_file(alone, tmp_path / "tower.safetensors")
    assert not identity.has_text(f"open_clip:ViT-Tiny@{tmp_path / 'tower.safetensors'}")


STUDY = """
name: clip
backbones: ["open_clip:ViT-Tiny@tiny.safetensors"]
tasks: ["folder:one", "folder:two"]
regimes: [open]
methods: [{name: task_arithmetic, scales: "0:1:0.5"}]
heads: [kept]
heatmap: {pairs: 0}
probe: {steps: 5, batch_size: 8, warmup: 0, learning_rates: [0.01]}
finetune: {steps: 2, batch_size: 8, warmup: 0}
"""


def test_an_open_study_of_folders_starts_from_sentences(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").symlink_to(tiny[0])
    write_folder_task(tmp_path / "one")
    write_folder_task(tmp_path / "two", ("red", "blue"), train=15, test=6)
    file, out = StudyFile(parse_study(STUDY, "clip"), STUDY, tmp_path), tmp_path / "out"
    runs.run_study(file, out, Store(tmp_path / "store"), 1, Quiet(), "taskvec run clip")
    rows = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert {"zero_shot", "fine_tuned", "task_arithmetic", "probing"} == set(rows.method)
    lock = read_json(out / "study.lock.json")
    assert lock["weights"]["ViT-Tiny"] == load_backbone(f"open_clip:ViT-Tiny@{tiny[0]}").origin["sha256"]


@pytest.mark.parametrize(
    ("address", "name", "count"),
    [
        ("torchvision:StanfordCars@x", "stanfordcars", 8),
        ("paper:eurosat@x", "land", 3),
        ("hf:timm/eurosat-rgb", "b", 3),
        ("hf:me/photos", "dtd", 8),
        ("folder:/data/cars", "dtd", 8),
        ("folder:/data/gtsrb", "birds", 2),
    ],
)
def test_sentences_are_those_of_the_data_set(
    address: str, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "list_task", lambda _: Listing(("a", "b"), {}, {}))
    found = tasks.sentences(address, name)
    assert found is not None
    assert len(set(found[0])) == count


def test_a_coca_tower_gives_one_feature_an_image() -> None:
    with torch.device("meta"):
        tower = build({"model": "coca_ViT-B-32", "size": 224, "quick_gelu": False, "projection": True})
    assert backbones.checked_features(tower, torch.zeros(2, 3, 224, 224, device="meta"), "coca").shape == (2, 512)
    assert separate({"text_decoder.x": torch.zeros(1)}, (), TEXTS)[1] == ("text_decoder.x",)


def test_the_papers_rows_see_images_as_their_libraries_say() -> None:
    for row, checkpoint in PAPER.items():
        place = parse(checkpoint.address)
        kind, name, tag = place.kind, place.name, place.file
        if kind == "open_clip":
            config = open_clip.get_pretrained_cfg(name, tag) if tag else {}
            want = config.get("mean", open_clip.OPENAI_DATASET_MEAN), config.get("std", open_clip.OPENAI_DATASET_STD)
        else:
            seen = timm.get_pretrained_cfg(checkpoint.timm or name)
            want = seen.mean, seen.std
        assert (checkpoint.mean, checkpoint.std) == tuple(map(tuple, want)), row


@pytest.mark.parametrize(
    "change",
    [
        {"quick_gelu": True},
        {"vision_cfg": {"no_ln_pre": True}},
        {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    ],
)
def test_a_folder_means_what_open_clip_reads(tiny: tuple[Path, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes(tiny[0].read_bytes())
    model_cfg = TINY | change | {"vision_cfg": TINY["vision_cfg"] | change.get("vision_cfg", {})}  # type: ignore[operator]
    if "no_ln_pre" in model_cfg["vision_cfg"]:
        state = load_file(tmp_path / "open_clip_model.safetensors")
        save_file({k: v for k, v in state.items() if "ln_pre" not in k}, tmp_path / "open_clip_model.safetensors")
    seen = {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": seen | {"size": 64}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model, view = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    backbone = load_backbone(f"open_clip:ViT-Tiny@{tmp_path}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = resize_and_crop(picture, backbone.preprocessing)[None]
    with torch.inference_mode():
        want = model.eval().encode_image(view(picture)[None])
    assert torch.allclose(backbone.features(pixels), want, atol=1e-4)
    texts, scale = backbones.text_features(f"open_clip:ViT-Tiny@{tmp_path}", ["a cat"])
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a cat"])
    with torch.inference_mode():
        assert torch.allclose(texts, model.encode_text(words, normalize=True), atol=1e-5)
    assert scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 32}, r"of another model than 'ViT-Tiny' \(embed_dim\)"),
        ({"vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8}}, r"\(width, layers\)"),
        ({"vision_cfg": {"image_size": 32, "layers": 10**7, "width": 64, "patch_size": 8}}, "layers is 10000000"),
        ({"vision_cfg": "large"}, "vision_cfg is 'large'"),
        ({"vision_cfg": TINY["vision_cfg"] | {"mlp_ratio": 1e9}}, "asks for [0-9]+ weights|cannot be made"),  # type: ignore[operator]
        ({"vision_cfg": TINY["vision_cfg"] | {"image_size": "wide"}}, "'wide' is no size in pixels"),  # type: ignore[operator]
    ],
)
def test_a_folder_of_another_model_is_refused(
    tiny: tuple[Path, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes(tiny[0].read_bytes())
    config = {"model_cfg": TINY | change, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"open_clip:ViT-Tiny@{tmp_path}")
