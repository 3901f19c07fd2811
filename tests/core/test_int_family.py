"""The integer family: what tuning sees is stored, gradients are those of autograd, the search never loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_core.errors import UnsupportedError
from autoround_core.int_family import IntFamily
from autoround_core.scheme import PRESETS, ActivationScheme, QuantScheme

FAMILY = IntFamily()
SCHEMES = st.builds(
    QuantScheme,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 7, 16, 32, 100]),
    sym=st.booleans(),
)
CASES = st.tuples(SCHEMES, st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))


def make_weight(out_features, in_features, generator):
    """float32 [out, in], heavy-tailed; with a dead row, a dead group, a huge outlier where there is room."""
    shape = (out_features, in_features)
    weight = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.05)
    weight[out_features // 2] = 0.0
    weight[0, : in_features // 2] = 0.0
    weight[-1, -1] = -300.0
    return weight * 0.05


def tuned(case):
    """(tunable, weight, generator) with offsets a little beyond half a step and ranges anywhere in [0, 1]."""
    scheme, out_features, in_features, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = make_weight(out_features, in_features, generator)
    tunable = FAMILY.tunable(weight, scheme)
    with torch.no_grad():
        tunable.rounding.uniform_(-0.6, 0.6, generator=generator)
        for factors in tunable.ranges:
            factors.uniform_(0.0, 1.0, generator=generator)
            factors[torch.rand(factors.shape, generator=generator) < 0.2] = 1.0
            factors[torch.rand(factors.shape, generator=generator) < 0.1] = 0.0
    return tunable, weight, generator


@given(CASES)
def test_tuning_starts_at_round_to_nearest(case):
    scheme, out_features, in_features, seed = case
    weight = make_weight(out_features, in_features, torch.Generator().manual_seed(seed))
    before = weight.clone()
    tunable, nearest = FAMILY.tunable(weight, scheme), FAMILY.round_to_nearest(weight, scheme)
    assert tunable.finish().digest() == nearest.digest()
    assert torch.equal(tunable.fake_quantize(), nearest.dequantize(torch.float32))
    assert torch.equal(weight, before)


@settings(max_examples=300)
@given(CASES)
def test_the_fake_quantized_weight_is_exactly_what_will_be_stored(case):
    tunable, weight, _ = tuned(case)
    with_graph = tunable.fake_quantize()
    with torch.no_grad():
        without_graph = tunable.fake_quantize()
    record = tunable.finish()
    assert with_graph.shape == weight.shape and with_graph.requires_grad and not without_graph.requires_grad
    assert torch.equal(with_graph, record.dequantize(torch.float32))
    assert torch.equal(with_graph, without_graph)
    assert int(record.codes.max()) < 2 ** case[0].bits
    if case[0].sym:
        assert (record.zero_point == 2 ** (case[0].bits - 1)).all()
    record.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_tuned_as_its_float32_copy(dtype):
    weight = make_weight(4, 64, torch.Generator().manual_seed(1)).to(dtype)
    for scheme in (QuantScheme(4, 32), QuantScheme(2, 20, False)):
        one, other = FAMILY.tunable(weight, scheme), FAMILY.tunable(weight.float(), scheme)
        assert one.fake_quantize().dtype == torch.float32
        assert one.finish().digest() == other.finish().digest()


def test_parameters_are_leaves_and_can_be_moved_in_place():
    tunable = FAMILY.tunable(torch.randn(3, 50), QuantScheme(4, 16))
    assert tunable.rounding.shape == (3, 4, 16) and [r.shape for r in tunable.ranges] == [(3, 4), (3, 4)]
    for parameter in (tunable.rounding, *tunable.ranges):
        assert parameter.is_leaf and parameter.requires_grad
    before = tunable.finish().digest()
    with torch.no_grad():
        tunable.ranges[0].fill_(0.5)
        tunable.ranges[1].fill_(0.5)
    assert tunable.finish().digest() != before


# --- gradients ----------------------------------------------------------------------------------------------


def straight_through(value, rounded):
    return value + (rounded - value).detach()


def reference(weight, scheme, rounding, low_factor, high_factor):
    """SignRound's formulas in plain autograd: only what is rounded or cast is passed straight through."""
    out_features, in_features = weight.shape
    length, top = rounding.shape[-1], 2**scheme.bits - 1
    padded = torch.cat([weight, weight.new_zeros(out_features, rounding[0].numel() - in_features)], dim=1)
    groups = padded.view(out_features, -1, length)
    low = groups.min(-1).values.clamp(max=0) * low_factor
    high = groups.max(-1).values.clamp(min=0) * high_factor
    symmetric = torch.where(high < -low, -low, -high) / 2 ** (scheme.bits - 1)
    scale = symmetric if scheme.sym else (high - low) / top
    stored = scale.detach().half().float()
    least = torch.tensor(1e-5).half().float()
    stored = torch.where(stored < 0, torch.minimum(stored, -least), torch.maximum(stored, least))
    scale = straight_through(scale, stored)
    if scheme.sym:
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        zero = straight_through(-low / scale, torch.round(-low / scale).clamp(0, top))
    scale, zero = scale[..., None], zero[..., None]
    steps = groups / scale + rounding
    codes = (straight_through(steps, steps.round()) + zero).clamp(0, top)
    return (scale * (codes - zero)).reshape(out_features, -1)[:, :in_features]


@settings(max_examples=200)
@given(CASES)
def test_gradients_are_those_of_autograd_through_straight_through_rounding(case):
    tunable, weight, generator = tuned(case)
    parameters = [tunable.rounding, *tunable.ranges]
    copies = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    loss_weight = torch.randn(weight.shape, generator=generator)
    value, expected = tunable.fake_quantize(), reference(weight, case[0], *copies)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    gradients = torch.autograd.grad((value * loss_weight).sum(), parameters)
    wanted = torch.autograd.grad((expected * loss_weight).sum(), copies)
    # sums of up to 100 terms that may cancel: what is lost is relative to the largest term, |w| or a step
    noise = 1e-4 * float(weight.abs().max()) * float(loss_weight.abs().max())
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=noise)
        clear = want.abs() > 10 * noise
        assert torch.equal(gradient[clear].sign(), want[clear].sign())
    assert torch.equal(gradients[0].sign(), wanted[0].sign())  # no sum: every sign is certain
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_gradient_by_hand():
    """W2 asymmetric, one group from -1 to 2, scale 1, zero point 1; its offset clamps the last weight."""
    weight = torch.tensor([[-1.0, 0.25, 0.75, 2.0]])
    tunable = FAMILY.tunable(weight, QuantScheme(2, -1, False))
    with torch.no_grad():
        tunable.rounding[0, 0, 3] = 0.75
    value = tunable.fake_quantize()
    assert value.tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    parameters = [tunable.rounding, *tunable.ranges]
    d_rounding, d_low, d_high = torch.autograd.grad((value * g).sum(), parameters)
    assert d_rounding.tolist() == [[[1.0, 2.0, 3.0, 0.0]]]  # gradient times scale, nothing where clamped
    # by scale: code - zero - (w / scale where not clamped) = 0, -0.25, 0.25, 2; by zero: 0, 0, 0, -scale
    d_scale, d_zero = 2 * -0.25 + 3 * 0.25 + 4 * 2, -4.0
    # scale = (2c + a) / 3, zero = a / scale: by a 1 - 1/3, by c -2/3
    assert d_low.item() == pytest.approx(d_scale / 3 + d_zero * (1 - 1 / 3), abs=1e-5)
    assert d_high.item() == pytest.approx(d_scale * 2 / 3 + d_zero * (-2 / 3), abs=1e-5)


def test_gradients_do_not_depend_on_the_strides_of_what_comes_back():
    # rows that the group size does not divide give the backward pass a gradient with holes
    tunable = FAMILY.tunable(
        torch.randn(6, 40, generator=torch.Generator().manual_seed(3)), QuantScheme(3, 32)
    )
    g = torch.randn(40, 6, generator=torch.Generator().manual_seed(4)).T
    one = torch.autograd.grad(tunable.fake_quantize(), tunable.rounding, g)[0]
    other = torch.autograd.grad(tunable.fake_quantize(), tunable.rounding, g.contiguous())[0]
    assert torch.equal(one, other) and float(one.view(6, -1)[:, 40:].abs().max()) == 0.0


# --- search -------------------------------------------------------------------------------------------------


def weighted_errors(weight, record, importance):
    """float64 [out, groups]."""
    error = (record.dequantize(torch.float64) - weight.double()).square() * importance.double()
    length = record.scheme.group_length(weight.shape[1])
    return torch.stack([part.sum(1) for part in error.split(length, dim=1)], dim=1)


@given(CASES)
def test_the_search_is_never_worse_than_the_range_in_any_group(case):
    scheme, out_features, in_features, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = make_weight(out_features, in_features, generator)
    importance = torch.rand(in_features, generator=generator) ** 4 + 1e-4
    found = weighted_errors(weight, FAMILY.search(weight, scheme, importance), importance)
    start = weighted_errors(weight, FAMILY.round_to_nearest(weight, scheme), importance)
    assert (found <= start * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.9), (4, 0.95)])
def test_the_search_gains_where_few_bits_meet_long_tails(bits, sym, gain):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(bits))
    importance, scheme = torch.ones(128), QuantScheme(bits, 128, sym)
    found = weighted_errors(weight, FAMILY.search(weight, scheme, importance), importance).sum()
    start = weighted_errors(weight, FAMILY.round_to_nearest(weight, scheme), importance).sum()
    assert found < gain * start


@pytest.mark.parametrize("sym", [True, False])
def test_the_search_serves_the_channels_that_matter(sym):
    generator = torch.Generator().manual_seed(9)
    weight, scheme = torch.randn(64, 64, generator=generator), QuantScheme(3, 32, sym)
    importance = torch.ones(64)
    importance[::4] = 1000.0
    matters = (importance > 1).double()
    favoured = weighted_errors(weight, FAMILY.search(weight, scheme, importance), matters).sum()
    alike = weighted_errors(weight, FAMILY.search(weight, scheme, torch.ones(64)), matters).sum()
    assert favoured < 0.8 * alike


def test_the_search_finds_either_sign_of_a_symmetric_scale():
    # -1.6 alone would ask for the extra code on its side; the two at +1.5 matter more
    weight = torch.tensor([[-1.6, 1.5, 1.5, 0.0]])
    record = FAMILY.search(weight, QuantScheme(2, -1), torch.tensor([0.01, 1.0, 1.0, 1.0]))
    assert record.scale.item() < 0 < FAMILY.round_to_nearest(weight, QuantScheme(2, -1)).scale.item()
    assert record.dequantize(torch.float32)[0, 1].item() == pytest.approx(1.5, rel=0.05)


# --- extremes -----------------------------------------------------------------------------------------------

EXTREMES = [QuantScheme(bits, size, sym) for bits in (2, 4, 8) for size in (-1, 8) for sym in (True, False)]


def all_ways(weight, scheme):
    importance = torch.ones(weight.shape[1])
    return [
        FAMILY.round_to_nearest(weight, scheme),
        FAMILY.search(weight, scheme, importance),
        FAMILY.tunable(weight, scheme).finish(),
    ]


@pytest.mark.parametrize("scheme", EXTREMES, ids=str)
def test_dead_weights_stay_exactly_zero(scheme):
    for record in all_ways(torch.zeros(3, 20), scheme):
        assert torch.equal(record.dequantize(torch.float32), torch.zeros(3, 20))
        assert torch.isfinite(record.scale).all() and (record.scale != 0).all()


@pytest.mark.parametrize("scheme", EXTREMES, ids=str)
def test_one_huge_outlier_is_kept_and_swallows_only_its_group(scheme):
    weight = torch.full((1, 32), 0.01)
    weight[0, 3] = 1000.0
    nearest = FAMILY.round_to_nearest(weight, scheme).dequantize(torch.float32)
    assert nearest[0, 3].item() == pytest.approx(1000.0, rel=2e-3)
    assert nearest[0, :3].tolist() == [0.0] * 3
    if scheme.group_size == 8:
        torch.testing.assert_close(nearest[0, 8:], weight[0, 8:], rtol=2e-2, atol=0)


@pytest.mark.parametrize("scheme", EXTREMES, ids=str)
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-30, 1e-8])
def test_weights_smaller_than_any_scale_become_zero(scheme, tiny):
    weight = torch.tensor([[tiny, -tiny] * 10])
    for record in all_ways(weight, scheme):
        assert torch.equal(record.dequantize(torch.float32), torch.zeros(1, 20))
    value = FAMILY.tunable(weight, scheme).fake_quantize()
    assert torch.equal(value, torch.zeros(1, 20))


@pytest.mark.parametrize("scheme", EXTREMES, ids=str)
def test_a_scale_beyond_float16_is_refused_by_every_way(scheme):
    weight = torch.zeros(2, 16)
    weight[1, 5] = 65504.0 * 2**scheme.bits * 1.1
    tunable = FAMILY.tunable(weight, scheme)
    for way in (
        lambda: FAMILY.round_to_nearest(weight, scheme),
        tunable.fake_quantize,
        tunable.finish,
        lambda: FAMILY.search(weight, scheme, torch.ones(16)),
    ):
        with pytest.raises(UnsupportedError, match="more than float16 can hold"):
            way()


def test_why_not():
    assert FAMILY.data_type == "int"
    for bits in range(2, 9):
        assert FAMILY.why_not(QuantScheme(bits, -1, False)) is None
    assert FAMILY.why_not(PRESETS["INT8"]) is None
    assert "all is INT8, got W4G128-A8intG-1" in FAMILY.why_not(QuantScheme(activation=ActivationScheme()))
    assert "a row or a part of it" in FAMILY.why_not(QuantScheme(group_rows=2))


@settings(max_examples=60)
@given(CASES)
def test_positive_scales_hold_the_whole_range(case):
    scheme, out_features, in_features, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight, family = make_weight(out_features, in_features, generator), IntFamily(positive=True)
    importance = torch.rand(in_features, generator=generator) + 0.01
    nearest, searched = family.round_to_nearest(weight, scheme), family.search(weight, scheme, importance)
    tunable = family.tunable(weight, scheme)
    assert tunable.finish().digest() == nearest.digest()
    if not scheme.sym:
        assert nearest.digest() == FAMILY.round_to_nearest(weight, scheme).digest()
        return
    assert (nearest.scale > 0).all() and (searched.scale > 0).all()
    # nothing is cut off: no weight is further than half a step away (and what float16 makes of the step)
    step = nearest.scale.float().repeat_interleave(scheme.group_length(in_features), 1)[:, :in_features]
    slack = step * (0.5 + 2 ** (scheme.bits - 11)) + 1e-6
    assert ((nearest.dequantize(torch.float32) - weight).abs() <= slack).all()
