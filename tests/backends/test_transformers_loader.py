"""from_pretrained of Transformers: the numbers of our own loader, the same tensors when saved, nothing random."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import autoround_backends  # noqa: F401  registers the loader
from autoround_backends.transformers_loader import AutoRoundLoader
from autoround_core import AutoRound, CheckpointError, TensorFiles, UnsupportedError, load
from checkpoint_cases import rewrite
from tiny_models import token_ids

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
IDS = token_ids(2, 12)
FORMATS = ["auto_round", "auto_gptq", "auto_awq"]


@pytest.fixture
def quantized(saved, tmp_path):
    """quantized(model, format, scheme, ...) -> a checkpoint directory, rounded to nearest."""

    def make(model="llama", fmt="auto_round", scheme="W4G32", name="out", **options):
        source = model if isinstance(model, Path) else saved(model)
        AutoRound(source, scheme=scheme, recipe="rtn", **options).quantize_and_save(tmp_path / name, fmt)
        return tmp_path / name

    return make


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def from_pretrained(directory, caplog=None, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert isinstance(model.hf_quantizer, AutoRoundLoader)
    return model


def contents(directory):
    files = TensorFiles(directory)
    return {name: files.get(name) for name in files.names()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scheme", ["W4G32", "W4G32-asym", "W2G64-asym", "W8G-1"])
def test_the_logits_are_those_of_load(quantized, fmt, scheme, caplog):
    if fmt == "auto_awq" and not scheme.startswith("W4"):
        pytest.skip("AWQ has 4 bits")
    directory = quantized(fmt=fmt, scheme=scheme)
    with caplog.at_level(logging.WARNING, "transformers"):
        model = from_pretrained(directory)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    assert torch.equal(logits(model), logits(load(directory)))


def test_the_trained_model_runs_with_our_kernels(quantized):
    directory = quantized(TINY, scheme="W4G128")
    model = from_pretrained(directory, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mlp.down_proj).__name__ in ("_NativeLinear", "_Int4Linear")  # by the machine
    assert torch.equal(logits(model), logits(load(directory)))
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 16)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "MXFP4", "MXFP8"])
def test_floats_with_quantized_inputs(quantized, scheme):
    directory = quantized(TINY, scheme=scheme)
    assert torch.equal(logits(from_pretrained(directory)), logits(load(directory)))


@pytest.mark.parametrize("name", ["gpt2", "opt", "starcoder2", "gemma2", "phi3"])
def test_other_architectures(quantized, name):
    directory = quantized(name)
    assert torch.equal(logits(from_pretrained(directory)), logits(load(directory)))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_are_not_random(quantized, name, fmt, caplog):
    directory = quantized(name, fmt)
    with caplog.at_level(logging.WARNING, "transformers"):
        model = from_pretrained(directory, experts_implementation="eager")
    assert "MISSING" not in caplog.text and "UNEXPECTED" not in caplog.text
    assert torch.equal(logits(model), logits(load(directory)))


def test_one_expert_in_16_bits(quantized):
    layer = "model.layers.1.mlp.experts.2.gate_proj"
    directory = quantized("qwen3_moe", layer_config={layer: 16}, fuse="off")
    model = from_pretrained(directory, experts_implementation="eager")
    assert torch.equal(logits(model), logits(load(directory)))
    model.save_pretrained(directory.parent / "again")
    assert same(contents(directory), contents(directory.parent / "again"))


def test_the_experts_of_one_layer_in_16_bits(quantized):
    directory = quantized("mixtral", layer_config={r"layers\.0\..*experts": 16})
    model = from_pretrained(directory, experts_implementation="eager")
    assert torch.equal(logits(model), logits(load(directory)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_skipped_layers_and_mixed_ones(quantized, fmt):
    config = {"layers.0.self_attn.(q|k|v)_proj": 16, "layers.1.mlp.down_proj": 16 if fmt == "auto_awq" else "W8G64"}
    directory = quantized(fmt=fmt, layer_config=config)
    model = from_pretrained(directory)
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert torch.equal(logits(model), logits(load(directory)))


def test_a_quantized_head_and_a_model_without_one(quantized):
    directory = quantized(quant_lm_head=True)
    assert torch.equal(logits(from_pretrained(directory)), logits(load(directory)))
    with torch.no_grad():
        states = AutoModel.from_pretrained(directory)(input_ids=IDS).last_hidden_state
        truth = load(directory).model(input_ids=IDS).last_hidden_state
    assert torch.equal(states, truth)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"},
     {"device_map": {"model": "cpu", "lm_head": "cpu"}}],
    ids=str,
)
def test_options_of_from_pretrained(quantized, options):
    directory = quantized()
    model = from_pretrained(directory, **options)
    assert torch.equal(logits(model), logits(load(directory, dtype=options.get("dtype"))))


def test_several_devices_are_refused(quantized):
    with pytest.raises(UnsupportedError, match=r"one device, device_map names \['cpu', 'disk'\]"):
        from_pretrained(quantized(), device_map={"model": "cpu", "lm_head": "disk"})


def test_configurations_that_ask_for_other_packages(quantized):
    directory = quantized(fmt="auto_gptq")
    rewrite(directory, modules_in_block_to_quantize=[["self_attn.q_proj"]])
    assert torch.equal(logits(from_pretrained(directory)), logits(load(directory)))


def test_the_backend_can_be_named(quantized):
    config = transformers.AutoRoundConfig(backend="reference")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = from_pretrained(quantized(TINY, scheme="W4G128"), quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "_DequantizedLinear"


# --- saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gpt2"])
def test_what_is_saved_again_is_the_same(quantized, tmp_path, fmt, name):
    directory = quantized(name, fmt, layer_config={"layers.0.mlp.down_proj": 16} if name == "llama" else None)
    from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert same(contents(directory), contents(tmp_path / "again"))
    first, again = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "again"))
    assert first["quantization_config"] == again["quantization_config"]
    reloaded = from_pretrained(tmp_path / "again")
    assert torch.equal(logits(reloaded), logits(from_pretrained(directory)))


def test_saved_over_itself(quantized):
    directory = quantized()
    before, model = contents(directory), from_pretrained(directory)
    expected = logits(model)
    model.save_pretrained(directory)
    assert same(contents(directory), before)
    assert torch.equal(logits(from_pretrained(directory)), expected)


def test_a_model_without_its_head_is_saved_under_its_own_names(quantized, tmp_path):
    directory = quantized()
    model = AutoModel.from_pretrained(directory)
    model.save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj.qweight" in contents(tmp_path / "base")
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "base")(input_ids=IDS).last_hidden_state
        assert torch.equal(again, model(input_ids=IDS).last_hidden_state)


def test_sharded_checkpoints(quantized, tmp_path):
    directory = quantized()
    from_pretrained(directory).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(from_pretrained(tmp_path / "shards")), logits(load(directory)))


def test_the_source_must_still_be_there(quantized, tmp_path):
    directory = quantized()
    model = from_pretrained(directory)
    directory.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="which is gone"):
        model.save_pretrained(tmp_path / "again")


# --- bad input ----------------------------------------------------------------------------------------------


def without(directory, end):
    path = directory / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith(end)}, path)


@pytest.mark.parametrize(
    ("fmt", "spoil", "says"),
    [
        ("auto_round", lambda d: rewrite(d, packing_format="auto_round:marlin"), "packing_format `auto_round:marlin`"),
        ("auto_round", lambda d: rewrite(d, bits=8), "contradict W8G32"),
        ("auto_round", lambda d: without(d, "layers.1.mlp.up_proj.scales"), "no tensor `model.layers.1.mlp.up_proj.sc"),
        ("auto_gptq", lambda d: rewrite(d, dynamic={"-:.*down_proj": {}}), "dynamic says that"),
        ("auto_awq", lambda d: rewrite(d, group_size=64), "contradict W4G64"),
        ("auto_round", lambda d: without(d, "layers.0.mlp.up_proj.qweight"), "no weights for `model.layers.0.mlp.up"),
        ("auto_round", lambda d: without(d, "model.norm.weight"), "no weights for `model.norm.weight`"),
        ("auto_round", lambda d: without(d, "lm_head.weight"), "no weights for `lm_head.weight`"),
        ("auto_round", lambda d: rename(d, "layers.1.", "layers.7."), "`model.layers.7.*that is not in the model"),
    ],
)
def test_what_cannot_be_is_refused(quantized, fmt, spoil, says):
    directory = quantized(fmt=fmt)
    spoil(directory)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(directory)


def rename(directory, old, new):
    path = directory / "model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def test_missing_experts_are_no_random_numbers(quantized):
    directory = quantized("qwen3_moe")
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".layers.1.mlp.experts.3." not in k}, path)
    with pytest.raises(CheckpointError, match=r"no weights for the expert `model.layers.1.mlp.experts.3"):
        from_pretrained(directory)


def test_without_formats_the_package_is_named(quantized, monkeypatch):
    directory = quantized()
    monkeypatch.setattr("autoround_core.registry.Registry.formats", lambda self: {})
    with pytest.raises(CheckpointError, match="pip install autoround-export"):
        from_pretrained(directory)
