"""Study files: YAML read into studies; unknown keys and bad YAML are errors that say where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from taskvec.errors import TaskvecError, did_you_mean, unknown
from taskvec.merging import plugins
from taskvec.settings import Finetune, Heatmap, Lora, Negation, Probe, Subsets, Surgery
from taskvec.study import BackboneChoice, MethodChoice, RegimeChoice, Study, StudyFile, TaskChoice, plugin_files


def packaged() -> dict[str, str]:
    """Return the packaged studies: name to text."""
    files = resources.files("taskvec.studies").iterdir()
    return {
        f.name.removesuffix(".yaml"): f.read_text("utf-8")
        for f in sorted(files, key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }


def open_study(name: str) -> StudyFile:
    """Read a study from a file, or a packaged one by name."""
    path = Path(name).expanduser()
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise TaskvecError(f"study file '{path}' is not UTF-8 text", "give a YAML file") from None
        folder = path.resolve().parent
        return StudyFile(parse_study(text, str(path), folder), text, folder)
    known = packaged()
    if name not in known:
        if path.suffix in (".yaml", ".yml") or "/" in name:
            raise TaskvecError(
                f"no study file at '{name}'", f"give a YAML file, or a packaged study: {', '.join(known)}"
            )
        raise unknown("study", name, known)
    return StudyFile(parse_study(known[name], name), known[name], Path.cwd())


def parse_study(text: str, source: str, folder: Path | None = None) -> Study:
    """Validate a study's YAML; errors name the line, the key and what would be right.

    Its plugins are run, so that their methods are known; relative paths start from ``folder``, or else from where one
    is.
    """
    try:
        data = yaml.safe_load(text)
        lines = dict(key_lines(yaml.compose(text, yaml.SafeLoader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise TaskvecError(
            f"{source}{where}: not valid YAML: {error.problem or error.context}", "mend that line"
        ) from None
    except yaml.YAMLError as error:
        raise TaskvecError(f"{source}: not valid YAML: {str(error).splitlines()[0]}", "mend the file") from None
    if not isinstance(data, dict):
        raise TaskvecError(f"{source}: a study is a mapping of keys to values", "see docs/study.md for an example")
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._") or "study")
    use_plugins(data.get("plugins"), folder or Path.cwd())
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise TaskvecError(*explain(error, lines, source)) from None


def use_plugins(names: Any, folder: Path) -> None:
    """Import the plugins that a study names; what is no list of names is left to its validation."""
    if names is None or (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        plugins.use(plugin_files(names or (), folder))


def key_lines(node: yaml.Node | None, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield every key path of a YAML document with its line (from 1); a key given twice is an error."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
            yield (*at, key.value), key.start_mark.line + 1
            yield from key_lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*at, index), item.start_mark.line + 1
            yield from key_lines(item, (*at, index))


def explain(error: ValidationError, lines: dict[tuple[Any, ...], int], source: str) -> tuple[str, str]:
    """Say in plain words what is wrong with a study, where, and how to mend it."""
    first = error.errors()[0]
    place = first["loc"]
    line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    where = source + (f", line {line}" if line else "")
    key = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'", did_you_mean(str(place[-1]), known_keys(place[:-1]))
    if first["type"] == "missing":
        return f"{where}: the key '{key}' is missing", "every study names its backbones and tasks"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list) else f" (given: {first['input']!r})"
    more = f" ({error.error_count() - 1} more errors)" if error.error_count() > 1 else ""
    about = f"'{key}': " if key else ""
    return f"{where}: {about}{message}{given}{more}", "see docs/study.md for every key and its values"


def known_keys(place: Sequence[Any]) -> list[str]:
    """Return the keys that may stand at a place of the study file."""
    inside: dict[str, type[BaseModel]] = {
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
    return list((inside[place[0]] if place else Study).model_fields)
