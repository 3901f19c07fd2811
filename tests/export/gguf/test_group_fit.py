"""The fit of single groups, against the true optimum: exact where it can be enumerated, from a grid where it cannot."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.scheme import BLOCK_TYPES
from autoround_export.gguf.group_fit import Columns, fit_asymmetric, fit_symmetric, solve

SYMMETRIC = [name for name, kind in BLOCK_TYPES.items() if kind.sym]
ASYMMETRIC = [name for name, kind in BLOCK_TYPES.items() if not kind.sym]
WEIGHTINGS = ["alike", "by channel", "by size"]


def columns(data_type: str, groups: int, weighting: str = "alike", seed: int = 0) -> Columns:
    """Heavy-tailed groups."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCK_TYPES[data_type].group_size, groups)
    x = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.2) * 0.05
    weights = {"alike": torch.ones(shape), "by channel": torch.rand(shape, generator=generator) * 2 + 0.1,
               "by size": x.abs()}  # fmt: skip
    return Columns(x, weights[weighting], BLOCK_TYPES[data_type])


def of(x: list[list[float]], data_type: str) -> Columns:
    """Groups given row by row, all errors alike."""
    groups = torch.tensor(x).T.contiguous()
    return Columns(groups, torch.ones_like(groups), BLOCK_TYPES[data_type])


def errors(found: Columns, step: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """float64 [groups], for the nearest codes."""
    x, step = found.x.double(), step.double()
    shift = torch.zeros_like(step) if shift is None else shift.double()
    codes = torch.where(step == 0, 0.0, (x + shift) / step).round().clamp(found.low, found.top)
    return ((codes * step - shift - x) ** 2 * found.w.double()).sum(0)


def fitted(found: Columns) -> tuple[torch.Tensor, ...]:
    return (fit_symmetric(found),) if found.kind.sym else fit_asymmetric(found)


def least_squares(codes: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The least errors [...] over step and shift >= 0 for codes [..., n] of one group x, w [n]."""
    sum_w, sum_x = w.sum(), (w * x).sum()
    sum_l, sum_ll, sum_lx = (codes * w).sum(-1), (codes * codes * w).sum(-1), (codes * w * x).sum(-1)
    determinant = sum_w * sum_ll - sum_l * sum_l
    sound = determinant > 1e-9 * sum_w * sum_ll
    determinant = determinant.where(sound, 1.0)
    step = (sum_w * sum_lx - sum_x * sum_l) / determinant
    shift = -(sum_ll * sum_x - sum_l * sum_lx) / determinant
    alone = (shift < 0) | ~sound
    step = torch.where(alone, sum_lx / sum_ll.clamp(min=1e-300), step)
    shift = shift.where(~alone, 0.0)
    return ((codes * step[..., None] - shift[..., None] - x) ** 2 * w).sum(-1)


def least_symmetric(x: torch.Tensor, w: torch.Tensor, low: int, top: int) -> float:
    """The least error there is: between two values of 1 / step at which a code changes, all codes are constant."""
    edges = ((torch.arange(low - 1, top + 1) + 0.5) / x[x != 0, None]).flatten().sort().values
    inverse = torch.cat([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
    codes = (inverse[:, None] * x).round().clamp(low, top)
    sum_ll, sum_lx = (codes * codes * w).sum(1), (codes * w * x).sum(1)
    return float((w * x * x).sum() - (sum_lx**2 / sum_ll.clamp(min=1e-300)).max())


def least_two_bits(x: torch.Tensor, w: torch.Tensor) -> float:
    """The least error there is: codes rise with the weights, so all ways to cut the sorted ones in four are tried."""
    order = x.argsort()
    cuts = torch.tensor(list(combinations_with_replacement(range(len(x) + 1), 3)))
    codes = (torch.arange(len(x)) >= cuts[..., None]).sum(1).double()
    return float(least_squares(codes, x[order], w[order]).min())


def least_on_grid(x: torch.Tensor, w: torch.Tensor, top: int, size: int = 120) -> float:
    """The least error over a grid of steps and shifts, each refitted to the codes that it gives."""
    low = x.min().clamp(max=0)
    factors = torch.linspace(0.55, 1.1, size, dtype=torch.float64)
    step = ((x.max() - low) / top * factors)[:, None, None]
    shift = (-low * factors)[None, :, None]
    return float(least_squares(((x + shift) / step).round().clamp(0, top), x, w).min())


# --- against the optimum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("data_type", "share"), [("q3_k", 1.04), ("q6_k", 1.25)])
def test_symmetric_scales_are_near_the_exact_optimum(data_type, share, weighting):
    found = columns(data_type, 150, weighting)
    error = errors(found, fit_symmetric(found), None)
    least = torch.tensor([least_symmetric(x, w, found.low, found.top)
                          for x, w in zip(found.x.T.double(), found.w.T.double(), strict=True)])
    assert (error >= least * (1 - 1e-6)).all(), "the truth is no bound"
    assert error.sum() <= share * least.sum()
    assert (error / least).median() <= 1 + (share - 1) / 2


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_two_bits_are_near_the_exact_optimum(weighting):
    found = columns("q2_k", 150, weighting)
    error = errors(found, *fit_asymmetric(found))
    least = torch.tensor([least_two_bits(x, w) for x, w in zip(found.x.T.double(), found.w.T.double(), strict=True)])
    assert (error >= least * (1 - 1e-6)).all(), "the truth is no bound"
    assert error.sum() <= 1.06 * least.sum()
    assert (error / least).median() <= 1.001


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("data_type", "share"), [("q4_k", 1.05), ("q5_k", 1.12)])
def test_four_and_five_bits_are_near_the_best_of_a_grid(data_type, share, weighting):
    found = columns(data_type, 16, weighting)
    error = errors(found, *fit_asymmetric(found))
    least = torch.tensor([least_on_grid(x, w, found.top)
                          for x, w in zip(found.x.T.double(), found.w.T.double(), strict=True)])
    assert error.sum() <= share * least.sum()
    # a grid is no exact bound, but nothing is far below it
    assert error.sum() >= 0.98 * least.sum()


@pytest.mark.parametrize("data_type", BLOCK_TYPES)
def test_weights_on_a_grid_are_found(data_type):
    """Codes times a step, minus a shift, every code used: nothing is lost but float32's rounding."""
    kind = BLOCK_TYPES[data_type]
    low = -(2 ** (kind.bits - 1)) if kind.sym else 0
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(low, low + 2**kind.bits, (kind.group_size, 40), generator=generator)
    codes[0], codes[1] = low, low + 2**kind.bits - 1
    step = torch.rand(40, generator=generator) + 0.01
    shift = 0.0 if kind.sym else step * torch.randint(0, 2**kind.bits, (40,), generator=generator)
    x = codes * step - shift
    found = Columns(x, torch.ones_like(x), kind)
    step_found, *shift_found = fitted(found)
    assert (errors(found, step_found, *(shift_found or [None])) <= 1e-10 * (x.double() ** 2).sum(0)).all()
    assert torch.allclose(step_found, step, rtol=1e-4)


# --- groups that are no ordinary ones -------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", ASYMMETRIC)
def test_groups_of_one_value(data_type):
    n = BLOCK_TYPES[data_type].group_size
    found = of([[0.0] * n, [0.25] * n, [-0.25] * n], data_type)
    step, shift = fit_asymmetric(found)
    # a minimum holds a negative value by itself, but no positive one
    assert step[0] == shift[0] == 0 and (step[2], shift[2]) == (0, 0.25)
    assert shift[1] == 0 and float(step[1]) == pytest.approx(0.25 / found.top)
    codes = found.codes(step, shift)
    assert (codes[:, 0] == 0).all() and (codes[:, 1] == found.top).all() and (codes[:, 2] == 0).all()
    assert float(errors(found, step, shift).max()) < 1e-12


@pytest.mark.parametrize("data_type", SYMMETRIC)
def test_symmetric_groups_of_one_value(data_type):
    n = BLOCK_TYPES[data_type].group_size
    found = of([[0.0] * n, [0.25] * n, [-0.25] * n], data_type)
    step = fit_symmetric(found)
    assert step[0] == 0 and float(step[1]) == -float(step[2]) != 0
    assert float(errors(found, step, None).max()) < 1e-12


def test_the_extra_code_goes_to_the_greatest_magnitude():
    # at three bits codes run from -4 to 3: 4 and -4 fit exactly with steps -1 and 1, not the other way round
    found = of([[4.0, -3, 2, 1] * 4, [-4.0, 3, 2, 1] * 4], "q3_k")
    assert fit_symmetric(found).tolist() == [-1, 1]


def test_the_minimum_is_for_negative_weights():
    positive = columns("q4_k", 20)
    positive = Columns(positive.x.abs() + 0.1, positive.w, positive.kind)
    step, shift = fit_asymmetric(positive)
    # at most a part of a step, which moves the grid beneath the weights
    assert (step > 0).all() and (shift < step).all()
    negative = Columns(-positive.x, positive.w, positive.kind)
    step, shift = fit_asymmetric(negative)
    assert (step > 0).all() and (shift > 0.1).all()
    # an offset costs nothing where a minimum can hold it
    shifted = Columns(negative.x - 8, negative.w, negative.kind)
    assert float(errors(shifted, *fit_asymmetric(shifted)).sum()) < 1.2 * float(errors(negative, step, shift).sum())


# --- the sums and codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", BLOCK_TYPES)
def test_codes_errors_and_sums_are_those_of_the_formulas(data_type):
    found = columns(data_type, 24, "by channel")
    symmetric = found.kind.sym
    generator = torch.Generator().manual_seed(2)
    step, shift = torch.rand(24, generator=generator) * 0.1 + 0.01, torch.rand(24, generator=generator) * 0.1
    step[3], shift = 0, None if symmetric else shift
    codes = found.codes(step, shift)
    m = 0.0 if symmetric else shift.double()
    places = torch.where(step == 0, 0.0, (found.x.double() + m) / step.double())
    # float32 may round a place that lies between two codes to either
    assert ((codes - places.clamp(found.low, found.top)).abs() <= 0.5 + 1e-4).all()
    assert torch.equal(codes, codes.round()) and (codes[:, 3] == 0).all()
    assert int(codes.min()) >= found.low and int(codes.max()) <= found.top
    truth = ((codes.double() * step - m - found.x) ** 2 * found.w).sum(0)
    assert torch.allclose(found.error(codes, step, shift).double(), truth, rtol=1e-5)
    exact = codes.double(), found.w.double(), found.x.double()
    for sums, formula in zip(found.sums(codes), ("l,w->", "l,l,w->", "l,w,x->"), strict=True):
        names = formula.removesuffix("->").split(",")
        product = torch.stack([dict(zip("lwx", exact, strict=True))[name] for name in names]).prod(0)
        assert torch.allclose(sums.double(), product.sum(0), rtol=1e-4, atol=1e-5)


def test_solve_is_least_squares_with_a_minimum_of_zero():
    found = columns("q4_k", 30, "by channel")
    codes = found.codes(*fit_asymmetric(found))
    codes += torch.randint(0, 2, codes.shape, generator=torch.Generator().manual_seed(2))
    step, shift = solve(found, *found.sums(codes))
    for i in range(30):
        root = found.w[:, i].double().sqrt()
        design = torch.stack([codes[:, i].double(), -torch.ones(32, dtype=torch.float64)], dim=1) * root[:, None]
        truth = torch.linalg.lstsq(design, (found.x[:, i].double() * root)[:, None]).solution[:, 0]
        assert truth[1] > 0, "one case more to write"
        assert [float(step[i]), float(shift[i])] == pytest.approx(truth.tolist(), rel=1e-3)
    # of positive weights whose codes are too great, the free fit would have a minimum below zero
    positive = Columns(codes * 0.1 + 0.3, found.w, found.kind)
    step, shift = solve(positive, *positive.sums(codes))
    x, w, l = positive.x.double(), positive.w.double(), codes.double()
    assert not shift.any() and torch.allclose(step.double(), (w * l * x).sum(0) / (w * l * l).sum(0), rtol=1e-4)


@given(st.sampled_from(list(BLOCK_TYPES)), st.integers(-20, 10), st.integers(0, 2**32 - 1))
def test_scales_follow_a_power_of_two_exactly(data_type, exponent, seed):
    found = columns(data_type, 32, "by channel", seed)
    scaled = Columns(found.x * 2.0**exponent, found.w, found.kind)
    for one, other in zip(fitted(found), fitted(scaled), strict=True):
        assert torch.equal(one * 2.0**exponent, other)


@given(st.sampled_from(list(BLOCK_TYPES)), st.integers(0, 2**32 - 1))
def test_groups_do_not_know_each_other(data_type, seed):
    found, other = columns(data_type, 64, "by channel", seed), columns(data_type, 64, "by size", seed + 1)
    mixed = Columns(torch.cat([found.x[:, :32], other.x[:, 32:] * 1e3], dim=1),
                    torch.cat([found.w[:, :32], other.w[:, 32:]], dim=1), found.kind)  # fmt: skip
    for one, two in zip(fitted(found), fitted(mixed), strict=True):
        assert torch.equal(one[:32], two[:32])


@given(st.sampled_from(SYMMETRIC), st.integers(0, 2**32 - 1))
def test_a_negative_group_has_the_negative_scale(data_type, seed):
    found = columns(data_type, 32, "by channel", seed)
    assert torch.equal(fit_symmetric(Columns(-found.x, found.w, found.kind)), -fit_symmetric(found))
