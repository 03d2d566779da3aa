"""Weights as one flat float32 buffer with a layout; strict matching; safetensors in and out.

A model's parameters can be *bound* to such a buffer, so that moving to other weights is one fused pass over memory
(``torch.add(base, vector, alpha=scale, out=bound)``) and never a dictionary walk.
"""

from __future__ import annotations

import math
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
from taskvec.weights.header import Stored
from taskvec.weights.keys import COUNTER, foreign
from taskvec.weights.reader import Checkpoint
from taskvec.weights.writer import Shard, Writer

COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of numbers that weights may have."""
TYPES = {
    torch.int64: "I64", torch.uint64: "U64", torch.complex64: "C64", torch.int32: "I32", torch.uint32: "U32",
    torch.float32: "F32", torch.int16: "I16", torch.uint16: "U16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the types of entries and of what is carried, larger ones first."""
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

    def on(self, device: str) -> Weights:
        """Return the weights on a device: what lies there already is not copied."""
        return Weights(self.layout, self.flat.to(device), {name: t.to(device) for name, t in self.carried.items()})

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


def layout_of(state: Mapping[str, Tensor]) -> tuple[Slot, ...]:
    """Return the layout of a state dictionary's floating-point tensors, in its order; tied tensors share a place."""
    layout: list[Slot] = []
    starts: dict[int, int] = {}
    end = 0
    for name, tensor in state.items():
        if tensor.is_floating_point():
            start = starts.setdefault(id(tensor), end)
            layout.append(Slot(name, tuple(tensor.shape), start))
            end += tensor.numel() if start == end else 0
    return tuple(layout)


def outline(state: Mapping[str, Tensor]) -> Weights:
    """Return the layout of a state dictionary and what it carries; the entries have no values (meta device)."""
    layout = layout_of(state)
    size = max((slot.start + slot.size for slot in layout), default=0)
    others = {name: tensor.detach() for name, tensor in state.items() if not tensor.is_floating_point()}
    carried = {n: torch.zeros_like(t, device="cpu") if t.is_meta else t.clone() for n, t in others.items()}
    return Weights(layout, torch.empty(size, device="meta"), carried)


def pack(state: Mapping[str, Tensor]) -> Weights:
    """Copy a state dictionary into one flat float32 buffer, in its order; tied tensors are stored once.

    Tensors without values, on the meta device, become zeros on the CPU.
    """
    empty = outline(state)
    first = next((state[slot.name].device for slot in empty.layout), torch.device("cpu"))
    weights = empty.with_flat(torch.empty_like(empty.flat, device=_real(first)))
    for slot in distinct(weights):
        entry, tensor = view(weights.flat, slot), state[slot.name].detach()
        entry.zero_() if tensor.is_meta else entry.copy_(tensor)
    return weights


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def bind(module: nn.Module) -> Weights:
    """Make the module's parameters and float buffers views of one flat buffer, and return it.

    Writing to the returned ``flat`` moves the module. The module is cast to float32; tied parameters stay tied.
    """
    return attach(module.float(), pack(module.state_dict(keep_vars=True)))


def attach(module: nn.Module, weights: Weights) -> Weights:
    """Make the module's parameters and buffers views of ``weights``, which have its layout, and return them.

    The module may be without values, on the meta device; its parameters and buffers stay the same objects.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in weights.state().items():
        tensor = state[name]
        if tensor.is_meta:
            as_it = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            torch.utils.swap_tensors(tensor, as_it)
        else:
            tensor.data = value
    return Weights(weights.layout, weights.flat, {name: state[name] for name in weights.carried})


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
    check_fit(full, like, source)
    flat = torch.empty_like(like.flat, device=_real(like.flat.device))
    for slot in like.layout:
        view(flat, slot).copy_(full[slot.name])
    check_finite(Weights(like.layout, flat), source)
    return Weights(like.layout, flat, carried_of(full, like))


def check_fit(state: Mapping[str, Tensor], like: Weights, source: str) -> None:
    """Raise unless tensors have the keys and shapes of ``like``, and numbers that can be its."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in like.state().items()}
    check_keys(shapes, wanted, source, "give a checkpoint of that architecture, or name the one it was saved from")
    check_kinds(state, like.state(), source)


def counted(state: Mapping[str, Tensor], like: Weights) -> dict[str, Tensor]:
    """Return ``state`` with the counters of batch norm that it lacks, which older files do, as ``like`` has them."""
    counters = {key: value for key, value in like.carried.items() if key.endswith(COUNTER) and key not in state}
    return {**state, **counters}


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
    if all_finite(weights.flat):
        return
    bad = next(slot.name for slot in weights.layout if not torch.isfinite(view(weights.flat, slot)).all())
    raise TaskvecError(f"{source}: tensor '{bad}' holds NaN or infinity", fix)


def all_finite(numbers: Tensor) -> bool:
    """Return whether no number is NaN or infinite: one pass in place of isfinite's four, unless the sum overflows."""
    return math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())


def save(weights: Weights, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write all tensors to a safetensors file in the order of their layout, which appears whole or not at all.

    Raises for NaN and infinity: what a file in this order holds is finite, and is used where it lies (``open_saved``).
    """
    check_finite(weights, "the weights to be written", "choose other inputs or settings: their computation overflowed")
    state = weights.state()
    names = sorted(state, key=lambda name: -state[name].element_size())  # stable: entries keep their order
    sized = {name: (TYPES[state[name].dtype], tuple(state[name].shape), state[name].nbytes) for name in names}
    with replacing(path) as new:
        writer = Writer(new.parent, [Shard(new.name, dict(metadata or {}), sized)])
        try:
            for name in names:
                writer.write(name, 0, state[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            writer.finish()
        finally:
            writer.close()


def open_saved(path: Path, like: Weights, device: str = "cpu") -> Weights:
    """Open a file that ``save`` wrote and that nobody changes, for a device; on a CPU its entries stay where they lie.

    They are mapped into memory, privately: the disk is read when they are, and writing to them would not reach the
    file. They are finite, since ``save`` checks that. A file in another order is read and checked as any.
    """
    stored = _stored(path)
    begin = min((entry.start for entry in stored.values() if entry.dtype == "F32"), default=0)
    places = {n: (entry.shape, entry.start - begin) for n, entry in stored.items() if entry.dtype == "F32"}
    if places != {slot.name: (slot.shape, 4 * slot.start) for slot in like.layout}:
        return align(counted(read(path), like), like, f"'{path}'").on(device)
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size // 4)
    mapped = like.with_flat(whole[begin // 4 :][: like.flat.numel()])
    others = counted(read(path, stored.keys() - places.keys()), like)
    check_fit(Weights(mapped.layout, mapped.flat).state() | others, like, f"'{path}'")
    return Weights(like.layout, mapped.flat, carried_of(others, like)).on(device)


def carried_of(state: Mapping[str, Tensor], like: Weights) -> dict[str, Tensor]:
    """Return copies of the tensors that ``like`` carries beside its buffer, in its types and on its devices."""
    return {name: state[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in like.carried.items()}


def _stored(path: Path) -> Mapping[str, Stored]:
    """Return where the tensors of a safetensors file lie in it; a missing or damaged file is a clear error."""
    if not path.is_file():
        raise TaskvecError(f"no weights file at '{path}'", "give the path of a .safetensors file")
    with Checkpoint(path) as file:
        return file.tensors


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
    _stored(path)
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
