"""YAML within bounds: what a document holds, and the line of every key and list item; other YAML is refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from taskvec.core.errors import TaskvecError

MOST_VALUES, DEEPEST = 20_000, 20
"""How many keys and values a study has at most, with all aliases written out, and how deep they are nested."""
LONGEST_KEY, LONGEST_NUMBER, LONGEST_TEXT = 100, 40, 10_000
"""How many characters a key, a number and any other text has at most."""
Place = tuple[Any, ...]
SAID = {
    r"but found another document": "a study is one document, and a second one begins here",
    r"found undefined alias": "an alias (*) of something that has no anchor (&)",
    r"found unexpected end of stream": "a quotation mark that nothing closes",
    r".*'<stream end>'": "a bracket that nothing closes",
    r"expected <block end>.*|expected '<document start>'.*": "it is indented otherwise than the lines above",
    r"mapping values are not allowed here": "a second ': ' where one belongs; text that has one needs quotes",
    r"found character ('[^\\]'|\"'\") that cannot start any token": r"text that begins with \1 needs quotes",
}
"""Plainer words for what the YAML reader says."""
UNCLOSED = ("a quotation mark", "a bracket")
READ_AS = {
    "tag:yaml.org,2002:bool": "yes or no",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
}


@dataclass(frozen=True)
class Entry:
    """A key's or a list item's line (from 1; 0 is unknown) and its value."""

    line: int
    node: yaml.Node | None


NOWHERE = Entry(0, None)


class Loader(yaml.SafeLoader):
    """Mappings, lists, text, numbers, true and false: no tags, no dates, no times, no octal numbers.

    So 0:1:0.05, 007 and 2024-01-01 are text, as they are written.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a value, or raise where it has a tag or lies too deep."""
        event, self.depth = self.peek_event(), self.depth + 1
        if getattr(event, "tag", None) is not None:
            raise refused(event, f"the tag '{event.tag}' is not known here", "leave it out")
        if self.depth > DEEPEST:
            raise refused(event, f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):  # JSON writes some characters as pairs of surrogates
            node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return node


Loader.yaml_implicit_resolvers = {}
for tag, form, starts in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{form})$"), list(starts))


def read_yaml(text: str, source: str) -> tuple[Any, dict[Place, Entry]]:
    """Return what a YAML document holds, and every key and list item by its place."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        entries = bounded(node)
        return (None if node is None else loader.construct_document(node)), entries
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, ord(text[error.position])
        raise TaskvecError(f"{source}, line {line}: a character U+{code:04X} is no text", "leave it out") from None
    except yaml.MarkedYAMLError as error:
        said = plain(str(error.problem or error.context), SAID)
        first, last = error.context_mark, error.problem_mark
        mark = (first or last) if said.startswith(UNCLOSED) else (last or first)
        where = f", line {mark.line + 1}" if mark else ""
        if error.note:  # refused here
            raise TaskvecError(f"{source}{where}: {error.problem}", error.note) from None
        fix = "indent with spaces" if r"'\t'" in said else "mend that line"
        raise TaskvecError(f"{source}{where}: not valid YAML: {said}", fix) from None


def bounded(node: yaml.Node | None) -> dict[Place, Entry]:
    """Return every key and list item of a document by its place, or raise where they are too many."""
    entries: dict[Place, Entry] = {}
    for count, (place, entry) in enumerate(entries_of(node) if node else ()):
        if count == MOST_VALUES:
            raise refused(entry.node or node, f"more than {MOST_VALUES:,} values, with every alias written out")
        entries[place] = entry
    return entries


def entries_of(node: yaml.Node, at: Place = ()) -> Iterator[tuple[Place, Entry]]:
    """Yield every key and list item of a YAML document with its place, aliases written out."""
    if len(at) > DEEPEST:
        raise refused(node, f"nested more than {DEEPEST} deep")
    if isinstance(node, yaml.ScalarNode):
        check_scalar(node)
    for key, line, child in children_of(node):
        yield (*at, key), Entry(line + 1, child)
        yield from entries_of(child, (*at, key))


def children_of(node: yaml.Node) -> Iterator[tuple[str | int, int, yaml.Node]]:
    """Yield the keys or numbers of a value's items, with their lines (from 0) and values."""
    if isinstance(node, yaml.MappingNode):
        yield from pairs_of(node)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((index, item.start_mark.line, item) for index, item in enumerate(node.value))


def pairs_of(node: yaml.MappingNode) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield the keys of a mapping with their lines (from 0) and values; one that is given twice is an error."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag in READ_AS:
            kind = READ_AS.get(key.tag, "a list or a mapping")
            raise refused(key, f"a key is {kind}, where a word belongs", "give a word, in quotes if need be")
        check_scalar(key, LONGEST_KEY)
        if key.value in lines:
            first = lines[key.value] + 1
            raise refused(key, f"the key '{key.value}' is given twice, first on line {first}", "leave one of them out")
        lines[key.value] = key.start_mark.line
        yield key.value, key.start_mark.line, value


def check_scalar(node: yaml.ScalarNode, most: int = LONGEST_TEXT) -> None:
    """Raise for text and numbers that are too long, and for text with signs that no name or sentence has."""
    number = node.tag.endswith((":int", ":float"))
    if len(node.value) > (LONGEST_NUMBER if number else most):
        raise refused(node, f"a {'number' if number else 'text'} of {len(node.value):,} characters")
    for sign in node.value:
        if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t":
            raise refused(node, f"a character U+{ord(sign):04X} is no text", "leave it out")


def refused(at: Any, problem: str, fix: str = "write less") -> yaml.MarkedYAMLError:
    """Build the error for what is well-formed and not taken."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark, note=fix)


def plain(message: str, words: Mapping[str, str]) -> str:
    """Return a message of pydantic or of the YAML reader in plainer words, by patterns of what they say."""
    for theirs, ours in words.items():
        message = re.sub(theirs, ours, message)
    return message
