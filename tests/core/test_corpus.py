"""The offline corpus: complete, disjoint, lazy, the same twice."""

from __future__ import annotations

import ast
import inspect
import itertools
import json.decoder
import queue
import sys
import sysconfig
import textwrap

import pytest

from autoround_core import corpus
from autoround_core.corpus import PARTS, part_of, stdlib_documents
from autoround_core.errors import UnknownNameError


@pytest.fixture(scope="module")
def documents():
    return {part: list(stdlib_documents(part)) for part in PARTS}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own; returns a function that adds a file to it."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    def add(name, source, encoding="utf-8"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode(encoding))

    return add


def everything():
    return sorted(itertools.chain(stdlib_documents("calibration"), stdlib_documents("evaluation")))


def test_it_is_large_enough_for_the_usual_calibration_set(documents):
    # 128 rows of 2048 tokens, at the 5 characters a token of a very large vocabulary
    assert sum(map(len, documents["calibration"])) > 128 * 2048 * 5
    assert sum(map(len, documents["evaluation"])) > 50_000


def test_the_parts_are_disjoint_and_about_one_in_eight_is_held_out(documents):
    calibration, evaluation = (set(documents[part]) for part in PARTS)
    assert not calibration & evaluation
    assert 0.06 < len(evaluation) / len(calibration | evaluation) < 0.2


@pytest.mark.parametrize("thing", [textwrap.dedent, queue.Queue.join, json.decoder.JSONDecoder])
def test_it_holds_what_python_itself_says_of_a_thing(documents, thing):
    holders = [d for d in documents[part_of(thing.__module__)] if inspect.getdoc(thing) in d]
    assert len(holders) == 1
    assert f"{thing.__name__}(" in holders[0]  # the line it documents goes with it


def test_the_order_is_the_same_twice_and_not_that_of_the_alphabet(documents):
    again = list(itertools.islice(stdlib_documents("calibration"), 20))
    assert again == documents["calibration"][:20]
    assert again != sorted(again)


def test_nothing_is_read_before_it_is_asked_for(library, monkeypatch):
    for index in range(8):
        library(f"m{index}.py", f'"""Document {index}."""')
    read = []
    document = corpus._document
    monkeypatch.setattr(corpus, "_document", lambda path: read.append(path) or document(path))
    stream = stdlib_documents("calibration")
    assert read == []
    next(stream)
    assert len(read) == 1


def test_a_document_is_the_strings_of_a_module_in_source_order(library):
    library(
        "m.py",
        '"""The module."""\n\nx = 1\n\n\ndef first(\n    a,\n    b,\n):\n'
        '    """One.\n\n    More.\n    """\n\n\nif x:\n    @decorated\n    class Second:\n'
        '        """Two."""\n\n        async def third(self): "Three."\n\n'
        '        def bare(self):\n            return 1\nelse:\n    def fourth(): "Four."\n',
    )
    assert everything() == [
        "The module.\n\ndef first(\n    a,\n    b,\n):\nOne.\n\nMore.\n\nclass Second:\nTwo.\n\n"
        'async def third(self): "Three."\nThree.\n\ndef fourth(): "Four."\nFour.'
    ]


def test_tests_tables_strangers_and_broken_files_are_left_out(library):
    library("kept.py", '"""Kept."""')
    library("package/__init__.py", '"""A package."""')
    library("latin.py", '# coding: latin-1\n"""Café."""', "latin-1")
    library("escape.py", '"""Odd \\d escape."""')
    for folder in ("test", "json/tests", "site-packages/x", "encodings", "idlelib"):
        library(f"{folder}/m.py", '"""Left out."""')
    library("broken.py", '"""Left out."""\ndef (:')
    library("binary.py", '"""Left out é."""', "latin-1")
    library("silent.py", "x = 1")
    library("notes.txt", '"""Left out."""')
    assert everything() == ["A package.", "Café.", "Kept.", "Odd \\d escape."]


def test_another_part_is_an_error_at_once():
    with pytest.raises(UnknownNameError, match="did you mean `evaluation`"):
        stdlib_documents("evaluatoin")


def test_it_imports_nothing_but_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(corpus))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"autoround_core"}
