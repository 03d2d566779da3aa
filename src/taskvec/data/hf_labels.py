"""Labels of a data set's tables as class numbers: what a number or a text in a label column means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from taskvec.core.errors import TaskvecError, and_more
from taskvec.data.hf_tables import Shard, class_names_of, label_text
from taskvec.data.index import Labels


def is_empty(label: Any) -> bool:
    """Return whether a label stands for none: None, NaN, an empty text, or -1."""
    return label is None or label in ("", -1) or label != label


def class_labels(
    splits: dict[str, list[Shard]], column: str
) -> tuple[dict[str, Labels], tuple[str, ...], tuple[str, ...]]:
    """Return the labels of each split, the class names, and notes.

    A number means the class that its own file names by it, a text means itself. Classes come in the order in which the
    training split declares them, then undeclared ones in the order of their values.
    """
    all_shards = [shard for shards in splits.values() for shard in shards]
    for split, shards in splits.items():
        check_labels([value for shard in shards for value in shard.values(column)], column, split)
    names, notes = meanings(all_shards, column)
    notes += contradictions(all_shards, column)
    labels_by_name = {
        split: [name for shard in shards for name in class_names(shard, names[shard.name], column)]
        for split, shards in splits.items()
    }
    declared = dict.fromkeys(name for shard in splits["train"] for name in names[shard.name] or ())
    undeclared = set(chain(*labels_by_name.values())).difference(declared)
    classes = (*declared, *sorted(undeclared, key=sort_key))
    numbers = {name: number for number, name in enumerate(classes)}
    labels: dict[str, Labels] = {
        split: np.array([numbers[name] for name in rows], np.int64) for split, rows in labels_by_name.items()
    }
    if "-1" in classes:
        notes += ("the label -1 is taken for a class: where it means that an image has no label, leave its row out",)
    return labels, classes, notes


def sort_key(name: str) -> tuple[bool, int, str]:
    """Return a key that sorts numbers by value, before texts."""
    number = is_number(name)
    return not number, int(name) if number else 0, name


def is_number(name: str) -> bool:
    """Return whether a class name is a whole number."""
    return bool(re.fullmatch(r"-?\d{1,18}", name))


def meanings(shards: list[Shard], column: str) -> tuple[dict[str, tuple[str, ...] | None], tuple[str, ...]]:
    """Return the class names by which the numbers of each shard are read, and notes.

    Numbers without names are classes of their own where no shard has names. Where all other shards share one list of
    names, it serves them too, with a note. Where others have several lists, or texts, what the numbers mean is unknown.
    """
    names = {shard.name: shard.names(column) for shard in shards}
    bare = [shard for shard in shards if names[shard.name] is None and are_numbers(shard.values(column))]
    others = [shard for shard in shards if shard not in bare]
    if not bare or not others:
        return names, ()
    lists = {names[shard.name] for shard in others}
    first = next(iter(lists))
    if len(lists) == 1 and first is not None:
        note = f"{bare[0].name} has numbers for labels and no class names: they are read by those of {others[0].name}"
        return names | {shard.name: first for shard in bare}, (note,)
    if all(is_number(label_text(value)) for shard in others for value in names[shard.name] or shard.values(column)):
        return names, ()
    raise TaskvecError(
        f"{bare[0].name} has numbers for labels and no class names, and {others[0].name} has others",
        "which number means which class cannot be known: write the names, or the texts, into every file",
    )


def contradictions(shards: list[Shard], column: str) -> tuple[str, ...]:
    """Return a note where files name their classes otherwise than the card beside them."""
    names = [(shard.name, class_names_of(shard.features).get(column), shard.declared) for shard in shards]
    differing = [shard for shard, classes, card in names if classes != class_names_of(card).get(column, classes)]
    if not differing:
        return ()
    what = "names its classes otherwise than is declared beside it, and is read by its own names"
    return (f"{differing[0]} {what}{and_more(differing)}",)


def are_numbers(labels: list[Any]) -> bool:
    """Return whether there are numbers among labels."""
    return any(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)


def class_names(shard: Shard, names: tuple[str, ...] | None, column: str) -> list[str]:
    """Return the class name of every row of a shard: that of its number in ``names``, or the value itself."""
    values = shard.values(column)
    if names is None or not are_numbers(values):
        return [label_text(value) for value in values]
    strange = next((value for value in values if not 0 <= value < len(names)), None)
    if strange is not None:
        raise TaskvecError(
            f"{shard.name} has the label {strange} in column '{column}', which is none of its {len(names)} classes",
            "every image needs a label: mend it, or leave the row out",
        )
    return [names[int(value)] for value in values]


def check_labels(labels: Sequence[Any], column: str, split: str) -> None:
    """Raise unless every row has one label: a text or a whole number."""
    for row, label in enumerate(labels):
        whole = isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())
        if not whole or label == "":
            what = "no label" if is_empty(label) else f"a {type(label).__name__} for a label"
            raise TaskvecError(
                f"row {row} of the {split} split has {what} in column '{column}'",
                "give every row one text or whole number, or leave it out",
            )
