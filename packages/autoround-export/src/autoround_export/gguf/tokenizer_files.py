"""The tokenizer files of a Hugging Face directory, read and put side by side.

Older checkpoints spread a tokenizer over half a dozen files, Transformers 5 writes two. Here is decided which of them
is believed: tokenizer.json is what runs, the others name its special tokens and hold the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_core import CheckpointError, ModelError, read_json

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before anything else: out of the normalized text, or as it was given. A
    special one marks something, and is never printed.
    """

    content: str
    special: bool
    normalized: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """tokenizer: tokenizer.json, empty without one. settings: tokenizer_config.json over special_tokens_map.json.
    added: by id. templates: chat templates by name, `default` first. eos_ids: those of generation_config.json.
    """

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    added: Mapping[int, AddedToken]
    templates: Mapping[str, str]
    eos_ids: tuple[int, ...]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Raises ModelError where a file is missing, is no JSON, or does not hold what its name says."""
    tokenizer = _read(directory / TOKENIZER)
    if not tokenizer and not (directory / SENTENCEPIECE).is_file():
        raise ModelError(
            f"`{directory}` has no tokenizer.json (or tokenizer.model), which a GGUF file is to hold; load its "
            "tokenizer with Transformers and call save_pretrained to get one"
        )
    if tokenizer and not isinstance(tokenizer.get("model"), Mapping):
        raise ModelError(f"`{directory / TOKENIZER}` has no `model`, so it is no tokenizer")
    settings = _read(directory / "special_tokens_map.json") | _read(directory / "tokenizer_config.json")
    generation = _read(directory / "generation_config.json")
    return TokenizerFiles(
        tokenizer=tokenizer,
        settings=settings,
        added=_added_tokens(tokenizer, settings, _read(directory / "added_tokens.json")),
        templates=_templates(directory, settings),
        eos_ids=as_ids(generation.get("eos_token_id")),
    )


def token_text(value: Any) -> str | None:
    """The text of a special token, which configurations give as a string or as a description of one."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def as_ids(value: Any) -> tuple[int, ...]:
    """An id, or a list of them, as configurations give it."""
    ids = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(number for number in ids if isinstance(number, int) and not isinstance(number, bool) and number >= 0)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    if not isinstance(content, dict):
        raise ModelError(f"`{path}` holds a {type(content).__name__}, where a JSON object is expected")
    return content


def _added_tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], additions: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """tokenizer.json first; of the other files only what it lacks, as Transformers adds it when it loads them."""
    found: dict[int, AddedToken] = {}
    try:
        for token in tokenizer.get("added_tokens") or ():
            special, normalized = bool(token.get("special", False)), bool(token.get("normalized", True))
            found[int(token["id"])] = AddedToken(str(token["content"]), special, normalized)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError("tokenizer.json describes an added token without its id or content") from None
    contents = {token.content for token in found.values()}
    described = settings.get("added_tokens_decoder") or {}
    others = [(number, token_text(token), bool(token.get("special"))) for number, token in described.items()]
    others += [(number, content, False) for content, number in additions.items()]
    for number, content, special in others:
        if content and content not in contents and int(number) not in found:
            found[int(number)] = AddedToken(content, special)
            contents.add(content)
    return found


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own win over the configuration, as in Transformers."""
    template = settings.get("chat_template")
    single = _read(directory / "chat_template.json").get("chat_template")
    template = single if isinstance(single, str) else template
    if isinstance(template, list):
        templates = {str(entry.get("name")): str(entry.get("template")) for entry in template}
    elif isinstance(template, Mapping):
        templates = {str(name): str(text) for name, text in template.items()}
    else:
        templates = {"default": template} if isinstance(template, str) else {}
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        templates = {"default": jinja.read_text(encoding="utf-8")}
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
    return templates
