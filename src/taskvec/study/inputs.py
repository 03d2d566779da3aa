"""What a study names: its tasks and backbones at their addresses, and which regimes they can take part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.notes import listen, note
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data import sources, tasks
from taskvec.data.addresses import TaskAddress
from taskvec.encoders import identity
from taskvec.encoders.addresses import BackboneAddress, parse
from taskvec.engine.store import Store
from taskvec.learning.regimes import REGIMES
from taskvec.paper.checkpoints import PAPER
from taskvec.study.names import name_problem, told_twins, twins
from taskvec.study.schema import BackboneChoice, StudyFile

UNKNOWN_IMAGES = 10_000
"""Images that a data set of the Hub is taken to have until it is here."""
UNKNOWN_CLASSES = 20
"""Classes of a task that does not tell, which only the time of linear heads depends on."""


class StudyInputs:
    """The tasks and backbones of a study; an estimate reads no image and no weights, and lets the paper's be absent."""

    def __init__(self, file: StudyFile, store: Store, estimate: bool) -> None:
        """Find the tasks by name; two of one name raise."""
        self.study, self.folder, self.store, self.estimate = file.study, file.folder, store, estimate
        self.regimes = {regime.name: regime for regime in file.study.regimes}
        addresses = [sources.parse(t.address, self.folder, file.study.data) for t in file.study.tasks]
        given = [t.name or a.default_name for t, a in zip(file.study.tasks, addresses, strict=True)]
        self.addresses = dict(
            zip(unique(given, [t.address for t in file.study.tasks], "tasks"), addresses, strict=True)
        )
        self.captions = {name: tasks.captions(address) for name, address in self.addresses.items()}
        self.brought = {name: task for name, task in zip(given, file.study.tasks, strict=True) if task.finetuned}
        self.backbone_addresses = {b.address: parse(b.address, self.folder) for b in file.study.backbones}
        self.sentences: dict[str, list[list[str]] | None] = {}

    def backbones(self) -> dict[str, BackboneChoice]:
        """Return the backbones by name; two of one name raise."""
        choices = self.study.backbones
        names = [choice.called for choice in choices]
        return dict(zip(unique(names, [choice.address for choice in choices], "backbones"), choices, strict=True))

    def describe(self, address: TaskAddress) -> dict[str, Any]:
        """Return what identifies a task's images; an estimate reads none, and those published may be absent."""
        if not self.estimate:
            with listen():  # the step that decodes it lists it again, and tells what is to be told
                return tasks.describe(address, self.store.tree_digest)
        known = address.paper
        absent = {"absent": str(address), "images": sum(known.sizes) if known else UNKNOWN_IMAGES}
        if not address.is_here:
            return absent
        try:
            return tasks.describe(address, self.store.known_digest)
        except TaskvecError:
            if known is None:
                raise
            return absent

    def address_of(self, choice: BackboneChoice) -> BackboneAddress:
        """Return an address whose path is absolute: relative paths start from the study file's folder."""
        return self.backbone_addresses[choice.address]

    def path(self, path: str) -> Path:
        """Return a path, which is relative to the study file's folder."""
        return self.folder / Path(path).expanduser()

    def takes_part(self, choice: BackboneChoice, regime: str) -> bool:
        """Say whether a backbone is fine-tuned in a regime: the study does not leave it out, and it can be."""
        wanted = not choice.regimes or regime in choice.regimes
        return wanted and (not REGIMES[regime].opens or self._has_text(choice))

    def _has_text(self, choice: BackboneChoice) -> bool:
        if self.is_absent(choice):
            return PAPER[self.address_of(choice).name].has_text
        return identity.has_text(self.address_of(choice), self.study.allow_pickle, choice.projection)

    def is_absent(self, choice: BackboneChoice) -> bool:
        """Say whether an estimate has to do without a checkpoint of the paper, and with no library that reads it."""
        return self.estimate and bool(self.address_of(choice).absent)

    def captions_for(self, choice: BackboneChoice) -> Mapping[str, list[str] | list[list[str]] | None]:
        """Return the captions of every task's classes: in the words of the lab's text encoders, or in sentences."""
        if identity.reads_words(self.address_of(choice)):
            return self.captions
        if not self.sentences:
            self.sentences = {name: self._sentences(name, address) for name, address in self.addresses.items()}
        return self.sentences

    def _sentences(self, name: str, address: TaskAddress) -> list[list[str]] | None:
        """Return the captions of a task's classes; an estimate makes do with their number where the data is absent."""
        if self.estimate and address.paper:
            return [[""]] * address.paper.classes
        if self.estimate and not address.is_here:
            return [[""]] * UNKNOWN_CLASSES
        return tasks.sentences(address, name)

    def has_open(self, choice: BackboneChoice) -> bool:
        """Say whether a backbone takes part in a regime that starts from zero-shot heads."""
        return any(REGIMES[name].opens and self.takes_part(choice, name) for name in self.regimes)

    def mixed(self, names: Sequence[str]) -> bool:
        """Say whether some tasks are of another kind than classification, so that metrics differ."""
        return any(a.source.task_type(a.rest) != CLASSIFICATION for a in map(self.addresses.__getitem__, names))

    def check_open(self) -> None:
        """Raise if a regime that starts from zero-shot heads can have none."""
        for name in (name for name in self.regimes if REGIMES[name].opens):
            if not any(self.takes_part(choice, name) for choice in self.study.backbones):
                raise TaskvecError(
                    f"regime '{name}' needs a backbone with a text tower that takes part in it, and there is none",
                    "add one (lab:contrastive), or leave the regime out",
                )
            able = (choice for choice in self.study.backbones if self.takes_part(choice, name))
            if not any(any(self.captions_for(choice).values()) for choice in able):
                raise TaskvecError(
                    f"regime '{name}' needs tasks whose classes have captions, and there is none",
                    "add one (lab:greek), or leave the regime out",
                )
            self._note_left_out(name)

    def _note_left_out(self, regime: str) -> None:
        """Note which backbones and tasks a regime that starts from zero-shot heads does without."""
        for choice in (choice for choice in self.study.backbones if not choice.regimes or regime in choice.regimes):
            if not self._has_text(choice):
                note(f"regime '{regime}' leaves out backbone {choice.called}, which has no text tower")
            elif lacking := ", ".join(task for task, captions in self.captions_for(choice).items() if not captions):
                note(
                    f"regime '{regime}' leaves out {lacking} for backbone {choice.called}: their classes have no "
                    "captions"
                )

    def check_negation(self) -> None:
        """Raise if negation names a task that the study does not have."""
        asked = self.study.negation
        for name in (asked.forget, asked.control) if asked else ():
            if name not in self.addresses:
                raise unknown("task of negation", name, self.addresses)


def unique(names: Sequence[str], addresses: Sequence[str], kind: str) -> Sequence[str]:
    """Return the names, or raise when two are the same or one cannot be a name."""
    for name, address in zip(names, addresses, strict=True):
        if problem := name_problem(name) or ("" if name else "is empty"):
            raise TaskvecError(
                f"'{address}' is one of the {kind}, and its name '{name}' {problem}",
                f"give it another name: {{address: '{address}', name: ...}}",
            )
    for pair in twins(names):
        same = [address for name, address in zip(names, addresses, strict=True) if name in pair]
        raise TaskvecError(
            f"of the {kind}, {told_twins(*pair)}: {', '.join(same)}",
            f"give each a name of its own: {{address: '{same[1]}', name: {pair[1]}-2}}",
        )
    return names
