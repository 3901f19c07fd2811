"""From text to equal rows of tokens: the calibration set.

Tuning needs rows of one length and text comes in all lengths. A document at least as long as a row
gives its beginning; shorter ones are joined, with the end-of-text token between them, and cut into
rows; if that is not enough, the long documents give what follows their beginnings. Dropping the
short documents, as is common, would calibrate on long texts only, and on nothing at all where every
text is short.

The order is the order of the data, so equal data give equal rows; `CalibrationSet.sha256` names the
result.
"""

from __future__ import annotations

import itertools
import numbers
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autoround_core.calibration_set import CalibrationSet
from autoround_core.documents import (
    DatasetSpec,
    first_line,
    open_rows,
    parse_datasets,
    share_rows,
)
from autoround_core.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_DATASET = "NeelNanda/pile-10k"
ROW_KEYS = ("input_ids", "messages", "text")  # the first that a row has is the one that counts
_GIVEN = "given documents"
_LARGEST_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows cut from documents, and counts for the report. unused: tokens of the unfilled row."""

    rows: list[list[int]]
    documents: int
    tokens: int
    unused: int


def load_calibration(
    dataset: str | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int = 42,
) -> CalibrationSet:
    """Make `nsamples` rows of `seqlen` tokens.

    dataset: a specification (see `documents`), or an iterable of texts, of rows with text, messages
    or input_ids, or of token ids [n] or [1, n]. tokenizer: None only if every row is token ids.
    seed: the order of rows from several data sets; one alone keeps its order. Reading stops when
    there are enough rows. Raises UsageError for what cannot be meant, CalibrationError for data
    that cannot be read or is too small.
    """
    _check_number("nsamples", nsamples, 1)
    _check_number("seqlen", seqlen, 2)
    if isinstance(dataset, str):
        source, specs = dataset, parse_datasets(dataset)
        opened = [(spec, open_rows(spec)) for spec in specs]
    else:
        source, specs = _GIVEN, (DatasetSpec(_GIVEN),)
        opened = [(specs[0], _given_rows(dataset))]
    shares = share_rows(specs, nsamples)
    parts = []
    for (spec, rows), wanted in zip(opened, shares, strict=True):
        documents = _token_documents(spec, rows, tokenizer)
        packed = pack(documents, wanted, seqlen, concat=spec.concat)
        _check_packed(spec, packed, wanted, seqlen, alone=len(specs) == 1)
        _check_ids(spec, packed.rows, tokenizer)
        parts.append(packed)
    rows = [row for packed in parts for row in packed.rows]
    if len(parts) > 1:
        random.Random(seed).shuffle(rows)
    return CalibrationSet(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        source=source,
        documents=sum(packed.documents for packed in parts),
        unused_tokens=sum(packed.unused for packed in parts),
    )


def pack(
    documents: Iterable[tuple[Sequence[int], int | None]],
    wanted: int,
    seqlen: int,
    *,
    concat: bool = False,
) -> Packed:
    """Cut up to `wanted` rows of `seqlen` tokens from (tokens, separator) documents.

    separator: the token to put before a document that is joined to another, None = nothing.
    concat: join the long documents too. Stops reading when there are enough rows.
    """
    rows: list[list[int]] = []
    joined: list[int] = []
    tails: list[list[int]] = []
    previous, count, tokens = None, 0, 0
    for ids, separator in documents:
        if not ids:
            continue
        count, tokens = count + 1, tokens + len(ids)
        if len(ids) >= seqlen and not concat:
            rows.append(list(ids[:seqlen]))
            tails.append(list(ids[seqlen : wanted * seqlen]))
        else:
            # a tokenizer may have written the separator itself
            if previous is not None and separator not in (None, previous):
                joined.append(separator)
            joined.extend(ids)
            previous = ids[-1]
            full = min(len(joined) // seqlen, wanted - len(rows)) * seqlen
            rows.extend(joined[start : start + seqlen] for start in range(0, full, seqlen))
            del joined[:full]
        if len(rows) == wanted:
            break
    # the second row of every long document, then the third: as many of them as possible have a say
    further = (
        tail[start : start + seqlen]
        for start in range(0, max(map(len, tails), default=0), seqlen)
        for tail in tails
        if start + seqlen <= len(tail)
    )
    rows.extend(itertools.islice(further, wanted - len(rows)))
    return Packed(rows, count, tokens, len(joined) % seqlen)


def _given_rows(dataset: Iterable[Any]) -> Iterator[Any]:
    if isinstance(dataset, (bytes, Mapping)) or not isinstance(dataset, Iterable):
        kind = type(dataset).__name__
        raise UsageError(f"dataset must be a name or a list of texts or token ids, got {kind}")
    return iter(dataset)


def _token_documents(
    spec: DatasetSpec, rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[list[int], int | None]]:
    """Each row as (token ids, the separator that joins it to others)."""
    for number, row in enumerate(rows, 1):
        where = f"row {number} of `{spec.name}`"
        key, value = _content(row, where)
        if key == "input_ids":
            if spec.templated:
                raise CalibrationError(f"{where} is token ids; a chat template needs text")
            ids = _ready_ids(value, where)
            if isinstance(row, Mapping) and row.get("attention_mask") is not None:
                # padding is not text
                ids = list(itertools.compress(ids, _ready_ids(row["attention_mask"], where)))
            yield ids, None
            continue
        if tokenizer is None:
            raise CalibrationError(f"{where} is text and needs a tokenizer; pass one, or token ids")
        ids = _tokenize(key, value, spec, tokenizer, where)
        yield ids, getattr(tokenizer, "eos_token_id", None)


def _content(row: Any, where: str) -> tuple[str, Any]:
    """What a row holds, as one of ROW_KEYS and its value."""
    if isinstance(row, str):
        return "text", row
    if not isinstance(row, Mapping):
        return "input_ids", row
    key = next((key for key in ROW_KEYS if key in row), None)
    if key is None:
        found, known = ", ".join(map(str, row)) or "none", ", ".join(ROW_KEYS)
        raise CalibrationError(f"{where} has the keys {found}; one of {known} is needed")
    return key, row[key]


def _ready_ids(value: Any, where: str) -> list[int]:
    """Token ids [n] or [1, n] from a list, tensor or array."""
    ids = value if isinstance(value, (list, tuple)) else getattr(value, "tolist", lambda: None)()
    if isinstance(ids, (list, tuple)) and len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = ids[0]
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, numbers.Integral) for i in ids):
        kind = type(value).__name__
        raise CalibrationError(f"{where} is neither text nor token ids [n] or [1, n] (type {kind})")
    return [int(i) for i in ids]


def _tokenize(
    key: str, value: Any, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    single = [{"role": "user", "content": value}]
    messages = _messages(value, where) if key == "messages" else single
    if not all(isinstance(message["content"], str) for message in messages):
        raise CalibrationError(f"{where}: `{key}` must hold text")
    try:
        # verbose=False: a document longer than the model's context is no trouble, it is cut
        if not spec.templated:
            text = "\n".join(message["content"] for message in messages)
            return list(tokenizer(text, verbose=False)["input_ids"])
        if spec.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": spec.system_prompt}, *messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # a template is a stranger's program and may raise anything
        if spec.templated and not getattr(tokenizer, "chat_template", None):
            message = "has no chat template; leave apply_chat_template and system_prompt out"
            raise CalibrationError(f"dataset `{spec.name}`: the tokenizer {message}") from None
        raise CalibrationError(f"the tokenizer refuses {where}: {first_line(error)}") from error


def _messages(value: Any, where: str) -> list[Mapping[str, Any]]:
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value):
            return list(value)
    raise CalibrationError(f"{where}: `messages` must be a list of objects with role and content")


def _check_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value}")


def _check_packed(
    spec: DatasetSpec, packed: Packed, wanted: int, seqlen: int, *, alone: bool
) -> None:
    if not packed.documents:
        raise CalibrationError(f"calibration set `{spec.name}` is empty")
    count = len(packed.rows)
    if count < wanted:
        fewer = f"pass {'--nsamples ' if alone else ':num='}{count} or " if count else "pass "
        raise CalibrationError(
            f"`{spec.name}` gives {count} rows of {seqlen} tokens ({packed.tokens} tokens in "
            f"{packed.documents} documents), {wanted} were asked: "
            f"add data, or {fewer}a smaller --seqlen"
        )


def _check_ids(
    spec: DatasetSpec, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Refuse ids that have no row in the embedding: they would end in an index error, or worse."""
    try:
        largest = len(tokenizer) - 1 if tokenizer is not None else _LARGEST_ID
    except TypeError:
        largest = _LARGEST_ID
    for row in rows:
        wrong = min(row) if min(row) < 0 else max(row)
        if not 0 <= wrong <= largest:
            raise CalibrationError(
                f"`{spec.name}` holds the token id {wrong}; the tokenizer's are 0 to {largest}"
            )
