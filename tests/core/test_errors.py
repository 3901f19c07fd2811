"""Errors: one root, exit codes, and messages that name the closest thing that exists."""

from __future__ import annotations

import inspect

import pytest

from autoround_core import errors
from autoround_core.errors import AutoRoundError, UnknownNameError, unknown_name

ALL = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
]
USAGE = {"UsageError", "UnknownNameError", "OutputError"}  # mistakes on the command line itself


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_has_the_one_root_and_the_exit_code_of_its_kind(error):
    assert issubclass(error, AutoRoundError)
    assert error.exit_code == (2 if error.__name__ in USAGE else 1)
    assert error.__doc__


def test_a_wrong_option_is_also_a_value_error():
    with pytest.raises(ValueError, match="unknown"):
        raise unknown_name("format", "x", ["y"])


@pytest.mark.parametrize(
    ("given", "known", "hint"),
    [
        ("auto_rond", ["dense", "auto_round", "gguf"], "auto_round"),
        ("DENSE", ["dense", "auto_round"], "dense"),
        ("bits", ["Bits", "group_size"], "Bits"),
        ("group-size", ["bits", "group_size"], "group_size"),
        ("zzz", ["dense", "auto_round"], None),
    ],
)
def test_the_closest_name_is_offered_and_a_far_one_is_not(given, known, hint):
    error = unknown_name("format", given, known)
    assert isinstance(error, UnknownNameError)
    message = str(error)
    assert f"unknown format `{given}`" in message
    assert (f"did you mean `{hint}`?" in message) if hint else ("did you mean" not in message)


def test_all_known_names_are_listed_in_order_and_the_note_comes_last():
    message = str(
        unknown_name("recipe", "?", (name for name in ("light", "base", "best")), "; plugin `x` failed")
    )
    assert message.endswith("(known: base, best, light); plugin `x` failed")


def test_nothing_known_is_no_crash():
    assert "unknown backend `cuda` (known: )" in str(unknown_name("backend", "cuda", []))
