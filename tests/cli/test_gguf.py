"""The command line and GGUF files: the road of a user, and the mistakes that it must survive."""

from __future__ import annotations

import json
import struct

import pytest

from .conftest import TINY


def quantize(autoround, model, output, *more):
    return autoround("quantize", "--model", model, "--output_dir", output, "--quiet", "--recipe", "rtn", *more)


def test_quantize_info_run_eval(autoround, tmp_path):
    result = autoround("plan", "--model", TINY, "--format", "gguf:q3_k_m")
    assert result.code == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in result.out.splitlines()}
    assert rows["model.embed_tokens"][2] == "GGUF:Q6_K" and rows["model.layers.0.mlp.down_proj"][2] == "GGUF:Q4_K"
    result = quantize(autoround, TINY, tmp_path / "out", "--format", "gguf:q3_k_m")
    assert (result.code, result.err) == (0, "")
    file = tmp_path / "out" / "tiny-qwen3-Q3_K_M.gguf"
    for path in (file, tmp_path / "out"):
        result = autoround("info", path)
        assert result.code == 0 and "format gguf, qwen3" in result.out and "GGUF:Q3_K" in result.out
    result = autoround("run", file, "def read(", "--max_new_tokens", 4)
    assert result.code == 0 and result.out.startswith("def read(")
    result = autoround("eval", file, "--reference", TINY, "--windows", 2, "--seqlen", 64, "--json")
    assert 0 < json.loads(result.out)["kl"]["value"] < 0.3
    result = autoround("convert", file, tmp_path / "dense", "--format", "dense")
    assert result.code == 0 and (tmp_path / "dense" / "model.safetensors").is_file()


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_duplicate(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = list(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4095, "content": words[9]})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_too_many_tokens(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["onemore"] = 4096
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_other_rules(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-c]+"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_rope(model):
    change(model / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


def without_tokenizer(model):
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize(("damage", "says"), [
    (with_duplicate, ["twice"]),
    (with_too_many_tokens, ["4096", "rows"]),
    (with_other_rules, ["[a-c]+", "--gguf_pre"]),
    (with_rope, ["dynamic"]),
    (without_tokenizer, ["tokenizer.json"]),
])  # fmt: skip
def test_models_that_cannot_be_written(autoround, model_copy, tmp_path, damage, says):
    damage(model_copy)
    for command in ("plan", "quantize"):
        more = ["--output_dir", tmp_path / "out", "--quiet"] if command == "quantize" else []
        result = autoround(command, "--model", model_copy, "--format", "gguf:q4_k_m", "--recipe", "rtn", *more)
        assert result.code == 1, result.err
        assert len(result.err.strip().splitlines()) == 1, result.err
        assert all(text in result.err for text in says), result.err
        assert result.out == "" and not (tmp_path / "out").exists()


def test_rules_named_by_the_user(autoround, model_copy, tmp_path):
    with_other_rules(model_copy)
    result = quantize(autoround, model_copy, tmp_path / "out", "--format", "gguf:q8_0", "--gguf_pre", "qwen2")
    assert (result.code, result.err) == (0, "")
    result = quantize(autoround, model_copy, tmp_path / "no", "--format", "gguf:q8_0", "--gguf-pre", "qwen")
    assert result.code == 2 and "qwen2" in result.err and not (tmp_path / "no").exists()
    result = quantize(autoround, model_copy, tmp_path / "no", "--format", "auto_round", "--gguf_pre", "qwen2")
    assert result.code == 2 and "is for no format of this run" in result.err


@pytest.mark.parametrize("content", [
    b"GGUG" + bytes(60),
    struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 1) + bytes(60),
    struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**63) + bytes(60),
    struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62) + bytes(60),
])  # fmt: skip
@pytest.mark.parametrize("command", ["info", "eval"])
def test_broken_files(autoround, tmp_path, command, content):
    (tmp_path / "broken.gguf").write_bytes(content)
    result = autoround(command, tmp_path / "broken.gguf")
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    assert "broken.gguf" in result.err and result.out == ""
