"""The way back: `tokenizer.*` fields of a GGUF file -> tokenizer files that Transformers loads.

Transformers has a conversion of its own, which reads a whole file, decides by architecture and knows few splitting
rules. Here the fields alone decide. What a GGUF file does not say is left as the tokenizers of that kind have it:
byte-level BPE neither adds nor removes spaces, SentencePiece's replaces them by `\u2581`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoround_core import CheckpointError, write_json
from autoround_export.gguf.pretokenizer import composes, known_names, pre_tokenizer_json
from autoround_export.gguf.vocabulary import SPACE, repeated

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_LONGEST = 256  # characters; no tokenizer merges longer tokens, and each is cut at all places
_PADDING = re.compile(r"\[+PAD\d+\]+")
_KINDS = ("gpt2", "llama", "t5")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(fields: Mapping[str, Any], directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as far as `fields` has one.

    Raises CheckpointError for fields that are missing or contradict each other, and for tokenizers that Hugging Face's
    library has no counterpart of.
    """
    kind = fields.get(f"{_PREFIX}model")
    if kind not in _KINDS:
        raise CheckpointError(f"the file's tokenizer is of kind `{kind}`; Hugging Face has {', '.join(_KINDS)}")
    tokens, types = _tokens(fields)
    if kind == "gpt2":
        parts, adds_bos = _byte_level(fields, tokens, types)
    else:
        build = _merged_by_score if kind == "llama" else _unigram
        parts, adds_bos = build(fields, tokens, types), kind == "llama"
    marks = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    added = [_added(tokens[i], i, types[i] != _USER_DEFINED) for i in range(len(tokens)) if types[i] in marks]
    roles = {role: _token(fields, name, tokens) for role, name in _ROLES.items()}
    ends = _added_ends(fields, roles, adds_bos, kind == "t5")
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    content["post_processor"] = _template(*ends, {token: i for i, token in enumerate(tokens)})
    write_json(directory / "tokenizer.json", content)
    settings = {role: token for role, token in roles.items() if token is not None}
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", settings)
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokens(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = fields.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"the file has no list of tokens (`{_PREFIX}tokens`)")
    types = _numbers(fields, "token_type", len(tokens)) or [1] * len(tokens)
    if (token := repeated(tokens)) is not None:
        raise CheckpointError(f"the file has the token `{token}` twice")
    return tokens, types


def _numbers(fields: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """A list with one number for each token; empty if the file has none."""
    values = fields.get(f"{_PREFIX}{name}", [])
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or len(values) not in (0, count):
        raise CheckpointError(f"`{_PREFIX}{name}` does not have one number for each of the {count} tokens")
    return values


def _byte_level(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    name = fields.get(f"{_PREFIX}pre", "default")
    found = pre_tokenizer_json(str(name))
    if found is None:
        known = [known for known in known_names() if pre_tokenizer_json(known) is not None]
        raise CheckpointError(
            f"the file splits text by the rules `{name}`, which have no counterpart in Hugging Face's library; those "
            f"that have: {', '.join(known)}"
        )
    pre, pre_tokenizer = found
    vocab = _vocab(tokens, types)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = _bpe(vocab, _listed_merges(fields, vocab), None) | {"ignore_merges": pre.ignore_merges}
    parts = {
        "normalizer": {"type": "NFC"} if composes(pre.name) else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level,
        "model": model,
    }
    return parts, pre.adds_bos


def _listed_merges(fields: Mapping[str, Any], vocab: Mapping[str, int]) -> list[list[str]]:
    merges = fields.get(f"{_PREFIX}merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"the file has byte-level BPE, but no merges (`{_PREFIX}merges`)")
    pairs = []
    for merge in merges:
        left, space, right = str(merge)[1:].partition(" ")  # the first character belongs to a token, even a space
        pair = [str(merge)[:1] + left, right]
        if not space or any(token not in vocab for token in (*pair, "".join(pair))):
            raise CheckpointError(f"the file has the merge `{merge}`, which is not of two tokens into a third")
        pairs.append(pair)
    return pairs


def _merged_by_score(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Merges from scores: each pair of tokens whose union is one, the highest score of the union first."""
    scores = _numbers(fields, "scores", len(tokens))
    if not scores:
        raise CheckpointError(f"the file's tokenizer is of kind `llama`, but has no scores (`{_PREFIX}scores`)")
    words = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == _NORMAL and len(token) <= _LONGEST
    }
    pairs = [
        (-score, at, [token[:at], token[at:]])
        for token, score in words.items()
        for at in range(1, len(token))
        if token[:at] in words and token[at:] in words
    ]
    pairs.sort(key=lambda pair: pair[:2])
    unknown = _token(fields, "unknown", tokens) or (tokens[0] if types[0] == _UNKNOWN else None)
    model = _bpe(_vocab(tokens, types), [pair for _, _, pair in pairs], unknown)
    return _spaces(fields, True) | {"model": model | {"fuse_unk": True, "byte_fallback": True}}


def _unigram(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = _numbers(fields, "scores", len(tokens))
    unknown = fields.get(f"{_PREFIX}unknown_token_id", 2)
    if not scores or not isinstance(unknown, int) or unknown >= len(tokens):
        raise CheckpointError("the file's tokenizer is of kind `t5`, but has no scores or no token for what is unknown")
    model = {"type": "Unigram", "unk_id": unknown, "byte_fallback": False}
    model["vocab"] = [[token, float(score)] for token, score in zip(tokens, scores, strict=True)]
    return _spaces(fields, False) | {"model": model}


def _spaces(fields: Mapping[str, Any], default: bool) -> dict[str, Any]:
    """SentencePiece's treatment of text: its own rules, several spaces into one, one in front, all into its sign."""
    normalizers: list[dict[str, Any]] = []
    if rules := fields.get(f"{_PREFIX}precompiled_charsmap"):
        if not isinstance(rules, list) or not all(isinstance(byte, int) for byte in rules):
            raise CheckpointError(f"`{_PREFIX}precompiled_charsmap` is no list of bytes")
        data = base64.b64encode(bytes(byte & 255 for byte in rules)).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": data})
    if fields.get(f"{_PREFIX}remove_extra_whitespaces", False):
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    prefix = fields.get(f"{_PREFIX}add_space_prefix", default)
    if prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Ids by text, without the names of rows that no token has."""
    pairs = enumerate(zip(tokens, types, strict=True))
    return {token: i for i, (token, kind) in pairs if token and not (kind == _UNUSED and _PADDING.fullmatch(token))}


def _bpe(vocab: dict[str, int], merges: list[list[str]], unknown: str | None) -> dict[str, Any]:
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    return {"type": "BPE", **plain, "unk_token": unknown, "byte_fallback": False, "vocab": vocab, "merges": merges}


def _added(content: str, number: int, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **plain, "special": special}


def _token(fields: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    number = fields.get(f"{_PREFIX}{name}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _added_ends(
    fields: Mapping[str, Any], roles: Mapping[str, str | None], adds_bos: bool, adds_eos: bool
) -> tuple[str | None, str | None]:
    """The tokens put before and after a text; files that do not say it have llama.cpp's way for their kind."""
    first = roles["bos_token"] if fields.get(f"{_PREFIX}add_bos_token", adds_bos) else None
    last = roles["eos_token"] if fields.get(f"{_PREFIX}add_eos_token", adds_eos) else None
    return first, last


def _template(first: str | None, last: str | None, ids: Mapping[str, int]) -> dict[str, Any]:
    def around(names: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for name in names:
            parts += [{"SpecialToken": {"id": first, "type_id": 0}}] if first is not None else []
            parts.append({"Sequence": {"id": name, "type_id": 0}})
            parts += [{"SpecialToken": {"id": last, "type_id": 0}}] if last is not None else []
        return parts

    ends = [token for token in (first, last) if token is not None]
    known = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ends}
    return {"type": "TemplateProcessing", "single": around("A"), "pair": around("AB"), "special_tokens": known}
