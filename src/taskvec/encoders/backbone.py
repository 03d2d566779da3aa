"""Backbones: pre-trained encoders by address, with feature width, preprocessing and the origin of the weights."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from taskvec.core.compute import PassPrecision, arithmetic, autocast, choose_device
from taskvec.core.errors import TaskvecError, first_line
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.data.images import Preprocessing, normalise
from taskvec.data.uploads import Images, fits, on_device
from taskvec.encoders.addresses import BackboneAddress, parse
from taskvec.encoders.linearised import jvp_features
from taskvec.encoders.loaders import families
from taskvec.encoders.loaders.families import build, build_hollow
from taskvec.encoders.passes import ON_CPU, Look, Passes, Recorded, collect, images_per_batch, is_small
from taskvec.weights.flat import Weights, align, attach, bind, check_filled, counted
from taskvec.weights.keys import parts


@dataclass
class Backbone:
    """An encoder bound to a flat weight buffer; ``pretrained`` keeps the weights it came with, on the same device.

    ``architecture`` is what ``build`` needs to make the module again without the original file; ``left_out`` names the
    tensors of that file that are no part of the encoder, and ``origin`` the file and the SHA-256 of its content.
    Where there are ``base`` weights, the encoder is linearised: its features are those of its first-order expansion
    around them. ``precision`` is that of passes that learn nothing (``core.compute``), except those of a linearised
    encoder, whose forward derivatives are float32. ``passes`` is what is known of them on a GPU, for all backbones that
    share the module and its weights.

    Threads may share a backbone: its ``lock`` lets one at a time move it (``at``) or ask for features.
    """

    name: str
    module: nn.Module
    width: int
    preprocessing: Preprocessing
    architecture: dict[str, Any]
    pretrained: Weights
    bound: Weights
    device: str = "cpu"
    left_out: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    base: Weights | None = None
    precision: PassPrecision = "float32"
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=threading.RLock, repr=False, compare=False)
    passes: Passes = field(default_factory=Passes, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: its module is bound anew, and its lock and passes are its own."""
        return {name: value for name, value in vars(self).items() if name not in ("bound", "lock", "passes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy, in this process or another."""
        vars(self).update(state, bound=bind(state["module"]), lock=threading.RLock(), passes=Passes())

    def use(self, weights: Weights) -> None:
        """Move the encoder to other weights of its layout, for good; integer buffers stay the pre-trained encoder's.

        That is for who opens an encoder that was kept at such weights. To look through others, see ``at``.
        """
        self.bound.flat.copy_(weights.flat)

    @contextlib.contextmanager
    def at(self, weights: Weights | None = None) -> Iterator[None]:
        """Be at other weights inside, or wherever the block moves to; after it, however it ends, at those of before."""
        with self.lock, mode_kept(self.module):
            flat, start = self.bound.flat, self.pretrained.flat
            before = start if torch.equal(flat, start) else flat.clone()
            try:
                if weights is not None:
                    self.use(weights)
                yield
            finally:
                flat.copy_(before)

    def resident(self, images: Images) -> Images:
        """Return images where passes find them fastest: on a GPU as a tensor there if they fit, else as they are.

        The copy is kept for as long as the array lives, or until others displace it (``data.uploads``).
        """
        if isinstance(images, np.ndarray) and fits(images, self.device):
            return on_device(images, self.device)
        return images

    @torch.no_grad()  # under inference_mode autocast would cast the weights anew for every batch
    def features(
        self,
        images: Images,
        batch_size: int | None = None,
        progress: Progress = no_progress,
        per_patch: bool = False,
    ) -> Float[Tensor, "count *patches width"]:
        """Return the float32 features of all images under the present weights, on the device; one a patch if wanted.

        Arrays are uploaded while others pass. The size of batches follows from the encoder (``encoders.passes``).
        """
        precision = self.pass_precision
        with self.lock, mode_kept(self.module), arithmetic(precision, self.device), autocast(precision, self.device):
            self.module.eval()
            while True:
                look, size = self.planned_pass(batch_size, per_patch)
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    return collect(look, images, size, self.device, self.width, progress)
                if batch_size is not None or size == 1:
                    raise TaskvecError(
                        f"out of memory on {self.device} with {size} images a batch", "free some, or use another device"
                    )
                self.passes.halve(self.device)

    @property
    def pass_precision(self) -> PassPrecision:
        """The precision of a pass: that of the backbone, and float32 where it is linearised."""
        return self.precision if self.base is None else "float32"

    def planned_pass(self, batch_size: int | None, per_patch: bool) -> tuple[Look, int]:
        """Return what looks at a batch, and at how many images: on a GPU as the encoder allows, as a graph if small."""
        look = functools.partial(self.look, per_patch, self.pass_precision)
        if batch_size is not None or not self.device.startswith("cuda"):
            return look, batch_size or ON_CPU
        if not self.passes.size:
            tangents = 1 if self.base is None else 2
            self.passes.size = images_per_batch(self.module, look, self.preprocessing.size, self.device) // tangents
        if self.base is not None or not is_small(self.module):
            return look, self.passes.size
        key = per_patch, self.precision
        if key not in self.passes.graphs:
            uncached = functools.partial(self.look, per_patch, self.precision, cache=False)
            self.passes.graphs[key] = Recorded(uncached, self.module, self.passes.size)
        return self.passes.graphs[key], self.passes.size

    def look(
        self,
        per_patch: bool,
        precision: PassPrecision,
        pixels: UInt8[Tensor, "batch 3 size size"],
        cache: bool = True,
    ) -> Float[Tensor, "batch *patches width"]:
        """Return the float32 features of a batch; without the ``cache``, weights are cast for it alone."""
        with autocast(precision, self.device, cache):
            images = normalise(pixels, self.preprocessing, self.device)
            return encode(self.module, images, per_patch, self.base).float()


@contextlib.contextmanager
def mode_kept(module: nn.Module) -> Iterator[None]:
    """Put every part of a module back into its mode, of training or evaluation, after a block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def encode(
    module: nn.Module, images: Float[Tensor, "batch 3 size size"], per_patch: bool, base: Weights | None = None
) -> Float[Tensor, "batch *patches width"]:
    """Return a module's feature of every image, or of every patch; linearised around ``base`` where given."""
    function = patch_tokens if per_patch else image_features
    return function(module, images) if base is None else jvp_features(module, function, images, base)


def image_features(module: nn.Module, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch width"]:
    """Return a module's feature of every image."""
    features: Tensor = module(images)
    return features


def linearised(backbone: Backbone) -> Backbone:
    """Return the backbone as its first-order expansion around the pre-trained weights (arXiv 2305.12827, section 5).

    Both share the module and its weights. Fine-tuning, merging and measuring it is done as with any backbone.
    """
    return replace(backbone, base=backbone.pretrained, passes=Passes())


def patch_tokens(module: nn.Module, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch patches width"]:
    """Return the final token of every patch, row by row: those of the lab's transformer, or of timm's.

    Raises for a module that has none, such as a convolutional network.
    """
    encoder: Any = module
    if not hasattr(encoder, "tokens") and not hasattr(encoder, "num_prefix_tokens"):
        raise TaskvecError(
            f"a {type(module).__name__} gives no feature a patch, which a task with a label a patch needs",
            "choose a vision transformer, or leave the task out",
        )
    tokens: Tensor
    if hasattr(encoder, "tokens"):
        tokens = encoder.tokens(images)
    else:
        tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
    return tokens


def text_features(
    address: str | BackboneAddress, captions: Sequence[str], allow_pickle: bool = False
) -> tuple[Float[Tensor, "captions width"], float]:
    """Return the text features of captions, of unit length, and the scale of similarities (1 / temperature)."""
    family, asked = families.find(address, None, allow_pickle)
    if family.texts is None:
        raise TaskvecError(f"'{address}' has no text tower", "choose a CLIP model, or lab:contrastive")
    return family.texts(asked, captions)


def load_backbone(
    address: str | BackboneAddress,
    size: int | None = None,
    name: str | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
    projection: bool | None = None,
) -> Backbone:
    """Load an encoder by address (docs/backbones.md) at an input size in pixels, its own by default.

    ``allow_pickle`` admits .pt and .bin files, which are then read with ``weights_only=True``; ``projection`` says
    whether the features of a CLIP model are those after its projection.
    """
    family, asked = families.find(address, size, allow_pickle, projection)
    loaded = families.load(asked, family)
    hollow = build_hollow(loaded.architecture)
    module = build(loaded.architecture) if hollow is None else hollow
    check_size(module, size, str(address))
    start = bind(module)
    state, origin = loaded.state(module), loaded.origin()
    source = f"'{origin.get('from', asked.file or asked.name)}'"
    weights = None if state is None else filled(state.tensors, start, source)
    if state is None:
        module = build(loaded.architecture)
    named, device = name or parse(address).default_name, choose_device(device)
    backbone = assemble(named, module, loaded.preprocessing(module), loaded.architecture, device, weights)
    if state is not None and state.left_out:
        backbone.left_out = state.left_out
        note(f"{source}: left out {parts(state.left_out)}")
    backbone.origin = origin
    return backbone


def filled(state: Mapping[str, Tensor], like: Weights, source: str) -> Weights:
    """Return ``state`` as the weights of an encoder: keys and shapes must fit, and something must have been saved."""
    weights = align(counted(state, like), like, source)
    check_filled(weights, source)
    return weights


def assemble(
    name: str,
    module: nn.Module,
    preprocessing: Preprocessing,
    architecture: dict[str, Any],
    device: str,
    weights: Weights | None = None,
    width: int | None = None,
) -> Backbone:
    """Bind a module to a flat buffer of its own weights, or of others, which a module without values needs.

    The width of its features, where it is not known, is found by one forward pass.
    """
    if weights is None:
        bound = bind(module.to(device))
        weights = bound.clone()
    else:
        weights = weights.on(device)
        bound = attach(module.float(), weights.clone())
    module = module.to(device).eval()
    if width is None:
        width = feature_width(module, preprocessing, device, name)
    return Backbone(name, module, width, preprocessing, architecture, weights, bound, device)


@torch.inference_mode()
def feature_width(module: nn.Module, preprocessing: Preprocessing, device: str, name: str) -> int:
    """Return the width of the module's features, or raise if it cannot look at images of that size."""
    images = torch.zeros(2, 3, preprocessing.size, preprocessing.size, device=device)
    return int(checked_features(module, images, name).shape[1])


def checked_features(
    module: nn.Module, images: Float[Tensor, "batch 3 size size"], name: str
) -> Float[Tensor, "batch width"]:
    """Return a module's features, or raise if it cannot look at such images or gives no vector of each."""
    try:
        features: Any = module(images)
    except Exception as error:  # modules of many libraries, which raise errors of many kinds
        raise TaskvecError(
            f"'{name}' cannot look at {images.shape[-1]} px images: {first_line(error)}", "choose another size"
        ) from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        what = f"features of shape {list(features.shape[1:])}" if isinstance(features, Tensor) else "several outputs"
        raise TaskvecError(f"'{name}' gives {what}, not one vector an image", "choose a classifier")
    return features


def check_size(module: nn.Module, size: int | None, name: str) -> None:
    """Raise where a size that is asked for is no multiple of the patches, so that a border of images is never seen."""
    patch = patch_side(module)
    if size is None or size % patch == 0:
        return
    below = size - size % patch
    near = f"{below} or {below + patch}" if below else str(patch)
    raise TaskvecError(
        f"'{name}' cuts images into patches of {patch} px, and {size} px leave {size % patch} px that no patch sees",
        f"choose another size, a multiple of {patch}: {near}; or leave size out for the encoder's own",
    )


def patch_side(module: nn.Module) -> int:
    """Return the side of the patches that images are cut into, 1 for convolutions or where the library pads images."""
    parts = list(module.modules())
    if any(hasattr(part, "maybe_pad") or getattr(part, "dynamic_img_pad", False) for part in parts):
        return 1
    wide = [part for part in parts if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    cuts = len(wide) == 1 and wide[0].kernel_size == wide[0].stride and wide[0].padding in ((0, 0), "valid")
    return int(wide[0].stride[0]) if cuts else 1
