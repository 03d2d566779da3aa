"""Modules of transformers that give one feature an image: the types that are known, and how each is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError
from taskvec.encoders.loaders.hf.saved import CONFIG
from taskvec.encoders.loaders.requests import import_extra

Images = Float[Tensor, "batch 3 size size"]


@dataclass(frozen=True)
class Type:
    """How a type of model in transformers is read: the type whose encoder it has, and which output is its feature."""

    encoder: str
    feature: str


TYPES = {
    **{name: Type(name, "class") for name in ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")},
    "vit_mae": Type("vit", "class"),
    "vit_msn": Type("vit_msn", "class"),
    "clip": Type("clip_vision_model", "clip"),
    "clip_vision_model": Type("clip_vision_model", "clip"),
    "siglip": Type("siglip_vision_model", "pooled"),
    **{
        name: Type(name, "pooled")
        for name in (
            "siglip_vision_model", "beit", "data2vec-vision", "swin", "swinv2", "focalnet", "resnet", "regnet", "bit",
            "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "mobilenet_v1", "mobilenet_v2", "levit",
        )
    },
}  # fmt: skip
"""The types of model that are known, by ``model_type`` of config.json."""


class Encoder(nn.Module):
    """A model of transformers that gives one feature an image."""

    def __init__(self, model: nn.Module, resampled: bool) -> None:
        """Keep the model; ``resampled`` lets it resample its position embeddings to the images' size."""
        super().__init__()
        self.model = model
        self.resampled = {"interpolate_pos_encoding": True} if resampled else {}

    def outputs(self, images: Images) -> Any:
        """Return all outputs of the model."""
        return self.model(images, **self.resampled)


class ClassToken(Encoder):
    """The class token after the final norm."""

    patches: int

    def forward(self, images: Images) -> Float[Tensor, "batch width"]:
        """Return the feature of every image."""
        feature: Tensor = self.outputs(images).last_hidden_state[:, 0]
        return feature

    def tokens(self, images: Images) -> Float[Tensor, "batch patches width"]:
        """Return the final token of every patch, without class and register tokens."""
        tokens: Tensor = self.outputs(images).last_hidden_state[:, -self.patches :]
        return tokens


class Pooled(Encoder):
    """The model's own pooled feature; of CLIP's image tower that is the normalised class token."""

    def forward(self, images: Images) -> Float[Tensor, "batch width"]:
        """Return the feature of every image."""
        feature: Tensor = self.outputs(images).pooler_output.flatten(1)
        return feature


class Projected(Encoder):
    """The embedding after CLIP's projection, not normalised."""

    def forward(self, images: Images) -> Float[Tensor, "batch width"]:
        """Return the feature of every image."""
        feature: Tensor = self.outputs(images).image_embeds
        return feature


class Classifier(Encoder):
    """A classifier of the library, which gives its scores."""

    def forward(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Return the scores of every image."""
        scores: Tensor = self.outputs(images).logits
        return scores


def make_config(options: dict[str, Any]) -> Any:
    """Make the configuration of an encoder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with refused(options):
        return CONFIG_MAPPING[TYPES[options["type"]].encoder](**options["config"])


@contextlib.contextmanager
def refused(options: dict[str, Any]) -> Iterator[None]:
    """Turn what transformers says of a configuration that it cannot use into an error."""
    try:
        yield
    except Exception as error:  # of many kinds, its checks' own among them
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise TaskvecError(
            f"no '{options['type']}' can be made from its {CONFIG}: {type(error).__name__}: {said}",
            "mend that file, or copy it again",
        ) from None


def model_class(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class of a model, and with what else it is made: no pooler where the class token counts, else one."""
    import inspect

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if options["has_projection"]:
        return transformers.CLIPVisionModelWithProjection, {}
    made = MODEL_MAPPING[type(make_config(options))]
    pools = "add_pooling_layer" in inspect.signature(made.__init__).parameters
    return made, {"add_pooling_layer": TYPES[options["type"]].feature != "class"} if pools else {}


def build(options: dict[str, Any]) -> nn.Module:
    """Make an encoder with random weights."""
    import_extra("transformers", "transformers", "hf", f"hf:{options['type']}")
    made, more = model_class(options)
    config = make_config(options)
    with quiet(), refused(options):
        model = made(config, **more)
    return wrap(model, options)


def wrap(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Make a model give its feature."""
    if options["has_projection"] and not options["projection"]:
        model = model.vision_model  # type: ignore[assignment]
    resampled = options["resampled"] and takes_size(model)
    if options["projection"]:
        return Projected(model, resampled)
    if TYPES[options["type"]].feature != "class":
        return Pooled(model, resampled)
    encoder, patch = ClassToken(model, resampled), edge(options["config"].get("patch_size")) or 16
    encoder.patches = (options["size"] // patch) ** 2
    return encoder


def takes_size(model: nn.Module) -> bool:
    """Say whether a model can resample its position embeddings to the images' size."""
    import inspect

    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting what is checked here: keys that do not fit, and bars of progress."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def edge(size: Any) -> int | None:
    """Return a side in pixels out of transformers' ways to say a size."""
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    if isinstance(size, dict):
        size = next((size[name] for name in ("shortest_edge", "height") if size.get(name)), None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise TaskvecError(f"a size is '{size}', not a number of pixels", f"mend it in {CONFIG}, or copy that again")
    return size
