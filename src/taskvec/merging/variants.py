"""What a merge is in results: a method, and in what it differs from the plain merge by that method."""

from __future__ import annotations

from dataclasses import dataclass

from taskvec.merging.recipes import ADDITION


@dataclass(frozen=True, order=True)
class Variant:
    """A method of results in columns of their own.

    ``correction`` is "surgery" where features are corrected; ``statistics`` is "reestimated" where those of batch norm
    were estimated anew; ``scaling`` is "per-task" where each task has a lambda of its own. All are empty else.
    """

    method: str
    correction: str = ""
    statistics: str = ""
    scaling: str = ""

    @property
    def name(self) -> str:
        """Return its method with what differs, for messages."""
        return ", ".join((self.method, *self.differences.values()))

    @property
    def differences(self) -> dict[str, str]:
        """Return the columns in which it differs from the plain merge."""
        return {key: value for key, value in vars(self).items() if key != "method" and value}


DIFFERENCES = ("correction", "statistics", "scaling")
"""The columns of results, beside the method, that tell variants apart."""
ADDED = Variant(ADDITION)
"""The paper's task addition."""
PER_TASK = Variant(ADDITION, scaling="per-task")
"""Addition with one lambda a task."""
