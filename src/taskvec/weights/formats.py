"""Kinds of files of weights: what they are by suffix, and which may be read."""

from __future__ import annotations

import re
from pathlib import Path

from taskvec.core.errors import TaskvecError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FORMATS = {
    ".distcp": ("a part of a distributed checkpoint of PyTorch (DCP)",
                "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE makes one file of it"),
    ".h5": ("weights of Keras or TensorFlow", ""), ".keras": ("a model of Keras", ""),
    ".pb": ("a graph of TensorFlow", ""), ".tflite": ("a model of TensorFlow Lite", ""),
    ".msgpack": ("weights of Flax", ""), ".npz": ("arrays of NumPy or JAX", ""), ".npy": ("an array of NumPy", ""),
    ".onnx": ("a graph of ONNX", "save the weights that it was exported from"),
    ".gguf": ("a model of llama.cpp, often quantised", "take the weights that it was made from"),
    ".ggml": ("a model of llama.cpp, often quantised", "take the weights that it was made from"),
    ".pdparams": ("weights of PaddlePaddle", ""), ".mlmodel": ("a model of Core ML", ""),
    ".engine": ("an engine of TensorRT", "take the weights that it was made from"),
}  # fmt: skip
"""Files of other libraries by suffix: what they are, and what to do with them."""
CONVERT = "convert it to the state_dict() of a PyTorch model, saved as safetensors"


def format_of(name: str) -> tuple[str, str] | None:
    """Say by its name what a file of another library is and what to do about it; None for other files."""
    if re.search(r"\.(index|data-\d+-of-\d+)$", name):
        return "a checkpoint of TensorFlow", CONVERT
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    what, fix = FORMATS.get(suffix, ("", ""))
    return (what, fix or CONVERT) if what else None


def refuse_pickle(file: Path | str, allow_pickle: bool) -> None:
    """Raise unless a file is safetensors, or pickles were allowed; other libraries' files are named as such."""
    if other := format_of(Path(file).name):
        raise TaskvecError(f"'{file}' is {other[0]}", other[1])
    if not is_safetensors(Path(file)) and not allow_pickle:
        raise TaskvecError(
            f"'{file}' is not a .safetensors file; pickled checkpoints can run code when loaded",
            "convert it to safetensors, or set allow_pickle: true (it is then read with weights_only=True)",
        )


def is_safetensors(path: Path) -> bool:
    """Say whether a file is safetensors, by its suffix, or where it has none of weights by how it begins."""
    if path.suffix in WEIGHT_SUFFIXES or not path.is_file():
        return path.suffix == ".safetensors"
    with path.open("rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size
