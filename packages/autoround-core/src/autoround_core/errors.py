"""Errors that a user can act on.

Every one descends from `AutoRoundError`: the command line prints its message as one line and exits with
its `exit_code`; anything else is a bug of ours and keeps its traceback. A message says what was given,
what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class AutoRoundError(Exception):
    """Root of the errors that are shown to the user as one line."""

    exit_code = 1


class UsageError(AutoRoundError, ValueError):
    """An option, keyword or specification that cannot be meant."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that nothing is registered under; the message offers the closest ones."""


class UnsupportedError(AutoRoundError):
    """A layer, model or device that the chosen format, kernel or algorithm cannot take."""


class ModelError(AutoRoundError):
    """A model directory that cannot be read, or holds something that cannot be quantized."""


class CheckpointError(AutoRoundError):
    """A checkpoint file that is missing, truncated or contradicts itself."""


class CalibrationError(AutoRoundError):
    """Calibration data that cannot be read, or is too small."""


class NonFiniteError(ModelError):
    """A tensor with NaN or infinite values."""


class OutputError(AutoRoundError):
    """An output directory that must not be written to."""

    exit_code = 2


class PluginError(AutoRoundError):
    """Two plugins claim one name, or a plugin breaks the contract of a hook."""


class VerificationError(AutoRoundError):
    """What was saved differs from what was meant."""


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Let an UnsupportedError from numerics say which layer it is about."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(f"layer `{name}`: {error}") from None


def unknown_name(kind: str, given: str, known: Iterable[str], note: str = "") -> UnknownNameError:
    """Build the error for an unknown `kind` (such as "format"), with the closest known name."""
    known = sorted(known)
    close = difflib.get_close_matches(given.lower(), [name.lower() for name in known], n=1, cutoff=0.5)
    hint = next((f"; did you mean `{name}`?" for name in known if [name.lower()] == close), "")
    return UnknownNameError(f"unknown {kind} `{given}`{hint} (known: {', '.join(known)}){note}")
