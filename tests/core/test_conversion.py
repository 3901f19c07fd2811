"""Conversion: the records of the source in another format, or a refusal that leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoround_core import AutoRound, CheckpointError, UnsupportedError, UsageError, convert, load
from autoround_core.errors import OutputError
from autoround_core.loading import find_format
from tiny_models import token_ids


def digests(directory):
    return {layer.name: layer.weight.digest() for layer in find_format(directory).read(directory).layers()}


@torch.no_grad()
def logits(directory):
    return load(directory, backend="reference")(input_ids=token_ids(2, 8)).logits


@pytest.fixture
def quantized(saved, tmp_path):
    def make(scheme="W4G32", fmt="auto_round", model="llama", **options):
        AutoRound(saved(model), scheme=scheme, recipe="rtn", **options).quantize_and_save(tmp_path / "in", fmt)
        return tmp_path / "in"

    return make


FORMATS = ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx"]


@pytest.mark.parametrize("scheme", ["W4G32", "W4G32-asym"])
@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_there_and_back(quantized, tmp_path, scheme, first, second):
    source = quantized(scheme, first, layer_config={"layers.0.mlp.down_proj": 16})
    convert(source, tmp_path / "out", second)
    assert digests(tmp_path / "out") == digests(source)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    convert(tmp_path / "out", tmp_path / "back", first)
    config, again = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "back"))
    assert {k: v for k, v in again.items() if not k.startswith("quantization")} == {
        k: v for k, v in config.items() if not k.startswith("quantization")
    }
    assert (tmp_path / "back" / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size


def test_mixed_schemes_and_a_quantized_head(quantized, tmp_path):
    source = quantized(layer_config={"mlp.down_proj": "W8G32"}, quant_lm_head=True)
    convert(source, tmp_path / "out", "llm_compressor")
    assert digests(tmp_path / "out") == digests(source)
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt2"])
def test_experts_and_transposed_layers(quantized, tmp_path, model):
    source = quantized(model=model)
    convert(source, tmp_path / "out", "auto_gptq")
    convert(source, tmp_path / "dense", "dense")
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    assert torch.allclose(logits(tmp_path / "dense").float(), logits(source).float(), atol=1e-2)


def test_calibrated_scales_come_along(quantized, tmp_path):
    source = quantized("FP8_STATIC", "llm_compressor", dataset=token_ids(8, 16).tolist(), nsamples=8, seqlen=16)
    convert(source, tmp_path / "out", "llm_compressor")
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize(
    ("scheme", "fmt", "says"),
    [
        ("W3G32", "auto_awq", r"layer `model.layers.0.\S+` \(W3G32\) cannot be stored in auto_awq: .*4-bit"),
        ("W4G-1", "mlx", "group sizes 32, 64, 128, not -1"),
        ("W4G32-asym", "auto_gptq:gptq", "asymmetric"),
    ],
)
def test_what_does_not_fit_is_refused(quantized, tmp_path, scheme, fmt, says):
    source = quantized(scheme)
    with pytest.raises(UnsupportedError, match=says):
        convert(source, tmp_path / "out", fmt)
    assert not (tmp_path / "out").exists()


def test_one_scheme_only(quantized, tmp_path):
    with pytest.raises(UnsupportedError, match="all layers share one scheme"):
        convert(quantized(layer_config={"o_proj": "W4G64"}), tmp_path / "out", "auto_awq")


def test_bad_input(quantized, saved, tmp_path):
    with pytest.raises(UsageError, match="holds no quantized layers"):
        convert(saved("llama"), tmp_path / "out", "auto_gptq")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out", "auto_gptq")
    source = quantized()
    with pytest.raises(OutputError, match="own directory"):
        convert(source, source, "auto_gptq", overwrite=True)


def test_a_tensor_that_the_model_has_no_place_for(quantized):
    directory = quantized()
    path = directory / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.mlp.extra.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="`model.layers.0.mlp.extra.weight`, for which the model has no place"):
        load(directory)
