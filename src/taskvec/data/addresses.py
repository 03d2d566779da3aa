"""Types of what a task's address says: the record of its kind of source, and the address itself.

A new kind is a module with a ``Source`` of its own, and a line in ``data.sources``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.index import Listing
from taskvec.paper.tasks import PaperTask
from taskvec.weights import hub


def last_part(rest: str) -> str:
    """Return the last part of a name, without what follows the @."""
    return rest.partition("@")[0].rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A kind of source of tasks; its functions take what follows the kind in an address.

    ``read`` lists images and labels by split, ``forms`` has a line for each form of address, and ``resolve`` returns
    the same address wherever it is read: it takes the folder at which relative paths begin, and that of published data
    sets. ``name`` is the name of a task that is given none. ``identify`` returns what tells a task's images from
    others, where that is not the content of files; ``dataset`` the data set of the Hub that is meant, None for what is
    on disk; ``folder`` the folder that is read whole. ``captions`` returns a caption for each class in the words of the
    lab's text encoders, None for a task without, and ``paper`` what is known of a task without its data. ``counts`` are
    the images by split of a source that draws them. Training crops are cut from whole images where the source
    ``has_whole`` ones. With ``class_folders`` labels come from the names of folders.
    """

    read: Callable[[str], Listing]
    forms: Callable[[], Mapping[str, str]]
    resolve: Callable[[str, Path, str | None], str] = lambda rest, start, data: rest
    name: Callable[[str], str] = last_part
    identify: Callable[[str], dict[str, Any]] | None = None
    dataset: Callable[[str], str | None] = lambda _: None
    folder: Callable[[str], Path | None] = lambda _: None
    captions: Callable[[str], list[str] | None] | None = None
    task_type: Callable[[str], str] = lambda _: CLASSIFICATION
    paper: Callable[[str], PaperTask | None] = lambda _: None
    counts: Mapping[str, int] | None = None
    has_whole: bool = True
    class_folders: bool = False


@dataclass(frozen=True)
class TaskAddress:
    """An address of a task that was read: its kind of source, and what follows the kind."""

    kind: str
    rest: str
    source: Source = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Return the address as it is written."""
        return f"{self.kind}:{self.rest}"

    @property
    def default_name(self) -> str:
        """Return the name a task gets when none is given: the folder's, the data set's or the lab task's."""
        return self.source.name(self.rest)

    @property
    def dataset(self) -> str | None:
        """Return the data set of the Hub that is meant, None where the task is on disk or drawn."""
        with readable(self):
            return self.source.dataset(self.rest)

    @property
    def paper(self) -> PaperTask | None:
        """Return what is known of a task of the paper without looking at it, None for other tasks."""
        return self.source.paper(self.rest)

    @property
    def is_here(self) -> bool:
        """Say whether the images can be on this machine: in a folder, or in the cache of the Hub's data sets."""
        dataset = self.dataset
        return dataset is None or hub.has_dataset(dataset.partition("@")[0])


@contextlib.contextmanager
def readable(address: TaskAddress) -> Iterator[None]:
    """Turn what the system refuses about a task's files into a message that names the task and the place."""
    try:
        yield
    except OSError as error:
        place = error.filename or address
        raise TaskvecError(
            f"task '{address}' cannot be read at '{place}': {error.strerror or error}", "mend its permissions or path"
        ) from None
