"""Format llm_compressor: what compressed-tensors and engines read in the configuration, and the way back."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from autoround_core import CheckpointError, QuantScheme, Target
from autoround_core.scheme import PRESETS
from autoround_export.llm_compressor import LlmCompressorFormat
from checkpoint_cases import CONFIG, W3A, W4, W4A, W8, context, digests, quantization, rewrite, save, spec

FORMAT = LlmCompressorFormat()
FIRST = "model.layers.0.fc"


@pytest.mark.parametrize("name", [*PRESETS, "W4G32", "W4G32-asym", "W3G64-asym", "W8G-1"])
def test_every_scheme_comes_back(tmp_path, name):
    scheme = QuantScheme.parse(name)
    given = context([])
    given.layers.extend(spec(f"model.layers.{i}.fc", scheme, 256, 128) for i in range(2))
    layers = save(tmp_path, given, FORMAT)
    assert FORMAT.recognizes(tmp_path)
    back = {layer.name: layer for layer in FORMAT.read(tmp_path).layers()}
    assert digests(back.values()) == digests(layers.values())
    for name, layer in layers.items():
        assert (back[name].input_scale is None) == (layer.input_scale is None)
        assert layer.input_scale is None or torch.equal(back[name].input_scale, layer.input_scale)
        assert (back[name].bias is None) == (layer.bias is None)
    assert list(FORMAT.read(tmp_path).rest()) == []
    QuantizationConfig.model_validate(quantization(tmp_path))


def test_the_configuration_as_engines_read_it(tmp_path):
    save(tmp_path, context([W4, None, W8], kept=["model.layers.0.mlp.gate"]), FORMAT)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == CONFIG
    assert quantized.pop("provider").startswith("autoround-export ")
    arguments = {"type": "int", "symmetric": True, "dynamic": False}
    rest = {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    assert quantized == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            # the layers that are named come before the class of all
            "group_0": {"targets": ["model.layers.2.fc"],
                        "weights": {"num_bits": 8, "strategy": "channel", **arguments}, **rest},
            "group_1": {"targets": ["Linear"],
                        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, **arguments}, **rest},
        },
        "ignore": ["model.layers.1.fc", "model.layers.0.mlp.gate", "lm_head"],
        "kv_cache_scheme": None,
    }  # fmt: skip


def test_a_mixture_of_kinds_says_so_and_a_quantized_head_is_not_ignored(tmp_path):
    layers = save(tmp_path, context([W4, PRESETS["INT8"], W3A], head=W8), FORMAT)
    config = quantization(tmp_path)
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == []
    formats = [group["format"] for group in config["config_groups"].values()]
    assert formats == ["int-quantized", "pack-quantized", "pack-quantized", "pack-quantized"]
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


# --- checkpoints of others ----------------------------------------------------------------------------------


def test_patterns_and_keys_left_out(tmp_path):
    layers = save(tmp_path, context([W4, W8]), FORMAT)
    groups = quantization(tmp_path)["config_groups"]
    groups["group_0"]["targets"] = [r"re:.*layers\.1\."]
    for group in groups.values():
        del group["input_activations"], group["output_activations"], group["format"]
    rewrite(tmp_path, config_groups=groups)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


def test_scales_in_bfloat16_stay_what_they_are(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{FIRST}.weight_scale"] = tensors[f"{FIRST}.weight_scale"].bfloat16()
    save_file(tensors, path)
    (layer,) = FORMAT.read(tmp_path).layers()
    assert torch.equal(layer.weight.scale, tensors[f"{FIRST}.weight_scale"])


def change(group, **values):
    return {"config_groups": {"group_0": {**group, **values}}}


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (lambda group: {"config_groups": {}}, "no config_groups"),
        (lambda group: change(group, targets=["model.layers.7.fc"]), f"names the quantized layer `{FIRST}`"),
        (lambda group: change(group, targets=["re:("]), "group_0 is not valid"),
        (lambda group: change(group, weights={**group["weights"], "num_bits": 8}), "contradict W8G32"),
        (lambda group: change(group, weights={**group["weights"], "strategy": "token"}), "strategy 'token'"),
        (lambda group: change(group, weights={**group["weights"], "actorder": "group"}), "reorders features"),
        (lambda group: change(group, weights={**group["weights"], "symmetric": False}), "no weight_zero_point"),
        (lambda group: change(group, weights=None), "group_0 is not valid"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, alter, says):
    save(tmp_path, context([W4]), FORMAT)
    rewrite(tmp_path, **alter(quantization(tmp_path)["config_groups"]["group_0"]))
    with pytest.raises(CheckpointError, match=says):
        list(FORMAT.read(tmp_path).layers())


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("packed")}, path)
    with pytest.raises(CheckpointError, match=f"no tensor `{FIRST}.weight_packed`"):
        list(FORMAT.read(tmp_path).layers())


# --- engines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "scheme", "refusal"),
    [
        ("vllm", W4A, None),
        ("vllm", QuantScheme(4, 48), "group sizes -1, 32, 64, 128"),
        ("vllm:cpu", W4A, None),
        ("vllm:cpu", W8, "on a CPU it runs 4 bits"),
        ("vllm:cpu", PRESETS["INT8"], None),
        ("vllm:cpu", PRESETS["MXFP4"], "INT8 and FP8_DYNAMIC"),
        ("sglang", W3A, "4 and 8 bits"),
        ("transformers:cpu", W4A, "zero points of asymmetric"),
        ("gptqmodel", PRESETS["NVFP4"], "integers only"),
        ("llamacpp", W4, "does not read this format"),
        ("sglang:cpu", W4, "does not read this format on cpu"),
    ],
)
def test_the_verdicts_of_engines(target, scheme, refusal):
    verdict = FORMAT.verdict(Target.parse(target), [spec("fc", scheme, 96), spec("kept", None)])
    assert verdict.refusal is None if refusal is None else refusal in verdict.refusal


def test_odd_bits_need_a_package_in_vllm():
    assert "humming" in FORMAT.verdict(Target.parse("vllm"), [spec("fc", W3A)]).notes[0]
