"""Study files: read into studies; every mistake is told with its line and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from taskvec.core.errors import TaskvecError, did_you_mean, near, unknown
from taskvec.core.files import disk_errors
from taskvec.core.settings import Finetune, Heatmap, Lora, Negation, Probe, Subsets, Surgery
from taskvec.merging import plugins
from taskvec.study.names import LONGEST_NAME, name_problem
from taskvec.study.schema import (
    BackboneChoice,
    Choice,
    MethodChoice,
    RegimeChoice,
    Study,
    StudyFile,
    TaskChoice,
    plugin_files,
)
from taskvec.study.yaml_reader import LONGEST_KEY, NOWHERE, READ_AS, Entry, Place, plain, read_yaml

MOST_BYTES = 100_000
"""A study file is a few kilobytes; a larger one is something else."""
SHOWN = 10
"""How many mistakes of one file are told at once."""
KEYS_AND_VALUES = "docs/study.md has every key and its values"
NEEDED = "every study names its backbones and tasks"
SHOWN_AS = {"None": "nothing", "True": "true", "False": "false"}
OPTIONS = ("out", "smoke", "store", "workers")
"""What belongs to the command taskvec run, not into a study."""
WORDS = {
    r"Input should be a valid tuple": "should be a list",
    r"Input should be a valid (dictionary|mapping)( or .*)?": "should be a mapping",
    r"Input should be a valid string": "should be text",
    r"Input should be a valid integer.*": "should be a whole number",
    r"Input should be a valid number.*": "should be a number",
    r"Input should be a valid boolean.*": "should be true or false",
    r"Input should be": "should be",
    r"String should have at least 1 character": "should have some text",
    r"String should match pattern '\^\(auto.*": "should be auto, cpu, cuda, cuda:N or mps",
    r"String should match pattern.*": "should have letters a to z, digits, . _ and - only, the first no sign",
    r"\w+ should have at (most|least) (\d+) items? after validation, not (\d+)": r"has \3, at \1 \2 belong here",
}


INSIDE: dict[str, type[BaseModel]] = {
    "backbones": BackboneChoice,
    "tasks": TaskChoice,
    "regimes": RegimeChoice,
    "methods": MethodChoice,
    "heatmap": Heatmap,
    "subsets": Subsets,
    "surgery": Surgery,
    "probe": Probe,
    "finetune": Finetune,
    "lora": Lora,
    "negation": Negation,
}
"""What may stand under a key of a study."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a study: the line (0 where there is none), what it is, and how to mend it."""

    line: int
    problem: str
    fix: str = ""

    @property
    def short(self) -> bool:
        """Say whether its fix is no list of everything that is known."""
        return bool(self.fix) and not self.fix.startswith("known: ")


def packaged() -> dict[str, str]:
    """Return the packaged studies: name to text."""
    files = resources.files("taskvec.study.packaged").iterdir()
    return {
        f.name.removesuffix(".yaml"): f.read_text("utf-8")
        for f in sorted(files, key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }


def open_study(name: str) -> StudyFile:
    """Read a study from a file, or a packaged one by name."""
    path, known = Path(name).expanduser(), packaged()
    with disk_errors(path):
        there = "\0" not in name and path.exists()
    if there and (path.is_file() or name not in known):
        text, folder = read_text(path), path.resolve().parent
        return StudyFile(parse_study(text, str(path), folder), text, folder)
    if name not in known:
        if path.suffix in (".yaml", ".yml") or "/" in name:
            raise TaskvecError(
                f"no study file at '{name}'", f"give a YAML file, or a packaged study: {', '.join(known)}"
            )
        raise unknown("study", name, known)
    return StudyFile(parse_study(known[name], name), known[name], Path.cwd())


def read_text(path: Path) -> str:
    """Return the text of a study file, or raise: it is a file of UTF-8 text, and not large."""
    if not path.is_file():
        raise TaskvecError(f"'{path}' is {'a folder' if path.is_dir() else 'no regular file'}", "give a YAML file")
    with disk_errors(path), path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise TaskvecError(f"'{path}' has more than {MOST_BYTES:,} bytes, too many for a study", "give a YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = "UTF-16, not UTF-8 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        raise TaskvecError(f"study file '{path}', line {line}, is {kind}", "give a YAML file saved as UTF-8") from None


def parse_study(text: str, source: str, folder: Path | None = None) -> Study:
    """Validate a study's YAML; errors name the lines, the keys and what would be right.

    Its plugins are run, so that their methods are known; relative paths start from ``folder``, or else from where one
    is.
    """
    data, entries = read_yaml(text, source)
    if not isinstance(data, dict):
        raise TaskvecError(f"{source}: a study is a mapping of keys to values", "see docs/study.md for an example")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem)[:LONGEST_NAME].strip("-._")
    data.setdefault("name", "study" if not stem or name_problem(stem) else stem)
    use_plugins(data.get("plugins"), folder or Path.cwd())
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise TaskvecError(*explain(error, entries, source)) from None


def use_plugins(names: Any, folder: Path) -> None:
    """Import the plugins that a study names; what is no list of names is left to its validation."""
    if names is None or (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        plugins.use(plugin_files(names or (), folder))


# ---------------------------------------------------------------- mistakes


def explain(error: ValidationError, entries: dict[Place, Entry], source: str) -> tuple[str, str]:
    """Say in plain words what is wrong with a study, each mistake with its line, and how to mend it."""
    every = sorted(mistakes(error, entries), key=lambda mistake: mistake.line)
    if len(every) == 1:
        [first] = every
        return f"{source}{f', line {first.line}' if first.line else ''}: {first.problem}", first.fix or KEYS_AND_VALUES
    lines = [
        (f"line {m.line}: " if m.line else "") + m.problem + (f"; {m.fix}" if m.short else "") for m in every[:SHOWN]
    ]
    lines += [f"and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return "\n  ".join((f"{source} has {len(every)} mistakes:", *lines)), KEYS_AND_VALUES


def mistakes(error: ValidationError, entries: dict[Place, Entry]) -> list[Mistake]:
    """List what is wrong, but for what only follows from another mistake."""
    details = error.errors(include_url=False)
    return list(
        dict.fromkeys(m for error in details if not follows(error, details) for m in mistakes_of(error, entries))
    )


def follows(error: ErrorDetails, every: Sequence[ErrorDetails]) -> bool:
    """Say whether a key is missing because another is misspelt, or a list is short because its items are wrong."""
    place = error["loc"]
    if error["type"] == "too_short":
        return any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in every)
    extra = [other["loc"] for other in every if other["type"] == "extra_forbidden"]
    return error["type"] == "missing" and any(
        other[:-1] == place[:-1] and near(str(other[-1]), [str(place[-1])]) for other in extra
    )


def mistakes_of(error: ErrorDetails, entries: dict[Place, Entry]) -> Iterator[Mistake]:
    """Yield the mistakes that one error of validation tells: a validator of a whole study joins several by lines.

    Those begin with the study's key that they are about, if they are about one.
    """
    place: Place = ()
    for part in error["loc"]:  # pydantic names the branches of a choice as well
        place += (part,) if (*place, part) in entries else ()
    entry = entries.get(place, NOWHERE)
    key = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        yield Mistake(entry.line, f"unknown key '{key}'", where_it_belongs(place))
    elif error["type"] == "missing":
        key = ".".join(map(str, (*place, error["loc"][-1])))
        yield Mistake(entry.line, f"the key '{key}' is missing", "" if place else NEEDED)
    elif isinstance(entry.node, yaml.ScalarNode) and wants_text(error, place) and entry.node.tag in READ_AS:
        raw = entry.node.value
        fix = f'put it in quotes: "{raw}"' if raw.strip("~") else "write some, or leave it out"
        problem = f"'{key}': YAML reads {raw or 'an empty place'} as {READ_AS[entry.node.tag]}, where text belongs"
        yield Mistake(entry.line, problem, fix)
    else:
        for message in error["msg"].removeprefix("Value error, ").split("\n"):
            line = entry.line or entries.get((message.partition(" ")[0],), NOWHERE).line
            problem = plain(message, WORDS) + given(error["input"], message)
            yield Mistake(line, f"'{key}': {problem}" if key else problem, in_brackets(error, entry))


def wants_text(error: ErrorDetails, place: Place) -> bool:
    """Say whether text belongs at a place, for which an item of a list of choices may stand."""
    return error["type"] == "string_type" or (error["type"].startswith("model_") and isinstance(place[-1], int))


def in_brackets(error: ErrorDetails, entry: Entry) -> str:
    """Say how to write a list of one value; empty for any other mistake."""
    alone = error["type"] == "tuple_type" and isinstance(entry.node, yaml.ScalarNode) and error["input"] is not None
    return f"put it in brackets: [{entry.node.value}]" if alone and entry.node else ""


def where_it_belongs(place: Place) -> str:
    """Say where a key belongs that is known elsewhere, or which keys are near it here."""
    key = str(place[-1])
    if len(place) == 1 and key in OPTIONS:
        return f"it is an option of the command: --{key}"
    sections = {name: kind.model_fields for name, kind in INSIDE.items() if not issubclass(kind, Choice)}
    homes = [name for name, keys in sections.items() if len(place) == 1 and key in keys]
    if homes:
        return f"it belongs in {' or '.join(homes)}"
    known = known_keys(place[:-1])
    if place[0] == "methods" and not near(key, known):
        return f"hyperparameters belong in config: {{{key}: ...}}"
    return did_you_mean(key, known)


def given(value: Any, message: str) -> str:
    """Repeat what was given, where it is short enough to be looked at and the message does not."""
    if isinstance(value, dict | list | tuple) or f"'{value}'" in message:
        return ""
    text = SHOWN_AS.get(repr(value), repr(value))
    return f" (given: {text if len(text) <= LONGEST_KEY else text[:LONGEST_KEY] + '...'})"


def known_keys(place: Sequence[Any]) -> list[str]:
    """Return the keys that may stand at a place of the study file."""
    return list((INSIDE[place[0]] if place else Study).model_fields)
