"""What is asked of a loader, and what it finds: an architecture, its preprocessing, and the weights for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from taskvec.errors import TaskvecError
from taskvec.images import Preprocessing
from taskvec.store import file_digest


@dataclass(frozen=True)
class Request:
    """A backbone as it is asked for: its address, what it stands for, its input size in pixels, and what is allowed.

    ``projection`` says whether the features of a CLIP model are those after its projection, where it has one; ``hub``
    is the repository and file of weights that have no name of their own, ``key`` the part of the file that is meant.
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


Texts = tuple[Float[Tensor, "captions width"], float]
"""Text features of unit length, and the scale of similarities (1 / temperature)."""


@dataclass(frozen=True)
class Family:
    """How one kind of address is loaded.

    ``identify`` returns what tells its weights from others, for a fingerprint, without loading them; ``missing`` what
    would have to be downloaded (repository and files), without asking the network.
    """

    load: Callable[[Request], Loaded]
    identify: Callable[[Request], dict[str, Any]]
    missing: Callable[[Request], str]
    has_text: Callable[[Request], bool] = lambda _: False
    identify_text: Callable[[Request], str] = lambda _: ""
    texts: Callable[[Request, Sequence[str]], Texts] | None = None


def no_projection(request: Request, because: str) -> None:
    """Raise where a projection is asked for that a model does not have."""
    if request.projection:
        raise TaskvecError(
            f"'{request.address}' has no projection: {because}", "leave out projection, or set it to false"
        )


def extra(module: str, package: str, name: str, address: str) -> ModuleType:
    """Import an optional library, or raise and name the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise TaskvecError(
            f"'{address}' needs {package}, which is not installed", f"pip install 'taskvec[{name}]'"
        ) from None


def library(package: str) -> str:
    """Return name and version of the package that makes a module: another version may make another one."""
    return f"{package} {metadata.version(package)}"


def origin_of(path: Any, repo: str = "") -> dict[str, str]:
    """Return where a weights file is from, and the SHA-256 of its content."""
    return {"from": f"{repo}/{path.name}" if repo else str(path), "sha256": file_digest(path)}
