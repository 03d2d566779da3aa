"""Weights as one flat float32 buffer with a layout; strict matching; safetensors in and out.

A model's parameters can be *bound* to such a buffer, so that moving to other weights is one fused pass over memory
(``torch.add(base, vector, alpha=scale, out=bound)``) and never a dictionary walk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError
from taskvec.core.locks import replacing
from taskvec.weights.keys import foreign
from taskvec.weights.reader import Checkpoint

COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of numbers that weights may have."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One named tensor inside the flat buffer; tied tensors are entries with the same ``start``."""

    name: str
    shape: Shape
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Weights:
    """Floating-point entries in one buffer; everything else (integer and boolean buffers) is carried beside it."""

    layout: tuple[Slot, ...]
    flat: Float32[Tensor, " size"]
    carried: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return a view of one entry, or a carried tensor."""
        if name in self.carried:
            return self.carried[name]
        slot = next(slot for slot in self.layout if slot.name == name)
        return view(self.flat, slot)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name, floating-point ones as views of the buffer."""
        return {slot.name: view(self.flat, slot) for slot in self.layout} | dict(self.carried)

    def with_flat(self, flat: Float32[Tensor, " size"]) -> Weights:
        """Return weights of the same layout and carried tensors around another buffer."""
        if flat.shape != self.flat.shape or flat.dtype != torch.float32:
            raise ValueError(
                f"buffer {tuple(flat.shape)} {flat.dtype} does not fit layout {tuple(self.flat.shape)} float32"
            )
        return Weights(self.layout, flat, self.carried)

    def clone(self) -> Weights:
        """Return an independent copy, on the same device."""
        carried = {name: tensor.detach().clone() for name, tensor in self.carried.items()}
        return Weights(self.layout, self.flat.detach().clone(), carried)


def mend_variances(weights: Weights) -> Weights:
    """Raise negative running variances to 0 in place: far along a vector batch norm would give NaN otherwise."""
    for slot in weights.layout:
        if slot.name.endswith("running_var"):
            view(weights.flat, slot).clamp_(min=0)
    return weights


def view(flat: Float32[Tensor, " size"], slot: Slot) -> Tensor:
    """Return the part of the buffer that holds ``entry``, in its shape."""
    return flat[slot.start : slot.start + slot.size].view(slot.shape)


def distinct(weights: Weights) -> tuple[Slot, ...]:
    """Return the entries that hold something, tied ones once by the first of their names, in the buffer's order."""
    return distinct_slots(weights.layout)


def distinct_slots(layout: Sequence[Slot]) -> tuple[Slot, ...]:
    """Return the slots of a layout that hold something, as ``distinct`` does."""
    first = {slot.start: slot for slot in reversed(layout) if slot.size}
    return tuple(first[start] for start in sorted(first))


def pack(state: Mapping[str, Tensor]) -> Weights:
    """Copy a state dictionary into one flat float32 buffer, in its order; tied tensors are stored once."""
    layout: list[Slot] = []
    carried: dict[str, Tensor] = {}
    starts: dict[int, int] = {}
    pieces, end = [], 0
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            carried[name] = tensor.detach().clone()
            continue
        if id(tensor) not in starts:
            starts[id(tensor)] = end
            end += tensor.numel()
            pieces.append(tensor.detach().reshape(-1).to(torch.float32))
        layout.append(Slot(name, tuple(tensor.shape), starts[id(tensor)]))
    flat = torch.cat(pieces) if pieces else torch.empty(0)
    return Weights(tuple(layout), flat, carried)


def bind(module: nn.Module) -> Weights:
    """Make the module's parameters and float buffers views of one flat buffer, and return it.

    Writing to the returned ``flat`` moves the module. The module is cast to float32; tied parameters stay tied.
    """
    module.float()
    state = module.state_dict(keep_vars=True)
    bound = pack(state)
    for slot in bound.layout:
        state[slot.name].data = view(bound.flat, slot)
    carried = {name: state[name] for name in bound.carried}
    return Weights(bound.layout, bound.flat, carried)


def check_keys(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str, fix: str) -> None:
    """Raise unless both have the same keys and shapes; the message names the first that differ."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    mismatched = [key for key in wanted if key in found and tuple(found[key]) != tuple(wanted[key])]
    if not (missing or unexpected or mismatched):
        return
    if explained := foreign(unexpected):
        raise TaskvecError(
            f"{source} does not fit: it holds {explained[0]} ({_some('', unexpected).strip()})", explained[1]
        )
    parts = [_some("is missing", missing), _some("has unexpected", unexpected)]
    if mismatched and not missing and not unexpected:
        fix += "; if it was made for another input size: give that size, or none where the architecture keeps its own"
    parts += [
        _some("has another shape for", [f"{k} {list(found[k])} instead of {list(wanted[k])}" for k in mismatched])
    ]
    raise TaskvecError(f"{source} does not fit: it " + "; ".join(part for part in parts if part), fix)


def _some(verb: str, keys: list[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{verb} {', '.join(keys[:most])}{more}" if keys else ""


def align(state: Mapping[str, Tensor], like: Weights, source: str) -> Weights:
    """Copy ``state`` into the layout of ``like``, on its device: keys and shapes must be equal, or it raises.

    A tied entry may be missing from ``state`` when its twin is there.
    """
    twins = {slot.start: slot.name for slot in like.layout if slot.name in state}
    names = {e.name: twins[e.start] for e in like.layout if e.name not in state and e.start in twins}
    full = dict(state) | {name: state[twin] for name, twin in names.items()}
    shapes = {key: tuple(value.shape) for key, value in full.items()}
    wanted = {key: tuple(value.shape) for key, value in like.state().items()}
    check_keys(shapes, wanted, source, "give a checkpoint of that architecture, or name the one it was saved from")
    check_kinds(full, like.state(), source)
    flat = torch.empty_like(like.flat)
    for slot in like.layout:
        view(flat, slot).copy_(full[slot.name])
    check_finite(Weights(like.layout, flat), source)
    carried = {name: full[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in like.carried.items()}
    return Weights(like.layout, flat, carried)


def check_kinds(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raise for tensors that are no plain numbers, or whose numbers cannot be those of the wanted one of their name."""
    for name, tensor in state.items():
        if why := _why_not(tensor, wanted.get(name)):
            raise TaskvecError(
                f"{source}: tensor '{name}' {why}",
                "give the weights themselves, in floating-point numbers; of a quantised model those before that",
            )


def _why_not(tensor: Tensor, wanted: Tensor | None) -> str:
    if tensor.is_meta:
        return "holds no numbers: it is on the meta device"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is no plain tensor ({'nested' if tensor.is_nested else tensor.layout})"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    if wanted is not None and wanted.is_floating_point() and tensor.dtype not in COMPUTED:
        return f"is of type {tensor.dtype}, which is none of weights"
    if wanted is not None and not wanted.is_floating_point():
        odd = tensor.is_complex() or not torch.equal(tensor.to(wanted.dtype).double(), tensor.double())
        return f"is of type {tensor.dtype}, and its numbers are none of {wanted.dtype}" if odd else ""
    return ""


def check_filled(weights: Weights, source: str) -> None:
    """Raise when all matrices of an encoder are zero: nothing was saved."""
    matrices = [slot for slot in weights.layout if len(slot.shape) > 1 and slot.size]
    if matrices and not any(bool(view(weights.flat, slot).any()) for slot in matrices):
        raise TaskvecError(f"{source}: all its matrices are zero", "give a checkpoint that holds trained weights")


def check_finite(weights: Weights, source: str, fix: str = "give a checkpoint whose training did not diverge") -> None:
    """Raise when an entry holds NaN or infinity, and name it."""
    if bool(torch.isfinite(weights.flat).all()):
        return
    bad = next(slot.name for slot in weights.layout if not torch.isfinite(view(weights.flat, slot)).all())
    raise TaskvecError(f"{source}: tensor '{bad}' holds NaN or infinity", fix)


def save(weights: Weights, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write all tensors to a safetensors file, which appears whole or not at all."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.state().items()}
    save_tensors(tensors, path, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, which appears whole or not at all."""
    try:
        about = dict(metadata or {}) if tensors else None  # a file of no tensors but metadata would be no valid JSON
        with replacing(path) as new:
            save_file(tensors, str(new), metadata=about)
    except SafetensorError as error:  # its writer hides the system's error number in the text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number.group(1)), str(error), str(path)) if number else error from None


def read(path: Path, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of a safetensors file (all, or ``keys``); a missing or damaged file is a clear error."""
    if not path.is_file():
        raise TaskvecError(f"no weights file at '{path}'", "give the path of a .safetensors file")
    Checkpoint(path).close()
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TaskvecError(
            f"'{path}' cannot be read as safetensors: {error}", "is it complete? copy or convert it again"
        ) from None


def read_keys(path: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file; a missing or damaged file is a clear error."""
    read(path, ())
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that ``read`` can read."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})
