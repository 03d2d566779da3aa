"""How images are seen by models of transformers: held against the library's own processors, on uneven images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as T
from PIL import Image

from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing, resize_and_crop
from taskvec.encoders.loaders.hf.modules import TYPES
from taskvec.encoders.loaders.hf.processors import preprocessing, read_processor

PROCESSORS = {
    "ViT": ("vit", "vit_mae", "vit_msn", "swin", "swinv2"),
    "DeiT": ("deit",),
    "Bit": ("dinov2", "dinov2_with_registers", "focalnet", "bit"),
    "DINOv3ViT": ("dinov3_vit", "dinov3_convnext"),
    "CLIP": ("clip", "clip_vision_model"),
    "Siglip": ("siglip", "siglip_vision_model"),
    "Beit": ("beit", "data2vec-vision"),
    "ConvNext": ("resnet", "regnet", "convnext", "convnextv2"),
    "EfficientNet": ("efficientnet",),
    "MobileNetV1": ("mobilenet_v1",),
    "MobileNetV2": ("mobilenet_v2",),
    "Levit": ("levit",),
}
"""The library's processor of every type of model."""
WRITTEN: dict[str, dict[str, Any]] = {
    **{
        f"{name}, published": {"feature_extractor_type": f"{name}FeatureExtractor", "size": 224}
        for name in ("ViT", "Beit", "CLIP", "ConvNext", "EfficientNet", "Levit")
    },
    "DeiT, published": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
    "CLIP, old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 64, "crop_size": 64},
    "DINOv2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
    "ConvNeXt at 384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "ConvNeXt at 224": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
    "without normalising": {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    "without scaling": {"image_processor_type": "ViTImageProcessor", "do_rescale": False},
    "EfficientNet, shifted": {
        "image_processor_type": "EfficientNetImageProcessor",
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "include_top": False,
    },
}
IMAGES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)).resize(
        (10 * columns, 10 * rows), Image.Resampling.BICUBIC
    )
    for rows, columns in ((30, 50), (40, 24))
]


def folder_with(folder: Path, processor: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / name).write_text(json.dumps(processor))
    return folder


def check(folder: Path) -> Preprocessing:
    """Hold the pixels of both images against the library's, in 0..1: rounding may differ by two levels of 255."""
    view, processor = preprocessing(folder, "vit", None), read_processor(folder)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (view.mean, view.std))
    for image in IMAGES:
        want = processor(image, return_tensors="np")["pixel_values"][0] * std + mean
        assert np.abs(resize_and_crop(image, view) / 255 - want).max() < 2.1 / 255
    return view


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_view_is_the_librarys(tmp_path: Path, name: str) -> None:
    getattr(T, f"{name}ImageProcessor")().save_pretrained(folder_with(tmp_path, {}))
    check(tmp_path)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_view_is_the_librarys_however_it_was_written(tmp_path: Path, name: str) -> None:
    check(folder_with(tmp_path, WRITTEN[name]))


def test_every_type_has_its_processor_held_against() -> None:
    assert {kind for kinds in PROCESSORS.values() for kind in kinds} == set(TYPES)


def test_a_processor_of_images_and_texts_is_read(tmp_path: Path) -> None:
    saved = {"image_processor": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256}}}
    view = check(folder_with(tmp_path, saved, "processor_config.json"))
    assert (view.size, view.crop, view.mean[0]) == (224, 0.875, 0.48145466)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "no square"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "no square"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 200}}, "not known here"),
        ({"image_processor_type": "NoneImageProcessor", "auto_map": {"AutoImageProcessor": "a.B"}}, "cannot be read"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 4}, "box"),
        ({"image_processor_type": "ViTImageProcessor", "resample": "bicubic"}, "PIL's method bicubic"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0, 0.5]}, "with std above 0"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [-0.5] * 3}, "with std above 0"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [float("nan")] * 3}, "not three numbers each"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}, "fails|three numbers"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 10**6, "width": 10**6}}, "'1000000' px"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": -8, "width": -8}}, "'-8' px"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 1e-9}, "a share of '1e-09'"),
    ],
)
def test_a_view_that_cannot_be_had_is_refused(tmp_path: Path, processor: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        preprocessing(folder_with(tmp_path, processor), "vit", None)


def test_what_is_usual_is_what_was_published(tmp_path: Path) -> None:
    usual = {"vit": 0.5, "data2vec-vision": 0.5, "vit_msn": 0.485, "vit_mae": 0.485, "clip": 0.48145466}
    for kind, mean in usual.items():
        assert preprocessing(tmp_path, kind, None).mean[0] == mean
