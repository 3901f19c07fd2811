"""Quantized activations end to end: what is calibrated, who shares it, and that checkpoints compute the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from autoround_core import AutoRound, UnsupportedError, load
from autoround_core.scheme import PRESETS
from tiny_models import token_ids

WITH_ACTIVATIONS = [name for name, scheme in PRESETS.items() if scheme.activation]
ROWS = token_ids(8, 16)


def run(source, scheme, recipe="rtn", **options):
    return AutoRound(source, scheme=scheme, recipe=recipe, dataset=ROWS.tolist(), **{
        "nsamples": 8, "seqlen": 16, "batch_size": 4, **options
    })  # fmt: skip


@torch.no_grad()
def logits(model):
    return model(input_ids=ROWS[:2]).logits.float()


@pytest.fixture(scope="module")
def wide(saved):
    """A llama whose widths every scheme divides."""
    return saved("llama", hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_the_checkpoint_computes_what_was_tuned(wide, tmp_path, name):
    ours = run(wide, name, "base", iters=4)
    ours.quantize_and_save(tmp_path / "out", "llm_compressor,dense")
    packed = load(tmp_path / "out" / "llm_compressor", backend="reference")
    dense = load(tmp_path / "out" / "dense")
    report = json.loads((tmp_path / "out" / "dense" / "report.json").read_text())
    assert report["verification"]["llm_compressor"]["forward_difference"] == 0
    assert not torch.equal(logits(packed), logits(dense)), "the inputs are not quantized"
    assert all(block["loss_after"] <= block["loss_before"] for block in report["blocks"].values())


def test_errors_while_tuning_count_the_inputs(wide, tmp_path):
    errors = {}
    for name in ("MXFP4", "MXFP4A16"):
        run(wide, name, "opt_rtn").quantize_and_save(tmp_path / name, "llm_compressor")
        report = json.loads((tmp_path / name / "report.json").read_text())
        errors[name] = report["blocks"]["model.layers.0"]["loss_before"]
    assert errors["MXFP4"] > 1.2 * errors["MXFP4A16"]


def greatest_inputs(source):
    """|input| of q_proj in the first block, which is the same along both chains."""
    model, found = load(source), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: found.append(args[0].abs().max().float()))
    with torch.no_grad():
        model(input_ids=ROWS)
    return float(max(found))


@pytest.mark.parametrize(("name", "stored", "value"), [
    ("FP8_STATIC", "input_scale", lambda greatest: greatest / 448),
    ("NVFP4", "input_global_scale", lambda greatest: 448 * 6 / greatest),
])
def test_calibrated_scales(wide, tmp_path, name, stored, value):
    ours = run(wide, name)
    assert ours.plan("llm_compressor").needs_data and not run(wide, "MXFP4").plan("llm_compressor").needs_data
    ours.quantize_and_save(tmp_path / "out", "llm_compressor")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["samples"] == 8
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0."
    parts = ("self_attn.q", "self_attn.k", "mlp.down")
    scale = {part: tensors[f"{prefix}{part}_proj.{stored}"].item() for part in parts}
    assert scale["self_attn.q"] == scale["self_attn.k"] == pytest.approx(value(greatest_inputs(wide)), rel=1e-2)
    assert scale["mlp.down"] != scale["self_attn.q"]
    if name == "NVFP4":
        whole = [tensors[f"{prefix}self_attn.{part}_proj.weight_global_scale"].item() for part in "qkv"]
        assert len(set(whole)) == 1


def test_every_expert_has_a_scale_and_shares_it_with_those_of_its_kind(saved, tmp_path):
    source = saved("qwen3_moe")
    run(source, "FP8_STATIC").quantize_and_save(tmp_path / "out", "llm_compressor")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {kind: {float(tensor) for name, tensor in tensors.items() if name.startswith("model.layers.0.mlp.experts.")
                     and name.endswith(f"{kind}_proj.input_scale")} for kind in ("gate", "up", "down")}
    assert len(scales["gate"]) == len(scales["down"]) == 1 and scales["gate"] == scales["up"] != scales["down"]
    assert min(scales["gate"] | scales["down"]) > 0
    counts = [sum(name.endswith(end) for name in tensors) for end in ("input_scale", "weight_scale")]
    assert counts[0] == counts[1] > 0


def test_the_inputs_of_the_head_stay_in_16_bits(wide):
    with pytest.raises(UnsupportedError, match="`lm_head`.*the inputs of lm_head stay in 16 bits"):
        run(wide, "INT8", quant_lm_head=True).plan("llm_compressor")
    plan = run(wide, "INT8", quant_lm_head=True, layer_config={"lm_head": "W8G32"}).plan("llm_compressor")
    assert str(plan.quantized()["lm_head"].scheme) == "W8G32"


def test_an_override_in_numbers_of_another_kind_keeps_inputs_in_16_bits(wide):
    plan = run(wide, "MXFP4", layer_config={"o_proj": {"bits": 8}, "down_proj": "INT8"}).plan("llm_compressor")
    schemes = {spec.name.rpartition(".")[2]: spec.scheme for spec in plan.specs()}
    assert schemes["o_proj"].activation is None and schemes["o_proj"].bits == 8
    assert schemes["down_proj"] == PRESETS["INT8"] and schemes["q_proj"] == PRESETS["MXFP4"]
