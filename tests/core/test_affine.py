"""Integer numerics against the same formulas in numpy, one group at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core import affine
from autoround_core.errors import UnsupportedError
from autoround_core.scheme import QuantScheme

F32 = np.float32
SMALLEST = np.float16(1e-5)
GROUP_SIZES = [-1, 1, 5, 16, 32, 48]


def weights(out_features, in_features, seed, magnitude=0.0):
    """Heavy-tailed float32 [out, in], with a dead row and a one-sided one where there is room."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(2, (out_features, in_features)) * 10.0**magnitude
    values[out_features // 2] = 0.0
    values[-1] = -np.abs(values[-1])
    return torch.from_numpy(values.astype(F32))


def split(row, scheme):
    size = len(row) if scheme.group_size == -1 else scheme.group_size
    return [row[i : i + size] for i in range(0, len(row), size)]


def stored(scale):
    scale = np.float16(scale)
    return F32(min(scale, -SMALLEST) if scale < 0 else max(scale, SMALLEST))


def grid(group, scheme):
    """(scale, zero point) of a group, as the docstring of the integer family has them."""
    low, high = min(F32(0), group.min()), max(F32(0), group.max())
    if scheme.sym:
        # the larger side is mapped to the code that only the negative side has
        extreme = -low if high < -low else -high
        return stored(F32(extreme) / F32(2 ** (scheme.bits - 1))), 2 ** (scheme.bits - 1)
    scale = stored(F32(high - low) / F32(2**scheme.bits - 1))
    return scale, int(np.clip(np.rint(F32(-low) / scale), 0, 2**scheme.bits - 1))


def rounded(group, scale, zero, bits):
    return np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1).astype(np.uint8)


CASES = st.tuples(
    st.builds(
        QuantScheme, bits=st.integers(2, 8), group_size=st.sampled_from(GROUP_SIZES), sym=st.booleans()
    ),
    st.integers(1, 5),
    st.integers(1, 80),
    st.integers(0, 2**32 - 1),
    st.sampled_from([-7.0, -4.0, 0.0, 3.0]),
)


@given(CASES)
def test_scales_zero_points_and_codes_of_every_group(case):
    scheme, out_features, in_features, seed, magnitude = case
    weight = weights(out_features, in_features, seed, magnitude)
    low, high = affine.weight_range(affine.to_groups(weight, scheme))
    try:
        scale, zero_point = affine.scale_and_zero(low, high, scheme)
    except UnsupportedError:
        assert float(weight.abs().max()) > 65000  # no group of smaller weights needs such a scale
        return
    record = affine.quantize(weight, scheme, scale, zero_point)
    for row in range(out_features):
        groups = split(weight[row].numpy(), scheme)
        wanted = [grid(group, scheme) for group in groups]
        assert scale[row].tolist() == record.scale[row].tolist() == [float(s) for s, _ in wanted]
        assert zero_point[row].tolist() == record.zero_point[row].tolist() == [z for _, z in wanted]
        codes = [rounded(group, s, z, scheme.bits) for group, (s, z) in zip(groups, wanted, strict=True)]
        assert record.codes[row].tolist() == np.concatenate(codes).tolist()


@given(CASES)
def test_no_weight_is_further_than_a_step_from_its_code(case):
    scheme, *shape, seed, _ = case
    weight = weights(*shape, seed)
    low, high = affine.weight_range(affine.to_groups(weight, scheme))
    scale, zero_point = affine.scale_and_zero(low, high, scheme)
    error = (
        affine.quantize(weight, scheme, scale, zero_point).dequantize(torch.float64) - weight.double()
    ).abs()
    # the end that the grid does not reach: half a step asymmetric, a whole one symmetric; the rounding of the
    # scale, 2**-11 of it or half of float16's smallest step, adds up over 2**bits codes
    for row in range(shape[0]):
        for part, s in zip(split(error[row].numpy(), scheme), scale[row].abs().tolist(), strict=True):
            steps = (1.0 if scheme.sym else 0.5) + 2**scheme.bits * max(2**-11, 2**-25 / s) + 1e-3
            assert part.max() <= steps * s


@given(st.sampled_from(GROUP_SIZES), st.integers(1, 6), st.integers(1, 100))
def test_groups_and_back(group_size, out_features, in_features):
    scheme = QuantScheme(4, group_size)
    weight = torch.arange(1.0, out_features * in_features + 1).view(out_features, in_features)
    groups = affine.to_groups(weight, scheme)
    assert groups.shape == (out_features, scheme.groups(in_features), scheme.group_length(in_features))
    assert groups.dtype == torch.float32
    assert torch.equal(affine.from_groups(groups, in_features), weight)
    # what was added is zero and lies at the end of the last group
    tail = groups.numel() // out_features - in_features
    assert (groups == 0).sum() == tail * out_features
    assert torch.equal(groups[:, -1, groups.shape[2] - tail :], torch.zeros(out_features, tail))
    for row in range(out_features):
        for group, part in zip(groups[row], split(weight[row].numpy(), scheme), strict=True):
            assert group[: len(part)].tolist() == part.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_computed_in_float32(dtype):
    weight = weights(4, 64, 1).to(dtype)
    before = weight.clone()
    scheme = QuantScheme(3, 16, False)
    low, high = affine.weight_range(affine.to_groups(weight, scheme))
    record = affine.quantize(weight, scheme, *affine.scale_and_zero(low, high, scheme))
    same = affine.quantize(weight.float(), scheme, *affine.scale_and_zero(low, high, scheme))
    assert low.dtype == torch.float32 and record.digest() == same.digest()
    assert torch.equal(weight, before)


def test_the_range_always_contains_zero():
    groups = torch.tensor([[[1.0, 2.0], [-3.0, -1.0], [-1.0, 5.0], [0.0, 0.0]]])
    low, high = affine.weight_range(groups)
    assert low.tolist() == [[0.0, -3.0, -1.0, 0.0]] and high.tolist() == [[2.0, 0.0, 5.0, 0.0]]


@pytest.mark.parametrize(
    ("group", "bits", "scale", "codes"),
    [
        # the larger side gets the extra code -2**(bits-1): a positive one turns the sign of the scale
        ([-8.0, 7.0], 4, 1.0, [0, 15]),
        ([8.0, -7.0], 4, -1.0, [0, 15]),
        (
            [8.0, -8.0],
            4,
            -1.0,
            [0, 15],
        ),  # equally far: the positive side wins, the negative end is cut by one step
        ([-2.0, 1.0], 2, 1.0, [0, 3]),
        ([0.0, 0.0], 8, float(SMALLEST), [128, 128]),
        ([0.5, 0.25], 3, -0.125, [0, 2]),
    ],
)
def test_symmetric_examples(group, bits, scale, codes):
    weight, scheme = torch.tensor([group]), QuantScheme(bits, -1)
    low, high = affine.weight_range(affine.to_groups(weight, scheme))
    record = affine.quantize(weight, scheme, *affine.scale_and_zero(low, high, scheme))
    assert record.scale.tolist() == [[scale]] and record.codes.tolist() == [codes]
    assert record.zero_point.tolist() == [[2 ** (bits - 1)]]


@pytest.mark.parametrize(
    ("group", "bits", "scale", "zero", "codes"),
    [
        ([-5.0, 10.0], 4, 1.0, 5, [0, 15]),
        ([3.0, 15.0], 4, 1.0, 0, [3, 15]),  # the range starts at zero, not at the least weight
        ([-15.0, -3.0], 4, 1.0, 15, [0, 12]),
        ([-1.0, 2.0], 2, 1.0, 1, [0, 3]),
        ([0.0, 0.0], 4, float(SMALLEST), 0, [0, 0]),
    ],
)
def test_asymmetric_examples(group, bits, scale, zero, codes):
    weight, scheme = torch.tensor([group]), QuantScheme(bits, -1, False)
    low, high = affine.weight_range(affine.to_groups(weight, scheme))
    record = affine.quantize(weight, scheme, *affine.scale_and_zero(low, high, scheme))
    assert record.scale.tolist() == [[scale]] and record.zero_point.tolist() == [[zero]]
    assert record.codes.tolist() == [codes]


def test_halves_are_rounded_to_even_and_the_offset_is_added_before():
    weight, scheme = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), QuantScheme(4, -1, False)
    scale, zero = torch.ones(1, 1), torch.full((1, 1), 4.0)
    assert affine.quantize(weight, scheme, scale, zero).codes.tolist() == [[4, 6, 6, 4, 2]]
    offset = torch.tensor([[[0.01, -0.01, 0.49, 0.5, -0.49]]])
    assert affine.quantize(weight, scheme, scale, zero, offset).codes.tolist() == [[5, 5, 7, 4, 2]]


def test_codes_are_clamped_on_both_sides():
    weight, scheme = torch.tensor([[-100.0, 100.0]]), QuantScheme(3, -1, False)
    record = affine.quantize(weight, scheme, torch.ones(1, 1), torch.full((1, 1), 3.0))
    assert record.codes.tolist() == [[0, 7]]


@given(st.floats(-70000, 70000, width=32))
def test_a_stored_scale_is_a_float16_away_from_zero_with_its_sign(value):
    scale = torch.tensor([value], dtype=torch.float32)
    if not torch.isfinite(scale.to(torch.float16)).all():
        with pytest.raises(UnsupportedError, match="more than float16 can hold"):
            affine.stored_scale(scale)
        return
    assert affine.stored_scale(scale).item() == stored(value)
    assert scale.item() == np.float32(value)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_scale_beyond_float16_is_refused_with_its_size(bits, sym):
    scheme = QuantScheme(bits, -1, sym)
    low, high = torch.tensor([[-1e7]]), torch.tensor([[0.0]])
    needed = 1e7 / (2 ** (bits - 1) if sym else 2**bits - 1)
    if needed < 65504:
        scale, _ = affine.scale_and_zero(low, high, scheme)
        assert scale.item() == pytest.approx(needed, rel=1e-3)
    else:
        with pytest.raises(UnsupportedError, match=f"needs the scale {needed:g}".replace("+", r"\+")):
            affine.scale_and_zero(low, high, scheme)


def test_weights_that_are_not_numbers_are_refused():
    for value in (float("nan"), float("inf")):
        low, high = affine.weight_range(torch.tensor([[[1.0, value]]]))
        for sym in (True, False):
            with pytest.raises(UnsupportedError):
                affine.scale_and_zero(low, high, QuantScheme(4, -1, sym))
