"""Which tokens begin and end a text and a turn, and the chat templates."""

from __future__ import annotations

import json

import pytest

from autoround_export.gguf.special_tokens import special_fields, template_fields
from autoround_export.gguf.tokenizer_files import read_tokenizer_files

KEY = "tokenizer.ggml."
TOKENS = ["a", "<s>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|user|>", "<|observation|>", "[gMASK]", "<|im_end|>"]


def fields(directory, config=None, post=None, generation=None, tokens=TOKENS, **settings):
    tokenizer = {"model": {"type": "BPE", "vocab": {}}, "post_processor": post}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    found = special_fields(read_tokenizer_files(directory), config or {}, tokens)
    return {key.removeprefix(KEY).removesuffix("_token_id"): value for key, value in found.items()}


def around(first=(), last=()):
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in first]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": name, "type_id": 0}} for name in last]
    template = {"type": "TemplateProcessing", "single": single, "pair": []}
    return {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}


def test_names_come_from_the_tokenizer_then_from_the_model(tmp_path):
    found = fields(tmp_path, {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 99}, eos_token={"content": "</s>"})
    assert found == {"bos": 1, "eos": 2, "add_bos_token": False, "add_eos_token": False}
    later = {"added_tokens_decoder": {"3": {"content": "<|eot_id|>", "special": True}}}
    assert fields(tmp_path, {"eos_token_id": 3}, eos_token="</s>", **later)["eot"] == 3
    assert fields(tmp_path, {"text_config": {"eos_token_id": [8, 2]}})["eos"] == 8
    assert fields(tmp_path)["add_bos_token"] is False and "bos" not in fields(tmp_path)


def test_special_tokens_map_is_read_where_the_configuration_is_silent(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "a"}))
    found = fields(tmp_path, eos_token="</s>")
    assert (found["bos"], found["eos"]) == (1, 2)


def test_what_is_put_around_a_text(tmp_path):
    found = fields(tmp_path, post=around(["<s>"], ["</s>"]), bos_token="<s>", eos_token="</s>")
    assert found["add_bos_token"] is True and found["add_eos_token"] is True
    # what the tokenizer does is what counts, not what its configuration calls BOS
    assert fields(tmp_path, post=around(["<s>"]), bos_token="a")["bos"] == 1
    assert fields(tmp_path, post=around(["<s>"]), bos_token="<s>", add_bos_token=False)["add_bos_token"] is False
    assert fields(tmp_path, bos_token="<s>", add_bos_token=True)["add_bos_token"] is True
    assert fields(tmp_path, add_bos_token=True)["add_bos_token"] is False, "there is no BOS to add"
    roberta = {"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}
    found = fields(tmp_path, post=roberta)
    assert (found["bos"], found["eos"], found["add_bos_token"], found["add_eos_token"]) == (1, 2, True, True)


def test_a_prefix_of_two_tokens_cannot_be_said(tmp_path):
    found = fields(tmp_path, post=around(["[gMASK]", "<s>"]))
    assert found["bos"] == 7 and found["add_bos_token"] is False


@pytest.mark.parametrize(
    ("eos", "listed", "expected"),
    [
        ("</s>", 2, {}),  # one end needs no more words
        ("</s>", [2, 3, 4], {"eot": 3, "eom": 4}),  # llama 3, base
        ("<|eot_id|>", [2, 4, 3], {"eot": 3, "eom": 4}),  # llama 3, instruct
        ("</s>", [2, 5, 6], {"eot": 5, "eom": 6}),  # glm
        ("<|im_end|>", [8, 2], {"eot": 8}),  # qwen: the other is an end by its text
        ("</s>", 8, {"eot": 8}),  # a fine-tune that ends its turns otherwise
        ("</s>", [2, 99], {}),  # no such row
    ],
)
def test_ends_of_a_turn(tmp_path, eos, listed, expected):
    found = fields(tmp_path, generation=listed, eos_token=eos)
    assert {name: found[name] for name in ("eot", "eom") if name in found} == expected
    assert found["eos"] == TOKENS.index(eos)


def test_the_turn_ends_with_what_the_template_writes(tmp_path):
    tokens = ["</s>", "<done>", "<turn>"]
    (tmp_path / "chat_template.jinja").write_text("{{ m }}<turn>")
    found = fields(tmp_path, generation=[0, 1, 2], eos_token="</s>", tokens=tokens)
    assert (found["eot"], found["eom"]) == (2, 1)


def test_templates(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    settings = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
    for given, expected in (
        ("plain", {"tokenizer.chat_template": "plain"}),
        (named, {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T",
                 "tokenizer.chat_templates": ["tool_use"]}),
        (None, {}),
    ):  # fmt: skip
        settings.write_text(json.dumps({"chat_template": given}))
        assert template_fields(read_tokenizer_files(tmp_path)) == expected
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert template_fields(read_tokenizer_files(tmp_path)) == {"tokenizer.chat_template": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert template_fields(read_tokenizer_files(tmp_path)) == {
        "tokenizer.chat_template": "jinja",
        "tokenizer.chat_template.rag": "R",
        "tokenizer.chat_templates": ["rag"],
    }
