"""tokenizer.model, the file of SentencePiece: a protocol buffer of pieces with scores, read without its library.

    file: 1 piece ..., 2 how it was trained, 3 how text is normalized        piece: 1 text, 2 score (float), 3 type

The types have the numbers that GGUF uses: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoround_core import ModelError, UnsupportedError

_UNIGRAM, _BPE = 1, 2
_KIND, _UNK, _BOS, _EOS, _PAD = 3, 40, 41, 42, 43  # fields of the training, and below of the normalizer
_RULES, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4
_FIXED = {1: 8, 5: 4}  # wire types of fixed size


@dataclass(frozen=True, slots=True)
class SpmModel:
    """unigram: the best split by score, else merges by score. special_ids: bos, eos, unk, pad, where they exist."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    unigram: bool
    space_prefix: bool
    merge_spaces: bool
    special_ids: dict[str, int]


def read_spm_model(path: Path) -> SpmModel:
    """Raises ModelError for anything but a model of SentencePiece, UnsupportedError for what GGUF cannot say."""
    pieces, training, normalizer = [], {}, {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
            elif field == 2:
                training = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise ModelError(f"`{path}` is no model of SentencePiece, or not a whole one") from None
    kind = training.get(_KIND, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(f"`{path}` splits text into words or characters; llama.cpp knows BPE and Unigram")
    if normalizer.get(_RULES):
        raise UnsupportedError(
            f"`{path}` rewrites text by the rules `{normalizer.get(1, b'').decode()}` before it is split, "
            "which a GGUF file of this kind cannot say"
        )
    ids = {"unk": training.get(_UNK, 0), "bos": training.get(_BOS, 1), "eos": training.get(_EOS, 2)}
    ids["pad"] = training.get(_PAD, 2**64 - 1)  # -1, as an unsigned number: none
    tokens, scores, types = zip(*pieces, strict=True) if pieces else ((), (), ())
    return SpmModel(
        tokens=tokens,
        scores=scores,
        types=types,
        unigram=kind == _UNIGRAM,
        space_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        merge_spaces=bool(normalizer.get(_EXTRA_SPACES, 1)),
        special_ids={name: number for name, number in ids.items() if number < len(tokens)},
    )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a message; a value is a number, or bytes still to be read."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        if tag & 7 == 0:
            value, at = _number(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = _number(data, at)
        elif tag & 7 in _FIXED:
            size = _FIXED[tag & 7]
        else:
            raise ValueError("no field")
        if at + size > len(data):
            raise ValueError("the file ends too early")
        yield tag >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, seven bits in each byte, and where the next thing starts."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError("the file ends too early")
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            return value, at + i + 1
    raise ValueError("no number")
