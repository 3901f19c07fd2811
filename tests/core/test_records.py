"""Records: the one formula against numpy, what contradicts itself, digests, and that nothing changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.records import AffineWeight, FloatWeight, QuantizedLayer, tensor_bytes
from autoround_core.scheme import PRESETS, QuantScheme

CASES = st.tuples(
    st.builds(
        QuantScheme,
        bits=st.integers(2, 8),
        group_size=st.sampled_from([-1, 1, 3, 16, 32, 100]),
        sym=st.booleans(),
    ),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)


def record(scheme, out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid, top = (out_features, scheme.groups(in_features)), 2**scheme.bits
    zeros = torch.full(grid, top // 2) if scheme.sym else torch.randint(0, top, grid, generator=generator)
    scale = torch.randn(grid, generator=generator) * 10 ** torch.empty(grid).uniform_(
        -4, 3, generator=generator
    )
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    return AffineWeight(scheme, codes.to(torch.uint8), scale.to(torch.float16), zeros.to(torch.uint8))


def truth(weight):
    """scale * (code - zero_point), one weight at a time in float64."""
    size, (out_features, in_features) = weight.scheme.group_size, weight.shape
    values = np.empty((out_features, in_features))
    for row in range(out_features):
        for column in range(in_features):
            group = 0 if size == -1 else column // size
            difference = int(weight.codes[row, column]) - int(weight.zero_point[row, group])
            values[row, column] = float(weight.scale[row, group]) * difference
    return values


@given(CASES)
def test_dequantize_is_exact_in_float32_and_rounded_once_below(case):
    weight = record(*case)
    exact = truth(weight)  # 11 bits times 9 bits fit into float32, so nothing may be lost there
    single = weight.dequantize(torch.float32)
    assert single.dtype == torch.float32 and np.array_equal(single.numpy().astype(np.float64), exact)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = weight.dequantize(dtype)
        assert got.dtype == dtype and torch.equal(got, torch.from_numpy(exact).to(torch.float32).to(dtype))


@given(CASES)
def test_dequantize_changes_nothing(case):
    weight = record(*case)
    before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    weight.dequantize(torch.float32).fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weight.tensors().items())


GOOD = record(QuantScheme(4, 32, False), 6, 80)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("codes", GOOD.codes[0], r"codes must be \[out, in\]"),
        ("codes", GOOD.codes.to(torch.int32), r"codes .* must be torch.uint8"),
        ("codes", GOOD.codes[:5], "scale .* must be torch.float16"),
        ("codes", GOOD.codes[:, :64], "scale .*(6, 2)"),
        ("scale", GOOD.scale.double(), "scale .* must be torch.float16"),
        ("scale", GOOD.scale[:, :2], "scale .*(6, 3)"),
        ("scale", GOOD.scale.T, "scale .*(6, 3)"),
        ("zero_point", GOOD.zero_point.to(torch.int8), "zero_point .* must be torch.uint8"),
        ("zero_point", GOOD.zero_point[:1], "zero_point .*(6, 3)"),
        ("scheme", QuantScheme(4, 64, False), "scale .*(6, 2)"),
        ("scheme", QuantScheme(4, -1, False), "scale .*(6, 1)"),
    ],
)
def test_tensors_that_contradict_the_scheme_or_each_other_are_refused(name, tensor, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(GOOD, **{name: tensor})


def test_check_accepts_what_can_be_and_returns_it():
    for weight in (GOOD, record(QuantScheme(8, -1, False), 3, 9), record(QuantScheme(3, 16), 3, 40)):
        assert weight.check() is weight


def symmetric():
    return record(QuantScheme(4, 32), 6, 80)


@pytest.mark.parametrize(
    ("weight", "name", "value", "says"),
    [
        (GOOD, "scale", float("inf"), "not finite"),
        (GOOD, "scale", float("nan"), "not finite"),
        (GOOD, "zero_point", 16, "zero_point 16 does not fit into 4 bits"),
        (symmetric(), "zero_point", 7, "symmetric weights must be 8"),
        (symmetric(), "zero_point", 0, "symmetric weights must be 8"),
    ],
)
def test_check_refuses_numbers_that_cannot_be(weight, name, value, says):
    tensor = getattr(weight, name).clone()
    tensor[-1, -1] = value
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(weight, **{name: tensor}).check()


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.scale = GOOD.scale * 2
    with pytest.raises((AttributeError, TypeError)):
        GOOD.state = 1


def test_equal_records_have_equal_digests_wherever_they_lie():
    copies = [
        record(QuantScheme(4, 32, False), 6, 80),
        GOOD.to(torch.device("cpu")),
        AffineWeight(
            GOOD.scheme, GOOD.codes.T.contiguous().T, GOOD.scale.clone(), GOOD.zero_point.T.contiguous().T
        ),
    ]
    assert {copy.digest() for copy in copies} == {GOOD.digest()}
    assert len(GOOD.digest()) == 64


def test_any_difference_changes_the_digest():
    others = [GOOD]
    for name in ("codes", "zero_point"):
        tensor = getattr(GOOD, name).clone()
        tensor[-1, -1] ^= 1
        others.append(dataclasses.replace(GOOD, **{name: tensor}))
    scale = GOOD.scale.clone()
    scale[0, 0] = -scale[0, 0]
    others.append(dataclasses.replace(GOOD, scale=scale))
    others.append(dataclasses.replace(GOOD, scheme=QuantScheme(5, 32, False)))
    others.append(dataclasses.replace(GOOD, scheme=QuantScheme(4, 32, True)))
    # the same bytes in another shape
    narrow = AffineWeight(
        QuantScheme(4, 32),
        GOOD.codes.reshape(12, 40),
        GOOD.scale.new_ones(12, 2),
        GOOD.zero_point.new_ones(12, 2),
    )
    wide = AffineWeight(
        QuantScheme(4, 32),
        GOOD.codes.reshape(8, 60),
        GOOD.scale.new_ones(8, 2),
        GOOD.zero_point.new_ones(8, 2),
    )
    others += [narrow, wide]
    assert len({other.digest() for other in others}) == len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_tensor_bytes_are_row_major_whatever_the_strides(dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    assert tensor_bytes(tensor.T) == b"".join(tensor_bytes(column) for column in tensor.T)
    if dtype != torch.bfloat16:
        assert tensor_bytes(tensor) == tensor.numpy().tobytes()
    assert tensor_bytes(torch.empty(0, dtype=dtype)) == b""


def test_a_layer_has_a_bias_or_none():
    assert QuantizedLayer("model.layers.0.mlp.up_proj", GOOD).bias is None
    assert QuantizedLayer("fc", GOOD, torch.ones(6)).bias.shape == (6,)


# --- floats -------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def float_weight(name, out_features=130, in_features=200, seed=0):
    scheme = PRESETS[name]
    generator = torch.Generator().manual_seed(seed)
    grid = (scheme.row_groups(out_features), scheme.groups(in_features))
    codes = torch.randint(0, 2**scheme.bits, (out_features, in_features), generator=generator)
    codes[codes & 127 == 127] -= 1  # no number in E4M3
    scale = torch.rand(grid, generator=generator) + 0.1
    if scheme.data_type == "mx_fp":
        scale = torch.randint(100, 140, grid, generator=generator).to(torch.uint8)
    if scheme.data_type == "nv_fp":
        scale = (scale * 400).to(torch.float8_e4m3fn)
    extra = torch.tensor([737.5]) if scheme.data_type == "nv_fp" else None
    return FloatWeight(scheme, codes.to(torch.uint8), scale, extra)


@pytest.mark.parametrize("name", [name for name, scheme in PRESETS.items() if scheme.data_type != "int"])
def test_floats_by_the_formula_in_float64(name):
    weight = float_weight(name)
    scheme, (out_features, in_features) = weight.scheme, weight.shape
    rows = out_features if scheme.group_rows == -1 else scheme.group_rows
    length = in_features if scheme.group_size == -1 else scheme.group_size
    found = weight.dequantize(torch.float32)
    for i, j in [(0, 0), (out_features - 1, in_features - 1), (127, 128), (64, 31), (5, 199)]:
        code = int(weight.codes[i, j])
        if scheme.bits == 4:
            number = E2M1[code & 7] * (-1 if code & 8 else 1)
        else:
            sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
            number = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            number = -number if sign else number
        stored = weight.scale[i // rows, j // length]
        scale = 2.0 ** (int(stored) - 127) if scheme.data_type == "mx_fp" else float(stored.float())
        if scheme.data_type == "nv_fp":
            scale /= 737.5
        assert float(found[i, j]) == pytest.approx(number * scale, rel=2e-7)
    assert weight.check() is weight
    assert weight.to(torch.device("cpu")).digest() == weight.digest()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("MXFP4", {"scale": torch.ones(130, 7)}, "scale of MXFP4 must be torch.uint8"),
        ("FP8_BLOCK", {"scale": torch.ones(130, 2)}, r"must be .*\(2, 2\), got"),
        ("NVFP4", {"global_scale": None}, "global_scale belongs to nv_fp"),
        ("FP8_STATIC", {"global_scale": torch.ones(1)}, "global_scale belongs to nv_fp"),
        ("MXFP8", {"codes": torch.zeros(130, 200)}, "codes must be uint8"),
    ],
)
def test_floats_that_contradict_their_scheme(name, change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(float_weight(name), **change)


def test_what_is_no_number_is_found():
    with pytest.raises(ValueError, match="code 16 does not fit"):
        dataclasses.replace(float_weight("MXFP4"), codes=torch.full((130, 200), 16).byte()).check()
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(float_weight("FP8_STATIC"), codes=torch.full((130, 200), 127).byte()).check()
