"""Encoders from timm and the lab: the library's own features, strict files, clear refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.timm_files import VIT, timm_file
from safetensors.torch import save_file

from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing, normalise
from taskvec.encoders import identity
from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.loaders import families as loaders
from taskvec.encoders.loaders import timm as timm_loader
from taskvec.encoders.loaders.checkpoints import Reading, read_weights_only
from taskvec.encoders.loaders.requests import Request
from taskvec.encoders.loaders.timm import preprocessing, state_for, translate
from taskvec.encoders.records import read_backbone, write_backbone
from taskvec.learning.external import read_finetuned
from taskvec.study.forecast.model_cost import model_cost
from taskvec.weights.flat import align, check_keys, pack


@pytest.mark.parametrize(
    ("name", "size"),
    [(VIT, 224), ("resnet10t", 96), ("convnext_atto", 64), ("efficientnet_lite0", 64), ("mobilenetv3_small_050", 64)],
)
def test_features_are_timms_own(tmp_path: Path, name: str, size: int) -> None:
    path, model = timm_file(tmp_path, name)
    backbone = load_backbone(f"timm:{name}@{path}", size=size)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8)
    inputs = normalise(torch.from_numpy(images), backbone.preprocessing, "cpu")
    with torch.inference_mode():
        want = model.forward_head(model.forward_features(inputs), pre_logits=True)
    assert backbone.width == want.shape[1]
    assert torch.allclose(backbone.features(images), want, atol=1e-5)
    config = timm.data.resolve_data_config({}, model=model)
    assert backbone.preprocessing.mean == config["mean"]
    assert backbone.preprocessing.interpolation == config["interpolation"]


def test_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, VIT)
    backbone = load_backbone(f"timm:{VIT}@{path}", size=96)
    overlay = {"file": str(path), "num_classes": 7}
    reference = timm.create_model(VIT, True, num_classes=0, img_size=96, pretrained_cfg_overlay=overlay).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    with torch.inference_mode():
        want = reference(normalise(torch.from_numpy(images), backbone.preprocessing, "cpu"))
    assert torch.allclose(backbone.features(images), want, atol=1e-5)


def test_the_classifier_is_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = timm_file(tmp_path, VIT)
    backbone = load_backbone(f"timm:{VIT}@{path}", size=32)
    assert "left out 2 tensors of a classifier (head.bias, head.weight)" in capsys.readouterr().err
    assert not [entry.name for entry in backbone.pretrained.layout if entry.name.startswith("head")]


def test_a_backbone_folder_gives_the_same_features_back(tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, "resnet10t")
    backbone = load_backbone(f"timm:resnet10t@{path}", size=64)
    write_backbone(backbone, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    assert torch.equal(read_backbone(tmp_path).features(images), backbone.features(images))


def edit(path: Path, how: str) -> Path:
    from safetensors.torch import load_file

    state = load_file(path)
    if how == "missing":
        del state["blocks.3.mlp.fc1.weight"]
    elif how == "unexpected":
        state["blocks.3.extra"] = torch.zeros(1)
    elif how == "shape":
        state["blocks.3.mlp.fc1.weight"] = torch.zeros(3, 3)
    elif how == "patches":
        state["patch_embed.proj.weight"] = torch.nn.functional.interpolate(
            state["patch_embed.proj.weight"], scale_factor=2
        )
    out = path.with_name("edited.safetensors")
    save_file(state, out)
    return out


@pytest.mark.parametrize(
    ("how", "key"),
    [
        ("missing", "blocks.3.mlp.fc1.weight"),
        ("unexpected", "blocks.3.extra"),
        ("shape", "blocks.3.mlp.fc1.weight"),
        ("patches", "patch_embed.proj.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path: Path, how: str, key: str) -> None:
    path = edit(timm_file(tmp_path, VIT)[0], how)
    with pytest.raises(TaskvecError, match=rf"edited\.safetensors.*{key}"):
        load_backbone(f"timm:{VIT}@{path}", size=32)


@pytest.mark.parametrize(("file_of", "into"), [("resnet10t", VIT), (VIT, "convnext_atto"), (VIT, "resnet10t")])
def test_a_checkpoint_of_another_architecture_names_the_first_keys(tmp_path: Path, file_of: str, into: str) -> None:
    path, _ = timm_file(tmp_path, file_of)
    with pytest.raises(TaskvecError, match="does not fit: it is missing .* and .* more"):
        load_backbone(f"timm:{into}@{path}", size=64)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("timm:vit_tiny_patch16_225@x.safetensors", "no weights file"),
        ("timm:vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224.augreg_in22k", "augreg_in21k"),
        ("lab:supervisd", "did you mean 'supervised'"),
        ("lab", "not of the form"),
        ("tim:x", "unknown kind of backbone 'tim' in 'tim:x'"),
        ("timm:vit_tiny_patch16_224@weights", "not a file"),
    ],
)
def test_bad_addresses_are_clear_errors(address: str, message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        identity.describe(address, None)
        load_backbone(address)


def test_pickles_load_only_when_asked_for(tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, VIT)
    from safetensors.torch import load_file

    pickled = tmp_path / "weights.pth"
    torch.save({"state_dict": load_file(path)}, pickled)
    with pytest.raises(TaskvecError, match="allow_pickle"):
        load_backbone(f"timm:{VIT}@{pickled}", size=32)
    backbone = load_backbone(f"timm:{VIT}@{pickled}", size=32, allow_pickle=True)
    assert torch.equal(backbone.pretrained.flat, load_backbone(f"timm:{VIT}@{path}", size=32).pretrained.flat)
    options = argparse.Namespace(model=VIT, lr=0.1)
    torch.save({"epoch": 3, "args": options, "state_dict": load_file(path)}, pickled)  # as timm's training writes it
    backbone = load_backbone(f"timm:{VIT}@{pickled}", size=32, allow_pickle=True)
    assert torch.equal(backbone.pretrained.flat, load_backbone(f"timm:{VIT}@{path}", size=32).pretrained.flat)
    torch.save({"state_dict": load_file(path), "odd": Preprocessing(3)}, pickled)
    with pytest.raises(TaskvecError, match=r"weights_only=True: .*taskvec\.data\.images\.Preprocessing") as caught:
        load_backbone(f"timm:{VIT}@{pickled}", size=32, allow_pickle=True)
    assert "\x1b" not in str(caught.value)
    pickled.write_bytes(b"rubbish")
    with pytest.raises(TaskvecError, match=r"weights\.pth"):
        load_backbone(f"timm:{VIT}@{pickled}", size=32, allow_pickle=True)


def test_pickles_of_tensors_load_on_the_oldest_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)  # younger than torch 2.3
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "w.pth")
    assert read_weights_only(tmp_path / "w.pth")["state_dict"]["w"].tolist() == [1, 1]


def test_kernels_of_another_patch_size_are_refused_in_any_keys(tmp_path: Path) -> None:
    import open_clip

    tower = {"image_size": 64, "layers": 1, "width": 512, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(512, open_clip.CLIPVisionCfg(**tower), open_clip.CLIPTextCfg(**text))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m32.safetensors")
    with pytest.raises(TaskvecError, match=r"patch_embed\.proj\.weight \[512, 3, 32, 32\]|does not fit"):
        load_backbone(f"timm:vit_medium_patch16_clip_224@{tmp_path / 'm32.safetensors'}", size=64)
    with torch.device("meta"):
        module = timm.create_model("vit_medium_patch16_clip_224", num_classes=0, img_size=64, depth=1)
    found, _ = translate(dict(model.state_dict()), module)
    assert found["patch_embed.proj.weight"].shape == (512, 3, 32, 32)


def test_random_lab_weights_are_seeded() -> None:
    first, second = load_backbone("lab:random"), load_backbone("lab:random")
    assert torch.equal(first.pretrained.flat, second.pretrained.flat)
    shipped = load_backbone("lab:supervised")
    assert shipped.pretrained.layout == first.pretrained.layout
    assert not torch.equal(shipped.pretrained.flat, first.pretrained.flat)


def test_an_impossible_size_is_a_clear_error(tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, VIT)
    with pytest.raises(TaskvecError, match="8 px"):
        load_backbone(f"timm:{VIT}@{path}", size=8)


def test_auxiliary_heads_are_left_out() -> None:
    name = "efficientvim_m1"
    with torch.device("meta"):
        whole, bare = timm.create_model(name), timm.create_model(name, num_classes=0)
    state = state_for(bare, Reading(whole.state_dict()), {"name": name, "size": 224})
    assert set(state.tensors) == set(bare.state_dict())
    assert set(state.left_out) == set(whole.state_dict()) - set(bare.state_dict())


@pytest.mark.parametrize("overlay", [{}, {"crop_mode": "border"}, {"crop_pct": 1.15}])
def test_a_border_that_timm_lays_around_images_is_told(
    overlay: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    module = timm.create_model("test_vit", num_classes=0, pretrained_cfg_overlay=overlay)
    assert preprocessing(module, 160).crop <= 1
    assert ("border" in capsys.readouterr().err) == bool(overlay)


def test_a_plan_says_what_a_run_would_and_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(TaskvecError, match="patches of 16 px, and 8 px leave 8 px .*\n.*a multiple of 16: 16;"):
        model_cost(f"timm:{VIT}@{path}", 8)
    save_file({"x": torch.zeros(1)}, path)
    monkeypatch.setattr("taskvec.encoders.loaders.requests.file_digest", lambda _: pytest.fail("the weights were read"))
    family, asked = loaders.find(f"timm:{VIT}@{path}")
    loaders.load(asked, family)
    wide, narrow = (model_cost("paper:vit-b16-clip-2b", None, projection) for projection in (None, False))
    assert wide is not None and narrow is not None
    assert (wide.width, narrow.width) == (512, 768)


def test_another_shape_is_not_blamed_on_a_size_that_was_given() -> None:
    with pytest.raises(TaskvecError, match="give that size, or none where the architecture keeps its own"):
        check_keys({"a": (2,)}, {"a": (3,)}, "x", "give another")


# ---------------------------------------------------------------- containers and what stands in names

TENSORS = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
ENCODER = {key: value + 1 for key, value in TENSORS.items() if not key.startswith("head.")}
WHOLE = ENCODER | {key: value for key, value in TENSORS.items() if key.startswith("head.")}


def under(prefix: str, state: dict[str, torch.Tensor] = ENCODER, offset: float = 0.0) -> dict[str, torch.Tensor]:
    return {prefix + key: value + offset if offset else value for key, value in state.items()}


def inner(part: str, state: dict[str, torch.Tensor] = WHOLE) -> dict[str, torch.Tensor]:
    return {
        key.replace("blocks.1.", f"blocks.1.{part}.").replace("attn.", f"attn.{part}."): t for key, t in state.items()
    }


LAYER = {"weight": torch.ones(2, 2)}
CONTAINERS = {
    "tutorial": {"model_state_dict": WHOLE, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "cifar": {"net": under("module.", WHOLE), "acc": 91.0},
    "deepspeed": {"module": WHOLE, "optimizer": None, "args": argparse.Namespace(a=1)},
    "deep": {"a": {"b": [{"c": {"weights": WHOLE}}]}},
    "mmpretrain": {
        "meta": {}, "state_dict": under("backbone.") | under("head.fc.", LAYER) | under("data_preprocessor.", LAYER),
    },
    "lightning": {"state_dict": under("model.encoder.") | under("loss.", LAYER) | under("model.head.", LAYER)},
    "ibot": {"student": under("module.backbone.") | {"module.backbone.masked_embed": torch.ones(1, 64)}},
    "beit": {"model": ENCODER | {"mask_token": torch.ones(1, 1, 64)} | under("lm_head.", LAYER)},
    "simclr": {"state_dict": under("module.online.encoder.") | under("module.online.projector.0.", LAYER)},
    "any name": {"my_weights": under("wrapper.thing.")},
    "compiled": under("_orig_mod.module.", WHOLE),
    "compiled blocks": inner("_orig_mod"), "recomputed": inner("_checkpoint_wrapped_module"),
    "sharded": under("_fsdp_wrapped_module.", inner("_fsdp_wrapped_module")), "devices inside": inner("module"),
    "beside an ema that does not fit": {"model": WHOLE, "ema": {"decay": 0.9, "shadow": {"x": torch.ones(1)}}},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_weights_are_found_wherever_training_scripts_put_them(tmp_path: Path, name: str) -> None:
    torch.save(CONTAINERS[name], tmp_path / "c.pth")
    backbone = load_backbone(f"timm:test_vit@{tmp_path / 'c.pth'}", size=32, allow_pickle=True)
    for key, value in ENCODER.items():
        assert torch.equal(backbone.pretrained[key], value), key
    finetuned = read_finetuned(tmp_path / "c.pth", backbone, allow_pickle=True)
    assert torch.equal(finetuned.encoder.flat, backbone.pretrained.flat)


CHOICES = {
    "dino": ({"student": under("module.backbone.", offset=1), "teacher": under("backbone.")}, "teacher", "student"),
    "moco": (under("module.encoder_k.", offset=1) | under("module.encoder_q."), "encoder_q", "encoder_k"),
    "moco v3": (
        under("module.momentum_encoder.", offset=1) | under("module.base_encoder."), "base_encoder", "momentum_encoder",
    ),
    "byol": (
        {"state_dict": under("target_network.", offset=1) | under("online_network.")}, "online_network",
        "target_network",
    ),
    "ema": ({"model_ema": under("", offset=1), "model": ENCODER}, "model", "model_ema"),
    "timm": ({"state_dict_ema": under("", offset=1), "state_dict": ENCODER}, "state_dict", "state_dict_ema"),
    "net": ({"net_ema": under("", offset=1), "net": ENCODER}, "net", "net_ema"),
    "shadow": ({"ema": {"shadow": under("", offset=1)}, "model": ENCODER}, "model", "shadow"),
    "gradients": ({"grads": under("", offset=1), "weights": ENCODER}, "weights", "grads"),
    "optimizer": ({"optimizer": under("", offset=1), "ema": ENCODER}, "ema", "optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_of_several_parts_one_is_taken_with_a_note_and_others_by_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state, usual, other = CHOICES[name]
    torch.save(state, tmp_path / "c.pth")
    address = f"timm:test_vit@{tmp_path / 'c.pth'}"
    taken = load_backbone(address, size=32, allow_pickle=True)
    said = capsys.readouterr().err
    assert "took '" in said and usual in said and other in said
    chosen = {part: load_backbone(f"{address}#{part}", size=32, allow_pickle=True) for part in (usual, other)}
    for key, value in ENCODER.items():
        assert torch.equal(taken.pretrained[key], value)
        assert torch.equal(chosen[usual].pretrained[key], value)
        assert torch.equal(chosen[other].pretrained[key], value + 1)
    described = [identity.describe(address + part, 32, True) for part in ("", f"#{usual}", f"#{other}")]
    assert described[1] != described[2] != described[0]
    tuned = read_finetuned(Path(f"{tmp_path / 'c.pth'}#{other}"), taken, allow_pickle=True)
    assert torch.equal(tuned.encoder.flat, chosen[other].pretrained.flat)
    with pytest.raises(TaskvecError, match="has no part 'techer'"):
        load_backbone(f"{address}#techer", size=32, allow_pickle=True)


def test_a_file_whose_name_has_the_sign_is_itself(tmp_path: Path) -> None:
    torch.save({"student": under("", offset=1), "teacher": ENCODER}, tmp_path / "c.pth")
    save_file({key: value + 5 for key, value in ENCODER.items()}, tmp_path / "c.pth#student.safetensors")
    save_file({key: value + 7 for key, value in ENCODER.items()}, tmp_path / "c.pth#student")
    for name, offset in (("c.pth#student", 7), ("c.pth#student.safetensors", 5), ("c.pth#teacher", 0)):
        found = load_backbone(f"timm:test_vit@{tmp_path / name}", size=32, allow_pickle=True)
        assert torch.equal(found.pretrained["norm.weight"], ENCODER["norm.weight"] + offset)


def test_a_container_that_holds_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, object] = {"model": ENCODER}
    loop["self"] = [loop] * 20
    torch.save(loop, tmp_path / "c.pth")
    assert load_backbone(f"timm:test_vit@{tmp_path / 'c.pth'}", size=32, allow_pickle=True).width == 64


ODD = {
    "integer": (lambda t: (t * 9).to(torch.int32), "torch.int32"),
    "int8": (lambda t: (t * 9).to(torch.int8), "torch.int8"),
    "bool": (lambda t: t > 0, "torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "torch.complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "sparse": (lambda t: t.to_sparse(), "sparse_coo"),
    "meta": (lambda t: t.to("meta"), "meta device"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "qint8"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", sorted(ODD))
@pytest.mark.parametrize("key", ["blocks.1.attn.qkv.weight", "norm.bias"])
def test_tensors_that_are_no_weights_are_refused_by_name_and_type(tmp_path: Path, kind: str, key: str) -> None:
    change, told = ODD[kind]
    torch.save(under("module.", WHOLE | {key: change(WHOLE[key])}), tmp_path / "c.pth")
    with pytest.raises(TaskvecError, match=f"tensor '{key}' .*{told}"):
        load_backbone(f"timm:test_vit@{tmp_path / 'c.pth'}", size=32, allow_pickle=True)


def test_an_encoder_of_zeros_is_refused(tmp_path: Path) -> None:
    save_file(ENCODER, tmp_path / "a.safetensors")
    save_file(
        {key: 0 * value if value.ndim > 1 else value for key, value in ENCODER.items()}, tmp_path / "z.safetensors"
    )
    backbone = load_backbone(f"timm:test_vit@{tmp_path / 'a.safetensors'}", size=32)
    for read in (lambda: load_backbone(f"timm:test_vit@{tmp_path / 'z.safetensors'}", size=32),
                 lambda: read_finetuned(tmp_path / "z.safetensors", backbone)):  # fmt: skip
        with pytest.raises(TaskvecError, match="z.safetensors': all its matrices are zero"):
            read()


def test_whole_numbers_of_the_architecture_may_be_stored_as_others(tmp_path: Path) -> None:
    own = {"norm.num_batches_tracked": torch.tensor(7), "w": torch.ones(2, 2)}
    like = pack(own)
    for dtype in (torch.int32, torch.float32, torch.int64):
        found = align(own | {"norm.num_batches_tracked": torch.tensor(7, dtype=dtype)}, like, "x")
        assert found.carried["norm.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(TaskvecError, match="'norm.num_batches_tracked' is of type torch.float32"):
        align(own | {"norm.num_batches_tracked": torch.tensor(7.5)}, like, "x")


@pytest.mark.parametrize(
    ("name", "told"),
    [("a.gguf", "llama.cpp"), ("a.onnx", "ONNX"), ("a.h5", "Keras"), ("a.msgpack", "Flax"), ("a.npz", "NumPy"),
     ("a.index", "TensorFlow"), ("__0_0.distcp", "DCP")],
)  # fmt: skip
def test_files_of_other_libraries_are_told(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(TaskvecError, match=told) as caught:
            load_backbone(f"timm:test_vit@{place}", size=32)
        assert caught.value.fix


def test_adapters_and_global_pooling_say_what_to_do(tmp_path: Path) -> None:
    adapters = {f"base_model.model.blocks.0.attn.qkv.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
    pooled = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: t for key, t in WHOLE.items()}
    for state, told in (
        (adapters, "merge_and_unload"),
        (ENCODER | adapters, "merge_and_unload"),
        (pooled, "cls_token"),
    ):
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(TaskvecError, match=told):
            load_backbone(f"timm:test_vit@{tmp_path / 'x.safetensors'}", size=32)


def timm_folder(folder: Path, change: dict[str, Any] | None = None, **options: Any) -> torch.nn.Module:
    """Let timm write a folder whose configuration is not its architecture's, and return the model that it reads."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, **options)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    seen = {"mean": [0.485, 0.456, 0.406], "std": [0.2, 0.3, 0.4], "crop_pct": 0.8, "interpolation": "bilinear"}
    config["pretrained_cfg"] |= seen | {"input_size": [3, 96, 96]} | (change or {})
    (folder / "config.json").write_text(json.dumps(config))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False, "act_layer": "relu"}, {"img_size": 96}],
)
@pytest.mark.parametrize("address", ["timm:test_vit@{}", "timm:test_vit.r160_in1k@{}/model.safetensors"])
def test_a_folder_of_timm_means_what_timm_reads(tmp_path: Path, address: str, options: dict[str, Any]) -> None:
    model = timm_folder(tmp_path / "hub", **options)
    backbone = load_backbone(address.format(tmp_path / "hub"), device="cpu")
    seen, want = backbone.preprocessing, timm.data.resolve_data_config({}, model=model)
    found = (seen.mean, seen.std, seen.crop, seen.interpolation, seen.size)
    assert found == (tuple(want["mean"]), tuple(want["std"]), want["crop_pct"], "bilinear", want["input_size"][1])
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    with torch.inference_mode():
        scores = model(normalise(torch.from_numpy(images), seen, "cpu"))
        assert torch.allclose(model.head(backbone.features(images)), scores, atol=1e-4)
    write_backbone(backbone, tmp_path)
    assert torch.equal(read_backbone(tmp_path).features(images), backbone.features(images))


def test_a_folder_of_another_architecture_or_library_is_refused_with_its_address(tmp_path: Path) -> None:
    timm_folder(tmp_path)
    with pytest.raises(TaskvecError, match="is of 'test_vit', not of 'test_vit2'\nwrite timm:test_vit@"):
        load_backbone(f"timm:test_vit2@{tmp_path}")
    with pytest.raises(TaskvecError, match="is a folder of timm\nwrite timm:test_vit@"):
        load_backbone(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(TaskvecError, match="is a folder of transformers\nwrite hf:"):
        load_backbone(f"timm:test_vit@{tmp_path}")


def test_a_configuration_beside_weights_is_in_their_fingerprint(tmp_path: Path) -> None:
    timm_folder(tmp_path)
    before, config = identity.describe(f"timm:test_vit@{tmp_path}", None), tmp_path / "config.json"
    config.write_text(config.read_text().replace("0.485", "0.585"))
    assert identity.describe(f"timm:test_vit@{tmp_path}", None) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [0.5, 0, 0.5]}, "with std above 0"),
        ({"mean": [float("nan")] * 3}, "no other program may read"),
        ({"mean": [0.5]}, "not three numbers each"),
        ({"mean": "grey"}, "mean is 'grey'"),
        ({"crop_pct": 0}, "crop_pct is '0'"),
        ({"input_size": [3, 96, 64]}, "images must be square"),
        ({"in_chans": 1}, "in colour"),
        ({"input_size": 96}, "is no configuration of timm"),
        ({"input_size": [3, 10**6, 10**6]}, "input_size is 1000000"),
        ({"interpolation": ["bicubic"]}, "no images can be seen"),
        ({"depth": 10**7}, "depth is 10000000, and at most"),
        ({"embed_dim": 10**9}, "asks for [0-9]+ weights|cannot be made"),
        ({"act_layer": "gelux"}, "cannot be made for .*gelux'\nmend model_args"),
        ({"patch_size": 0}, "cannot be made"),
    ],
)
def test_a_configuration_of_timm_that_cannot_be_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    timm_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = (
        "model_args"
        if set(change) & {"depth", "embed_dim", "act_layer", "patch_size", "in_chans"}
        else "pretrained_cfg"
    )
    config[part] = config.get(part, {}) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TaskvecError, match=message):
        load_backbone(f"timm:test_vit@{tmp_path}")


def test_a_file_that_nothing_tells_of_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm_loader.tell_view(Request("timm:vit_small_patch16_224@x.safetensors", "timm", "vit_small_patch16_224"))
    told = capsys.readouterr().err
    assert "nothing says how it sees images: taking mean [0.5, 0.5, 0.5]" in told
    assert "timm:vit_small_patch16_224.dino@" in told
    timm_loader.tell_view(Request("timm:vit_small_patch16_224.dino@x", "timm", "vit_small_patch16_224.dino"))
    path, _ = timm_file(tmp_path, "test_vit")
    load_backbone(f"timm:test_vit@{path}", size=32)  # all weights of that name see them alike
    assert "nothing says" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), (VIT, 16), ("test_resnet", 1), ("test_convnext", 1)])
def test_a_size_is_a_multiple_of_the_patch(tmp_path: Path, name: str, patch: int) -> None:
    path, _ = timm_file(tmp_path, name)
    if patch == 1:
        assert load_backbone(f"timm:{name}@{path}", size=57).preprocessing.size == 57
        return
    with pytest.raises(TaskvecError, match="57 px leave 9 px that no patch sees\n.*: 48 or 64;"):
        load_backbone(f"timm:{name}@{path}", size=57)
    for size in (0, -16, 10**6, "32"):
        with pytest.raises(TaskvecError, match="size is"):
            load_backbone(f"timm:{name}@{path}", size=size)  # type: ignore[arg-type]
