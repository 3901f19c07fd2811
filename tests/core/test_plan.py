"""The plan: layers that engines run as one, formats that hold one scheme only, and what the target says."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from autoround_core import AutoRound, UnknownNameError, UnsupportedError

BLOCK = "model.layers.0"
MIXED = {f"{BLOCK}.self_attn.k_proj": "W8G32", f"{BLOCK}.mlp.up_proj": 16}


def plan(saved, format="auto_round", model="llama", **options):
    return AutoRound(saved(model), **{"scheme": "W4G32", "recipe": "rtn", **options}).plan(format)


def schemes(result):
    return {spec.name.removeprefix(f"{BLOCK}."): spec.scheme and str(spec.scheme) for spec in result.specs()}


def test_parts_of_a_fused_layer_must_agree(saved):
    with pytest.raises(UnsupportedError, match="engines run `model.layers.0.self_attn.qkv_proj` as one") as caught:
        plan(saved, layer_config=MIXED)
    assert '"model.layers.0.self_attn.(q_proj|k_proj|v_proj)": "W8G32"' in str(caught.value)


def test_the_line_of_the_message_mends_it(saved):
    lines = {f"{BLOCK}.self_attn.(q_proj|k_proj|v_proj)": "W8G32", f"{BLOCK}.mlp.(gate_proj|up_proj)": 16}
    result = schemes(plan(saved, layer_config={**lines, **MIXED}))
    assert {result[f"self_attn.{x}_proj"] for x in "qkv"} == {"W8G32"}


def test_promotion(saved):
    result = schemes(plan(saved, layer_config=MIXED, fuse="promote"))
    assert {result[f"self_attn.{x}_proj"] for x in "qkv"} == {"W8G32"}
    assert result["self_attn.o_proj"] == result["mlp.down_proj"] == "W4G32"
    assert result["mlp.gate_proj"] is result["mlp.up_proj"] is None


@pytest.mark.parametrize(
    "options", [{"fuse": "off"}, {"format": "dense"}, {"format": "mlx"}, {"target": "transformers"}], ids=str
)
def test_where_nothing_is_fused_parts_are_free(saved, options):
    result = schemes(plan(saved, layer_config=MIXED, **options))
    assert result["self_attn.k_proj"] == "W8G32" and result["self_attn.q_proj"] == "W4G32"


def test_a_part_that_cannot_be_stored_keeps_its_whole_in_16_bits(saved):
    # k and v have 16 rows each: GPTQ packs rows by 32
    odd = {"head_dim": 8}
    options = {"strict": False, "fuse": "promote"}
    result = AutoRound(saved("llama", **odd), scheme="W4G32", recipe="rtn", **options).plan("auto_gptq")
    layers = {layer.spec.name.removeprefix(f"{BLOCK}."): layer for layer in result.layers}
    assert layers["self_attn.k_proj"].spec.scheme is layers["self_attn.q_proj"].spec.scheme is None
    assert "divisible by 32" in layers["self_attn.k_proj"].reason
    assert "part of `model.layers.0.self_attn.qkv_proj`" in layers["self_attn.q_proj"].reason
    assert layers["self_attn.o_proj"].spec.scheme is not None


def test_all_experts_of_a_layer_must_agree(saved):
    some = {r"experts\.0\.": "W8G32"}
    with pytest.raises(UnsupportedError, match=r"\"model.layers.0.*experts.\": \"W8G32\""):
        plan(saved, model="qwen3_moe", layer_config=some)
    result = plan(saved, model="qwen3_moe", layer_config=some, fuse="promote")
    assert {str(spec.scheme) for spec in result.specs() if ".experts." in spec.name} == {"W8G32"}


def test_a_format_with_one_scheme_for_all(saved):
    with pytest.raises(UnsupportedError, match="format auto_awq: all layers share one scheme, got W4G32, W4G64"):
        plan(saved, "auto_awq", layer_config={"o_proj": "W4G64"})


@pytest.mark.parametrize(
    ("scheme", "format", "target", "says"),
    [
        ("W4G32-asym", "auto_gptq", "vllm", "asymmetric.*--format auto_round or auto_awq or llm_compressor would"),
        ("W3G32-asym", "auto_round", "sglang", "does not read this format.*no installed format would work"),
        ("W4G32-asym", "llm_compressor", "transformers:cpu", "zero points.*auto_round or auto_gptq or auto_awq"),
        ("W4G32", "auto_round", "llamacpp", "does not read this format"),
    ],
)
def test_the_target_refuses_and_names_what_would_work(saved, scheme, format, target, says):
    with pytest.raises(UnsupportedError, match=says):
        plan(saved, format, scheme=scheme, target=target)


def test_what_the_target_needs_besides_is_noted(saved):
    assert "humming" in plan(saved, scheme="W2G32", target="vllm").notes[0]
    assert plan(saved, target="vllm").notes == ()


def test_unknown_modes_and_targets(saved):
    with pytest.raises(UnknownNameError, match="fuse mode `promot`.*promote"):
        plan(saved, fuse="promot")
    with pytest.raises(UnknownNameError, match="scale sign `negative`"):
        plan(saved, scale_sign="negative")
    with pytest.raises(UnknownNameError, match="target `vlm`"):
        plan(saved, target="vlm")


def test_what_was_promoted_is_what_is_saved(saved, tmp_path):
    run = AutoRound(saved("llama"), scheme="W4G32", recipe="rtn", layer_config=MIXED, fuse="promote")
    run.quantize()
    run.save_quantized(tmp_path / "out", "auto_gptq")
    dynamic = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["dynamic"]
    assert any("qkv_proj" in key and key.startswith("+:") for key in dynamic)
    assert any("gate_up_proj" in key and key.startswith("-:") for key in dynamic)


def test_positive_scales_reach_the_checkpoint(saved, tmp_path):
    AutoRound(saved("llama"), scheme="W4G32", recipe="rtn", scale_sign="positive").quantize_and_save(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all((tensor > 0).all() for name, tensor in tensors.items() if name.endswith(".scales"))


def test_what_was_quantized_survives_a_refused_save(saved, tmp_path):
    run = AutoRound(saved("llama"), scheme="W4G32", recipe="rtn", layer_config=MIXED)
    run.quantize()
    for fmt in ("auto_round", "auto_awq"):
        with pytest.raises(UnsupportedError):
            run.save_quantized(tmp_path / "out", fmt)
    assert run.save_quantized(tmp_path / "out", "mlx").is_dir()
