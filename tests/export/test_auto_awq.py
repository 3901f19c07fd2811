"""Format auto_awq: one scheme, stored zero points, two skip lists, and the way back."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from autoround_core import CheckpointError, QuantScheme
from autoround_export.auto_awq import AutoAwqFormat
from checkpoint_cases import CONFIG, W4, W4A, W8, context, digests, quantization, rewrite, save, spec

FORMAT = AutoAwqFormat()


@pytest.mark.parametrize("scheme", [W4, W4A, QuantScheme(4, -1), QuantScheme(4, 16, False)], ids=str)
def test_all_layers_come_back_with_their_scheme(tmp_path, scheme):
    layers = save(tmp_path, context([scheme, None, scheme], scheme), FORMAT)
    assert FORMAT.recognizes(tmp_path)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


def test_symmetric_layers_have_zero_points_too(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    words = load_file(tmp_path / "model.safetensors")["model.layers.0.fc.qzeros"]
    assert {int(word) & 0xFFFFFFFF for word in words.flatten()} == {0x88888888}


def test_the_configuration_as_engines_read_it(tmp_path):
    save(tmp_path, context([W4A, W4A], W4A), FORMAT)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == CONFIG
    assert quantized.pop("provider").startswith("autoround-export ")
    assert quantized == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True, "sym": False,
    }  # fmt: skip


def test_skipped_layers_stand_in_both_lists_and_under_the_fused_name(tmp_path):
    given = context([W4], kept=["model.layers.0.mlp.gate"])
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    given.layers.extend(spec(name, None) for name in (*parts, "model.layers.0.mlp.gate_proj"))
    given.layers.append(spec("model.layers.0.mlp.up_proj", W4))
    save(tmp_path, given, FORMAT)
    config = quantization(tmp_path)
    skipped = [*parts, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate", "model.layers.0.self_attn.qkv_proj"]
    assert config["modules_to_not_convert"] == skipped
    assert list(config["dynamic"]) == [f"-:^{name}$".replace(".", r"\.") for name in skipped]
    assert set(map(str, config["dynamic"].values())) == {"{}"}


def test_what_is_refused_before_the_run():
    assert FORMAT.why_not(spec("fc", W4A)) is None
    assert "4-bit integers, not W8" in FORMAT.why_not(spec("fc", W8))
    assert "divisible by 8, got 20" in FORMAT.why_not(spec("fc", W4, out_features=20))
    assert "divisible by group_size" in FORMAT.why_not(spec("fc", QuantScheme(4, 48)))
    assert "lm_head in 16 bits" in FORMAT.why_not(spec("lm_head", W4))
    together = [spec("a", W4), spec("b", QuantScheme(4, 64))]
    assert FORMAT.why_not_together(together[:1]) is None
    assert FORMAT.why_not_together(together) == "all layers share one scheme, got W4G32, W4G64"


# --- checkpoints of others ----------------------------------------------------------------------------------


def test_other_names_of_the_same_keys(tmp_path):
    layers = save(tmp_path, context([W4A], W4A), FORMAT)
    # Transformers writes sym under anything
    rewrite(tmp_path, w_bit=4, q_group_size=32, version="GEMM", sym=True, bits=None, group_size=None)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"version": "gemv"}, "uses version `gemv` of AWQ; known: gemm"),
        ({"bits": 8}, "claims 8 bits; version `gemm` of AWQ stores 4"),
        ({"group_size": 64}, "contradict"),
        ({"group_size": None, "q_group_size": None}, "group_size must be .*got None"),
        ({"bits": "four"}, "bits must be .*got four"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path, values, says):
    save(tmp_path, context([W4A], W4A), FORMAT)
    rewrite(tmp_path, **values)
    with pytest.raises(CheckpointError, match=says):
        list(FORMAT.read(tmp_path).layers())
