"""The way back: what Transformers loads gives the ids of the tokenizer that the fields came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from autoround_core import CheckpointError
from autoround_export.gguf.pretokenizer import pre_tokenizer_json
from autoround_export.gguf.tokenizer import tokenizer_fields, write_tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
KEY = "tokenizer.ggml."
TEXTS = [
    "Hello world, don't you think it's 2024 or 12345?",
    "def f(x):\n    return x ** 2\n\n\n# done\t\tok  ",
    "Ünïcödé 你好，世界 🚀  multiple   spaces",
]
MARKED = "a<|endoftext|>b <aside> c</s>\r\n"


def same_ids(directory, original, texts=(*TEXTS, MARKED)):
    back = AutoTokenizer.from_pretrained(directory)
    for text in texts:
        for special in (False, True):
            expected = original.encode(text, add_special_tokens=special).ids
            assert back(text, add_special_tokens=special)["input_ids"] == expected, text
    return back


def test_the_tiny_model(tmp_path):
    write_tokenizer(tokenizer_fields(TINY, {"model_type": "qwen3"}, 4100), tmp_path)
    back = same_ids(tmp_path, Tokenizer.from_file(str(TINY / "tokenizer.json")))
    assert len(back) == 4096, "rows without a token are no tokens"
    assert (back.eos_token, back.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "hi"}]
    original = AutoTokenizer.from_pretrained(TINY)
    assert back.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)
    assert back.decode(back(TEXTS[2])["input_ids"]) == TEXTS[2]


@pytest.mark.parametrize("name", ["llama-bpe", "gpt-2", "smollm", "tekken", "deepseek-v3", "falcon"])
def test_byte_level(tmp_path, name):
    pre, steps = pre_tokenizer_json(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": steps}
    size = tokenizer.get_vocab_size()
    content["model"]["ignore_merges"] = pre.ignore_merges
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "<aside>", "special": False})
    if pre.adds_bos:
        start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
        content["post_processor"] = {"type": "TemplateProcessing", "single": [start, text[0]],
                                     "pair": [start, *text], "special_tokens": known}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    fields = tokenizer_fields(tmp_path, {}, 410)
    if pre.adds_bos:  # as llama.cpp takes it from the name
        del fields[f"{KEY}add_bos_token"]
    (tmp_path / "back").mkdir()
    write_tokenizer(fields, tmp_path / "back")
    same_ids(tmp_path / "back", Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


def sentencepiece(prefix):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(tokenizer.to_str())["model"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += [token for token in sorted(learned["vocab"], key=learned["vocab"].get) if token not in texts]
    vocab = {token: i for i, token in enumerate(texts)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": texts[i], "special": True, **plain} for i in range(3)]
    added += [{"id": len(vocab), "content": "<aside>", "special": False, **plain}]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    body = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    post = {"type": "TemplateProcessing", "single": [start, body[0]], "pair": [start, *body],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
    model = learned | {"vocab": vocab, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return {"version": "1.0", "added_tokens": added, "post_processor": post, "model": model,
            "normalizer": {"type": "Sequence", "normalizers": steps}}  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece(prefix)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    fields = tokenizer_fields(tmp_path, {}, 500)
    (tmp_path / "back").mkdir()
    write_tokenizer(fields, tmp_path / "back")
    back = same_ids(
        tmp_path / "back", Tokenizer.from_file(str(tmp_path / "tokenizer.json")), [*TEXTS, MARKED, "x 🦙 <s> y"]
    )
    assert back.decode(back(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]


def test_unigram(tmp_path):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "back").mkdir()
    write_tokenizer(tokenizer_fields(tmp_path, {}, 120), tmp_path / "back")
    same_ids(tmp_path / "back", tokenizer, [TEXTS[0], TEXTS[1], "unknown 🦙 here"])


SMALL = {
    f"{KEY}model": "gpt2", f"{KEY}pre": "qwen2", f"{KEY}tokens": ["a", "b", "ab", " a"], f"{KEY}merges": ["a b"],
}  # fmt: skip


def test_fields_that_say_little(tmp_path):
    write_tokenizer(SMALL, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").ids == [2]
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "kind `bert`; Hugging Face has gpt2, llama, t5"),
        ({"model": None}, "kind `None`"),
        ({"tokens": None}, "no list of tokens"),
        ({"tokens": ["a", 1]}, "no list of tokens"),
        ({"tokens": ["a", "b", "ab", "a"]}, "the token `a` twice"),
        ({"token_type": ["1"] * 4}, "one number for each of the 4 tokens"),
        ({"token_type": [1]}, "one number for each of the 4 tokens"),
        ({"merges": None}, "no merges"),
        ({"merges": ["ab"]}, "the merge `ab`"),
        ({"merges": ["a c"]}, "the merge `a c`"),
        ({"pre": "kimi-k2"}, "rules `kimi-k2`.*qwen2"),
        ({"pre": "no such"}, "rules `no such`"),
        ({"model": "llama"}, "no scores"),
        ({"model": "llama", "scores": [1.0]}, "one number for each"),
        ({"model": "t5"}, "no scores"),
        ({"model": "t5", "scores": [1.0] * 4, "precompiled_charsmap": "x"}, "no list of bytes"),
        ({"model": "t5", "scores": [1.0] * 4, "unknown_token_id": 9}, "no token for what is unknown"),
    ],
)
def test_fields_that_contradict_each_other(tmp_path, changes, reason):
    fields = SMALL | {f"{KEY}{name}": value for name, value in changes.items()}
    with pytest.raises(CheckpointError, match=reason) as caught:
        write_tokenizer({key: value for key, value in fields.items() if value is not None}, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
