"""Scales of blocks: what is reported is what the stored numbers give, and refining them never loses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_core import QuantScheme, SuperBlockWeight
from autoround_core.scheme import BLOCK_TYPES
from autoround_export.gguf import block_grid as module
from autoround_export.gguf.block_grid import Grid, block_grid
from autoround_export.gguf.group_fit import Columns

TWO_LEVELS = [name for name, kind in BLOCK_TYPES.items() if kind.block > kind.group_size]
# (lowest, greatest) integer that the file has room for
SUB_SCALES = {"q2_k": (0, 15), "q3_k": (-32, 31), "q4_k": (0, 63), "q5_k": (0, 63), "q6_k": (-128, 127)}
# a geometric mean over blocks: at most this much of the error is left after refining, with a margin
GAINS = {"q4_1": 0.998, "q5_1": 0.998, "q2_k": 0.96, "q3_k": 0.9995, "q4_k": 0.96, "q5_k": 0.93, "q6_k": 0.97}
BLOCKS = 48
CASES = st.tuples(st.sampled_from(list(BLOCK_TYPES)), st.integers(0, 2**32 - 1))


def columns_of(rows: torch.Tensor, weights: torch.Tensor, data_type: str) -> Columns:
    kind = BLOCK_TYPES[data_type]
    return Columns(*(part.reshape(-1, kind.group_size).T.contiguous() for part in (rows, weights)), kind)


def columns(data_type: str, seed: int = 0) -> Columns:
    """Heavy-tailed blocks of very different sizes; one is zero, one negative, one has an outlier, one a zero group."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, BLOCK_TYPES[data_type].block)
    rows = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.1)
    rows *= 10 ** (torch.rand(BLOCKS, 1, generator=generator) * 3 - 3)
    rows[1], rows[2, 5], rows[4, :32] = 0, 400, 0
    rows[3] = -rows[3].abs()
    return columns_of(rows, torch.rand(shape, generator=generator) + 0.05, data_type)


def steps(grid: Grid, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (step, shift) [groups] from the stored numbers."""
    scale, minimum, sub_scale, sub_minimum = (
        None if part is None else part.double().flatten() for part in grid.stored(1))
    per_block = columns.per_block
    step = scale.repeat_interleave(per_block) * (1 if sub_scale is None else sub_scale)
    if minimum is None:
        return step, torch.zeros_like(step)
    return step, minimum.repeat_interleave(per_block) * (1 if sub_minimum is None else sub_minimum)


def stored_errors(grid: Grid, columns: Columns) -> torch.Tensor:
    """float64 [blocks]: what the stored numbers can do, each weight at its nearest code."""
    step, shift = steps(grid, columns)
    x = columns.x.double()
    codes = torch.where(step == 0, 0.0, (x + shift) / step).round().clamp(columns.low, columns.top)
    return ((codes * step - shift - x) ** 2 * columns.w.double()).sum(0).view(BLOCKS, -1).sum(1)


def energies(columns: Columns) -> torch.Tensor:
    """float64 [blocks]: the error of storing zeros."""
    return (columns.x.double() ** 2 * columns.w.double()).sum(0).view(BLOCKS, -1).sum(1)


@settings(max_examples=60)
@given(CASES)
def test_errors_are_those_of_the_stored_numbers(case):
    data_type, seed = case
    found = columns(data_type, seed)
    grid = block_grid(found)
    # float32 sums of squares, whose parts may be small beside the weights: what is stored near 400 is 400 * 2^-24
    tolerance = 1e-4 * stored_errors(grid, found) + 1e-12 * energies(found)
    assert ((grid.error.double() - stored_errors(grid, found)).abs() <= tolerance).all()
    assert (grid.error <= energies(found) * (1 + 1e-6)).all()


@pytest.mark.parametrize("data_type", BLOCK_TYPES)
def test_a_refinement_never_loses_and_wins_something(data_type, monkeypatch):
    found = columns(data_type)
    errors = []
    for rounds in (0, 1, 2, 4):
        for name in ("_REFINEMENTS", "_REFINEMENTS_OF_SIX_BITS"):
            monkeypatch.setattr(module, name, rounds)
        errors.append(stored_errors(block_grid(found), found))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-12 * energies(found)).all()
    wins = (errors[2] / errors[0].clamp(min=1e-300))[errors[0] > 0]
    assert wins.log().mean().exp() < GAINS[data_type]


@pytest.mark.parametrize("data_type", BLOCK_TYPES)
def test_what_is_stored_has_the_types_and_ranges_of_the_file(data_type):
    found = columns(data_type)
    grid, kind = block_grid(found), BLOCK_TYPES[data_type]
    scale, minimum, sub_scale, sub_minimum = grid.stored(BLOCKS // 2)
    assert scale.dtype == torch.float16 and scale.shape == (BLOCKS // 2, 2)
    # float32 numbers that float16 holds exactly
    assert torch.equal(scale.float().flatten(), grid.scale) and grid.error.shape == (BLOCKS,)
    assert (minimum is None) == kind.sym
    if minimum is not None:
        assert minimum.dtype == torch.float16 and torch.equal(minimum.float().flatten(), grid.minimum)
        assert (minimum >= 0).all() and (scale >= 0).all()
    if data_type not in TWO_LEVELS:
        assert sub_scale is None and sub_minimum is None
        return
    low, top = SUB_SCALES[data_type]
    groups = (BLOCKS // 2, 2 * kind.block // kind.group_size)
    assert sub_scale.dtype == torch.int8 and sub_scale.shape == groups
    assert torch.equal(sub_scale.float().flatten(), grid.sub_scale)
    assert low <= int(sub_scale.min()) and int(sub_scale.max()) <= top
    assert (sub_minimum is None) == kind.sym
    if sub_minimum is not None:
        assert sub_minimum.dtype == torch.uint8 and sub_minimum.shape == groups
        assert torch.equal(sub_minimum.float().flatten(), grid.sub_minimum) and int(sub_minimum.max()) <= top


@pytest.mark.parametrize("data_type", BLOCK_TYPES)
def test_zero_blocks_and_groups_are_exact(data_type):
    found = columns(data_type)
    grid = block_grid(found)
    assert grid.error[1] == 0 and grid.scale[1] == 0
    step, shift = steps(grid, found)
    # codes that are nearest to zero give zero, wherever the block's other groups are
    zero = (found.x == 0).all(0)
    assert zero.sum() == found.per_block + 32 // found.kind.group_size
    codes = found.codes(step.float(), shift.float()).double()
    assert ((codes * step - shift)[:, zero] == 0).all()


@pytest.mark.parametrize("data_type", TWO_LEVELS)
def test_numbers_of_the_type_are_found_again(data_type):
    """Weights that are a record's: nearly all of their error is gone, and most blocks are met exactly."""
    kind = BLOCK_TYPES[data_type]
    generator = torch.Generator().manual_seed(7)
    low, top = SUB_SCALES[data_type]
    groups = kind.block // kind.group_size
    codes = torch.randint(0, 2**kind.bits, (BLOCKS, kind.block), generator=generator, dtype=torch.uint8)
    # every group uses the ends of its codes, and the block the end of its sub-scales
    codes[:, :: kind.group_size], codes[:, 1 :: kind.group_size] = 0, 2**kind.bits - 1
    sub_scale = torch.randint(max(low, 1), top + 1, (BLOCKS, groups), generator=generator, dtype=torch.int8)
    sub_scale[:, 0] = low or top
    sub_minimum = None if kind.sym else torch.randint(0, top + 1, (BLOCKS, groups), generator=generator).byte()
    if sub_minimum is not None:
        # zero lies within each group, as a search that knows no positive minimum wants it
        sub_minimum = sub_minimum.clamp(min=1)
        sub_minimum[:, 1] = top
    scale = (torch.rand(BLOCKS, 1, generator=generator) * 0.01 + 0.001).half()
    minimum = None if kind.sym else (scale * 1.5).half()
    scheme = QuantScheme(kind.bits, kind.group_size, kind.sym, data_type)
    weight = SuperBlockWeight(scheme, codes, scale, minimum, sub_scale, sub_minimum).dequantize(torch.float32)
    found = columns_of(weight, torch.ones_like(weight), data_type)
    error = stored_errors(block_grid(found), found)
    assert (error == 0).double().mean() > 0.9 and (error <= 1e-4 * energies(found)).all()


@settings(max_examples=40)
@given(CASES)
def test_blocks_do_not_know_each_other(case):
    data_type, seed = case
    found, other = columns(data_type, seed), columns(data_type, seed + 1)
    half = found.x.shape[1] // 2
    x = torch.cat([found.x[:, :half], other.x[:, half:] * 100], dim=1)
    w = torch.cat([found.w[:, :half], other.w[:, half:]], dim=1)
    alone, beside = block_grid(found), block_grid(Columns(x, w, found.kind))
    for one, two in zip(alone.stored(2), beside.stored(2), strict=True):
        assert one is two is None or torch.equal(one[0], two[0])
