"""Vision models of transformers, from a folder or the hub: ViT and its family, CLIP's image tower, and CNNs.

The feature is the class token after the final norm, without the pooler; of CLIP it is projected where the checkpoint
has the projection; models without a class token give their own pooled feature. Nothing is masked: a checkpoint of MAE
is read into ViTModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError, did_you_mean, first_line
from taskvec.encoders.loaders.hf import processors, saved
from taskvec.encoders.loaders.hf.modules import (
    TYPES,
    Classifier,
    build,
    edge,
    make_config,
    model_class,
    quiet,
    takes_size,
    wrap,
)
from taskvec.encoders.loaders.requests import (
    Family,
    Loaded,
    Request,
    State,
    Texts,
    check_affordable,
    check_bounds,
    import_extra,
    no_projection,
)
from taskvec.paper.checkpoints import Checkpoint
from taskvec.weights.flat import check_keys
from taskvec.weights.keys import CLASSIFIERS, COUNTER, DECODERS
from taskvec.weights.reader import tell_other

HEADS = (*CLASSIFIERS, *DECODERS, "pooler.", "embeddings.mask_token")
"""Key prefixes of what is excluded of an encoder: classifiers, decoders, the pooler and the token of hidden patches."""
TEXTS = ("text_model.", "text_projection.", "logit_scale", "logit_bias", "visual_projection.")
OTHERS = ("model_type", "architectures", "dtype", "return_dict", "torchscript")
"""What a configuration says that is none of the encoder's architecture."""


# ---------------------------------------------------------------- loading


def identify(request: Request) -> dict[str, Any]:
    """Return a digest of the folder, where it is on this machine."""
    folder = saved.locate(request)
    import_extra("transformers", "transformers", "hf", request.address)
    return {"content": saved.digest(folder, request.allow_pickle)} if folder else {}


def missing(request: Request) -> str:
    """Say what would have to be downloaded."""
    return f"{request.name}/{saved.WEIGHTS[0]}" if saved.locate(request) is None else ""


def load(request: Request) -> Loaded:
    """Find a model's folder and read its configuration."""
    import_extra("transformers", "transformers", "hf", request.address)
    folder = saved.obtain(request)
    config = saved.read_config(folder)
    kind = type_of(request, config)
    trained_size = edge(vision_of(config, folder).get("image_size"))
    view = processors.preprocessing(folder, kind, trained_size)
    view = replace(view, size=request.size or view.size)
    files = saved.checked_files(folder, request.allow_pickle)
    tell_other(files[0] if len(files) == 1 else folder)
    projects = TYPES[kind].feature == "clip" and saved.holds(files, "visual_projection.", config)
    options = options_of(request, config, vision_of(config, folder), kind, view.size, projects)
    check_affordable(lambda: build(options), files, f"'{folder / saved.CONFIG}'")
    where = request.name if Path(request.name).expanduser().exists() else f"{request.name}/{folder.name}"
    return Loaded(
        {"family": "hf", "options": options},
        lambda _: view,
        lambda _: state_for(folder, options),
        lambda: {"from": where, "sha256": saved.content(files)},
    )


def type_of(request: Request, config: dict[str, Any]) -> str:
    """Return the type of a model; one that is not known is an error."""
    kind = str(config.get("model_type"))
    if "architecture" in config:
        name = config["architecture"]
        raise TaskvecError(f"'{request.address}' is a folder of timm", f"write timm:{name}@{Path(request.name)}")
    if kind not in TYPES:
        raise TaskvecError(f"'{request.address}' is a model of type '{kind}'", did_you_mean(kind, TYPES))
    return kind


def vision_of(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy of the part of a configuration that is the image tower's."""
    older = config.get("vision_config_dict") if config.get("model_type") == "clip" else None  # goes before the other
    vision = older or config.get("vision_config") or config
    if not isinstance(vision, dict):
        raise TaskvecError(f"'{folder / saved.CONFIG}': vision_config is '{vision}'", "copy it again")
    check_bounds(vision, f"'{folder / saved.CONFIG}'")
    return dict(vision)


def options_of(
    request: Request, config: dict[str, Any], vision: dict[str, Any], kind: str, size: int, has_projection: bool
) -> dict[str, Any]:
    """Return what ``build`` makes the encoder from."""
    if has_projection and "projection_dim" in config:
        vision["projection_dim"] = config["projection_dim"]
    elif not has_projection:
        no_projection(request, "its checkpoint holds none")
    trained_size = edge(vision.get("image_size"))
    return {
        "type": kind,
        "config": {key: value for key, value in vision.items() if key not in OTHERS},
        "size": size,
        "resampled": trained_size is not None and size != trained_size,
        "has_projection": has_projection,
        "projection": has_projection and request.projection is not False,
    }


def check_row(options: dict[str, Any], row: Checkpoint, request: Request) -> None:
    """Raise unless a folder's model is of the kind, width, depth, patch and input size of a row of the paper."""
    made, kinds = make_config(options), ("clip", "clip_vision_model") if row.projection else ("vit", "vit_mae")
    sizes = [edge(getattr(made, key, None)) for key in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")]
    projected = made.projection_dim if options["has_projection"] else 0
    wanted = row.projection if request.projection is not False else projected
    if options["type"] not in kinds or sizes != [*row.shape, 224] or projected != wanted:
        raise TaskvecError(
            f"'{request.address}': '{request.name}' is a {options['type']} of width, depth, patch and input size "
            f"{sizes}, projected to {projected or 'nothing'}; the paper's is a {kinds[0]} of {[*row.shape, 224]}"
            + (f", projected to {row.projection}" if row.projection else ""),
            f"give that encoder's folder, or load this one as hf:{request.name}",
        )


def state_for(folder: Path, options: dict[str, Any]) -> State:
    """Let transformers read and translate the weights of a folder; what is missing or not known raises."""
    saved.check_types(saved.checked_files(folder, True))
    model, info = read_model(folder, options)
    allowed = (*HEADS, *TEXTS) if TYPES[options["type"]].feature == "clip" or "siglip" in options["type"] else HEADS
    unexpected = sorted(info["unexpected_keys"])
    excluded = [key for key in unexpected if key.startswith(allowed) or key.partition(".")[2].startswith(allowed)]
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    present = {key: shape for key, shape in shapes.items() if key not in info["missing_keys"] or key.endswith(COUNTER)}
    present |= {key: tuple(shape) for key, shape, _ in info["mismatched_keys"]}
    present |= {key: () for key in unexpected if key not in excluded}
    fix = f"give a folder whose weights are those of its {saved.CONFIG}"
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        fix += ", or set use_mean_pooling to false there: then the class token is the feature"
    check_keys(present, shapes, f"'{saved.weights_in(folder)}'", fix)
    inner = wrap(model, options).state_dict()
    if options["has_projection"] and not options["projection"]:
        excluded.append("visual_projection.weight")
    return State(inner, tuple(excluded))


def read_model(folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read a folder into its model by transformers, which also says which keys did not fit."""
    made, more = model_class(options)
    config, weights = make_config(options), saved.weights_in(folder)
    named = None if weights is None or weights.name in saved.WEIGHTS else str(weights.relative_to(folder))
    config.transformers_weights = named
    return read_as(made, folder, config=config, **more)


def read_as(made: Any, folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Read a folder into a model of a class of transformers, which also says which keys did not fit."""
    weights = saved.weights_in(folder)
    safe = weights is not None and ".safetensors" in weights.name
    state = saved.bare_state(saved.checked_files(folder, True))
    if state is not None and "config" not in more:
        more["config"] = made.config_class.from_pretrained(folder, local_files_only=True)
    try:
        with quiet():
            model, info = made.from_pretrained(
                folder if state is None else None,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=safe,
                weights_only=True,
                dtype=torch.float32,
                **more,
            )
    except Exception as error:  # its readers raise errors of many kinds
        raise TaskvecError(
            f"'{weights}' cannot be read: {first_line(error)}", "is it complete? copy or convert it again"
        ) from None
    return model, info


def classifier(request: Request, options: Mapping[str, Any], outputs: int) -> nn.Module | None:
    """Read the classifier of a fine-tuned folder by the class that wrote it; None where the library has none."""
    folder = Path(request.file).parent
    if not saved.is_folder(folder) or saved.weights_in(folder) != Path(request.file):
        return None
    for made in classifier_classes(saved.read_config(folder)):
        model, info = read_as(made, folder)
        if not info["missing_keys"] and not info["mismatched_keys"]:
            return Classifier(model, options["resampled"] and takes_size(model))
    return None


def classifier_classes(config: Mapping[str, Any]) -> list[Any]:
    """Return the library's classifiers of a configuration's type: the one that it names, or all where it names none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as KNOWN

    made = KNOWN.get(CONFIG_MAPPING[config["model_type"]], ())
    every = list(made) if isinstance(made, tuple | list) else [made]
    named = saved.architectures(config) or [one.__name__ for one in every]
    return [one for one in every if one.__name__ in named]


# ---------------------------------------------------------------- texts


def has_text(request: Request) -> bool:
    """Say whether zero-shot heads can be built: of CLIP models with both towers; of one not here, by its name."""
    if request.projection is False:
        return False
    folder = saved.locate(request)
    if folder is None:
        return "clip" in request.name.lower()
    config = saved.read_config(folder)
    files = saved.checked_files(folder, request.allow_pickle)
    return config.get("model_type") == "clip" and saved.holds(files, "text_model.", config)


def check_tokenizer(folder: Path) -> None:
    """Raise unless a folder holds its tokenizer, in whose place transformers would make an empty one."""
    names = {name for name in saved.TOKENIZER if (folder / name).is_file()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise TaskvecError(
            f"'{folder}' holds no tokenizer, which its text tower needs",
            "copy tokenizer.json there (or vocab.json and merges.txt), or leave out the open regimes",
        )


def identify_text(request: Request) -> str:
    """Return a digest of weights and tokenizer, where they are on this machine."""
    folder = saved.locate(request)
    return saved.digest(folder, request.allow_pickle, saved.TOKENIZER) if folder else ""


@torch.inference_mode()
def texts(request: Request, captions: Sequence[str]) -> Texts:
    """Return the features of captions by a CLIP model's text tower, and its logit scale."""
    transformers = import_extra("transformers", "transformers", "hf", request.address)
    folder = saved.obtain(request)
    saved.checked_files(folder, request.allow_pickle)
    check_tokenizer(folder)
    try:
        with quiet():
            model, info = read_as(transformers.CLIPModel, folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            words = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    except Exception as error:
        raise TaskvecError(
            f"the text tower in '{folder}' cannot be used: {first_line(error)}", "leave out the open regimes"
        ) from None
    if missing := sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}):
        raise TaskvecError(
            f"'{folder}': its text tower is not whole: {', '.join(missing[:3])}",
            "copy the whole folder again, or leave out the open regimes",
        )
    outputs = model.eval().get_text_features(**words)
    features: Tensor = getattr(outputs, "pooler_output", outputs)
    return nn.functional.normalize(features.float(), dim=1), float(model.logit_scale.exp())


FAMILY = Family(("transformers",), load, build, identify, missing, has_text, identify_text, texts, classifier)
