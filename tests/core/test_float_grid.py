"""Numbers of few bits against torch's own casts, and against a search through all numbers in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.float_grid import E2M1, E4M3, exponent, from_e8m0, power_of_two, to_codes
from autoround_core.records import FloatWeight
from autoround_core.scheme import QuantScheme

HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ALL_E2M1 = torch.tensor([*HALVES, *(-x for x in HALVES)], dtype=torch.float64)
ALL_E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()


def values(seed, top):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-14, 12, (4096,), generator=generator).float())
    return (torch.randn(4096, generator=generator) * spread).clamp(-top, top)


@given(st.integers(0, 2**31))
def test_e4m3_rounds_like_the_cast(seed):
    x = values(seed, 448.0)
    assert torch.equal(E4M3.round(x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("grid", "numbers"), [(E2M1, ALL_E2M1), (E4M3, ALL_E4M3[~ALL_E4M3.isnan()])])
def test_nothing_is_nearer(grid, numbers):
    x = torch.cat((values(3, 1e4), numbers.float(), (numbers[1:] + numbers[:-1]).float() / 2))
    rounded = grid.round(x)
    assert set(rounded.tolist()) <= set(numbers.tolist())
    nearest = (x.double()[:, None] - numbers[None]).abs().amin(1)
    assert torch.equal((x.double() - rounded).abs(), nearest)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (5.1, 6.0), (9.0, 6.0)],
)
def test_halves_go_to_even_and_large_numbers_saturate(value, expected):
    assert E2M1.round(torch.tensor([value, -value])).tolist() == [expected, -expected]


@given(st.integers(0, 2**31), st.sampled_from([(E2M1, ALL_E2M1), (E4M3, ALL_E4M3)]))
def test_an_offset_moves_by_at_most_one_number_and_never_off_the_grid(seed, case):
    grid, numbers = case
    x = values(seed, grid.largest)
    offset = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.7
    rounded = grid.round(x, offset)
    assert set(rounded.abs().tolist()) <= set(numbers.abs().tolist())
    assert ((rounded - x).abs() <= grid.step(x) * 1.001).all()


@pytest.mark.parametrize(("bits", "numbers"), [(4, ALL_E2M1), (8, ALL_E4M3)])
def test_codes_are_the_index_of_the_number(bits, numbers):
    real = ~(numbers.isnan() | (numbers.signbit() & (numbers == 0)))
    expected = torch.arange(len(numbers))[real]
    assert torch.equal(to_codes(numbers[real].float(), bits).long(), expected)
    assert to_codes(torch.tensor([-0.0]), bits).item() == 0


def test_e8m0():
    codes = torch.arange(1, 255).to(torch.uint8)
    expected = torch.tensor([2.0 ** (int(code) - 127) for code in codes], dtype=torch.float64)
    assert torch.equal(from_e8m0(codes).double(), expected)
    scheme = QuantScheme(4, 32, data_type="mx_fp")
    ones = torch.full((254, 32), 2, dtype=torch.uint8)
    assert torch.equal(FloatWeight(scheme, ones, codes[:, None]).dequantize(torch.float32)[:, 0].double(), expected)


def test_a_scale_is_the_power_of_two_below():
    greatest = torch.tensor([6.0, 4.0, 3.999, 8.0, 0.0, 2.0**-140, 3e38])
    assert power_of_two(greatest, E2M1).tolist() == [127, 127, 126, 128, 124, 1, 252]
    assert torch.equal(exponent(greatest[:4]), torch.tensor([2, 2, 1, 3], dtype=torch.int32))
