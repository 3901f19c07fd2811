"""Numbers of few bits: E4M3 (OCP OFP8) and E2M1 (OCP MX), and the power-of-two scales E8M0.

A grid is described by its mantissa bits, its smallest normal exponent and its largest number. Between two powers of two
its steps are equal, so rounding is that of integers: divide by the step, round half to even, multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autoround_core.records import E2M1_VALUES, E8M0_BIAS

_E8M0_RANGE = (-126, 127)  # 2**-127 is no normal float32


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """mantissa: its stored bits. min_exponent: of the smallest normal number. largest: where it saturates."""

    mantissa: int
    min_exponent: int
    largest: float

    @property
    def max_exponent(self) -> int:
        """Of the largest number."""
        return exponent(torch.tensor(self.largest)).item()

    def step(self, values: torch.Tensor) -> torch.Tensor:
        """Distance of neighbouring numbers at each of `values`, float32, a power of two."""
        steps = exponent(values).clamp_(min=self.min_exponent).sub_(self.mantissa)
        return torch.ldexp(torch.ones_like(values), steps)

    def round(self, values: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest number to each of the float32 `values`, saturated. offset: in steps, within [-0.5, 0.5]."""
        step = self.step(values)
        rounded = values / step
        if offset is not None:
            # a step further than half of one could leave the grid at a power of two
            rounded = rounded + offset.clamp(-0.5, 0.5)
        return rounded.round_().mul_(step).clamp_(-self.largest, self.largest)


E4M3 = FloatGrid(mantissa=3, min_exponent=-6, largest=448.0)
E2M1 = FloatGrid(mantissa=1, min_exponent=0, largest=6.0)


def exponent(values: torch.Tensor) -> torch.Tensor:
    """floor(log2(|value|)) as int32, exact; -1 for zero."""
    return torch.frexp(values).exponent - 1


def to_codes(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of float32 numbers on the grid of E4M3 (8 bits) or E2M1 (4 bits); minus zero becomes zero."""
    if bits == 8:
        return (numbers + 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    index = torch.bucketize(numbers.abs(), torch.tensor(E2M1_VALUES, device=numbers.device), out_int32=True)
    return (index + 8 * (numbers < 0)).to(torch.uint8)


def power_of_two(greatest: torch.Tensor, grid: FloatGrid) -> torch.Tensor:
    """E8M0 bytes of the scales 2**(floor(log2(greatest)) - max_exponent) (OCP MX); greatest: float32, of any shape."""
    return (exponent(greatest) - grid.max_exponent).clamp(*_E8M0_RANGE).add(E8M0_BIAS).to(torch.uint8)


def from_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """The float32 scale of each E8M0 byte."""
    return torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.to(torch.int32) - E8M0_BIAS)
