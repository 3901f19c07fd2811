"""Which of llama.cpp's tokenizers a Hugging Face tokenizer is, and its tokens, merges and scores in these terms.

    gpt2    byte-level BPE: tokens in the alphabet of bytes, merges, and a name for the splitting rules
    llama   SentencePiece's BPE: spaces are `\u2581`, bytes `<0x0A>`. Two neighbours whose union is a token may merge,
            the highest score first. A tokenizer.json has merges instead: a score is minus the rank of the first
            merge that makes the token
    t5      SentencePiece's Unigram: the split with the greatest sum of scores

A tokenizer that is none of these is an error here, before anything is tuned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoround_core import ModelError, UnsupportedError
from autoround_export.gguf.pretokenizer import recognize, steps
from autoround_export.gguf.spm_model import SpmModel

SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# What `--gguf_pre` says of SentencePiece's kinds, which have no splitting rules: take the nearest that llama.cpp has.
NEAREST = "default"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """kind: as llama.cpp calls it. ids: of the texts. fields: those that only this kind has. types: as far as they are
    given, in GGUF's numbers. unknown: the text of the token for what no token covers.
    """

    kind: str
    ids: Mapping[str, int]
    fields: Mapping[str, Any]
    scores: Mapping[str, float] | None = None
    types: Mapping[str, int] | None = None
    unknown: str | None = None


def vocabulary_of(tokenizer: Mapping[str, Any], model_type: str | None, pre: str | None) -> Vocabulary:
    """From a tokenizer.json. Raises UnsupportedError for what llama.cpp has no counterpart of."""
    model = tokenizer["model"]
    # old files name no type; only BPE has merges
    kind = model.get("type") or ("BPE" if "merges" in model else "none")
    if kind == "Unigram":
        return _unigram(tokenizer, pre)
    if kind != "BPE":
        raise UnsupportedError(
            f"the tokenizer is of kind `{kind}`, which llama.cpp has no text models for; known: BPE (byte-level, or "
            "SentencePiece's with byte_fallback) and Unigram"
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, Mapping) or not all(isinstance(number, int) for number in vocab.values()):
        raise ModelError("tokenizer.json has no vocabulary (`model.vocab`)")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise UnsupportedError("the tokenizer marks parts of words with a prefix or suffix; no BPE of llama.cpp does")
    if any(step.get("type") == "ByteLevel" for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers")):
        fields = {
            "tokenizer.ggml.pre": pre or recognize(tokenizer, model_type),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merges(model)],
        }
        return Vocabulary("gpt2", vocab, fields)
    return _merged_by_score(tokenizer, pre)


def vocabulary_of_model(model: SpmModel, pre: str | None) -> Vocabulary:
    """From a tokenizer.model, where there is no tokenizer.json."""
    _no_rules(pre)
    if (token := repeated(model.tokens)) is not None:
        raise ModelError(f"tokenizer.model has the token `{token}` twice")
    if model.merge_spaces and not model.unigram and pre != NEAREST:
        raise _inexact("tokenizer.model takes several spaces for one, which llama.cpp does not for BPE")
    kind = _unigram_kind(model.tokens, pre) if model.unigram else "llama"
    if kind == "llama":
        _check_bytes(model.tokens)
    fields = _space_fields(kind, model.space_prefix, model.merge_spaces)
    ids = {token: number for number, token in enumerate(model.tokens)}
    scores = dict(zip(model.tokens, model.scores, strict=True))
    return Vocabulary(kind, ids, fields, scores, dict(zip(model.tokens, model.types, strict=True)))


def repeated(texts: Iterable[str]) -> str | None:
    """The first text that comes a second time."""
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            return text
        seen.add(text)
    return None


def _merged_by_score(tokenizer: Mapping[str, Any], pre: str | None) -> Vocabulary:
    model = tokenizer["model"]
    prefix, merge_spaces = _spaces(tokenizer, "BPE", pre)
    _check_bytes(model["vocab"])
    scores = dict.fromkeys(model["vocab"], 0.0)  # single characters are never the outcome of a merge
    for rank, (left, right) in reversed(list(enumerate(_merges(model)))):
        scores[left + right] = -1.0 - rank
    fields = _space_fields("llama", prefix, merge_spaces)
    return Vocabulary("llama", model["vocab"], fields, scores, unknown=model.get("unk_token"))


def _unigram(tokenizer: Mapping[str, Any], pre: str | None) -> Vocabulary:
    model = tokenizer["model"]
    prefix, merge_spaces = _spaces(tokenizer, "Unigram", pre)
    try:
        pieces = [(str(token), float(score)) for token, score in model["vocab"]]
    except (KeyError, TypeError, ValueError):
        raise ModelError("tokenizer.json has no vocabulary of tokens and scores (`model.vocab`)") from None
    if (token := repeated(token for token, _ in pieces)) is not None:
        raise ModelError(f"tokenizer.json has the token `{token}` twice")
    ids = {token: number for number, (token, _) in enumerate(pieces)}
    kind = _unigram_kind(ids, pre)
    unknown = model.get("unk_id")
    unknown = pieces[unknown][0] if isinstance(unknown, int) and unknown < len(pieces) else None
    return Vocabulary(kind, ids, _space_fields(kind, prefix, merge_spaces), dict(pieces), unknown=unknown)


def _unigram_kind(tokens: Iterable[str], pre: str | None) -> str:
    """llama.cpp's Unigram has no bytes for what no token covers: even a line break would become "unknown"."""
    if not any(BYTE_TOKEN.fullmatch(token) for token in tokens):
        return "t5"
    if pre != NEAREST:
        raise _inexact("the tokenizer is a Unigram with byte_fallback; llama.cpp's Unigram knows no bytes")
    return "llama"


def _space_fields(kind: str, prefix: bool, merge_spaces: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}
    return fields | ({"tokenizer.ggml.remove_extra_whitespaces": merge_spaces} if kind == "t5" else {})


def _spaces(tokenizer: Mapping[str, Any], kind: str, pre: str | None) -> tuple[bool, bool]:
    """Whether a space is put in front, and whether several count as one. Raises UnsupportedError for other steps."""
    _no_rules(pre)
    prefix, merge_spaces = False, False
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"} | {"type": "NFC"}:
                pass
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "\u2581"} if kind == "Unigram":
                merge_spaces = True
            case _ if pre != NEAREST:
                raise _inexact(f"the tokenizer's normalizer `{_shown(step)}` rewrites text")
    for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Metaspace", "replacement": "\u2581"}:
                scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
                prefix = prefix or scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # no spaces are left by now
            case _ if pre != NEAREST:
                raise _inexact(f"the tokenizer's pre-tokenizer `{_shown(step)}` splits text")
    return prefix, merge_spaces


def _shown(step: Mapping[str, Any]) -> str:
    return f"{step.get('type')} {step.get('pattern') or step.get('prepend') or ''}".strip()


def _inexact(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{reason}, so that some texts would get other ids; to accept that and write what llama.cpp has nearest to it, "
        f"pass `--gguf_pre {NEAREST}`"
    )


def _no_rules(pre: str | None) -> None:
    if pre not in (None, NEAREST):
        raise UnsupportedError(
            f"`--gguf_pre {pre}` names splitting rules of byte-level BPE, and this tokenizer is of SentencePiece's "
            "kind, which has none; leave the option out"
        )


def _check_bytes(tokens: Iterable[str]) -> None:
    """llama.cpp ends the whole program at a character that has neither a token nor bytes."""
    if sum(BYTE_TOKEN.fullmatch(token) is not None for token in tokens) < 256:
        raise UnsupportedError(
            "the tokenizer's BPE is neither byte-level nor has a token for each byte (`<0x00>` to `<0xFF>`), and "
            "llama.cpp knows no other"
        )


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; files have them as pairs or as strings with a space between."""
    merges = []
    for merge in model.get("merges") or ():
        pair = tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        if len(pair) != 2:
            raise ModelError(f"tokenizer.json has the merge `{merge}`, which is no pair")
        merges.append(pair)
    return merges
