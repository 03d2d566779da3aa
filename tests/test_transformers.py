"""Models of transformers from their folders: the library's own features, strict weights, texts, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from helpers.tasks import make_task
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json
from taskvec.core.notes import listen
from taskvec.data.images import normalise
from taskvec.encoders import backbone as backbones
from taskvec.encoders import identity
from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.loaders.hf.modules import TYPES
from taskvec.encoders.loaders.hf.saved import is_whole
from taskvec.encoders.loaders.hf.transformers import check_row
from taskvec.encoders.loaders.requests import Request
from taskvec.encoders.records import read_backbone, write_backbone
from taskvec.learning import heads
from taskvec.learning.external import head_of, read_finetuned
from taskvec.learning.heads import Head
from taskvec.paper.checkpoints import PAPER

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
DINO = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60,
    "bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57,
}  # fmt: skip
CLIP = {"vision_config": SMALL, "text_config": TEXT, "projection_dim": 24}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
BEIT = SMALL | {"use_mean_pooling": True}
SIGLIP = {"vision_config": SMALL, "text_config": TEXT}
FOCAL = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1],
    "focal_windows": [3, 3],
}  # fmt: skip
NEXT = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
LEVIT = {
    "image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
}  # fmt: skip
MOBILE = {"depth_multiplier": 0.25, "image_size": 32}
EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320}
CLASSIFIER = "2 tensors of a classifier"
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
REGNET = RESNET | {"layer_type": "y", "groups_width": 8}
BIT = RESNET | {"layer_type": "bottleneck", "num_groups": 4}


def folder_of(folder: Path, name: str, config: str, options: dict[str, Any]) -> tuple[Path, Any]:
    """Let the library write a model with seeded random weights, and return it."""
    torch.manual_seed(0)
    model = getattr(T, name)(getattr(T, config)(**options)).eval()
    for norm in (part for part in model.modules() if hasattr(part, "running_mean")):
        norm.running_mean.normal_()
    model.save_pretrained(folder)
    return folder, model


def inputs_for(backbone: backbones.Backbone) -> tuple[np.ndarray, torch.Tensor]:
    size = backbone.preprocessing.size
    images = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    return images, normalise(torch.from_numpy(images), backbone.preprocessing, "cpu")


def own(inside: str = "") -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, x: (getattr(model, inside) if inside else model)(x).last_hidden_state[:, 0]


def pooled(inside: str = "") -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, x: (getattr(model, inside) if inside else model)(x).pooler_output.flatten(1)


FAMILIES = {
    "vit": ("ViTModel", "ViTConfig", SMALL, own(), "2 tensors of a pooler"),
    "classifier": ("ViTForImageClassification", "ViTConfig", SMALL, own("vit"), CLASSIFIER),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SMALL, own("deit"), CLASSIFIER),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, own(), ""),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, own(), ""),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL, own(), ""),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", SMALL, own(), ""),
    "clip": ("CLIPModel", "CLIPConfig", CLIP, lambda m, x: m.get_image_features(x).pooler_output, "of a text tower"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", SMALL, pooled(), ""),
    "siglip": ("SiglipModel", "SiglipConfig", SIGLIP, pooled("vision_model"), "of a text tower"),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", SMALL, pooled(), ""),
    "beit": ("BeitForImageClassification", "BeitConfig", BEIT, pooled("beit"), CLASSIFIER),
    "data2vec-vision": (
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", BEIT, pooled("data2vec_vision"), CLASSIFIER,
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN, pooled("swin"), CLASSIFIER),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN, pooled("swinv2"), CLASSIFIER),
    "focalnet": ("FocalNetForImageClassification", "FocalNetConfig", FOCAL, pooled("focalnet"), CLASSIFIER),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, pooled("resnet"), CLASSIFIER),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", REGNET, pooled("regnet"), CLASSIFIER),
    "bit": ("BitForImageClassification", "BitConfig", BIT, pooled("bit"), CLASSIFIER),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", NEXT, pooled("convnext"), CLASSIFIER),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", NEXT, pooled("convnextv2"), CLASSIFIER),
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", NEXT, pooled(), ""),
    "efficientnet": (
        "EfficientNetForImageClassification", "EfficientNetConfig", EFFICIENT, pooled("efficientnet"), CLASSIFIER,
    ),
    "mobilenet_v1": (
        "MobileNetV1ForImageClassification", "MobileNetV1Config", MOBILE, pooled("mobilenet_v1"), CLASSIFIER,
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification", "MobileNetV2Config", MOBILE, pooled("mobilenet_v2"), CLASSIFIER,
    ),
    "levit": ("LevitForImageClassification", "LevitConfig", LEVIT, pooled("levit"), "of a classifier"),
}  # fmt: skip


def test_every_type_is_held_against_the_library() -> None:
    assert set(FAMILIES) - {"classifier"} == set(TYPES) - {"vit_mae"}  # which has a test of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_librarys_own(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    *made, reference, left_out = FAMILIES[family]
    folder, model = folder_of(tmp_path / "model", *made)
    backbone = load_backbone(f"hf:{folder}", size=32)
    assert left_out in capsys.readouterr().err
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        want = reference(model, x)
    assert backbone.width == want.shape[1]
    assert torch.allclose(backbone.features(images), want, atol=1e-5)
    write_backbone(backbone, tmp_path)
    assert torch.equal(read_backbone(tmp_path).features(images), backbone.features(images))


def test_maes_encoder_looks_at_the_whole_image(tmp_path: Path) -> None:
    folder, mae = folder_of(tmp_path, "ViTMAEForPreTraining", "ViTMAEConfig", SMALL | DECODER)
    backbone = load_backbone(f"hf:{folder}")
    images, x = inputs_for(backbone)
    mae.vit.embeddings.config.mask_ratio = 0.0
    with torch.inference_mode():  # without a mask, and in the order of the patches
        want = mae.vit(x, noise=torch.arange(16.0).repeat(2, 1)).last_hidden_state[:, 0]
    assert torch.allclose(backbone.features(images), want, atol=1e-5)
    assert torch.equal(backbone.features(images), backbone.features(images))
    assert all("decoder" in key for key in backbone.left_out)


def test_position_embeddings_are_resampled_by_the_library(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    backbone = load_backbone(f"hf:{folder}", size=48)
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        want = model(x, interpolate_pos_encoding=True).last_hidden_state
    assert torch.allclose(backbone.features(images), want[:, 0], atol=1e-5)
    assert torch.allclose(backbone.features(images, per_patch=True), want[:, 1:], atol=1e-5)
    with pytest.raises(TaskvecError, match="patches of 8 px, and 30 px leave 6 px .*\n.*a multiple of 8: 24 or 32"):
        load_backbone(f"hf:{folder}", size=30)


def test_clips_projection_is_a_choice(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "clip", "CLIPModel", "CLIPConfig", CLIP)
    backbone = load_backbone(f"hf:{folder}", projection=False)
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        assert torch.allclose(backbone.features(images), model.vision_model(x).pooler_output, atol=1e-5)
    assert "visual_projection.weight" in backbone.left_out
    assert identity.has_text(f"hf:{folder}") and not identity.has_text(f"hf:{folder}", projection=False)
    plain, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    assert not identity.has_text(f"hf:{plain}")
    with pytest.raises(TaskvecError, match="has no projection"):
        load_backbone(f"hf:{plain}", projection=True)


def test_preprocessing_is_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    assert load_backbone(f"hf:{folder}").preprocessing.std == (0.5, 0.5, 0.5)
    assert "has no preprocessor_config.json: taking mean [0.5, 0.5, 0.5]" in capsys.readouterr().err
    mean = [0.485, 0.456, 0.406]
    T.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean).save_pretrained(folder)
    found = load_backbone(f"hf:{folder}").preprocessing
    assert (found.size, found.squash, found.interpolation, found.mean) == (32, True, "bilinear", tuple(mean))
    T.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    found = load_backbone(f"hf:{folder}").preprocessing
    assert (found.size, found.crop, found.squash, found.interpolation) == (32, 0.8, False, "bicubic")


def tokenizer_into(folder: Path) -> None:
    """Write a tokenizer of 58 tokens: letters, at the end of a word or not, and the two marks."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), ".", ".</w>", "!", "!</w>"]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    T.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)


def test_a_zero_shot_head_scores_as_the_library_does(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "CLIPModel", "CLIPConfig", CLIP)
    with pytest.raises(TaskvecError, match=r"tokenizer\.json"):
        backbones.text_features(f"hf:{folder}", ["a cat."])
    before = identity.describe_text(f"hf:{folder}")
    tokenizer_into(folder)
    assert identity.describe_text(f"hf:{folder}") != before
    captions = ["a cat.", "the dog!", "a photo of ink."]
    texts, scale = backbones.text_features(f"hf:{folder}", captions)
    backbone = load_backbone(f"hf:{folder}")
    images, x = inputs_for(backbone)
    words = T.AutoTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    with torch.inference_mode():
        want = model(**words, pixel_values=x).logits_per_image
    got = heads.zero_shot_head(texts, scale).logits(backbone.features(images))
    assert torch.allclose(got, want, atol=1e-4)


def edit(folder: Path, how: str) -> str:
    """Damage a folder and return what the error has to say."""
    path, key = folder / "model.safetensors", "layernorm.weight"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return r"model\.safetensors.* cannot be read"
    state = load_file(path)
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state[key := "layernorm.extra"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(3)
    save_file(state, path, {"format": "pt"})
    return rf"model\.safetensors.*{key}"


@pytest.mark.parametrize("how", ["missing", "unexpected", "shape", "truncated"])
def test_weights_that_do_not_fit_are_refused_with_file_and_key(tmp_path: Path, how: str) -> None:
    folder, _ = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    message = edit(folder, how)
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"hf:{folder}")


def test_weights_in_several_files_and_pickles(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "one", "ViTModel", "ViTConfig", SMALL)
    whole = load_backbone(f"hf:{folder}").pretrained.flat
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert torch.equal(load_backbone(f"hf:{tmp_path / 'many'}").pretrained.flat, whole)
    next((tmp_path / "many").glob("model-00002*")).unlink()
    with pytest.raises(TaskvecError, match=r"model-00002.*missing"):
        load_backbone(f"hf:{tmp_path / 'many'}")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TaskvecError, match="allow_pickle: true"):
        load_backbone(f"hf:{folder}")
    assert torch.equal(load_backbone(f"hf:{folder}", allow_pickle=True).pretrained.flat, whole)


def test_a_file_beside_a_folders_own_weights_is_never_taken_for_them(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    whole = load_backbone(f"hf:{folder}")
    assert torch.equal(load_backbone(f"hf:{folder}/model.safetensors").pretrained.flat, whole.pretrained.flat)
    state = load_file(folder / "model.safetensors")
    moved = {f"vit.{key}": value + 0.03 for key, value in state.items() if not key.startswith("pooler.")}
    save_file(moved, folder / "cars.safetensors")
    for read in (
        lambda: load_backbone(f"hf:{folder}/cars.safetensors"),
        lambda: load_backbone(f"paper:vit-b16-in1k@{folder}/cars.safetensors"),
        lambda: read_finetuned(folder / "cars.safetensors", whole),
    ):
        with pytest.raises(TaskvecError, match=r"cars\.safetensors' is not what .*\n.*folder of its own as model"):
            read()
    folder_of(tmp_path / "cars", "ViTModel", "ViTConfig", SMALL)
    save_file(moved, tmp_path / "cars" / "model.safetensors", {"format": "pt"})
    found = read_finetuned(tmp_path / "cars" / "model.safetensors", whole)
    assert torch.allclose(found.encoder.flat, whole.pretrained.flat + 0.03)


def test_a_cache_with_a_part_missing_is_not_whole(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert not is_whole(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    assert is_whole(folder)
    next(folder.glob("model-00002*")).unlink()
    assert not is_whole(folder)


def test_folders_without_a_model_are_clear_errors(tmp_path: Path) -> None:
    for address, message in [
        (f"hf:{tmp_path}", r"has no config\.json"),
        (f"hf:{tmp_path}/absent", "no folder at"),
        ("hf:vit", "no folder at"),
    ]:
        with pytest.raises(TaskvecError, match=message):
            load_backbone(address)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov22"}))
    with pytest.raises(TaskvecError, match="of type 'dinov22'\ndid you mean 'dinov2'"):
        load_backbone(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(TaskvecError, match=r"has no weights\nit should hold model\.safetensors"):
        load_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], r"config\.json' holds a list"),
        ({"hidden_act": "gelux"}, "can be made from its config.json: .*gelux"),
        ({"hidden_size": "wide"}, "can be made from its config.json"),
        ({"vision_config": [1]}, r"config\.json': vision_config is"),
    ],
)
def test_a_configuration_that_makes_no_model_is_a_clear_error(tmp_path: Path, change: Any, message: str) -> None:
    folder, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"hf:{folder}")


def test_a_configuration_for_tuples_gives_the_same_features(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    plain, config = load_backbone(f"hf:{folder}"), read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False, "torchscript": True}))
    images, _ = inputs_for(plain)
    assert torch.equal(load_backbone(f"hf:{folder}").features(images), plain.features(images))


@pytest.mark.parametrize("named", [2.5, None, "ViTModel", [7], {}])
def test_odd_names_of_classes_are_no_tracebacks(tmp_path: Path, named: Any) -> None:
    folder, _ = folder_of(tmp_path, "ViTForImageClassification", "ViTConfig", SMALL)
    backbone, config = load_backbone(f"hf:{folder}"), read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named}))
    checkpoint = read_finetuned(folder / "model.safetensors", backbone)
    assert torch.equal(checkpoint.encoder.flat, backbone.pretrained.flat) and not checkpoint.objection


def test_a_patch_size_may_be_a_list(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    whole = load_backbone(f"hf:{folder}")
    config = read_json(folder / "config.json") | {"patch_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    again = load_backbone(f"hf:{folder}")
    images, _ = inputs_for(whole)
    assert torch.equal(again.features(images, per_patch=True), whole.features(images, per_patch=True))


def test_a_row_of_the_paper_is_its_encoder() -> None:
    wide = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "image_size": 224}
    vit = {"type": "vit", "config": wide, "has_projection": False}
    clip = {"type": "clip", "config": wide | {"projection_dim": 512}, "has_projection": True}
    for row, options, message in [
        ("vit-b16-mae", vit | {"type": "beit"}, "is a beit of"),
        ("vit-b16-dino", clip, "is a clip of"),
        ("vit-b16-dino", vit | {"config": wide | {"image_size": 384}}, r"\[768, 12, 16, 384\]"),
        ("vit-l16-in21k", vit, r"a vit of \[1024, 24, 16, 224\]\n.*hf:x"),
        ("vit-b16-clip-2b", vit, "the paper's is a clip"),
        ("vit-b16-clip-2b", clip | {"has_projection": False}, "projected to nothing"),
        ("vit-b16-clip-2b", clip | {"config": wide | {"projection_dim": 256}}, "projected to 256"),
    ]:
        with pytest.raises(TaskvecError, match=message):
            check_row(options, PAPER[row], Request(f"paper:{row}@x", "hf", "x"))
    check_row(vit | {"type": "vit_mae"}, PAPER["vit-b16-mae"], Request("paper:vit-b16-mae@x", "hf", "x"))
    check_row(clip, PAPER["vit-b16-clip-2b"], Request("paper:vit-b16-clip-2b@x", "hf", "x"))
    bare = clip | {"has_projection": False}
    check_row(bare, PAPER["vit-b16-clip-2b"], Request("paper:vit-b16-clip-2b@x", "hf", "x", projection=False))


@pytest.mark.parametrize(
    ("start", "brought", "message"),
    [
        (("ViTModel", SMALL), ("ViTModel", SMALL | {"num_hidden_layers": 3}), "unexpected model.layers.2"),
        (("ViTModel", SMALL | {"num_hidden_layers": 3}), ("ViTModel", SMALL), "missing model.layers.2"),
        (("Dinov2Model", DINO), ("Dinov2WithRegistersModel", DINO), "unexpected .*register_tokens"),
        (("ViTModel", SMALL), ("Dinov2Model", DINO), "does not fit"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    tmp_path: Path, start: tuple[str, Any], brought: tuple[str, Any], message: str
) -> None:
    for name, (model, options) in {"start": start, "brought": brought}.items():
        folder_of(tmp_path / name, model, model.replace("Model", "Config"), options)
    backbone = load_backbone(f"hf:{tmp_path / 'start'}")
    with pytest.raises(TaskvecError, match=message):
        read_finetuned(tmp_path / "brought" / "model.safetensors", backbone)


def test_the_projection_is_known_by_the_checkpoints_keys(tmp_path: Path) -> None:
    options = SMALL | {"projection_dim": 24}
    folder, _ = folder_of(tmp_path / "clip", "CLIPVisionModelWithProjection", "CLIPVisionConfig", options)
    told = load_backbone(f"hf:{folder}")
    config = read_json(folder / "config.json")
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    found = load_backbone(f"hf:{folder}")
    assert found.width == told.width == 24
    assert torch.equal(found.pretrained.flat, told.pretrained.flat)


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "resnet", "ResNetModel", "ResNetConfig", RESNET)
    whole = load_backbone(f"hf:{folder}")
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "num_batches_tracked" not in k}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_backbone(f"hf:{folder}").pretrained.flat, whole.pretrained.flat)


def test_a_cached_pickle_is_not_enough_where_pickles_are_refused(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert is_whole(folder, allow_pickle=True) and not is_whole(folder, allow_pickle=False)


def test_a_repository_in_the_hubs_cache_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "content" not in identity.describe("hf:owner/vit", 32)
    with pytest.raises(TaskvecError, match=r"config\.json of .*'owner/vit'.*HF_HUB_OFFLINE is set\n.*hf:FOLDER"):
        load_backbone("hf:owner/vit")
    home, commit = tmp_path / "models--owner--vit", "c" * 40
    folder, _ = folder_of(home / "snapshots" / commit, "ViTModel", "ViTConfig", SMALL)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    assert identity.to_download("hf:owner/vit") == "owner/vit/model.safetensors"
    with pytest.raises(TaskvecError, match=r"needs preprocessor_config\.json .*'owner/vit'.*HF_HUB_OFFLINE is set"):
        load_backbone("hf:owner/vit")  # AutoModel caches configuration and weights only, and no view is guessed
    T.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert identity.to_download("hf:owner/vit") == ""
    assert identity.describe("hf:owner/vit", 32)["content"] == identity.describe(f"hf:{folder}", 32)["content"]
    found = load_backbone("hf:owner/vit")
    assert (found.name, found.origin["from"]) == ("vit", f"owner/vit/{commit}")
    assert torch.equal(found.pretrained.flat, load_backbone(f"hf:{folder}").pretrained.flat)


def test_a_fingerprint_holds_content_and_library_and_no_path(tmp_path: Path) -> None:
    first, _ = folder_of(tmp_path / "first", "ViTModel", "ViTConfig", SMALL)
    second, _ = folder_of(tmp_path / "second", "ViTModel", "ViTConfig", SMALL)
    one, two = (identity.describe(f"hf:{folder}", 32) for folder in (first, second))
    assert one["content"] == two["content"] and set(one["packages"]) == {"transformers"}
    for folder in (first, second):
        write_backbone(load_backbone(f"hf:{folder}", name="x"), folder)
    assert (first / "backbone.json").read_bytes() == (second / "backbone.json").read_bytes()
    T.ViTImageProcessor().save_pretrained(second)
    assert identity.describe(f"hf:{second}", 32)["content"] != one["content"]


OTHER_FEATURE = {
    "CLIPForImageClassification": "another feature",  # the mean of the patches, as SigLIP's
    "SiglipForImageClassification": "another feature",
    "Dinov2ForImageClassification": "another feature",  # the class token beside that mean
    "Dinov2WithRegistersForImageClassification": "another feature",
    "DeiTForImageClassificationWithTeacher": "not one linear layer",
    "LevitForImageClassification": "not one linear layer",
    "LevitForImageClassificationWithTeacher": "not one linear layer",
}


def classifiers() -> list[tuple[str, str, str]]:
    """Return every type with a classifier in the library, its configuration, and each class of classifiers."""
    found = []
    for family, (_, config, *_) in FAMILIES.items():
        made = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(getattr(T, config), ())
        every = made if isinstance(made, tuple) else (made,)
        found += [(family, config, one.__name__) for one in every if family != "classifier"]
    return found


@pytest.mark.parametrize(("family", "config", "name"), classifiers())
def test_a_brought_classifier_answers_as_the_library_does_or_is_not_taken(
    tmp_path: Path, family: str, config: str, name: str
) -> None:
    options = FAMILIES[family][2] | {"num_labels": 3}
    folder, model = folder_of(tmp_path, name, config, options)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.out_features == 3:
            torch.nn.init.normal_(part.weight)
            torch.nn.init.normal_(part.bias)
    model.save_pretrained(folder)
    backbone = load_backbone(f"hf:{folder}", size=32, projection=False if family == "clip" else None)
    task, start = make_task(("a", "b", "c"), "t"), Head(torch.zeros(3, backbone.width), torch.zeros(3))
    with listen() as notes:
        found = read_finetuned(folder / "model.safetensors", backbone)
        head = head_of(found, (), task, backbone.width, start)
    if name in OTHER_FEATURE:
        assert head is start and any(OTHER_FEATURE[name] in note for note in notes)
        with pytest.raises(TaskvecError, match=rf"{OTHER_FEATURE[name]}.*\n.*regime aligned"):
            head_of(found, (), task, backbone.width, None)
        return
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        assert torch.allclose(head.logits(backbone.features(images)), model(x).logits, atol=1e-4)


def test_weights_that_a_configuration_names_elsewhere_are_those_that_count(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "vit", "ViTModel", "ViTConfig", SMALL)
    before = identity.describe(f"hf:{folder}", None)
    state = load_file(folder / "model.safetensors")
    other = {key: value + 1 for key, value in state.items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    named = load_backbone(f"hf:{folder}")
    assert torch.equal(named.pretrained["model.layernorm.weight"], other["layernorm.weight"])
    between = identity.describe(f"hf:{folder}", None)
    assert between != before
    save_file({key: value + 1 for key, value in other.items()}, folder / "other.safetensors", {"format": "pt"})
    assert identity.describe(f"hf:{folder}", None) not in (before, between)
    for name, message in [("../vit/other.safetensors", "no file of its folder"), (7, "transformers_weights is '7'")]:
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(TaskvecError, match=message):
            load_backbone(f"hf:{folder}")


def test_parts_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    state = model.state_dict()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: f"{i}/a.safetensors" for i in (0, 1) for key in halves[i]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i in (0, 1):
        (folder / str(i)).mkdir()
        save_file(halves[i], folder / str(i) / "a.safetensors", {"format": "pt"})
    known = [identity.describe(f"hf:{folder}", None)]
    for i in (0, 1):
        save_file({key: value + 1 for key, value in halves[i].items()}, folder / str(i) / "a.safetensors")
        known.append(identity.describe(f"hf:{folder}", None))
    assert len({str(one) for one in known}) == 3


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", 3, "a" * 300, "a\0b"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: Any) -> None:
    folder, _ = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layernorm.weight": name}}))
    with pytest.raises(TaskvecError, match="no file of its folder|weight_map is to map names to files"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**9}, "asks for [0-9]+ weights|can be made"),
        ({"intermediate_size": 10**9}, "asks for [0-9]+ weights, and its files have"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, and at most"),
        ({"image_size": 10**6}, "image_size is 1000000, and at most"),
        ({"image_size": 10**400}, "image_size is 1000"),
        ({"image_size": "large"}, "a size is 'large', not a number of pixels"),
        ({"image_size": -32}, "a size is '-32'"),
        ({"image_size": [[]]}, "a size is "),
        ({"patch_size": 0}, "can be made|a size is '0'"),
        ({"layer_norm_eps": float("nan")}, "no other program may read"),
        ({"name": "\ud800"}, "no other program may read"),
    ],
)
def test_a_configuration_that_asks_for_the_impossible_is_refused_at_once(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder, _ = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "", "[1]", "null"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder, _ = folder_of(tmp_path, "ViTModel", "ViTConfig", SMALL)
    (folder / "config.json").write_text(text)
    with pytest.raises(TaskvecError, match=r"config\.json"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "swin", "resnet", "convnext"])
def test_a_size_that_leaves_a_border_unseen_is_refused(tmp_path: Path, family: str) -> None:
    folder, _ = folder_of(tmp_path, *FAMILIES[family][:3])
    if family in ("swin", "resnet", "convnext"):  # padded by the library, or convolutional
        assert load_backbone(f"hf:{folder}", size=57).preprocessing.size == 57
        return
    with pytest.raises(TaskvecError, match="patches of 8 px, and 57 px leave 1 px .*\n.*: 56 or 64;"):
        load_backbone(f"hf:{folder}", size=57)


def test_a_text_tower_with_weights_missing_is_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "CLIPModel", "CLIPConfig", CLIP)
    tokenizer_into(folder)
    state = load_file(folder / "model.safetensors")
    del state["text_model.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TaskvecError, match=r"not whole: text_model\.final_layer_norm\.weight"):
        backbones.text_features(f"hf:{folder}", ["a cat."])


def test_clips_older_way_to_describe_its_image_tower_counts_as_in_the_library(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "CLIPModel", "CLIPConfig", CLIP)
    config = read_json(folder / "config.json")
    older = {"vision_config_dict": SMALL | {"hidden_act": "relu"}, "text_config_dict": TEXT}
    (folder / "config.json").write_text(json.dumps(config | older))
    model = T.CLIPModel.from_pretrained(folder).eval()
    assert model.config.vision_config.hidden_act == "relu"
    backbone = load_backbone(f"hf:{folder}")
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        assert torch.allclose(backbone.features(images), model.get_image_features(x).pooler_output, atol=1e-5)


def test_wrappers_in_a_folders_names_and_types_that_are_none_of_weights(tmp_path: Path) -> None:
    config = T.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    T.ViTModel(config).save_pretrained(tmp_path)
    file, address = tmp_path / "model.safetensors", f"hf:{tmp_path}"
    state, plain = load_file(file), load_backbone(address, device="cpu")
    wrapped = {f"_orig_mod.{name.replace('.0.', '.0._checkpoint_wrapped_module.')}": t for name, t in state.items()}
    save_file(wrapped, file, {"format": "pt"})
    assert torch.equal(load_backbone(address, device="cpu").pretrained.flat, plain.pretrained.flat)
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn):
        save_file({name: (9 * t).to(dtype) for name, t in state.items()}, file, {"format": "pt"})
        with pytest.raises(TaskvecError, match="tensor 'embeddings.cls_token' is of type .*, which is none of weights"):
            load_backbone(address, device="cpu")
    save_file({name: 0 * t for name, t in state.items()}, file, {"format": "pt"})
    with pytest.raises(TaskvecError, match="all its matrices are zero"):
        load_backbone(address, device="cpu")


def test_types_are_seen_under_the_names_that_the_library_translates(tmp_path: Path) -> None:
    config = T.ViTConfig(**SMALL, num_labels=3)
    T.ViTForImageClassification(config).save_pretrained(tmp_path / "a")
    backbone, state = load_backbone(f"hf:{tmp_path / 'a'}", device="cpu"), load_file(tmp_path / "a/model.safetensors")
    bad = "vit.encoder.layer.0.layernorm_before.weight"
    assert bad in state
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "complex64": lambda t: t.to(torch.complex64), "int8": lambda t: t.to(torch.int8), "bool": lambda t: t > 0,
        "sparse": torch.Tensor.to_sparse,
    }  # fmt: skip
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "a/config.json").read_text())
    for name, change in kinds.items():
        odd = state | {bad: change(state[bad])}
        torch.save(odd, folder / "pytorch_model.bin")
        with pytest.raises(TaskvecError, match=f"'{bad}' is .*{name}"):
            load_backbone(f"hf:{folder}", device="cpu", allow_pickle=True)
        (folder / "pytorch_model.bin").unlink()
        if name == "sparse":
            continue
        save_file(odd, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(TaskvecError, match=f"'{bad}' is of type .* none of weights"):
            load_backbone(f"hf:{folder}", device="cpu")
        with pytest.raises(TaskvecError, match=f"'{bad}' is of type .* none of weights"):
            read_finetuned(folder / "model.safetensors", backbone)
        (folder / "model.safetensors").unlink()


def test_beits_masked_pre_training_gives_its_class_token(tmp_path: Path) -> None:
    model = T.BeitForMaskedImageModeling(T.BeitConfig(**BEIT, vocab_size=9)).eval()
    torch.nn.init.normal_(model.layernorm.weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(TaskvecError, match="or set use_mean_pooling to false there: then the class token"):
        load_backbone(f"hf:{tmp_path}", device="cpu")
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_mean_pooling": False}))
    backbone = load_backbone(f"hf:{tmp_path}", device="cpu")
    images, x = inputs_for(backbone)
    with torch.inference_mode():
        wanted = model.layernorm(model.beit(x).last_hidden_state)[:, 0]
        assert torch.allclose(backbone.features(images), wanted, atol=1e-5)


def test_a_folder_of_adapters_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TaskvecError, match="holds adapters such as LoRA.*\\n.*merge_and_unload"):
        load_backbone(f"hf:{tmp_path}", device="cpu")
