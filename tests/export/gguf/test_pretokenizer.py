"""Names of splitting rules. The expressions here are written as tokenizer.json files in the wild spell them."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, models
from tokenizers import pre_tokenizers as library

from autoround_core import UnknownNameError, UnsupportedError
from autoround_export.gguf.pre_types import ALIASES, OTHER_NAMES, PRE_TYPES
from autoround_export.gguf.pretokenizer import check_name, pre_tokenizer_json, recognize, rules_of

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DEEPSEEK_CODER = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def byte_level(use_regex, prefix=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def document(*steps, ignore_merges=False, normalizer=None, vocab=None, merges=(), added=()):
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    model = {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocab or {"a": 0}, "merges": list(merges)}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model, "added_tokens": list(added)}


DIGITS = {"type": "Digits", "individual_digits": True}
FALCON = ({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(True),
          {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]"))  # fmt: skip
KNOWN = [
    ("llama-bpe", (split(LLAMA3), byte_level(False)), True, "llama"),
    ("llama-bpe", (split(LLAMA3), byte_level(False)), True, "mistral"),
    ("glm4", (split(LLAMA3), byte_level(False)), True, "glm4"),
    ("dbrx", (split(LLAMA3), byte_level(False)), False, "phi3"),
    ("smaug-bpe", (split(LLAMA3), byte_level(False)), False, "smollm3"),
    ("chatglm-bpe", (split(LLAMA3), byte_level(False)), False, "chatglm"),
    ("qwen2", (split(QWEN2), byte_level(False)), False, "qwen3"),
    ("stablelm2", (split(QWEN2), byte_level(False)), False, "stablelm"),
    ("qwen35", (split(QWEN35), byte_level(False)), False, "qwen3_5"),
    ("gpt-2", (byte_level(True),), False, "gpt2"),
    ("olmo", (byte_level(True),), False, "olmo"),
    ("exaone4", (byte_level(True),), False, "exaone4"),
    ("smollm", (DIGITS, byte_level(True)), False, "llama"),
    ("starcoder", (DIGITS, byte_level(True)), False, "starcoder2"),
    ("command-r", (DIGITS, byte_level(True)), False, "cohere2"),
    ("refact", (DIGITS, byte_level(True)), False, "granite"),
    ("exaone", (DIGITS, byte_level(True)), False, "exaone"),
    ("tekken", (split(TEKKEN), byte_level(False)), True, "mistral"),
    ("gpt-4o", (split(GPT4O), byte_level(False)), False, "phi3"),
    ("llama4", (split(GPT4O), byte_level(False)), False, "llama4"),
    ("deepseek-v3", (*map(split, DEEPSEEK3), byte_level(False)), False, "deepseek_v3"),
    ("deepseek-coder", (*map(split, DEEPSEEK_CODER), DIGITS, byte_level(False)), False, "llama"),
    ("falcon", FALCON, False, "falcon"),
]


@pytest.mark.parametrize(("name", "steps", "ignore_merges", "model_type"), KNOWN)
def test_rules_have_their_name(name, steps, ignore_merges, model_type):
    assert recognize(document(*steps, ignore_merges=ignore_merges), model_type) == name


def test_the_expressions_of_transformers_are_known():
    from transformers.models.qwen2 import tokenization_qwen2
    from transformers.models.qwen3_5 import tokenization_qwen3_5

    assert recognize(document(split(tokenization_qwen2.PRETOKENIZE_REGEX), byte_level(False))) == "qwen2"
    assert recognize(document(split(tokenization_qwen3_5.PRETOKENIZE_REGEX), byte_level(False))) == "qwen35"


@pytest.mark.parametrize(
    "pattern",
    [
        QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"),
        QWEN2.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'(?i:[sdmt]|ll|ve|re)"),
        QWEN2.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
    ],
)
def test_spellings_of_one_expression(pattern):
    assert pattern != QWEN2
    assert recognize(document(split(pattern), byte_level(False))) == "qwen2"


def test_what_is_not_matched_removed_is_the_same_only_if_all_is_matched():
    assert recognize(document(split(LLAMA3, "Removed", True), byte_level(False))) == "dbrx"
    with pytest.raises(UnsupportedError, match="Removed, inverted"):
        recognize(document(split(r"\p{N}", "Removed", True), byte_level(True)))
    with pytest.raises(UnsupportedError, match="MergedWithNext"):
        recognize(document(split(LLAMA3, "MergedWithNext"), byte_level(False)))


def test_a_fine_tune_with_other_tokens_keeps_its_name():
    vocab = {token: i for i, token in enumerate(["a", "b", "ab", "anything else"])}
    added = [{"id": 3, "content": "anything else", "special": True}]
    steps = (split(QWEN2), byte_level(False))
    assert (
        recognize(document(*steps, vocab=vocab, merges=[["a", "b"]], added=added, normalizer={"type": "NFC"}))
        == "qwen2"
    )


def test_unknown_rules_are_shown():
    with pytest.raises(UnsupportedError, match=re.escape(r"`\w+x` then `\p{N}`")) as caught:
        recognize(document(split(r"\w+x"), DIGITS, byte_level(False)))
    assert "--gguf_pre NAME" in str(caught.value) and "llama-bpe" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_order_matters():
    with pytest.raises(UnsupportedError):
        recognize(document(byte_level(True), DIGITS))


def test_what_llama_cpp_does_not_do_is_refused():
    with pytest.raises(UnsupportedError, match="space before the text"):
        recognize(document(byte_level(True, prefix=True)))
    with pytest.raises(UnsupportedError, match="Lowercase"):
        lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
        recognize(document(byte_level(True), normalizer=lower))


def test_ignore_merges_without_a_twin_matters_only_for_tokens_that_merges_do_not_make():
    vocab = {"a": 0, "b": 1, "ab": 2}
    steps = (split(QWEN2), byte_level(False))
    assert recognize(document(*steps, ignore_merges=True, vocab=vocab, merges=["a b"])) == "qwen2"
    with pytest.raises(UnsupportedError, match=r"`abb`.*--gguf_pre qwen2"):
        recognize(document(*steps, ignore_merges=True, vocab=vocab | {"abb": 3}, merges=["a b"]))
    added = [{"id": 3, "content": "abb"}]
    assert (
        recognize(document(*steps, ignore_merges=True, vocab=vocab | {"abb": 3}, merges=["a b"], added=added))
        == "qwen2"
    )


def test_names_are_checked():
    assert check_name("tekken") == "tekken" and check_name("default") == "default"
    with pytest.raises(UnknownNameError, match="did you mean `qwen2`"):
        check_name("qwen-2")
    assert set(ALIASES) <= set(OTHER_NAMES) and set(ALIASES.values()) <= {pre.name for pre in PRE_TYPES}


@pytest.mark.parametrize("pre", PRE_TYPES, ids=lambda pre: pre.name)
def test_each_name_gives_its_rules_back(pre):
    found, steps = pre_tokenizer_json(pre.name)
    assert (found.name, found.ignore_merges) == (pre.name, pre.ignore_merges)
    written = document(steps, ignore_merges=pre.ignore_merges)
    again = recognize(written, next(iter(pre.model_types), None))
    assert rules_of({"pre_tokenizer": pre_tokenizer_json(again)[1]}) == found.rules


def pieces(name, text):
    """The words, in bytes, into which Hugging Face's library splits by the rules of a name."""
    tokenizer = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": pre_tokenizer_json(name)[1]}
    words = Tokenizer.from_str(json.dumps(tokenizer)).pre_tokenizer.pre_tokenize_str(text)
    alphabet = dict(zip(bytes_in_order(), range(256), strict=True))
    return [bytes(alphabet[letter] for letter in word) for word, _ in words]


def bytes_in_order():
    """The 256 letters that stand for bytes: printable ones for themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
    assert set(letters) == set(library.ByteLevel.alphabet())
    return letters


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("llama-bpe", "I'm 12345\n\n x", ["I", "'m", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "I'M 12", ["I", "'M", " ", "1", "2"]),
        ("gpt-2", "I'm 12345  x", ["I", "'m", " 12345", " ", " x"]),
        ("smollm", "a 12 b", ["a", " ", "1", "2", " b"]),
        ("tekken", "CamelCase's", ["Camel", "Case", "'s"]),
        ("gpt-4o", "CamelCase's 1234", ["Camel", "Case's", " ", "123", "4"]),
        ("deepseek-v3", "1234漢字a b", ["123", "4", "漢字", "a", " b"]),
        ("deepseek-coder", "a b, 12\n", ["a", " b", ",", " ", "1", "2", "\n"]),
        ("falcon", "a,b 1234", ["a", ",", "b", " ", "123", "4"]),
        ("ufakzeka", "it's", ["it", "'s"]),
        ("minicpm5", "x12345", ["x", "123", "45"]),
        ("bloom", " a, b", [" a", ",", " b"]),
    ],
)
def test_splits_by_hand(name, text, words):
    assert [piece.decode() for piece in pieces(name, text)] == words


@pytest.mark.parametrize("name", sorted({pre.name for pre in PRE_TYPES}))
def test_no_rules_lose_text(name):
    text = "Don't  split\tthe 1234567 words,\r\n\n  日本語のテキスト or émoji 🚀!  "
    assert b"".join(pieces(name, text)).decode() == text


def test_a_name_without_rules_of_its_own():
    assert pre_tokenizer_json("kimi-k2") is None
    assert pre_tokenizer_json("llama3") == pre_tokenizer_json("llama-bpe")
