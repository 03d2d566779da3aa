"""What is asked of a loader, and what it finds: an architecture, its preprocessing, and the weights for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, file_digest, read_json
from taskvec.data.images import RESAMPLING, Preprocessing
from taskvec.paper.checkpoints import Checkpoint as PaperCheckpoint

LARGEST = 4096
"""Side in pixels of the largest images that an encoder may see."""
LONGEST = 50_000_000
"""Bytes of a configuration, or of an index of weights, at most."""
BOUNDS = (("depth|layer|block|repeat|stage", 200), ("image_size|img_size|input_size", LARGEST), ("window", 128))
"""How large the numbers of a configuration may be, by what their names contain."""
SPARE = 2**24
"""Weights that an encoder may have beyond those of its files, such as positions for a larger input."""


@dataclass(frozen=True)
class Request:
    """A backbone as it is asked for: its address, what it stands for, its input size in pixels, and what is allowed.

    ``projection`` says whether the features of a CLIP model are those after its projection, where it has one; ``hub``
    is the repository and file of weights that have no name of their own, ``key`` the part of the file that is meant,
    and ``row`` the paper's checkpoint where it is one.
    """

    address: str
    kind: str
    name: str
    file: str = ""
    size: int | None = None
    projection: bool | None = None
    allow_pickle: bool = False
    hub: tuple[str, str] | None = None
    key: str = ""
    row: PaperCheckpoint | None = None


@dataclass(frozen=True)
class State:
    """Tensors that must fit the module exactly, and the keys of what was left out on purpose."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """What a loader finds: the architecture, how to get preprocessing and weights for its module, and their origin.

    ``origin`` tells the file, or the hub's repository, and the SHA-256 of its content, which it reads when it is asked;
    it is empty for the lab's.
    """

    architecture: dict[str, Any]
    preprocessing: Callable[[nn.Module], Preprocessing]
    state: Callable[[nn.Module], State | None]
    origin: Callable[[], dict[str, str]]

    def __post_init__(self) -> None:
        """Raise where the architecture does not tell the input size in pixels, which plans and views need."""
        if not isinstance(self.architecture["options"].get("size"), int):
            raise ValueError(
                f"the options of an architecture of '{self.architecture['family']}' have no size in pixels"
            )


Outline = tuple[dict[str, Any], Callable[[nn.Module], Preprocessing]]
"""An architecture, and how its module sees images."""
Texts = tuple[Float[Tensor, "captions width"], float]
"""Text features of unit length, and the scale of similarities (1 / temperature)."""


@dataclass(frozen=True)
class Family:
    """How one kind of address is loaded, and the ``packages`` whose code its modules are.

    ``identify`` returns what tells its weights from others, for a fingerprint, without loading them; ``missing`` what
    would have to be downloaded (repository and files), without asking the network. ``classifier`` makes the library's
    own classifier of a fine-tuned file, for an encoder's options and a number of outputs, or None where the file holds
    none that the library knows; a family whose library has no classifiers has no such function.
    ``build`` makes a module of the options of an architecture. ``outline`` returns the architecture and the view
    of a family that needs no file for them, and ``cost`` that of loading, in forward passes. Where ``reads_words``, the
    text tower takes the words of the lab's captions and no sentences.
    """

    packages: tuple[str, ...]
    load: Callable[[Request], Loaded]
    build: Callable[[dict[str, Any]], nn.Module]
    identify: Callable[[Request], dict[str, Any]]
    missing: Callable[[Request], str]
    has_text: Callable[[Request], bool] = lambda _: False
    identify_text: Callable[[Request], str] = lambda _: ""
    texts: Callable[[Request, Sequence[str]], Texts] | None = None
    classifier: Callable[[Request, Mapping[str, Any], int], nn.Module | None] | None = None
    outline: Callable[[Request], Outline] | None = None
    cost: Callable[[Request], float] = lambda _: 10.0
    reads_words: bool = False


def read_object(path: Path) -> dict[str, Any]:
    """Read a configuration; one that is too long, or no JSON object that others can read too, is an error."""
    with disk_errors(path):
        if path.stat().st_size > LONGEST:
            raise TaskvecError(f"'{path}' is too long for a configuration", "copy it again")
        about = read_json(path)
    if not isinstance(about, dict):
        raise TaskvecError(f"'{path}' holds a {type(about).__name__}, not an object", "copy it again")
    try:
        json.dumps(about, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise TaskvecError(f"'{path}' holds what no other program may read: {error}", "copy it again") from None
    return about


def check_bounds(about: Any, source: str, key: str = "") -> None:
    """Raise where a configuration asks for more layers or pixels than any encoder has: making it would take minutes."""
    if isinstance(about, dict):
        for name, value in about.items():
            check_bounds(value, source, str(name))
    elif isinstance(about, list | tuple):
        for value in about:
            check_bounds(value, source, key)
    elif isinstance(about, int | float):
        most = next((most for names, most in BOUNDS if re.search(names, key)), math.inf)
        if abs(about) > most:
            raise TaskvecError(f"{source}: {key} is {str(about)[:20]}, and at most {most} is possible", "copy it again")


def check_affordable(make: Callable[[], nn.Module], files: Sequence[Path], source: str) -> None:
    """Raise where a configuration asks for more weights than its files can hold, before memory is taken for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = make()
    check_parameters(module, files, source)


def check_parameters(module: nn.Module, files: Sequence[Path], source: str) -> None:
    """Raise where a module, which may be without values, has more weights than its files can hold."""
    wanted = sum(value.numel() for value in module.parameters())
    size = sum(file.stat().st_size for file in files)
    if wanted > 2 * size + SPARE:
        raise TaskvecError(
            f"{source} asks for {wanted} weights, and its files have {size} bytes", "copy both from where they are from"
        )


def check_view(view: Preprocessing, source: str) -> Preprocessing:
    """Return a view that is one: a size in pixels, and three finite means and positive deviations, else it raises."""
    numbers = (*view.mean, *view.std)
    sound = all(isinstance(number, int | float) and abs(number) <= 1000 for number in numbers)
    if not sound or not len(view.mean) == len(view.std) == 3 or min(view.std) <= 0:
        said = f"mean {list(view.mean)} and std {list(view.std)}"
        raise TaskvecError(f"{source}: {said} are not three numbers each, with std above 0", "mend them there")
    if not 0 < view.crop <= 1 or not 0 < view.size <= LARGEST or str(view.interpolation) not in RESAMPLING:
        seen = f"{view.size} px, crop {view.crop}, {view.interpolation}"
        raise TaskvecError(f"{source}: no images can be seen at {seen}", f"known are {', '.join(sorted(RESAMPLING))}")
    return view


def no_projection(request: Request, because: str) -> None:
    """Raise where a projection is asked for that a model does not have."""
    if request.projection:
        raise TaskvecError(
            f"'{request.address}' has no projection: {because}", "leave out projection, or set it to false"
        )


def import_extra(module: str, package: str, name: str, address: str) -> ModuleType:
    """Import an optional library, or raise and name the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise TaskvecError(
            f"'{address}' needs {package}, which is not installed", f"pip install 'taskvec[{name}]'"
        ) from None


def origin_of(path: Any, repo: str = "") -> dict[str, str]:
    """Return where a weights file is from, and the SHA-256 of its content."""
    return {"from": f"{repo}/{path.name}" if repo else str(path), "sha256": file_digest(path)}
