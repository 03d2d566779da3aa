"""Plugins: Python files that a user names, which register merging methods; known by the digest of their source."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors
from taskvec.merging.registry import BUILT_IN, METHODS, Method, Recipe, register


@dataclass(frozen=True)
class Plugin:
    """A plugin that was imported: its file, the SHA-256 of its source, and the methods that it registers by name.

    ``neighbours`` are the modules that it imports from its own folder: no digest tells when they change.
    """

    path: Path
    digest: str
    methods: Mapping[str, Method]
    neighbours: Sequence[str]


_imported: dict[tuple[Path, str], Plugin] = {}


class _Source(importlib.abc.InspectLoader):
    """Loads a module from source that was read before: what runs is what the digest is of, and no cache is written."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = path, source

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source)

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.source, str(self.path), "exec", dont_inherit=True)
        return code


def use(paths: Iterable[Path]) -> list[Plugin]:
    """Make the methods of these plugins known, and those of all others unknown; a file named twice counts once."""
    _forget()
    try:
        return [_use(path) for path in dict.fromkeys(_file(path) for path in paths)]
    except TaskvecError:
        _forget()
        raise


def _forget() -> None:
    for name, method in [pair for plugin in _imported.values() for pair in plugin.methods.items()]:
        if METHODS.get(name) is method:
            del METHODS[name]


def _file(path: Path) -> Path:
    with disk_errors(path):
        if path.is_file():
            return path.resolve()
    fix = "name a Python file; in a study, relative paths start from the study file's folder"
    raise TaskvecError(f"no plugin file at '{path}'", fix)


def _use(path: Path) -> Plugin:
    with disk_errors(path):
        source = path.read_bytes()
    digest, before = hashlib.sha256(source).hexdigest(), dict(METHODS)
    known = _imported.get((path, digest))
    try:
        if known is None:
            _run(path, source, f"taskvec_plugin_{digest[:16]}")
        for method in known.methods.values() if known else ():
            register(method)
        if any(METHODS.get(name) is not method for name, method in before.items()):
            raise ValueError("it replaces a method that is registered already")
    except (Exception, SystemExit) as error:
        METHODS.clear()
        METHODS.update(before)
        raise TaskvecError(_told(path, error), "mend the file (docs/methods.md shows a whole one)") from None
    methods = {name: method for name, method in METHODS.items() if name not in before}
    return _imported.setdefault((path, digest), Plugin(path, digest, methods, _neighbours(path, source)))


def _run(path: Path, source: bytes, name: str) -> None:
    loader = _Source(path, source)
    spec = importlib.util.spec_from_loader(name, loader, origin=str(path))
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _told(path: Path, error: BaseException) -> str:
    """Say in which line of a plugin what went wrong."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else [None, *lines][-1]
    where = f", line {line}" if line else ""
    said = str(error.msg if isinstance(error, SyntaxError) else error).splitlines() or [""]
    return f"plugin '{path}'{where}: {type(error).__name__}: {said[0]}".removesuffix(": ")


def _neighbours(path: Path, source: bytes) -> list[str]:
    """List the modules and packages in a file's own folder that it imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    neighbours = []
    for name in sorted({name.partition(".")[0] for name in names}):
        with contextlib.suppress(ImportError, ValueError):  # one that may be absent, or was made by a program
            spec = importlib.util.find_spec(name)
            places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
            neighbours += [name for place in places if Path(place).resolve().parent == path.parent]
    return neighbours


def sources(recipe: Recipe, plugins: Iterable[Plugin]) -> dict[str, str]:
    """Return the digest of the source of every method of a recipe that is none of the package's.

    A method that no plugin registers raises: nothing would tell when its body changes.
    """
    digests = {id(method): plugin.digest for plugin in plugins for method in plugin.methods.values()}
    others = [method for method, _ in recipe.stages if BUILT_IN.get(method.name) is not method]
    for method in others:
        if id(method) not in digests:
            raise TaskvecError(
                f"method '{method.name}' was registered by a program: a study could not tell when it changes, and its "
                "worker processes do not know it",
                "put it into a file of its own and name that in the study: plugins: [FILE.py] (docs/methods.md)",
            )
    return {method.name: digests[id(method)] for method in others}


def check_same(recipe: Recipe, plugins: Iterable[Plugin], known: Mapping[str, str]) -> None:
    """Raise if the source of a recipe's methods is not what it was when the run was planned."""
    if (digests := sources(recipe, plugins)) != known:
        changed = ", ".join(sorted(name for name in {*digests, *known} if digests.get(name) != known.get(name)))
        raise TaskvecError(f"the plugin of '{changed}' has changed since the run began", "run again")
