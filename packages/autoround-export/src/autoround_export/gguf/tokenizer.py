"""Tokenizer files of Hugging Face -> the `tokenizer.*` fields of a GGUF file.

What runs in Hugging Face is tokenizer.json, so its merges and rules are what is written, even where an older
tokenizer.model lies beside it. The other files say which tokens are special and hold the chat template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoround_core import ModelError
from autoround_export.gguf.hf_tokenizer import write_tokenizer
from autoround_export.gguf.pretokenizer import check_name
from autoround_export.gguf.special_tokens import special_fields, special_names, template_fields
from autoround_export.gguf.spm_model import SpmModel, read_spm_model
from autoround_export.gguf.tokenizer_files import SENTENCEPIECE, AddedToken, TokenizerFiles, read_tokenizer_files
from autoround_export.gguf.vocabulary import (
    BYTE_TOKEN,
    SPACE,
    Vocabulary,
    repeated,
    vocabulary_of,
    vocabulary_of_model,
)

__all__ = ["tokenizer_fields", "write_tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LAST = -1e6  # below the score of every merge: what is never to be made by merging
# Added tokens that mark something though their files do not call them special.
_MARKS = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)


def tokenizer_fields(directory: Path, config: Mapping[str, Any], rows: int, pre: str | None = None) -> dict[str, Any]:
    """Every `tokenizer.*` field for the tokenizer files in `directory`.

    config: the model's config.json. rows: of the embedding; the file names one token for each. pre: the name of the
    splitting rules, where the user knows better than `recognize`. Raises ModelError for files that are missing, damaged
    or do not fit the model, UnsupportedError for a tokenizer that llama.cpp has no counterpart of.
    """
    if pre is not None:
        check_name(pre)
    files = read_tokenizer_files(directory)
    if files.tokenizer:
        vocabulary = vocabulary_of(files.tokenizer, config.get("model_type"), pre)
    else:
        model = read_spm_model(directory / SENTENCEPIECE)
        vocabulary, files = vocabulary_of_model(model, pre), _with_defaults(files, model)
    tokens, types = _tokens(vocabulary, files, rows)
    fields = {"tokenizer.ggml.model": vocabulary.kind, **vocabulary.fields, "tokenizer.ggml.tokens": tokens}
    if vocabulary.scores is not None:
        fields["tokenizer.ggml.scores"] = _scores(vocabulary.scores, tokens, types)
    fields["tokenizer.ggml.token_type"] = types
    return fields | special_fields(files, config, tokens) | template_fields(files)


def _with_defaults(files: TokenizerFiles, model: SpmModel) -> TokenizerFiles:
    """What SentencePiece's file says of special tokens, where no other file does."""
    named = {f"{name}_token": model.tokens[number] for name, number in model.special_ids.items()}
    given = {key: value for key, value in files.settings.items() if value is not None}
    return replace(files, settings={"add_bos_token": True} | named | given)


def _tokens(vocabulary: Vocabulary, files: TokenizerFiles, rows: int) -> tuple[list[str], list[int]]:
    """Texts and types by id, one for each row of the embedding."""
    texts = {number: token for token, number in vocabulary.ids.items()}
    texts |= {number: token.content for number, token in files.added.items()}
    last = max(texts, default=-1)
    if last >= rows:
        raise ModelError(
            f"the tokenizer has the token `{texts[last]}` with the id {last}, but the model's embedding {rows} rows; "
            "resize it (resize_token_embeddings), or take the tokenizer that belongs to the model"
        )
    names = special_names(files.settings)
    tokens, types = [], []
    for number in range(rows):
        text = texts.get(number, "")
        if "\0" in text:
            text = ""  # llama.cpp would read it up to there, and find another token twice
        kind = _type(text, files.added.get(number), vocabulary, names)
        if kind == USER_DEFINED and vocabulary.kind != "gpt2":
            text = text.replace(SPACE, " ")  # it is looked for in the text as it was given
        tokens.append(text)
        types.append(kind)
    if (token := repeated(text for text in tokens if text)) is not None:
        raise ModelError(f"the tokenizer has the token `{token}` twice, which llama.cpp refuses; rename one of them")
    taken = set(tokens)
    return [text or _padding(number, taken) for number, text in enumerate(tokens)], types


def _type(text: str, added: AddedToken | None, vocabulary: Vocabulary, special: set[str]) -> int:
    if not text:
        return UNUSED
    if vocabulary.kind != "gpt2":
        if text == vocabulary.unknown:
            return UNKNOWN
        if added is None and BYTE_TOKEN.fullmatch(text):
            return BYTE
    given = (vocabulary.types or {}).get(text, NORMAL)
    if text in special or (added is not None and (added.special or _MARKS.fullmatch(text))):
        return given if given == UNKNOWN else CONTROL
    if added is None:
        return given
    # Gemma's runs of spaces. No text has that sign before spaces became it, so that merges make these tokens.
    if SPACE in text and not added.normalized and (vocabulary.scores or {}).get(text, 0.0) < 0:
        return NORMAL
    return USER_DEFINED


def _padding(number: int, taken: set[str]) -> str:
    """A name for a row that no token has, unlike all others."""
    name = f"[PAD{number}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _scores(scores: Mapping[str, float], tokens: list[str], types: list[int]) -> list[float]:
    return [
        float(scores.get(token, _LAST)) if kind in (NORMAL, BYTE, UNKNOWN) else _LAST
        for token, kind in zip(tokens, types, strict=True)
    ]
