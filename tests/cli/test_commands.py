"""The commands on the trained tiny model, as a user runs them."""

from __future__ import annotations

import json

import pytest
import torch

from autoround_core import LinearSpec, QuantScheme, get_registry, select_backend

from .conftest import TINY

TUNING = ["--nsamples", 4, "--seqlen", 32, "--iters", 2, "--batch_size", 2]


def test_quantize_tunes_and_reports(autoround, tmp_path, rows):
    result = autoround(
        "quantize",
        "--model",
        TINY,
        "--scheme",
        "W2G64-asym",
        "--dataset",
        rows,
        *TUNING,
        "--log-json",
        "--output-dir",
        tmp_path / "out",
    )
    assert result.code == 0, result.err
    events = [json.loads(line) for line in result.err.splitlines()]
    assert [e["name"] for e in events if e["event"] == "phase"] == ["load", "calibrate", "quantize", "save", "verify"]
    blocks = [e for e in events if e["event"] == "block"]
    assert [b["index"] for b in blocks] == list(range(6)) and all(b["loss_after"] <= b["loss_before"] for b in blocks)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["iters"] == 2 and report["seed"] == 42
    assert report["device"] == "cpu" and report["product_dtype"] in ("float32", "bfloat16")
    assert report["calibration"]["samples"] == 4 and report["calibration"]["tokens"] == 128
    assert len(report["calibration"]["sha256"]) == 64
    assert report["verification"]["auto_round"]["layers_equal"] == 42
    layer = report["layers"]["model.layers.0.mlp.down_proj"]
    assert layer["scheme"] == "W2G64-asym" and layer["bits_per_weight"] == pytest.approx(2 + 18 / 64)
    assert 0 < layer["relative_weight_error"] < 1
    assert {"load", "calibrate", "quantize", "save", "verify"} == set(report["phases"])
    assert all(row["peak_memory_mb"] > 0 for row in report["phases"].values())
    assert report["versions"]["autoround-core"] and report["bytes"] < report["original_bytes"]


def test_underscores_and_hyphens_are_the_same(autoround):
    underscores = autoround("plan", "--model", TINY, "--group_size", 64, "--batch_size", 2)
    hyphens = autoround("plan", "--model", TINY, "--group-size", 64, "--batch-size", 2)
    assert underscores.code == hyphens.code == 0 and underscores.out == hyphens.out
    assert "W4G64" in underscores.out


def test_plan_says_what_quantize_does(autoround, tmp_path):
    config = '{"layers.0.": 16, "model.layers.1.mlp.down_proj": "W8G64", "o_proj": {"bits": 8}}'
    options = ["--model", TINY, "--recipe", "rtn", "--layer_config", config]
    plan = autoround("plan", *options)
    assert plan.code == 0, plan.err
    planned = {line.split("\t")[0]: line.split("\t") for line in plan.out.splitlines() if line.startswith("model.")}
    assert planned["model.layers.0.self_attn.v_proj"][2] == "16 bit"
    assert planned["model.layers.0.self_attn.v_proj"][5] == "by layer_config"
    # codes of one byte; 256 rows of 8 groups, each with two bytes of scale and one of zero point
    assert planned["model.layers.1.mlp.down_proj"][2:4] == ["W8G64", f"{256 * 512 + 256 * 8 * 3:,}"]
    assert planned["model.layers.5.self_attn.o_proj"][2] == "W8G128"
    assert planned["model.layers.5.mlp.up_proj"][2:4] == ["W4G128", "68,096"]
    for name, shape, scheme in (("1.mlp.down_proj", (512, 256), "W8G64"), ("5.mlp.up_proj", (256, 512), "W4G128")):
        spec = LinearSpec(name, *shape, QuantScheme.parse(scheme))
        backend = select_backend(get_registry().backends().values(), spec, torch.device("cpu"), torch.bfloat16)
        assert planned[f"model.layers.{name}"][4] == backend.name
    result = autoround("quantize", *options, "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: row["scheme"] for name, row in report["layers"].items()} == {n: row[2] for n, row in planned.items()}
    assert {name: f"{row['bytes']:,}" for name, row in report["layers"].items()} == {
        name: row[3] for name, row in planned.items()
    }


def test_plan_computes_nothing(autoround, tmp_path, model_copy):
    """A plan needs no weights to be sound: NaN goes unnoticed because no tensor is read."""
    result = autoround("plan", "--model", model_copy, "--bits", 3)
    assert result.code == 0 and "42 layers quantized at 3.148 bits per weight" in result.out


def test_several_formats_from_one_run(autoround, tmp_path):
    output = tmp_path / "out"
    result = autoround(
        "quantize", "--model", TINY, "--recipe", "rtn", "--format", "auto_round,dense", "--output_dir", output
    )
    assert result.code == 0, result.err
    assert sorted(path.name for path in output.iterdir()) == ["auto_round", "dense"]
    for name in ("auto_round", "dense"):
        files = {path.name for path in (output / name).iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "report.json",
        } <= files
    scores = [
        json.loads(
            autoround(
                "eval",
                output / name,
                "--reference",
                TINY,
                "--dtype",
                "float32",
                "--seqlen",
                64,
                "--windows",
                4,
                "--json",
            ).out
        )
        for name in ("auto_round", "dense")
    ]
    # the dense weights are rounded to bfloat16, those of the records are not
    assert scores[0]["kl"]["value"] == pytest.approx(scores[1]["kl"]["value"], rel=0.05)


def test_overwrite(autoround, tmp_path, checkpoint):
    output = tmp_path / "old"
    output.mkdir()
    (output / "old.txt").write_text("old")
    result = autoround("quantize", "--model", TINY, "--recipe", "rtn", "--output_dir", output, "--overwrite", "--quiet")
    assert result.code == 0 and result.out == "" and result.err == ""
    assert not (output / "old.txt").exists() and not list(tmp_path.glob(".*"))
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "report.json")
    assert names == sorted(path.name for path in output.iterdir() if path.name != "report.json")
    for name in names:
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes(), name


def test_eval(autoround, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((TINY.parents[1] / "README.md").read_text())
    result = autoround("eval", checkpoint, "--reference", TINY, "--text", text, "--seqlen", 64, "--windows", 4)
    assert result.code == 0, result.err
    for figure in ("perplexity", "perplexity of the original", "KL divergence, mean", "99th percentile", "top-1"):
        assert figure in result.out
    assert "±" in result.out
    alone = json.loads(autoround("eval", checkpoint, "--text", text, "--seqlen", 64, "--windows", 2, "--json").out)
    assert alone["kl"] is None and alone["perplexity"]["value"] > 1 and alone["tokens"] == 126


def test_eval_of_the_original_is_zero(autoround, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((TINY.parents[1] / "README.md").read_text())
    score = json.loads(
        autoround("eval", TINY, "--reference", TINY, "--text", text, "--seqlen", 64, "--windows", 2, "--json").out
    )
    assert score["kl"]["value"] == pytest.approx(0, abs=1e-6) and score["top1"]["value"] == 1.0


def test_info(autoround, checkpoint):
    result = autoround("info", checkpoint)
    assert result.code == 0, result.err
    assert "format auto_round, qwen3" in result.out and "4.156 bits per quantized weight" in result.out
    assert "42 layers\tW4G128" in result.out and "by rtn" in result.out


def test_lists(autoround):
    assert "auto_round\t" in autoround("formats").out
    plugins = autoround("plugins").out
    assert "export\tautoround-export" in plugins and "failed" not in plugins
