"""Layers that engines run as one: which they are, when they disagree, and what mends it."""

from __future__ import annotations

import re

import pytest

from autoround_core.fusing import disagreement, fused_layers, promote, sharing_layers, widest
from autoround_core.scheme import QuantScheme

W4, W4A, W8, W4G32 = QuantScheme(4, 64), QuantScheme(4, 64, False), QuantScheme(8, 64), QuantScheme(4, 32)
BLOCK = "model.layers.1"


def test_what_is_fused_in_a_llama_block():
    leaves = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    assert fused_layers(f"{BLOCK}.{leaf}" for leaf in leaves) == {
        f"{BLOCK}.self_attn.qkv_proj": tuple(f"{BLOCK}.self_attn.{x}_proj" for x in "qkv"),
        f"{BLOCK}.mlp.gate_up_proj": (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"),
    }


def test_parts_that_a_model_lacks_make_no_group():
    assert fused_layers(["a.q_proj", "b.k_proj", "a.up_proj", "qkv_proj", "lm_head"]) == {}
    assert fused_layers(["a.q_a_proj", "a.kv_a_proj_with_mqa"]) == {
        "a.fused_qkv_a_proj": ("a.q_a_proj", "a.kv_a_proj_with_mqa")
    }


def test_all_matrices_of_all_experts_are_one_and_shared_experts_are_not_among_them():
    names = [f"{BLOCK}.mlp.experts.{e}.{x}_proj" for e in range(3) for x in ("gate", "up", "down")]
    shared = [f"{BLOCK}.mlp.shared_experts.{x}_proj" for x in ("gate", "up")]
    assert fused_layers([*names, *shared]) == {
        f"{BLOCK}.mlp.experts": tuple(names), f"{BLOCK}.mlp.shared_experts.gate_up_proj": tuple(shared),
    }


def test_names_that_mean_something_in_one_model_type_only():
    names = ["a.feed_forward.w1", "a.feed_forward.w3"]
    assert fused_layers(names) == {}
    assert fused_layers(names, "lfm2") == {"a.feed_forward.w1": tuple(names)}


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [([W4, W8], W8), ([W4, None, W8], None), ([W4, W4G32], W4G32), ([W4, W4A], W4A), ([QuantScheme(4, -1), W4], W4)],
)
def test_the_widest_loses_least(schemes, expected):
    assert widest(schemes) == widest(schemes[::-1]) == expected


def test_promotion_raises_the_parts_and_nothing_else():
    schemes = {"a.q_proj": W4, "a.k_proj": W8, "a.v_proj": W4, "a.o_proj": W4}
    promoted = promote(schemes, fused_layers(schemes))
    assert promoted == {"a.q_proj": W8, "a.k_proj": W8, "a.v_proj": W8, "a.o_proj": W4}


def test_a_disagreement_names_the_line_that_mends_it():
    schemes = {"m.0.q_proj": W4, "m.0.k_proj": W8, "m.0.v_proj": W4}
    reason = disagreement("m.0.qkv_proj", schemes)
    assert "`m.0.qkv_proj`" in reason and "W4G64 for m.0.q_proj, m.0.v_proj; W8G64 for m.0.k_proj" in reason
    assert '"m.0.(q_proj|k_proj|v_proj)": "W8G64"' in reason
    assert all(re.search("m.0.(q_proj|k_proj|v_proj)", name) for name in schemes)
    assert disagreement("m.0.qkv_proj", dict.fromkeys(schemes, W4)) is None


def test_many_experts_make_a_short_sentence():
    schemes = {f"m.experts.{i}.up_proj": W4 if i else None for i in range(64)}
    reason = disagreement("m.experts", schemes)
    assert '"m.experts.": 16 first' in reason and "and 60 more" in reason and len(reason) < 400


def test_experts_share_numbers_by_what_meets_the_same_input():
    names = [f"m.experts.{e}.{x}" for e in range(2) for x in ("w1", "w2", "w3")] + ["m.q_proj", "m.k_proj", "m.o_proj"]
    assert sharing_layers(names) == [
        ("m.experts.0.w1", "m.experts.0.w3", "m.experts.1.w1", "m.experts.1.w3"), ("m.experts.0.w2", "m.experts.1.w2"),
        ("m.q_proj", "m.k_proj"),
    ]  # fmt: skip
