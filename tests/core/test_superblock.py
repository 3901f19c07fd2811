"""The record of two-level blocks: its formula by hand, what contradicts itself, digests; its schemes by name."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.errors import UnknownNameError
from autoround_core.records import AffineWeight
from autoround_core.scheme import BLOCK_TYPES, GGUF_TYPES, QuantScheme
from autoround_core.superblock import SuperBlockWeight, group_grid

# data_type -> (bits, group, symmetric, block, bytes of a block, greatest sub-scale or None), from ggml's headers
GGML = {
    "q4_1": (4, 32, False, 32, 20, None), "q5_1": (5, 32, False, 32, 24, None), "q2_k": (2, 16, False, 256, 84, 15),
    "q3_k": (3, 16, True, 256, 110, 31), "q4_k": (4, 32, False, 256, 144, 63), "q5_k": (5, 32, False, 256, 176, 63),
    "q6_k": (6, 16, True, 256, 210, 127),
}  # fmt: skip
CASES = st.tuples(st.sampled_from(list(GGML)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))


def record(name: str, rows: int = 2, blocks: int = 2, seed: int = 0) -> SuperBlockWeight:
    bits, group, sym, block, _, top = GGML[name]
    generator = torch.Generator().manual_seed(seed)
    columns = blocks * block

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def floats() -> torch.Tensor:
        spread = 10 ** torch.empty(rows, blocks).uniform_(-5, 3, generator=generator)
        return (torch.randn(rows, blocks, generator=generator) * spread).to(torch.float16)

    sub_scale = sub_minimum = None
    if top is not None:
        sub_scale = whole(-top - 1 if sym else 0, top, rows, columns // group).to(torch.int8)
        sub_minimum = None if sym else whole(0, top, rows, columns // group).to(torch.uint8)
    codes = whole(0, 2**bits - 1, rows, columns).to(torch.uint8)
    return SuperBlockWeight(GGUF_TYPES[f"GGUF:{name.upper()}"], codes, floats(), None if sym else floats(), sub_scale,
                            sub_minimum)


def truth(weight: SuperBlockWeight) -> np.ndarray:
    """(scale * sub_scale) * (code - zero) - minimum * sub_minimum, one weight at a time in float64."""
    bits, group, sym, block, _, _ = GGML[weight.scheme.data_type]
    values = np.empty(weight.shape)
    for row, column in np.ndindex(*weight.shape):
        step = float(weight.scale[row, column // block])
        if weight.sub_scale is not None:
            step *= int(weight.sub_scale[row, column // group])
        values[row, column] = step * (int(weight.codes[row, column]) - (2 ** (bits - 1) if sym else 0))
        if not sym:
            shift = float(weight.minimum[row, column // block])
            inner = 1 if weight.sub_minimum is None else int(weight.sub_minimum[row, column // group])
            values[row, column] -= shift * inner
    return values


def test_the_table_is_that_of_ggml():
    assert {name: dataclasses.astuple(kind) for name, kind in BLOCK_TYPES.items()} == {
        name: row[:5] for name, row in GGML.items()
    }


@given(CASES)
def test_dequantize_rounds_once(case):
    weight = record(*case)
    exact = torch.from_numpy(truth(weight))
    single = weight.dequantize(torch.float32)
    # products are exact in float32, so only the difference is rounded
    assert single.dtype == torch.float32 and torch.equal(single, exact.to(torch.float32))
    if weight.scheme.sym:
        assert torch.equal(single.double(), exact)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = weight.dequantize(dtype)
        assert found.dtype == dtype and torch.equal(found, single.to(dtype))


@given(CASES)
def test_dequantize_changes_nothing(case):
    weight = record(*case)
    before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    weight.dequantize(torch.float32).fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weight.tensors().items())


@given(CASES)
def test_the_grid_of_a_group(case):
    weight = record(*case)
    step, shift = group_grid(weight.scale, weight.minimum, weight.sub_scale, weight.sub_minimum)
    groups = (weight.shape[0], weight.shape[1] // weight.scheme.group_size)
    assert step.dtype == torch.float32 and tuple(step.shape) == groups
    codes = weight.codes.double().view(*groups, -1) - (2 ** (weight.scheme.bits - 1) if weight.scheme.sym else 0)
    values = step.double().unsqueeze(-1) * codes
    if shift is not None:
        assert shift.dtype == torch.float32 and tuple(shift.shape) == groups
        values -= shift.double().unsqueeze(-1)
    assert torch.equal(values.view(weight.shape), torch.from_numpy(truth(weight)))


def test_numbers_by_hand():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 40] = 9
    weight = SuperBlockWeight(
        QuantScheme.parse("GGUF:Q4_K"), codes, torch.tensor([[0.5]]).half(), torch.tensor([[0.25]]).half(),
        torch.tensor([[1, 3, 0, 0, 0, 0, 0, 63]], dtype=torch.int8), torch.tensor([[0, 2, 0, 0, 0, 0, 0, 63]]).byte(),
    )  # fmt: skip
    values = weight.dequantize(torch.float32)[0]
    assert values[40] == 0.5 * 3 * 9 - 0.25 * 2 and values[41] == -0.5 and values[0] == 0.0
    assert values[255] == -0.25 * 63 and weight.shape == (1, 256)
    codes = torch.full((1, 256), 4, dtype=torch.uint8)
    codes[0, 17] = 0
    weight = SuperBlockWeight(QuantScheme.parse("GGUF:Q3_K"), codes, torch.tensor([[-0.5]]).half(),
                              sub_scale=torch.full((1, 16), -32, dtype=torch.int8))
    values = weight.dequantize(torch.float32)[0]
    assert values[17] == -0.5 * -32 * -4 and values[16] == 0.0


# --- refusals -----------------------------------------------------------------------------------------------

K4, K6, M4 = record("q4_k"), record("q6_k"), record("q4_1")
REFUSED = [
    (K4, "scheme", QuantScheme(4, 32, False), "W4G32-asym is no block type; known: q4_1, q5_1, q2_k"),
    (K4, "codes", K4.codes[0], r"codes of GGUF:Q4_K must be \[out, in\] with in divisible by 256, got \(512,\)"),
    (K4, "codes", K4.codes[:, :500], r"divisible by 256, got \(2, 500\)"),
    (K4, "codes", K4.codes.to(torch.int32), r"codes of GGUF:Q4_K must be \(torch.uint8, \(2, 512\)\), got .*int32"),
    (K4, "codes", K4.codes[:1], r"scale of GGUF:Q4_K must be \(torch.float16, \(1, 2\)\), got .*\(2, 2\)"),
    (K4, "scale", K4.scale.float(), r"scale .*float16.* got .*float32"),
    (K4, "scale", K4.scale.bfloat16(), r"scale .*float16.* got .*bfloat16"),
    (K4, "scale", K4.scale.repeat(1, 8), r"scale .*\(2, 2\).* got .*\(2, 16\)"),
    (K4, "minimum", None, "minimum of GGUF:Q4_K must be .* got None"),
    (K4, "minimum", K4.minimum[:, :1], r"minimum .*\(2, 2\).* got .*\(2, 1\)"),
    (K4, "sub_scale", None, "sub_scale .* got None"),
    (K4, "sub_scale", K4.sub_scale.byte(), "sub_scale .*int8.* got .*uint8"),
    (K4, "sub_scale", K4.sub_scale[:, :8], r"sub_scale .*\(2, 16\).* got .*\(2, 8\)"),
    (K4, "sub_minimum", None, "sub_minimum .* got None"),
    (K4, "sub_minimum", K4.sub_scale, "sub_minimum .*uint8.* got .*int8"),
    (K6, "minimum", K6.scale, "minimum of GGUF:Q6_K must be None, got"),
    (K6, "sub_minimum", K6.sub_scale.byte(), "sub_minimum of GGUF:Q6_K must be None, got"),
    (K6, "sub_scale", K6.sub_scale[:1], r"sub_scale .*\(2, 32\).* got .*\(1, 32\)"),
    (M4, "sub_scale", torch.ones(2, 2, dtype=torch.int8), "sub_scale of GGUF:Q4_1 must be None, got"),
    (M4, "sub_minimum", torch.ones(2, 2, dtype=torch.uint8), "sub_minimum of GGUF:Q4_1 must be None, got"),
    (M4, "codes", M4.codes[:, :40], r"divisible by 32, got \(2, 40\)"),
]


@pytest.mark.parametrize(("weight", "name", "value", "says"), REFUSED)
def test_tensors_that_contradict_the_scheme_or_each_other_are_refused(weight, name, value, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(weight, **{name: value})


@pytest.mark.parametrize("name", GGML)
def test_check_accepts_what_can_be_and_returns_it(name):
    weight = record(name)
    assert weight.check() is weight
    top = dataclasses.replace(weight, codes=torch.full_like(weight.codes, 2**weight.scheme.bits - 1))
    assert top.check() is top


@pytest.mark.parametrize("name", GGML)
def test_check_refuses_numbers_that_cannot_be(name):
    weight, bits = record(name), GGML[name][0]
    codes = weight.codes.clone()
    codes[-1, -1] = 2**bits
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit into {bits} bits"):
        dataclasses.replace(weight, codes=codes).check()
    for field in ("scale",) if weight.minimum is None else ("scale", "minimum"):
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = getattr(weight, field).clone()
            broken[-1, -1] = value
            with pytest.raises(ValueError, match="a scale or a minimum is not finite"):
                dataclasses.replace(weight, **{field: broken}).check()


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        K4.scale = K4.scale * 2
    with pytest.raises((AttributeError, TypeError)):
        K4.state = 1


# --- tensors, to, digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGML)
def test_its_tensors_are_those_that_it_has(name):
    _, _, sym, _, _, top = GGML[name]
    expected = {"codes", "scale"} | (set() if sym else {"minimum"})
    expected |= {"sub_scale"} if top else set()
    expected |= {"sub_minimum"} if top and not sym else set()
    weight = record(name)
    assert weight.tensors().keys() == expected
    assert all(tensor is getattr(weight, field) for field, tensor in weight.tensors().items())


@pytest.mark.parametrize("name", GGML)
def test_on_another_device_it_is_the_same_record(name):
    weight = record(name)
    moved = weight.to(torch.device("cpu"))
    assert isinstance(moved, SuperBlockWeight) and moved.digest() == weight.digest()
    away = weight.to(torch.device("meta"))
    assert {tensor.device.type for tensor in away.tensors().values()} == {"meta"}
    assert away.tensors().keys() == weight.tensors().keys() and away.shape == weight.shape


@pytest.mark.parametrize("name", GGML)
def test_any_difference_changes_the_digest(name):
    weight = record(name)
    assert record(name).digest() == weight.digest() and len(weight.digest()) == 64
    strided = dataclasses.replace(weight, codes=weight.codes.T.contiguous().T)
    assert strided.digest() == weight.digest()
    others = [weight, record(name, rows=4, blocks=1), record(name, rows=1, blocks=4)]
    for field, tensor in weight.tensors().items():
        changed = tensor.clone()
        raw = changed.view(torch.uint8)  # the same memory
        raw[-1, -1] ^= 1
        others.append(dataclasses.replace(weight, **{field: changed}))
    assert len({other.digest() for other in others}) == len(others)


def test_types_of_the_same_tensors_differ_in_the_digest():
    five = dataclasses.replace(K4, scheme=GGUF_TYPES["GGUF:Q5_K"])
    assert five.digest() != K4.digest()
    assert dataclasses.replace(M4, scheme=GGUF_TYPES["GGUF:Q5_1"]).digest() != M4.digest()


# --- schemes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGML)
def test_a_preset_is_read_and_printed(name):
    bits, group, sym = GGML[name][:3]
    for text in (f"GGUF:{name.upper()}", f"  gguf:{name}\n"):
        assert QuantScheme.parse(text) == QuantScheme(bits, group, sym, name)
    assert str(QuantScheme(bits, group, sym, name)) == f"GGUF:{name.upper()}"


@pytest.mark.parametrize(("name", "bits", "size"), [("q4_0", 4, 18), ("q5_0", 5, 22), ("q8_0", 8, 34)])
def test_an_alias_is_an_ordinary_scheme_and_is_printed_as_one(name, bits, size):
    scheme = QuantScheme.parse(f"GGUF:{name}")
    assert scheme == GGUF_TYPES[f"GGUF:{name.upper()}"] == QuantScheme(bits, 32) == QuantScheme.parse(f"W{bits}G32")
    assert str(scheme) == f"W{bits}G32" and scheme.data_type == "int"
    # the file has no zero points, which other formats of the scheme have
    assert scheme.stored_bits(3, 64) == 3 * 2 * (8 * size + bits)
    with pytest.raises(ValueError, match=f"W{bits}G32 is no block type"):
        SuperBlockWeight(scheme, torch.zeros(1, 32).byte(), torch.zeros(1, 1).half())
    AffineWeight(scheme, torch.zeros(1, 32).byte(), torch.ones(1, 1).half(), torch.full((1, 1), 2 ** (bits - 1)).byte())


@pytest.mark.parametrize("text", ["GGUF:", "GGUF:Q7_K", "Q4_K", "GGUF:Q4_K_M", "GGUF Q4_K", "GGUF:F16"])
def test_another_name_is_refused_with_those_that_are(text):
    with pytest.raises(UnknownNameError, match=re.escape(f"`{text}`")) as caught:
        QuantScheme.parse(text)
    assert "GGUF:Q4_K" in str(caught.value) and "GGUF:Q8_0" in str(caught.value)


@pytest.mark.parametrize("name", GGML)
def test_stored_bits_are_those_of_the_file(name):
    _, _, _, block, size, _ = GGML[name]
    scheme = GGUF_TYPES[f"GGUF:{name.upper()}"]
    assert scheme.stored_bits(5, 3 * block) == 5 * 3 * 8 * size


def test_bits_per_weight_by_hand():
    expected = {"Q4_1": 5, "Q5_1": 6, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
    assert {name: GGUF_TYPES[f"GGUF:{name}"].stored_bits(1, 256) / 256 for name in expected} == expected
