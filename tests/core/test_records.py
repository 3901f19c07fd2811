"""Records: the one formula against numpy, what contradicts itself, digests, and that nothing changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.records import AffineWeight, QuantizedLayer, tensor_bytes
from autoround_core.scheme import QuantScheme

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
