"""What a study names: its tasks and backbones at their addresses, and which regimes they can take part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.notes import listen, note
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data import tasks
from taskvec.encoders import backbone as backbones
from taskvec.encoders.addresses import default_name, is_file
from taskvec.engine.store import Store
from taskvec.learning.regimes import REGIMES
from taskvec.study.names import name_problem, told_twins, twins
from taskvec.study.remote import UNKNOWN_CLASSES, UNKNOWN_IMAGES, absent_task, absent_weights, has_images
from taskvec.study.schema import BackboneChoice, StudyFile


class Sources:
    """The tasks and backbones of a study; an estimate reads no image and no weights, and lets the paper's be absent."""

    def __init__(self, file: StudyFile, store: Store, estimate: bool) -> None:
        """Find the tasks by name; two of one name raise."""
        self.study, self.folder, self.store, self.estimate = file.study, file.folder, store, estimate
        self.regimes = {regime.name: regime for regime in file.study.regimes}
        addresses = [tasks.resolve(t.address, self.folder, file.study.data) for t in file.study.tasks]
        given = [t.name or tasks.default_name(a) for t, a in zip(file.study.tasks, addresses, strict=True)]
        self.addresses = dict(
            zip(unique(given, [t.address for t in file.study.tasks], "tasks"), addresses, strict=True)
        )
        self.captions = {name: tasks.captions(address) for name, address in self.addresses.items()}
        self.brought = {name: task for name, task in zip(given, file.study.tasks, strict=True) if task.finetuned}
        self.sentences: dict[str, list[list[str]] | None] = {}

    def backbones(self) -> dict[str, BackboneChoice]:
        """Return the backbones by name; two of one name raise."""
        chosen = self.study.backbones
        names = [one.name or default_name(one.address) for one in chosen]
        return dict(zip(unique(names, [one.address for one in chosen], "backbones"), chosen, strict=True))

    def describe(self, address: str) -> dict[str, Any]:
        """Return what identifies a task's images; an estimate reads none, and those published may be absent."""
        if not self.estimate:
            with listen():  # the step that decodes it lists it again, and tells what is to be told
                return tasks.describe(address, self.store.tree_digest)
        known = absent_task(address)
        absent = {"absent": address, "images": sum(known.sizes) if known else UNKNOWN_IMAGES}
        if not has_images(address):
            return absent
        try:
            return tasks.describe(address, self.store.known_digest)
        except TaskvecError:
            if known is None:
                raise
            return absent

    def source(self, address: str, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a decoded task depends on, and the address, which counts only where it is all there is."""
        config = {"limit": self.study.limit, **about} | ({"skip_corrupt": True} if self.study.skip_corrupt else {})
        return (config, {"address": address}) if tasks.has_whole(address) else ({"address": address, **config}, {})

    def address_of(self, choice: BackboneChoice) -> str:
        """Return an address whose path is absolute: relative paths start from the study file's folder."""
        kind, colon, rest = choice.address.partition(":")
        name, at, file = rest.partition("@")
        if kind == "hf" and self.path(rest).exists():
            return f"{kind}:{self.path(rest)}"
        if at and is_file(file):
            return f"{kind}{colon}{name}{at}{self.path(file)}"
        return choice.address

    def path(self, path: str) -> Path:
        """Return a path, which is relative to the study file's folder."""
        return self.folder / Path(path).expanduser()

    def takes_part(self, choice: BackboneChoice, regime: str) -> bool:
        """Say whether a backbone is fine-tuned in a regime: the study does not leave it out, and it can be."""
        wanted = not choice.regimes or regime in choice.regimes
        return wanted and (not REGIMES[regime].opens or self._has_text(choice))

    def _has_text(self, choice: BackboneChoice) -> bool:
        if self.is_absent(choice):
            return choice.address.partition("-clip")[1] != ""
        return backbones.has_text(self.address_of(choice), self.study.allow_pickle, choice.projection)

    def is_absent(self, choice: BackboneChoice) -> bool:
        """Say whether an estimate has to do without a checkpoint of the paper, and with no library that reads it."""
        return self.estimate and bool(absent_weights(self.address_of(choice)))

    def captions_for(self, choice: BackboneChoice) -> Mapping[str, list[str] | list[list[str]] | None]:
        """Return the captions of every task's classes: in the words of the lab's text encoders, or in sentences."""
        if choice.address.startswith("lab:"):
            return self.captions
        if not self.sentences:
            self.sentences = {name: self._sentences(name, address) for name, address in self.addresses.items()}
        return self.sentences

    def _sentences(self, name: str, address: str) -> list[list[str]] | None:
        """Return the captions of a task's classes; an estimate makes do with their number where the data is absent."""
        if self.estimate and (known := absent_task(address)):
            return [[""]] * known.classes
        if self.estimate and not has_images(address):
            return [[""]] * UNKNOWN_CLASSES
        return tasks.sentences(address, name)

    def has_open(self, choice: BackboneChoice) -> bool:
        """Say whether a backbone takes part in a regime that starts from zero-shot heads."""
        return any(REGIMES[name].opens and self.takes_part(choice, name) for name in self.regimes)

    def mixed(self, names: Sequence[str]) -> bool:
        """Say whether some tasks are of another kind than classification, so that metrics differ."""
        return any(tasks.kind_of(self.addresses[name]) != CLASSIFICATION for name in names)

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
        for one in (one for one in self.study.backbones if not one.regimes or regime in one.regimes):
            name = one.name or default_name(one.address)
            if not self._has_text(one):
                note(f"regime '{regime}' leaves out backbone {name}, which has no text tower")
            elif lacking := ", ".join(task for task, found in self.captions_for(one).items() if not found):
                note(f"regime '{regime}' leaves out {lacking} for backbone {name}: their classes have no captions")

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
