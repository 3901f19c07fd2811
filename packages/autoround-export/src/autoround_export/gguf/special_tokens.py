"""The tokens that mean something to llama.cpp: begin, end, end of a turn, unknown, padding.

A generation stops at what llama.cpp takes for an end: the tokens named `eos`, `eot` and `eom` in the file, and some
that it knows by their text. Hugging Face may list any number. A model whose chat terminator is missing from the file
never stops talking, so all that generation_config.json lists find a place here, as far as there are places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoround_export.gguf.pretokenizer import steps
from autoround_export.gguf.tokenizer_files import TokenizerFiles, as_ids, token_text

_KEY = "tokenizer.ggml.{}_token_id"
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What llama.cpp ends a generation at by its text alone.
_ENDS_BY_TEXT = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    "<｜end▁of▁sentence｜>",
))  # fmt: skip
# What ends a turn in a chat, where a model also has an end of document. In the order of preference.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>", "<|user|>")


def special_fields(files: TokenizerFiles, config: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The ids of special tokens, and whether a BOS is put in front and an EOS at the end."""
    id_of = {token: number for number, token in enumerate(tokens)}
    ids = {name: _named_id(name, files, config, id_of) for name in _NAMES}
    first, last = _template_ends(files, id_of)
    bos_first, eos_last = files.settings.get("add_bos_token"), files.settings.get("add_eos_token")
    if len(first) == 1 and bos_first is not False:
        ids["bos"] = first[0]  # what the tokenizer does is believed more than what its configuration says
    elif first and ids["bos"] is None:
        ids["bos"] = first[0]
    if len(last) == 1 and eos_last is not False and last[0] != ids["eos"]:
        ids["eos"] = last[0]
    # A prefix of several tokens cannot be said in a GGUF file; chat templates that need one spell it out.
    add_bos = bos_first if isinstance(bos_first, bool) else len(first) == 1
    add_eos = eos_last if isinstance(eos_last, bool) else len(last) == 1
    found = {_KEY.format(_NAMES[name]): number for name, number in ids.items() if number is not None}
    found |= _ends(files, config, ids["eos"], tokens)
    return found | {
        "tokenizer.ggml.add_bos_token": bool(add_bos and ids["bos"] is not None),
        "tokenizer.ggml.add_eos_token": bool(add_eos and ids["eos"] is not None),
    }


def template_fields(files: TokenizerFiles) -> dict[str, Any]:
    """The chat templates: the default one, and others by name."""
    fields: dict[str, Any] = {}
    for name, template in files.templates.items():
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
        fields["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{plain}"] = template
    named = [key.removeprefix("tokenizer.chat_template.") for key in fields if key != "tokenizer.chat_template"]
    return fields | ({"tokenizer.chat_templates": named} if named else {})


def special_names(settings: Mapping[str, Any]) -> set[str]:
    """The texts that a tokenizer_config.json calls special: `bos_token` and its like, and the lists of more."""
    names = {token_text(value) for key, value in settings.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        names |= {token_text(value) for value in (more.values() if isinstance(more, Mapping) else more)}
    return {name for name in names if name}


def _named_id(name: str, files: TokenizerFiles, config: Mapping[str, Any], id_of: Mapping[str, int]) -> int | None:
    text = token_text(files.settings.get(f"{name}_token"))
    if text is None and name == "unk":
        model = files.tokenizer.get("model", {})
        text = token_text(model.get("unk_token"))
        if text is None and isinstance(model.get("unk_id"), int):
            return model["unk_id"]
    if text in id_of:
        return id_of[text]
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        ids = [number for number in as_ids(place.get(f"{name}_token_id")) if number < len(id_of)]
        if ids:
            return ids[0]
    return next((number for number in files.eos_ids if number < len(id_of)), None) if name == "eos" else None


def _template_ends(files: TokenizerFiles, id_of: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The special tokens that the post-processor puts before and after a text."""
    for processor in steps(files.tokenizer.get("post_processor"), "processors"):
        if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
            return [processor["cls"][1]], [processor["sep"][1]]
        if processor.get("type") == "TemplateProcessing":
            parts = processor.get("single") or []
            names = [part.get("SpecialToken", {}).get("id") for part in parts]
            middle = names.index(None) if None in names else len(names)
            ends = names[:middle], names[middle + 1 :]
            first, last = ([id_of[name] for name in end if name in id_of] for end in ends)
            return first, last
    return [], []


def _ends(files: TokenizerFiles, config: Mapping[str, Any], eos: int | None, tokens: list[str]) -> dict[str, int]:
    """`eot` and `eom`: the chat terminator, and one more end that llama.cpp would not know by its text."""
    # config.json may be older than the tokenizer: a number of its that is now an ordinary word would cut texts short
    listed = files.eos_ids or [number for number in as_ids(config.get("eos_token_id")) if number in files.added]
    ends = list(dict.fromkeys(number for number in (*listed, *as_ids(eos)) if number < len(tokens)))
    if len(ends) < 2:
        return {}
    texts = {tokens[number]: number for number in ends}
    chat = "".join(files.templates.values())
    turn = next((texts[text] for text in _TURN_ENDS if text in texts), None)
    if turn is None:
        turn = next((number for text, number in texts.items() if text in chat), ends[0] if ends[0] != eos else ends[1])
    found = {_KEY.format("eot"): turn}
    rest = [number for text, number in texts.items() if number not in (eos, turn) and text not in _ENDS_BY_TEXT]
    if "<|eom_id|>" in texts:
        rest.insert(0, texts["<|eom_id|>"])
    return found | ({_KEY.format("eom"): rest[0]} if rest else {})
