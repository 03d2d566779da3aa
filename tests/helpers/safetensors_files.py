"""Safetensors files, whole and in shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def write(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def write_shards(folder: Path, *states: dict[str, torch.Tensor], total: int = 0) -> Path:
    """Write one shard a state, and their index."""
    places = {}
    for number, state in enumerate(states, 1):
        name = f"model-{number:05}-of-{len(states):05}.safetensors"
        write(folder / name, state, {"format": "pt"})
        places |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": total, "made_by": "test"}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
