"""The families of ggml's block types: what tuning sees is stored bit for bit, and gradients pass straight through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_core import LinearSpec, QuantScheme, SuperBlockWeight, get_registry
from autoround_core.scheme import BLOCK_TYPES
from autoround_export.gguf.families import super_block_families

FAMILIES = {family.data_type: family for family in super_block_families()}
SCHEMES = {name: QuantScheme.parse(f"GGUF:{name}") for name in BLOCK_TYPES}
TYPES = pytest.mark.parametrize("data_type", list(BLOCK_TYPES))
CASES = st.tuples(st.sampled_from(list(BLOCK_TYPES)), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2**32 - 1))


def make_weight(data_type: str, rows: int = 4, blocks: int = 2, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed float32, with a dead group, a dead block where there is room, and a huge outlier."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * BLOCK_TYPES[data_type].block)
    weight = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.05) * 0.05
    weight[0, : BLOCK_TYPES[data_type].group_size] = 0
    weight[rows // 2, : BLOCK_TYPES[data_type].block] = 0
    weight[-1, -1] = -30
    return weight


def make_importance(weight: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.01


def tuned(data_type: str, weight: torch.Tensor, importance: torch.Tensor | None, seed: int = 0, reach: float = 0.6):
    """A tunable weight whose offsets lie a little beyond half a step."""
    family, scheme = FAMILIES[data_type], SCHEMES[data_type]
    tunable = family.tunable(weight, scheme) if importance is None else family.tunable_from(weight, scheme, importance)
    with torch.no_grad():
        tunable.rounding.uniform_(-reach, reach, generator=torch.Generator().manual_seed(seed))
    return tunable


def group_parts(record: SuperBlockWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (step, shift) of each weight, [out, in], by hand."""
    kind = BLOCK_TYPES[record.scheme.data_type]

    def each(outer, inner):
        outer = outer.double().repeat_interleave(kind.block, dim=1)
        return outer if inner is None else outer * inner.double().repeat_interleave(kind.group_size, dim=1)

    step = each(record.scale, record.sub_scale)
    return step, torch.zeros_like(step) if kind.sym else each(record.minimum, record.sub_minimum)


# --- what tuning sees is what is stored -----------------------------------------------------------------------


@settings(max_examples=60)
@given(CASES)
def test_the_fake_quantized_weight_is_exactly_what_will_be_stored(case):
    data_type, rows, blocks, seed = case
    weight = make_weight(data_type, rows, blocks, seed)
    importance = make_importance(weight, seed) if seed % 2 else None
    for reach in (0.0, 0.6, 3.0):
        tunable = tuned(data_type, weight, importance, seed, reach)
        with_graph = tunable.fake_quantize()
        with torch.no_grad():
            without_graph = tunable.fake_quantize()
        record = tunable.finish().check()
        assert record.scheme == SCHEMES[data_type] and record.shape == tuple(weight.shape)
        assert with_graph.requires_grad and not without_graph.requires_grad and with_graph.shape == weight.shape
        assert torch.equal(with_graph, record.dequantize(torch.float32)) and torch.equal(with_graph, without_graph)


@settings(max_examples=40)
@given(CASES)
def test_values_are_those_of_the_formula(case):
    """code = clamp(round((w + m) / s + V)), w' = s * code - m, in float64 from the stored numbers."""
    data_type, rows, blocks, seed = case
    weight = make_weight(data_type, rows, blocks, seed)
    tunable = tuned(data_type, weight, None, seed)
    record = tunable.finish()
    step, shift = group_parts(record)
    zero = 2 ** (record.scheme.bits - 1) if record.scheme.sym else 0
    places = torch.where(step == 0, 0.0, (weight.double() + shift) / step)
    places = places + tunable.rounding.detach().double().view(weight.shape)
    codes = record.codes.double() - zero
    # float32 may round a place that lies between two codes to either
    limits = -zero, 2**record.scheme.bits - 1 - zero
    assert ((codes - places.clamp(*limits)).abs() <= 0.5 + 1e-4).all()
    # products of the stored numbers are exact in float32, their difference is rounded once
    assert torch.equal((step * codes - shift).float(), tunable.fake_quantize().detach())


@TYPES
def test_offsets_move_codes_and_nothing_else(data_type):
    weight = make_weight(data_type)
    before, after = (tuned(data_type, weight, None, reach=reach).finish() for reach in (0.0, 0.6))
    assert not torch.equal(before.codes, after.codes)
    assert (before.codes.int() - after.codes.int()).abs().max() == 1
    for name, tensor in before.tensors().items():
        assert name == "codes" or torch.equal(tensor, after.tensors()[name])


# --- gradients ------------------------------------------------------------------------------------------------


@TYPES
def test_gradients_are_those_of_the_formula(data_type):
    """d w' / d V is the step of the group where the code is free, and nothing where it is clamped."""
    weight = make_weight(data_type, rows=6)
    tunable = tuned(data_type, weight, make_importance(weight))
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (tunable.fake_quantize() * upstream).sum().backward()
    step, shift = group_parts(tunable.finish())
    bits, symmetric = SCHEMES[data_type].bits, SCHEMES[data_type].sym
    low, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    places = torch.where(step == 0, 0.0, (weight.double() + shift) / step)
    places = places + tunable.rounding.detach().view(weight.shape)
    clamped = (places.round() < low) | (places.round() > top)
    # at the very edge float32 may see it otherwise
    sure = ((places - (low - 0.5)).abs() > 1e-4) & ((places - (top + 0.5)).abs() > 1e-4)
    assert clamped[sure].any() and (~clamped[sure]).any() and (step < 0).any() == symmetric
    expected = torch.where(clamped, 0.0, upstream.double() * step)
    gradient = tunable.rounding.grad.view(weight.shape)
    assert torch.equal(gradient[sure], expected.float()[sure])
    assert tunable.ranges == () and tunable.rounding.is_leaf


def test_a_clamped_code_gets_no_gradient_and_a_free_one_the_step():
    # one block of Q4_1 that is exactly 0, 1 .. 15, twice, with a step of 1 and no minimum
    weight = torch.arange(16.0).repeat(2).view(1, 32)
    tunable = FAMILIES["q4_1"].tunable(weight, SCHEMES["q4_1"])
    with torch.no_grad():
        tunable.rounding.zero_()[..., 0], tunable.rounding[..., 15], tunable.rounding[..., 3] = -0.7, 0.7, 0.7
    values = tunable.fake_quantize()
    assert values.tolist()[0][:5] == [0, 1, 2, 4, 4] and values[0, 15] == 15
    values.sum().backward()
    expected = torch.ones(32)
    expected[[0, 15]] = 0
    assert torch.equal(tunable.rounding.grad.flatten(), expected)


def test_gradients_of_the_upstream_stay_as_they_are():
    weight = make_weight("q4_k")
    tunable = tuned("q4_k", weight, None)
    upstream = torch.ones_like(weight)
    tunable.fake_quantize().backward(upstream)
    assert torch.equal(upstream, torch.ones_like(weight))


# --- where tuning starts --------------------------------------------------------------------------------------


@TYPES
def test_tuning_starts_at_the_search(data_type):
    family, scheme, weight = FAMILIES[data_type], SCHEMES[data_type], make_weight(data_type)
    importance = make_importance(weight)
    assert family.starts_from_search
    found = family.search(weight, scheme, importance)
    start = family.tunable_from(weight, scheme, importance)
    assert start.finish().digest() == found.digest() and not start.rounding.any()
    assert torch.equal(start.fake_quantize(), found.dequantize(torch.float32))
    nearest = family.round_to_nearest(weight, scheme)
    assert family.tunable(weight, scheme).finish().digest() == nearest.digest() != found.digest()
    # each is the better one by its own measure: the errors of important channels
    errors = [((record.dequantize(torch.float64) - weight) ** 2 * importance).sum() for record in (found, nearest)]
    assert errors[0] < errors[1]


@TYPES
def test_inputs_are_left_alone(data_type):
    family, scheme, weight = FAMILIES[data_type], SCHEMES[data_type], make_weight(data_type)
    importance = make_importance(weight)
    before = weight.clone(), importance.clone()
    record = family.search(weight, scheme, importance)
    tunable = tuned(data_type, weight, importance)
    tunable.fake_quantize().sum().backward()
    tunable.finish()
    assert torch.equal(weight, before[0]) and torch.equal(importance, before[1])
    # nor does the record change with what it was made from
    digest = record.digest()
    weight.zero_()
    assert record.digest() == digest


@TYPES
def test_16_bit_and_strided_weights_are_as_their_float32_copies(data_type):
    family, scheme, weight = FAMILIES[data_type], SCHEMES[data_type], make_weight(data_type)
    importance = make_importance(weight)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = weight.to(dtype)
        for one in (rounded, torch.nn.Parameter(rounded)):
            assert family.search(one, scheme, importance).digest() == family.search(
                rounded.float(), scheme, importance).digest()
        tunable = tuned(data_type, rounded, importance)
        assert tunable.rounding.dtype == tunable.fake_quantize().dtype == torch.float32
    strided = torch.stack([weight, -weight], dim=-1)[..., 0]
    rows = torch.cat([weight, weight])[::2]
    for view in (strided, rows):
        assert not view.is_contiguous()
        copy = view.clone(memory_format=torch.contiguous_format)
        for one, two in ((family.round_to_nearest(each, scheme), tuned(data_type, each, None, reach=0).finish())
                         for each in (view, copy)):
            assert one.digest() == two.digest() == family.round_to_nearest(copy, scheme).digest()
    record = tuned(data_type, weight.T.contiguous().T, importance).finish()
    assert torch.equal(record.dequantize(torch.float32),
                       tuned(data_type, weight.T.contiguous().T, importance).fake_quantize())


# --- what a family is for -------------------------------------------------------------------------------------


def test_the_registry_has_them_all():
    assert FAMILIES.keys() == BLOCK_TYPES.keys()
    known = get_registry().number_families()
    assert {name: type(known[name]) for name in FAMILIES} == {name: type(FAMILIES[name]) for name in FAMILIES}


@TYPES
def test_a_family_has_one_scheme(data_type):
    family, scheme = FAMILIES[data_type], SCHEMES[data_type]
    kind = BLOCK_TYPES[data_type]
    assert family.why_not(scheme) is None
    others = [QuantScheme(kind.bits, kind.group_size, kind.sym), QuantScheme(kind.bits, 64, kind.sym, data_type),
              QuantScheme(8, kind.group_size, kind.sym, data_type), *(s for s in SCHEMES.values() if s != scheme)]
    for other in others:
        reason = family.why_not(other)
        assert data_type in reason and str(scheme) in reason and str(other) in reason


@TYPES
def test_rows_hold_whole_blocks(data_type):
    family, scheme, block = FAMILIES[data_type], SCHEMES[data_type], BLOCK_TYPES[data_type].block
    for columns in (block, 3 * block):
        assert family.why_not_layer(LinearSpec("layer", columns, 5, scheme)) is None
    for columns in (block // 2, block + 16, 3 * block - 1):
        reason = family.why_not_layer(LinearSpec("layer", columns, 5, scheme))
        assert f"divisible by {block}" in reason and str(columns) in reason
    assert "nothing else" in family.why_not_layer(LinearSpec("layer", block, 5, QuantScheme(4, 32)))
