"""The type of each tensor: what llama.cpp's own llama_model_quantize decided, and a few of its rules in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autoround_export.gguf.composition import mixture_types
from autoround_export.gguf.mixture import FILE_TYPES, MixtureFacts, choose_types, fitting, is_quantizable
from autoround_export.gguf.outline import FileTensor, Outline

# of data/make_ggml_mixtures.py
GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "ggml_mixtures.json").read_text())
NAMES = {letter: name for name, letter in GOLDEN["letters"].items()}
LLAMA = MixtureFacts("llama", 32, 32, 8)


def shapes_of(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    inner = {f"blk.{i}.{name}": shape for i, kind in enumerate(case["kind"])
             for name, shape in case["kinds"][int(kind)].items()}
    return {name: tuple(shape) for name, shape in {**case["outer"], **inner}.items()}


def expanded(text: str) -> list[str]:
    """`2fE` as [F32, F32, Q6_K]."""
    return [NAMES[letter] for count, letter in re.findall(r"(\d*)(\D)", text) for _ in range(int(count or 1))]


def outline_of(case: dict[str, Any]) -> Outline:
    name = case["architecture"]
    fields = {f"{name}.{key}": value for key, value in case["fields"].items()}
    tensors = tuple(FileTensor(tensor, shape, ()) for tensor, shape in shapes_of(case).items())
    return Outline({"general.architecture": name, **fields}, tensors, {})


@pytest.mark.parametrize("title", GOLDEN["cases"])
def test_every_decision_is_that_of_llama_cpp(title):
    case = GOLDEN["cases"][title]
    outline, names = outline_of(case), list(shapes_of(case))
    assert {key.rstrip("+") for key in case["types"]} == FILE_TYPES.keys()
    different = {}
    for key, letters in case["types"].items():
        wanted = dict(zip(names, expanded(letters), strict=True))
        found = mixture_types(key.rstrip("+"), outline, importance=key.endswith("+"))
        assert found.keys() == wanted.keys()
        different |= {(key, name): (found[name], kind) for name, kind in wanted.items() if found[name] != kind}
    assert different == {}


def test_the_golden_file_tries_what_the_rules_ask():
    cases = GOLDEN["cases"].values()
    assert sum(len(expanded(text)) for case in cases for text in case["types"].values()) > 150_000
    assert {"falcon", "llama", "qwen3", "qwen3moe", "phi3", "deepseek2"} <= {case["architecture"] for case in cases}
    assert {8, 16} <= {case["fields"].get("expert_count") for case in cases}
    used = {kind for case in cases for text in case["types"].values() for kind in expanded(text)}
    assert used == set(GOLDEN["letters"])


# --- some of the rules, in words ----------------------------------------------------------------------------


def decoder(blocks: int, width: int = 4096, inner: int = 14336, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (32000, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (32000, width)
    for i in range(blocks):
        shapes |= {f"blk.{i}.attn_{name}.weight": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (width, inner)
        shapes[f"blk.{i}.attn_norm.weight"] = (width,)
    return shapes


def those(types: dict[str, str], part: str, kind: str) -> list[int]:
    """Blocks whose tensor `part` is a `kind`."""
    return [int(name.split(".")[1]) for name, found in types.items() if part in name and found == kind]


def test_q4_k_m_gives_values_and_down_six_bits_at_both_ends_and_every_third_between():
    types = choose_types("q4_k_m", decoder(32), LLAMA)
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down"):
        assert those(types, part, "Q6_K") == more
        assert those(types, part, "Q4_K") == [i for i in range(32) if i not in more]
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert types["blk.5.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert those(types, part, "Q4_K") == list(range(32))


def test_blocks_are_counted_as_numbers():
    """Block 10 comes after block 9, not after block 1; the order of the tensors in the mapping does not matter."""
    shapes, facts = decoder(12), MixtureFacts("llama", 12, 32, 8)
    assert those(choose_types("q4_k_s", shapes, facts), "attn_v", "Q5_K") == [0, 1, 2, 3]
    assert choose_types("q4_k_s", dict(reversed(shapes.items())), facts) == choose_types("q4_k_s", shapes, facts)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_tied_embedding_is_treated_as_the_output(file_type):
    untied = choose_types(file_type, decoder(2), LLAMA)
    tied = choose_types(file_type, decoder(2, tied=True), LLAMA)
    assert tied["token_embd.weight"] == untied["output.weight"]
    assert untied["token_embd.weight"] == FILE_TYPES[file_type].type


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, "Q4_K"), (16, "Q3_K"), (32, "Q3_K"), (0, "Q3_K")])
def test_q2_k_spends_more_on_values_that_four_heads_share(kv_heads, kind):
    types = choose_types("q2_k", decoder(3), MixtureFacts("llama", 3, 32, kv_heads))
    assert those(types, "attn_v", kind) == [0, 1, 2] and those(types, "ffn_down", "Q3_K") == [0, 1, 2]
    assert those(types, "attn_q", "Q2_K") == [0, 1, 2]


def test_an_importance_brings_minima_to_the_first_down_matrices_of_q4_0():
    for file_type, kind in (("q4_0", "Q4_1"), ("q5_0", "Q5_1")):
        for importance in (True, False):
            facts = MixtureFacts("llama", 32, 32, 8, importance=importance)
            found = those(choose_types(file_type, decoder(32), facts), "ffn_down", kind)
            assert found == ([0, 1, 2, 3] if importance else [])


def test_eight_experts_get_keys_and_values_of_eight_bits():
    types = choose_types("q4_k_m", decoder(4), MixtureFacts("llama", 4, 32, 8, experts=8))
    assert those(types, "attn_k.", "Q8_0") == those(types, "attn_v", "Q8_0") == [0, 1, 2, 3]
    assert those(types, "attn_output", "Q5_K") == [0, 1, 2, 3]


def test_several_down_matrices_in_a_block_go_by_the_block():
    shapes = {f"blk.{i}.ffn_down_{part}.weight": (4, 256, 256) for i in range(16) for part in ("exps", "shexp")}
    types = choose_types("q4_k_s", shapes, MixtureFacts("qwen2moe", 16, 4, 4, experts=4))
    assert those(types, "ffn_down", "Q5_K") == [0, 0, 1, 1]


@pytest.mark.parametrize(("kind", "row", "found"), [
    ("Q4_K", 4096, "Q4_K"), ("Q4_K", 896, "Q5_0"), ("Q5_K", 896, "Q5_1"), ("Q6_K", 896, "Q8_0"), ("Q2_K", 896, "Q4_0"),
    ("Q3_K", 896, "Q4_0"), ("Q8_0", 896, "Q8_0"), ("Q4_0", 896, "Q4_0"), ("Q4_K", 100, "F16"), ("Q8_0", 100, "F16"),
    ("Q4_1", 48, "F16"), ("F32", 7, "F32"), ("F16", 7, "F16"), ("BF16", 7, "BF16"),
])  # fmt: skip
def test_rows_that_no_block_divides_fall_back(kind, row, found):
    assert fitting(kind, row) == found


def test_a_model_of_rows_of_896_falls_back_tensor_by_tensor():
    types = choose_types("q4_k_m", decoder(24, 896, 4864, tied=True), MixtureFacts("qwen2", 24, 14, 2))
    assert types["token_embd.weight"] == "Q8_0" and types["blk.3.attn_q.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "Q6_K" and types["blk.3.ffn_down.weight"] == "Q4_K"  # 4864 = 19 * 256
    assert types["blk.0.attn_v.weight"] == "Q8_0"


@pytest.mark.parametrize(("name", "shape", "quantizable"), [
    ("blk.0.attn_q.weight", (256, 256), True), ("blk.0.ffn_up_exps.weight", (4, 256, 256), True),
    ("token_embd.weight", (256, 256), True), ("blk.0.attn_q.bias", (256,), False),
    ("blk.0.attn_q.bias", (2, 256), False),
    ("blk.0.attn_norm.weight", (256,), False), ("blk.0.attn_q_norm.weight", (4, 64), False),
    ("blk.0.ffn_gate_inp.weight", (8, 256), False), ("blk.0.ffn_gate_inp_shexp.weight", (256,), False),
    ("blk.0.shortconv.conv.weight", (256, 3), False), ("blk.0.ssm_conv1d.weight", (256, 4), False),
])  # fmt: skip
def test_what_is_never_quantized(name, shape, quantizable):
    assert is_quantizable(name, shape) is quantizable
