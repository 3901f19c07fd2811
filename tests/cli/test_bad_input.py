"""Each mistake gives one line that helps, the right exit code, and leaves nothing under the final name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import TINY


def refused(autoround, tmp_path, *arguments, code: int, says: list[str], model=TINY, output=None):
    output = output or tmp_path / "out"
    existed = output.exists()
    before = sorted(path.name for path in output.iterdir()) if existed else None
    result = autoround("quantize", "--model", model, "--output_dir", output, "--quiet", *arguments)
    assert result.code == code, result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    for text in says:
        assert text in result.err, result.err
    assert result.out == ""
    assert output.exists() == existed
    assert not existed or sorted(path.name for path in output.iterdir()) == before
    assert not list(output.parent.glob(".*partial*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "0"], ["0", "2<=x<=8"]),
        (["--bits", "1.5"], ["1.5", "--bits"]),
        (["--bits", "9"], ["9", "2<=x<=8"]),
        (["--group_size", "0"], ["group_size", "positive", "-1", "got 0"]),
        (["--group_size", "-2"], ["group_size", "got -2"]),
        (["--group_size", "7.5"], ["7.5", "--group_size"]),
        (["--scheme", "W4G128-asim"], ["W4G128-asim", "did you mean `W4G128`"]),
        (["--scheme", "W9G128"], ["2 to 8", "got 9"]),
        (["--scheme", "W4G128", "--bits", "3"], ["bits 4", "bits=3"]),
        (["--format", "auto_rond"], ["auto_rond", "did you mean `auto_round`", "dense"]),
        (["--format", "auto_round:auto_gpt"], ["auto_gpt", "did you mean `auto_gptq`"]),
        (["--format", "dense,dense"], ["twice"]),
        (["--recipe", "bset"], ["bset", "did you mean `best`"]),
        (["--algorithm", "signround2"], ["did you mean `signround`"]),
        (["--dataset", "stdlb"], ["stdlb", "did you mean `stdlib`"]),
        (["--gruop_size", "32"], ["--gruop_size", "--group_size"]),
        (["--device", "cuba"], ["cuba", "cannot be used"]),
        (["--iters", "-1"], ["iters", "at least 0"]),
        (["--nsamples", "0"], ["nsamples", "at least 1"]),
        (["--lr", "0"], ["lr", "above 0"]),
        (["--layer_config", "{oops"], ["layer_config", "JSON"]),
        (["--layer_config", "nowhere.json"], ["nowhere.json"]),
        (["--layer_config", '{"layers.0.mlp.gte_proj": 8}'], ["layers.0.mlp.gte_proj"]),
        (["--layer_config", '{"mlp.gte_proj": 16}'], ["mlp.gte_proj", "model.layers"]),
    ],
)
def test_usage(autoround, tmp_path, rows, arguments, says):
    # what is not under test is valid and quick; of an option given twice the last counts
    quick = ["--dataset", rows, "--nsamples", 4, "--seqlen", 32]
    if not {"--recipe", "--algorithm", "--iters", "--lr", "--dataset"} & set(arguments):
        quick += ["--recipe", "rtn"]
    refused(autoround, tmp_path, *quick, *arguments, code=2, says=says)


def test_missing_option(autoround):
    result = autoround("quantize", "--model", TINY)
    assert result.code == 2 and "--output_dir" in result.err and len(result.err.strip().splitlines()) == 1


def test_unknown_command(autoround):
    result = autoround("quantise")
    assert result.code == 2 and "quantise" in result.err


def test_no_such_model(autoround, tmp_path):
    refused(autoround, tmp_path, model=tmp_path / "nothing", code=1, says=["nothing", "no directory"])


def test_no_config(autoround, tmp_path, model_copy):
    (model_copy / "config.json").unlink()
    refused(autoround, tmp_path, model=model_copy, code=1, says=["no config.json"])


def test_no_weights(autoround, tmp_path, model_copy):
    (model_copy / "model.safetensors").unlink()
    refused(autoround, tmp_path, model=model_copy, code=1, says=["model.safetensors"])


def test_pickle_only(autoround, tmp_path, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    refused(autoround, tmp_path, model=model_copy, code=1, says=["pickle", "safetensors"])


@pytest.mark.parametrize("size", [4, 100, 100_000])
def test_truncated(autoround, tmp_path, model_copy, size):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(autoround, tmp_path, "--recipe", "rtn", model=model_copy, code=1, says=["model.safetensors", "complete"])


def test_missing_tensor(autoround, tmp_path, model_copy):
    weights = load_file(model_copy / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    refused(
        autoround, tmp_path, "--recipe", "rtn", model=model_copy, code=1, says=["model.layers.3.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite(autoround, tmp_path, model_copy, value):
    weights = load_file(model_copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][5, 7] = value
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    refused(
        autoround,
        tmp_path,
        "--recipe",
        "rtn",
        model=model_copy,
        code=1,
        says=["model.layers.2.mlp.down_proj.weight", "[5, 7]"],
    )


def test_already_quantized(autoround, tmp_path, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model_copy / "config.json").write_text(json.dumps(config))
    refused(autoround, tmp_path, model=model_copy, code=1, says=["already quantized", "gptq"])


def test_remote_code_is_off_by_default(autoround, tmp_path, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (model_copy / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "it-ran"
    (model_copy / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Model: pass\n")
    refused(autoround, tmp_path, model=model_copy, code=1, says=["--trust_remote_code"])
    assert not trace.exists()


def test_output_is_model(autoround, tmp_path, model_copy):
    refused(
        autoround, tmp_path, "--overwrite", model=model_copy, output=model_copy, code=2, says=["model's own directory"]
    )


def test_output_contains_model(autoround, tmp_path, model_copy):
    refused(autoround, tmp_path, "--overwrite", model=model_copy, output=tmp_path, code=2, says=["contains it"])


def test_output_not_empty(autoround, tmp_path):
    output = tmp_path / "full"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    refused(autoround, tmp_path, "--recipe", "rtn", output=output, code=2, says=["not empty", "--overwrite"])
    assert (output / "precious.txt").read_text() == "keep me"


def test_empty_calibration(autoround, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(autoround, tmp_path, "--dataset", empty, "--iters", 1, code=1, says=["empty"])


def test_small_calibration(autoround, tmp_path, rows):
    refused(
        autoround,
        tmp_path,
        "--dataset",
        rows,
        "--nsamples",
        64,
        "--seqlen",
        32,
        "--iters",
        1,
        code=1,
        says=["4", "64", "--nsamples 4"],
    )


def test_default_dataset_offline(autoround, tmp_path):
    refused(autoround, tmp_path, "--iters", 1, code=1, says=["NeelNanda/pile-10k", "--dataset stdlib"])


def test_scale_overflow_names_the_layer(autoround, tmp_path, model_copy):
    weights = load_file(model_copy / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = 3e38
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    refused(
        autoround,
        tmp_path,
        "--recipe",
        "rtn",
        model=model_copy,
        code=1,
        says=["model.layers.1.mlp.down_proj", "float16"],
    )


def test_layer_the_format_cannot_store(autoround, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    odd = tmp_path / "odd"
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(odd)
    refused(
        autoround,
        tmp_path,
        "--recipe",
        "rtn",
        model=odd,
        code=1,
        says=["model.layers.0.mlp.gate_proj", "72", "--no_strict"],
    )
    result = autoround("quantize", "--model", odd, "--recipe", "rtn", "--no-strict", "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["layers"]["model.layers.0.mlp.gate_proj"]["scheme"] == "16 bit"
    assert "72" in report["layers"]["model.layers.0.mlp.gate_proj"]["reason"]
    assert report["layers"]["model.layers.0.self_attn.q_proj"]["scheme"] == "W4G128"


@pytest.mark.parametrize("command", [["info"], ["eval"], ["run"], ["bench"], ["backends", "--explain"]])
def test_reading_commands(autoround, tmp_path, command):
    prompt = ["hello"] if command == ["run"] else []
    result = autoround(*command, tmp_path / "nothing", *prompt)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1 and "nothing" in result.err
    (tmp_path / "hollow").mkdir()
    result = autoround(*command, tmp_path / "hollow", *prompt)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1 and "config.json" in result.err
