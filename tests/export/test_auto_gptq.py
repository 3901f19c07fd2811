"""Format auto_gptq: its two versions, what engines read in the configuration, and the way back."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autoround_core import CheckpointError, QuantScheme, UnknownNameError
from autoround_export.auto_gptq import AutoGptqFormat
from checkpoint_cases import CONFIG, W3A, W4, W4A, W8, context, digests, quantization, rewrite, save, spec

FORMAT = AutoGptqFormat()
FIRST = "model.layers.0.fc"


def retensor(directory, **tensors):
    path = directory / "model.safetensors"
    content = load_file(path)
    save_file({k: v for k, v in (content | tensors).items() if v is not None}, path)


@pytest.mark.parametrize(
    ("schemes", "version"),
    [([W4, W4], "gptq"), ([W4, None, W8], "gptq"), ([W4A, W4], "gptq_v2"), ([W3A], "gptq_v2"), ([W8, W4A], "gptq_v2")],
)
def test_the_version_follows_from_the_layers_and_all_come_back(tmp_path, schemes, version):
    layers = save(tmp_path, context(schemes), FORMAT)
    assert quantization(tmp_path)["checkpoint_format"] == version
    assert FORMAT.recognizes(tmp_path)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


def test_both_versions_differ_by_one_in_the_zero_points(tmp_path):
    words = {}
    for version in ("gptq", "gptq_v2"):
        (tmp_path / version).mkdir()
        save(tmp_path / version, context([W4]), FORMAT.variant(version))
        tensors = load_file(tmp_path / version / "model.safetensors")
        words[version] = {int(word) & 0xFFFFFFFF for word in tensors[f"{FIRST}.qzeros"].flatten()}
        assert torch.equal(tensors[f"{FIRST}.g_idx"], torch.arange(64, dtype=torch.int32) // 32)
    assert words == {"gptq": {0x77777777}, "gptq_v2": {0x88888888}}


def test_the_configuration_as_engines_read_it(tmp_path):
    save(tmp_path, context([W4, W4]), FORMAT)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == CONFIG
    assert quantized.pop("provider").startswith("autoround-export ")
    assert quantized == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "sym": True,
        "desc_act": False, "lm_head": False,
    }  # fmt: skip
    assert json.loads((tmp_path / "quantize_config.json").read_text()).items() >= quantized.items()


NAMES = [f"model.layers.{i}.{leaf}" for i in (1, 11) for leaf in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)]  # fmt: skip
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def looked_up(dynamic, name, default):
    """As vLLM and GPTQModel do: the first pattern that matches from the start of the name."""
    for key, entry in dynamic.items():
        if re.match(key[2:], name):
            return None if key.startswith("-:") else {**default, **entry}
    return default


@given(st.lists(st.sampled_from([W4, W8, None, QuantScheme(4, 64)]), min_size=14, max_size=14))
def test_engines_find_each_layer_and_each_fused_one_in_dynamic(tmp_path_factory, schemes):
    given_ = context([])
    given_.layers.extend(spec(name, scheme) for name, scheme in zip(NAMES, schemes, strict=True))
    directory = tmp_path_factory.mktemp("gptq")
    save(directory, given_, FORMAT)
    config = quantization(directory)
    default = {key: config[key] for key in ("bits", "group_size", "sym")}
    as_entry = {
        spec.name: spec.scheme and {key: getattr(spec.scheme, key) for key in default} for spec in given_.layers
    }
    dynamic = config.get("dynamic", {})
    for name, expected in as_entry.items():
        assert looked_up(dynamic, name, default) == expected
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            entries = [as_entry[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in as_entry]
            if leaf == parts[0] and all(entry == entries[0] for entry in entries):
                assert looked_up(dynamic, f"{parent}.{fused}", default) == expected
    assert "modules_in_block_to_quantize" not in config


def test_routers_and_the_head(tmp_path):
    save(tmp_path, context([W4], kept=["model.layers.0.mlp.gate"], head=W8), FORMAT)
    config = quantization(tmp_path)
    assert config["lm_head"] is True
    assert config["dynamic"] == {
        r"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.0\.mlp\.gate$": {},
    }
    assert [layer.weight.scheme for layer in FORMAT.read(tmp_path).layers()] == [W8, W4]


def test_what_is_refused_before_the_run():
    assert FORMAT.why_not(spec("fc", W4)) is None and FORMAT.why_not(spec("fc", W3A)) is None
    assert "2, 3, 4 and 8 bits, not 5" in FORMAT.why_not(spec("fc", QuantScheme(5, 32)))
    assert "asymmetric" in FORMAT.variant("gptq").why_not(spec("fc", W4A))
    assert "divisible by 32, got 40" in FORMAT.why_not(spec("fc", W4, out_features=40))
    with pytest.raises(UnknownNameError, match="version of format auto_gptq.*gptq_v2"):
        FORMAT.variant("v2")


# --- checkpoints of others ----------------------------------------------------------------------------------


def test_a_checkpoint_without_g_idx_or_version_is_version_1(tmp_path):
    layers = save(tmp_path, context([W4]), FORMAT)
    retensor(tmp_path, **{f"{FIRST}.g_idx": None})
    rewrite(tmp_path, checkpoint_format=None)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())
    assert list(FORMAT.read(tmp_path).rest()) == []


def test_act_order_is_refused(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    retensor(tmp_path, **{f"{FIRST}.g_idx": torch.arange(64, dtype=torch.int32).flip(0) // 32})
    with pytest.raises(CheckpointError, match="act order"):
        list(FORMAT.read(tmp_path).layers())


def test_a_zero_point_that_does_not_fit_is_refused(tmp_path):
    # version 1 with an asymmetric zero point of 0, stored as -1: readers differ in what it means
    save(tmp_path, context([W4A]), FORMAT.variant("gptq_v2"))
    tensors = load_file(tmp_path / "model.safetensors")
    retensor(tmp_path, **{f"{FIRST}.qzeros": torch.full_like(tensors[f"{FIRST}.qzeros"], -1)})
    rewrite(tmp_path, checkpoint_format="gptq", sym=False)
    with pytest.raises(CheckpointError, match="zero_point 16 does not fit into 4 bits"):
        list(FORMAT.read(tmp_path).layers())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format `marlin`; known: gptq, gptq_v2"),
        ({"dynamic": {"-:.*fc": {}}}, f"dynamic says that `{FIRST}` is not quantized"),
        ({"dynamic": {"+:(": {}}}, r"dynamic names `\+:\(`, which is no regular expression"),
        ({"bits": 8}, "contradict"),
        ({"group_size": 64}, "contradict"),
        ({"sym": True, "checkpoint_format": "gptq_v2"}, "zero points of symmetric weights must be 8"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, values, says):
    save(tmp_path, context([W4]), FORMAT)
    rewrite(tmp_path, **values)
    with pytest.raises(CheckpointError, match=says):
        list(FORMAT.read(tmp_path).layers())


def test_an_extra_tensor_of_a_layer_is_refused(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    retensor(tmp_path, **{f"{FIRST}.perm": torch.arange(64)})
    with pytest.raises(CheckpointError, match=f"holds `{FIRST}.perm`, which the layout gptq has not"):
        FORMAT.read(tmp_path).rest()


def test_a_newer_version_is_refused(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    rewrite(tmp_path, format_version=2)
    with pytest.raises(CheckpointError, match="format_version 2; this version of autoround-export reads up to 1"):
        FORMAT.read(tmp_path)
