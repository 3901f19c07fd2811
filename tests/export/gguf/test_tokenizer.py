"""Tokenizer files into fields of a GGUF file. Truth: values by hand, Hugging Face's library, and llama.cpp's rule for
merging by score, written out here."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from autoround_core import ModelError, UnknownNameError, UnsupportedError
from autoround_export.gguf.tokenizer import tokenizer_fields

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KEY = "tokenizer.ggml."


def write(directory, tokenizer=None, **files):
    directory.mkdir(parents=True, exist_ok=True)
    names = {
        "settings": "tokenizer_config.json",
        "generation": "generation_config.json",
        "named": "special_tokens_map.json",
    }
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in files.items():
        (directory / names[name]).write_text(json.dumps(content))
    return directory


def added(number, content, special=True, normalized=False):
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": number, "content": content, "special": special, "normalized": normalized, **plain}


def template(*names, ids, after=()):
    parts = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    parts += [{"Sequence": {"id": "A", "type_id": 0}}]
    parts += [{"SpecialToken": {"id": name, "type_id": 0}} for name in after]
    known = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*names, *after)}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": known}


def byte_level(*tokens, merges=(), added=(), post=None, vocab=None):
    """A byte-level BPE with GPT-2's rules."""
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab or {token: i for i, token in enumerate(tokens)}, "merges": list(merges)}
    return {"version": "1.0", "added_tokens": list(added), "normalizer": None, "pre_tokenizer": byte, "model": model,
            "post_processor": post, "decoder": byte}  # fmt: skip


PREPEND = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
WORDS = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁▁", "lo"]
MERGES = [["▁", "▁"], ["h", "e"], ["l", "l"], ["he", "ll"], ["l", "o"], ["hell", "o"], ["▁", "hello"]]


def sentencepiece(normalizer=PREPEND, pre_tokenizer=None, extra=(), words=WORDS, merges=MERGES):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    marks = [added(i, token) for i, token in enumerate(tokens[:3])] + list(extra)
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": merges,
    }
    return {"version": "1.0", "added_tokens": marks, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "model": model, "post_processor": template("<s>", ids=vocab)}  # fmt: skip


def by_score(fields, text):
    """llama.cpp: of all neighbours whose union is a token, merge those of the highest score, leftmost first."""
    tokens, scores = fields[KEY + "tokens"], fields[KEY + "scores"]
    score = {token: (scores[i], i) for i, token in enumerate(tokens)}
    parts = list((" " if fields[KEY + "add_space_prefix"] else "") + text)
    parts = ["▁" if part == " " else part for part in parts]
    while True:
        pairs = [(score[a + b][0], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        whole = [score[part][1]] if part in score else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
        ids += whole
    return ids


def test_the_tiny_model():
    config = json.loads((TINY / "config.json").read_text())
    fields = tokenizer_fields(TINY, config, config["vocab_size"])
    library = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert fields[KEY + "model"] == "gpt2" and fields[KEY + "pre"] == "qwen2"
    assert fields[KEY + "tokens"] == [library.id_to_token(i) for i in range(4096)]
    assert fields[KEY + "token_type"] == [3, 3, 3] + [1] * 4093
    assert len(fields[KEY + "merges"]) == 3837 and fields[KEY + "merges"][1] == "ĠĠ ĠĠ"
    assert fields[KEY + "eos_token_id"] == 0 and fields[KEY + "padding_token_id"] == 0
    assert fields[KEY + "add_bos_token"] is False and fields[KEY + "add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == (TINY / "chat_template.jinja").read_text()


def test_fields_are_what_the_gguf_library_writes_and_reads(tmp_path):
    fields = tokenizer_fields(TINY, {"model_type": "qwen3"}, 4100)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3")
    for key, value in fields.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        kind[type(value)](key, value)
    writer.add_tensor("none", np.zeros((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: read.fields[key].contents() for key in fields} == fields


def test_rows_without_a_token_get_a_name_of_their_own(tmp_path):
    vocab = {"a": 0, "[PAD3]": 1, "b": 4}
    fields = tokenizer_fields(write(tmp_path, byte_level(vocab=vocab)), {}, 6)
    assert fields[KEY + "tokens"] == ["a", "[PAD3]", "[PAD2]", "[[PAD3]]", "b", "[PAD5]"]
    assert fields[KEY + "token_type"] == [1, 1, 5, 5, 1, 5]


def test_tokens_that_llama_cpp_cannot_read_are_rows_without_a_token(tmp_path):
    fields = tokenizer_fields(write(tmp_path, byte_level("a", "", "a\0b")), {}, 3)
    assert fields[KEY + "tokens"] == ["a", "[PAD1]", "[PAD2]"]
    assert fields[KEY + "token_type"] == [1, 5, 5]


def test_types_of_added_tokens(tmp_path):
    marks = [added(1, "<think>", False), added(2, "<|tool|>", False), added(3, "[INST]"), added(4, "▁x", False)]
    settings = {"eos_token": "b", "added_tokens_decoder": {"6": {"content": "<late>", "special": True}}}
    tokenizer = byte_level(vocab={"a": 0, "b": 5}, added=marks)
    fields = tokenizer_fields(write(tmp_path, tokenizer, settings=settings), {}, 7)
    assert fields[KEY + "tokens"] == ["a", "<think>", "<|tool|>", "[INST]", "▁x", "b", "<late>"]
    assert fields[KEY + "token_type"] == [1, 4, 3, 3, 4, 3, 3]


def test_tokens_and_rows_must_fit(tmp_path):
    write(tmp_path, byte_level("a", "b", added=[added(2, "<x>")]))
    with pytest.raises(ModelError, match="`<x>` with the id 2, but the model's embedding 2 rows"):
        tokenizer_fields(tmp_path, {}, 2)
    write(tmp_path, byte_level("a", "b", added=[added(2, "a")]))
    with pytest.raises(ModelError, match="the token `a` twice"):
        tokenizer_fields(tmp_path, {}, 3)


def test_merges_of_both_notations(tmp_path):
    for merges in (["a b", "ab a"], [["a", "b"], ["ab", "a"]]):
        fields = tokenizer_fields(write(tmp_path, byte_level("a", "b", "ab", "aba", merges=merges)), {}, 4)
        assert fields[KEY + "merges"] == ["a b", "ab a"]
    with pytest.raises(ModelError, match="`ab`, which is no pair"):
        tokenizer_fields(write(tmp_path, byte_level("a", "b", "ab", merges=["ab"])), {}, 3)


def test_scores_are_ranks_of_merges(tmp_path):
    fields = tokenizer_fields(write(tmp_path, sentencepiece()), {}, 273)
    assert fields[KEY + "model"] == "llama" and fields[KEY + "pre"] == "default"
    assert fields[KEY + "token_type"] == [2, 3, 3] + [6] * 256 + [1] * 12 + [5] * 2
    scores = dict(zip(fields[KEY + "tokens"], fields[KEY + "scores"], strict=True))
    expected = {
        "▁": 0,
        "h": 0,
        "▁▁": -1,
        "he": -2,
        "ll": -3,
        "hell": -4,
        "lo": -5,
        "hello": -6,
        "▁hello": -7,
        "<0x41>": 0,
    }
    assert {token: scores[token] for token in expected} == expected
    assert scores["</s>"] == scores["[PAD271]"] < -1e5
    assert fields[KEY + "add_space_prefix"] is True and fields[KEY + "add_bos_token"] is True
    assert (fields[KEY + "bos_token_id"], fields[KEY + "unknown_token_id"]) == (1, 0)


@pytest.mark.parametrize("text", ["hello", "hello hello", "  hello", "hellolo", "hell", "olleh lo", "é\nhello ✓"])
@pytest.mark.parametrize("normalizer", [PREPEND, REPLACE])
def test_merging_by_these_scores_gives_the_ids_of_the_library(tmp_path, text, normalizer):
    fields = tokenizer_fields(write(tmp_path, sentencepiece(normalizer)), {}, 271)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert by_score(fields, text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (PREPEND, None, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
        (None, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, True),
        (REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}, False),
    ],
)
def test_the_space_in_front(tmp_path, normalizer, pre_tokenizer, prefix):
    fields = tokenizer_fields(write(tmp_path, sentencepiece(normalizer, pre_tokenizer)), {}, 271)
    assert fields[KEY + "add_space_prefix"] is prefix


def test_gemmas_added_tokens(tmp_path):
    """Runs of spaces are made by merges, as in Hugging Face; what is found in the raw text is user-defined."""
    extra = [
        added(269, "▁▁", False),
        added(271, "\n\n", False),
        added(272, "▁<x>", False),
        added(273, "<unused1>", False),
    ]
    fields = tokenizer_fields(write(tmp_path, sentencepiece(REPLACE, extra=extra)), {}, 274)
    assert fields[KEY + "tokens"][269:] == ["▁▁", "lo", "\n\n", " <x>", "<unused1>"]
    assert fields[KEY + "token_type"][269:] == [1, 1, 4, 4, 3]
    assert fields[KEY + "scores"][269] == -1.0


def unigram(pieces, **model):
    return {"version": "1.0", "added_tokens": [added(0, "<unk>")], "normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, "model": {
        "type": "Unigram", "unk_id": 0, "vocab": pieces, **model}}  # fmt: skip


def test_unigram(tmp_path):
    pieces = [["<unk>", 0.0], ["▁", -2.0], ["a", -3.5]]
    fields = tokenizer_fields(write(tmp_path, unigram(pieces)), {}, 4)
    assert fields[KEY + "model"] == "t5" and fields[KEY + "token_type"] == [2, 1, 1, 5]
    assert fields[KEY + "scores"][:3] == [0.0, -2.0, -3.5]
    assert fields[KEY + "add_space_prefix"] is True and fields[KEY + "unknown_token_id"] == 0
    pieces += [[token, 0.0] for token in BYTES]
    write(tmp_path, unigram(pieces, byte_fallback=True))
    with pytest.raises(UnsupportedError, match="knows no bytes.*--gguf_pre default"):
        tokenizer_fields(tmp_path, {}, 259)
    fields = tokenizer_fields(tmp_path, {}, 259, "default")
    assert fields[KEY + "model"] == "llama" and fields[KEY + "token_type"][3:] == [6] * 256


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json \(or tokenizer\.model\)"):
        tokenizer_fields(tmp_path, {}, 8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        tokenizer_fields(tmp_path, {}, 8)
    for content, reason in (
        ([], "holds a list"),
        ({"model": {"vocab": []}}, "kind `none`"),
        ({"a": 1}, "has no `model`"),
    ):
        write(tmp_path, content)
        with pytest.raises((ModelError, UnsupportedError), match=reason):
            tokenizer_fields(tmp_path, {}, 8)
    for broken, reason in (({"vocab": ["a"]}, "no vocabulary"), ({"vocab": {"a": "x"}}, "no vocabulary")):
        write(tmp_path, byte_level("a") | {"model": {"type": "BPE"} | broken})
        with pytest.raises(ModelError, match=reason):
            tokenizer_fields(tmp_path, {}, 8)
    write(tmp_path, byte_level("a", added=[{"content": "x"}]))
    with pytest.raises(ModelError, match="without its id"):
        tokenizer_fields(tmp_path, {}, 8)


def test_what_llama_cpp_has_no_counterpart_of(tmp_path):
    write(tmp_path, {"model": {"type": "WordPiece", "vocab": {"a": 0}}})
    with pytest.raises(UnsupportedError, match="kind `WordPiece`.*known: BPE"):
        tokenizer_fields(tmp_path, {}, 1)
    write(tmp_path, byte_level("a") | {"pre_tokenizer": None})
    with pytest.raises(UnsupportedError, match="token for each byte"):
        tokenizer_fields(tmp_path, {}, 1)
    write(tmp_path, sentencepiece({"type": "NFKC"}))
    with pytest.raises(UnsupportedError, match="`NFKC` rewrites text"):
        tokenizer_fields(tmp_path, {}, 271)
    assert tokenizer_fields(tmp_path, {}, 271, "default")[KEY + "model"] == "llama"


def test_the_name_of_the_rules_can_be_given(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level("a")["pre_tokenizer"]]}
    write(tmp_path, byte_level("a") | {"pre_tokenizer": steps})
    with pytest.raises(UnsupportedError, match=r"`x\+`.*--gguf_pre NAME"):
        tokenizer_fields(tmp_path, {}, 1)
    assert tokenizer_fields(tmp_path, {}, 1, "gpt-2")[KEY + "pre"] == "gpt-2"
    with pytest.raises(UnknownNameError, match="did you mean `gpt-2`"):
        tokenizer_fields(tmp_path, {}, 1, "gpt2")
    with pytest.raises(UnsupportedError, match="leave the option out"):
        tokenizer_fields(write(tmp_path, sentencepiece()), {}, 271, "gpt-2")
