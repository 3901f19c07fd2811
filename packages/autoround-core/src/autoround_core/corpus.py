"""An offline corpus that every machine already has: the documentation of Python's standard library.

Calibration needs a few hundred thousand tokens of ordinary text, and a machine without a network
should not have to look for them. The sources of the running Python hold almost two million
characters of documentation strings: prose with examples of code in between. Each goes with the
`def` or `class` line that it describes, and one module makes one document. Whole sources would give
five times as much, but nearly all of it code.

The split into calibration and evaluation text is by a hash of the module's name: the parts are
disjoint, and no module changes sides when another comes or goes. The text itself is that of the
running Python, so another version gives another set.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from autoround_core.errors import unknown_name

PARTS = ("calibration", "evaluation")
_EVALUATION_SHARE = 8  # one module in eight

# tests, bundled programs and tables document little; installed packages are not the library
_SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "__pycache__")
    + ("site-packages", "dist-packages")
)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_documents(part: Literal["calibration", "evaluation"]) -> Iterator[str]:
    """Yield the documents of one part, one module at a time, in an order that mixes the packages.

    Nothing is read before it is asked for. Raises UnknownNameError for another part.
    """
    if part not in PARTS:
        raise unknown_name("part of the corpus `stdlib`", part, PARTS)
    return _documents(part)


def stdlib_modules() -> Iterator[tuple[str, Path]]:
    """Each module of the standard library as (dotted name, file), in no particular order."""
    root = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts), path


def part_of(module: str) -> str:
    """The part that a module, such as "json.decoder", belongs to."""
    in_evaluation = hashlib.sha256(module.encode()).digest()[-1] % _EVALUATION_SHARE == 0
    return "evaluation" if in_evaluation else "calibration"


def _documents(part: str) -> Iterator[str]:
    modules = [(name, path) for name, path in stdlib_modules() if part_of(name) == part]
    for _, path in sorted(modules, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if document := _document(path):
            yield document


def _document(path: Path) -> str:
    """The documentation strings of one source file in source order; empty when it has none."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old escape in a stranger's file is not our concern
            tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    lines = source.split("\n")  # as `ast` counts them; splitlines() also breaks at form feeds
    return "\n\n".join(filter(None, (_entry(node, lines) for node in _definitions(tree))))


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """A module and each class and function in it, in source order."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # no expression holds a definition
            yield from _definitions(child)


def _entry(node: _Documented, lines: list[str]) -> str:
    """One documentation string under the line that it belongs to; empty when there is none."""
    text = ast.get_docstring(node)
    if not text or isinstance(node, ast.Module):
        return text or ""
    end = max(node.body[0].lineno - 1, node.lineno)  # a `def` may run over several lines
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : end])) + "\n" + text
