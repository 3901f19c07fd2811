"""The name of `tokenizer.ggml.pre` for a tokenizer.json, from its rules.

llama.cpp knows chains of splitting rules by name. Its own converter finds the name by hashing the ids of a text, which
fails for every tokenizer with a changed vocabulary. Here the rules themselves are compared: the regular expressions of
the pre-tokenizer, brought to one spelling, with those of `pre_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoround_core import UnsupportedError, unknown_name
from autoround_export.gguf.pre_types import ALIASES, DIGIT, GPT2, NUMBER, OTHER_NAMES, PRE_TYPES, PUNCTUATION, PreType

# Spellings of one and the same expression. Control characters first: JSON may hold them or their escapes.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    (r"\/", "/"),
    (r"'(?i:[sdmt]|ll|ve|re)", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
)
# Unicode's composition is not undone by llama.cpp either, and changes only text that was not composed.
_HARMLESS_NORMALIZERS = ("NFC",)
_COVERS_ALL = r"|\s+"
# Tokenizers of these names compose characters (NFC) before they split.
_COMPOSING = ("qwen2", "qwen35", "stablelm2", "olmo")


def known_names() -> tuple[str, ...]:
    """Every name that `--gguf_pre` may give."""
    return tuple(sorted({pre.name for pre in PRE_TYPES}.union(OTHER_NAMES)))


def check_name(pre: str) -> str:
    """`pre` itself. Raises UnknownNameError, which offers the closest name."""
    if pre not in known_names():
        raise unknown_name("pre-tokenizer of llama.cpp", pre, known_names())
    return pre


def recognize(tokenizer_json: Mapping[str, Any], model_type: str | None = None) -> str:
    """The name whose rules are those of a byte-level BPE tokenizer.

    Where several names have the same rules, the one with the same `ignore_merges` is taken, and among these the one
    made for `model_type`. Raises UnsupportedError for rules that no name has.
    """
    rules = rules_of(tokenizer_json)
    same = [pre for pre in PRE_TYPES if pre.rules == rules]
    if not same:
        raise _unknown(rules)
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    twins = [pre for pre in same if pre.ignore_merges == ignore_merges]
    if not twins and (split := _unmergeable(tokenizer_json)) is not None:
        raise UnsupportedError(
            f"the tokenizer's rules are those of llama.cpp's `{same[0].name}`, but its ignore_merges is "
            f"{str(ignore_merges).lower()}, which changes how `{split}` is split; to accept that, pass "
            f"`--gguf_pre {same[0].name}`"
        )
    candidates = twins or same
    return next((pre for pre in candidates if model_type in pre.model_types), candidates[0]).name


def rules_of(tokenizer_json: Mapping[str, Any]) -> tuple[str, ...]:
    """The chain of rules in the spelling of `pre_types`. Raises UnsupportedError for steps that have none."""
    for normalizer in steps(tokenizer_json.get("normalizer"), "normalizers"):
        if normalizer.get("type") not in _HARMLESS_NORMALIZERS:
            raise UnsupportedError(
                f"the tokenizer's normalizer `{normalizer.get('type')}` rewrites text, which llama.cpp does not do for "
                "this kind of tokenizer; to write the file nevertheless, pass `--gguf_pre` with a name of llama.cpp"
            )
    rules = [_rule(step) for step in steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")]
    return tuple(rule for rule in rules if rule)


def steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The members of a part of tokenizer.json: of a sequence (of sequences) in order, of a single one itself."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for member in part.get(key) or () for step in steps(member, key)]


def pre_tokenizer_json(name: str) -> tuple[PreType, dict[str, Any]] | None:
    """The inverse of `recognize`: a type of that name, and the pre-tokenizer of a tokenizer.json; None if unknown."""
    name = ALIASES.get(name, name)
    pre = next((pre for pre in PRE_TYPES if pre.name == name), None)
    if pre is None:
        return None
    members = [_step(rule) for rule in pre.rules]
    if GPT2 not in pre.rules:
        members.append(_byte_level(use_regex=False))
    return pre, {"type": "Sequence", "pretokenizers": members}


def composes(name: str) -> bool:
    """Whether tokenizers of that name bring text to Unicode's composed form first."""
    return ALIASES.get(name, name) in _COMPOSING


def _rule(step: Mapping[str, Any]) -> str:
    """One step as an expression; empty for a step that splits nothing."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space", True):
            raise UnsupportedError(
                "the tokenizer puts a space before the text (ByteLevel with add_prefix_space), which llama.cpp does "
                "not do for this kind of tokenizer; to write the file nevertheless, pass `--gguf_pre`"
            )
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return DIGIT if step.get("individual_digits") else NUMBER
    if kind == "Punctuation":
        return PUNCTUATION if step.get("behavior") == "Contiguous" else f"punctuation, {step.get('behavior')}"
    pattern = step.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping) and "Regex" in pattern:
        return _split_rule(str(pattern["Regex"]), step)
    return f"{kind} {pattern}" if pattern else str(kind)


def _split_rule(pattern: str, step: Mapping[str, Any]) -> str:
    for spelling, ours in _SPELLINGS:
        pattern = pattern.replace(spelling, ours)
    behavior, invert = step.get("behavior"), bool(step.get("invert", False))
    # Where the expression matches everything, "what it matches, and nothing between" is the same as to isolate.
    if (behavior, invert) == ("Isolated", False) or (
        (behavior, invert) == ("Removed", True) and pattern.endswith(_COVERS_ALL)
    ):
        return pattern
    return f"{pattern} ({behavior}{', inverted' if invert else ''})"


def _step(rule: str) -> dict[str, Any]:
    if rule == GPT2:
        return _byte_level(use_regex=True)
    if rule == PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    if rule in (DIGIT, NUMBER):
        return {"type": "Digits", "individual_digits": rule == DIGIT}
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _unmergeable(tokenizer_json: Mapping[str, Any]) -> str | None:
    """A token that merges alone do not make, the only kind for which `ignore_merges` matters."""
    from tokenizers.models import BPE

    model = tokenizer_json["model"]
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model.get("merges") or ()]
    bpe = BPE(vocab=dict(model["vocab"]), merges=merges)
    # added tokens are cut out of the text before, and never merged
    added = {token["content"] for token in tokenizer_json.get("added_tokens") or ()}
    words = (token for token in model["vocab"] if len(token) > 1 and token not in added)
    return next((token for token in words if [piece.value for piece in bpe.tokenize(token)] != [token]), None)


def _unknown(rules: tuple[str, ...]) -> UnsupportedError:
    shown = " then ".join(f"`{rule}`" for rule in rules) or "nothing"
    names = ", ".join(dict.fromkeys(pre.name for pre in PRE_TYPES))
    return UnsupportedError(
        f"no pre-tokenizer of llama.cpp is known to split text by {shown}; if one of them gives the same ids, pass "
        f"`--gguf_pre NAME` (known: {names})"
    )
