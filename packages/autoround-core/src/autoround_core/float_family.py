"""The float families: "fp" (FP8), "mx_fp" (OCP MX) and "nv_fp" (NVFP4), tuned as integers are.

With m the greatest magnitude of a block w, a its range factor, V the rounding offset, R the rounding to the grid:

    fp      s = m a / 448
    mx_fp   s = 2^(floor(log2(m a)) - emax)                           emax = 2 for E2M1, 8 for E4M3
    nv_fp   s = e4m3(g m a / 6) / g,   g = 448 * 6 / (greatest magnitude of the matrix)
    w' = s * R(w/s + V * step)

where `step` is the distance of the neighbouring numbers at w/s. Gradients pass R straight through; a saturated number
passes none to w/s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from autoround_core.family import NumberFamily, TunableWeight, straight_through
from autoround_core.float_grid import E2M1, E4M3, FloatGrid, from_e8m0, power_of_two, to_codes
from autoround_core.records import FloatWeight
from autoround_core.scheme import WHOLE_ROW, ActivationScheme, QuantScheme

_SMALLEST_SCALE = 1 / (448 * 512)  # keeps a block of zeros finite
_SMALLEST_E4M3 = 2.0**-9


class FloatFamily(NumberFamily):
    """What the three families share; they differ in their grid and in how a scale is stored."""

    search_factors: Sequence[float]
    """Multiples of the greatest magnitude that the search tries."""

    @abstractmethod
    def grid(self, bits: int) -> FloatGrid:
        """The numbers of an element."""

    @abstractmethod
    def stored_scale(self, greatest: torch.Tensor, bits: int, global_scale: torch.Tensor | None) -> torch.Tensor:
        """The scale of blocks, as stored, for their greatest magnitudes, float32 of any shape."""

    def scale_value(self, stored: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
        """The float32 number that a stored scale stands for."""
        return stored

    def global_scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a whole matrix, float32 [1], for families that have one."""
        return None

    def round_to_nearest(self, weight: torch.Tensor, scheme: QuantScheme) -> FloatWeight:
        return self.tunable(weight, scheme).finish()

    @torch.no_grad()
    def search(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> FloatWeight:
        tunable = self.tunable(weight, scheme)
        weights = to_blocks(importance.to(weight.device).view(1, -1), QuantScheme(scheme.bits, scheme.group_size))
        factors = tunable.ranges[0]
        best, best_error = factors.clone(), _weighted_error(tunable, weights)
        for factor in self.search_factors:
            factors.fill_(factor)
            error = _weighted_error(tunable, weights)
            better = error < best_error
            best = torch.where(better, factors, best)
            best_error = torch.where(better, error, best_error)
        factors.copy_(best)
        return tunable.finish()

    def tunable(self, weight: torch.Tensor, scheme: QuantScheme) -> TunableFloat:
        return TunableFloat(self, weight, scheme)

    def quantize_activation(
        self, inputs: torch.Tensor, activation: ActivationScheme, input_scale: torch.Tensor | None
    ) -> torch.Tensor:
        numbers, stored = self._activation_numbers(inputs, activation, input_scale)
        numbers.mul_(self._activation_value(stored, activation, input_scale))
        return straight_through(inputs, numbers.flatten(-2)[..., : inputs.shape[-1]].to(inputs.dtype))

    def activation_codes(
        self, inputs: torch.Tensor, activation: ActivationScheme, input_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `quantize_activation` rounds inputs [..., in] to, for kernels that multiply codes.

        Returns uint8 codes [..., in], as in FloatWeight, and the scales [..., groups] as the family stores them.
        """
        numbers, stored = self._activation_numbers(inputs, activation, input_scale)
        codes = to_codes(numbers.flatten(-2)[..., : inputs.shape[-1]], activation.bits)
        return codes, stored.squeeze(-1)

    def _activation_numbers(self, inputs, activation: ActivationScheme, input_scale):
        """(numbers of the grid [..., groups, length], scales as stored [..., groups, 1])."""
        groups = _feature_groups(inputs.detach().float(), activation)
        stored = self._activation_scale(groups.abs().amax(-1, keepdim=True), activation, input_scale)
        value = self._activation_value(stored, activation, input_scale)
        return self.grid(activation.bits).round(groups / value), stored

    def _activation_scale(self, greatest, activation: ActivationScheme, input_scale) -> torch.Tensor:
        return self.stored_scale(greatest, activation.bits, input_scale)

    def _activation_value(self, stored, activation: ActivationScheme, input_scale) -> torch.Tensor:
        return self.scale_value(stored, input_scale)


class Fp(FloatFamily):
    """E4M3 numbers with float32 scales for a row, a matrix, or a block of a matrix."""

    data_type = "fp"
    search_factors = tuple(i / 100 for i in range(80, 122, 2))

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.bits != 8 or not scheme.sym:
            return f"fp has 8 bits and no zero point, got {scheme}"
        if (scheme.group_size > 0) != (scheme.group_rows > 1):
            return f"fp has a scale for a row, a matrix or a block of both, got {scheme}"
        activation = scheme.activation
        if activation and ((activation.data_type, activation.bits) != (self.data_type, 8)
                           or (activation.group_size > 0 and not activation.dynamic)):
            return f"beside fp weights inputs are fp with 8 bits, got {activation}"
        return None

    def grid(self, bits: int) -> FloatGrid:
        return E4M3

    def stored_scale(self, greatest, bits, global_scale):
        return (greatest / E4M3.largest).clamp(min=_SMALLEST_SCALE)

    def input_scale(self, activation: ActivationScheme, greatest: torch.Tensor) -> torch.Tensor:
        return self.stored_scale(greatest.float().reshape(1), activation.bits, None)

    def _activation_scale(self, greatest, activation, input_scale):
        if activation.dynamic:
            return self.stored_scale(greatest, activation.bits, None)
        return input_scale.float().expand(greatest.shape)


class MxFp(FloatFamily):
    """E2M1 or E4M3 numbers, 32 to a power of two."""

    data_type = "mx_fp"
    search_factors = (0.5, 2.0)

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.bits not in (4, 8) or scheme.group_size != 32 or scheme.group_rows != 1 or not scheme.sym:
            return f"mx_fp has 4 or 8 bits in groups of 32, got {scheme}"
        return _why_not_alike(self.data_type, scheme)

    def grid(self, bits: int) -> FloatGrid:
        return E2M1 if bits == 4 else E4M3

    def stored_scale(self, greatest, bits, global_scale):
        return power_of_two(greatest, self.grid(bits))

    def scale_value(self, stored, global_scale):
        return from_e8m0(stored)


class NvFp(FloatFamily):
    """E2M1 numbers, 16 to an E4M3 scale, and one scale for the matrix. greatest: see `for_group`."""

    data_type = "nv_fp"
    search_factors = tuple(i / 100 for i in range(50, 152, 4))

    def __init__(self, greatest: float | None = None) -> None:
        self._greatest = greatest

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.bits != 4 or scheme.group_size != 16 or scheme.group_rows != 1 or not scheme.sym:
            return f"nv_fp has 4 bits in groups of 16, got {scheme}"
        return _why_not_alike(self.data_type, scheme)

    def for_group(self, weights: Sequence[torch.Tensor]) -> NvFp:
        """One global scale for all: engines keep a single one for layers that they run as one."""
        return NvFp(max(float(weight.abs().max()) for weight in weights))

    def grid(self, bits: int) -> FloatGrid:
        return E2M1

    def global_scale(self, weight):
        greatest = weight.abs().max().float() if self._greatest is None else torch.tensor(self._greatest)
        return _global_scale(greatest.to(weight.device))

    def stored_scale(self, greatest, bits, global_scale):
        scale = global_scale * greatest / E2M1.largest
        return scale.clamp(_SMALLEST_E4M3, E4M3.largest).to(torch.float8_e4m3fn)

    def scale_value(self, stored, global_scale):
        return stored.to(torch.float32) / global_scale

    def input_scale(self, activation: ActivationScheme, greatest: torch.Tensor) -> torch.Tensor:
        return _global_scale(greatest)


def _global_scale(greatest: torch.Tensor) -> torch.Tensor:
    """float32 [1]: 448 * 6 / greatest, so that the largest block scale is the largest E4M3 number."""
    greatest = greatest.float().reshape(1)
    return torch.where(greatest > 0, E4M3.largest * E2M1.largest / greatest, torch.ones_like(greatest))


def _why_not_alike(data_type: str, scheme: QuantScheme) -> str | None:
    """The inputs of MX and NV layers are of the kind of their weights, or stay in 16 bits."""
    activation = scheme.activation
    alike = ActivationScheme(scheme.bits, data_type, scheme.group_size)
    return None if activation in (None, alike) else f"beside these weights inputs are {alike}, got {activation}"


class TunableFloat(TunableWeight):
    """A weight with the tuned parameters V (`rounding`) and a (`ranges`) of this module's formulas."""

    def __init__(self, family: FloatFamily, weight: torch.Tensor, scheme: QuantScheme) -> None:
        self._family, self._scheme, self._shape = family, scheme, tuple(weight.shape)
        self.blocks = to_blocks(weight, scheme)
        self._greatest = self.blocks.abs().amax((1, 3))
        self._global = family.global_scale(weight)
        self.rounding = torch.zeros_like(self.blocks, requires_grad=True)
        self.ranges = (torch.ones_like(self._greatest).requires_grad_(),)

    def fake_quantize(self) -> torch.Tensor:
        _, scale = self._scales()
        grid = self._family.grid(self._scheme.bits)
        blocks = _FakeQuantize.apply(self.blocks, self.rounding, scale[:, None, :, None], grid)
        return from_blocks(blocks, self._shape)

    @torch.no_grad()
    def finish(self) -> FloatWeight:
        stored, scale = self._scales()
        numbers = self._family.grid(self._scheme.bits).round(self.blocks / scale[:, None, :, None], self.rounding)
        codes = to_codes(from_blocks(numbers, self._shape), self._scheme.bits)
        return FloatWeight(self._scheme, codes.contiguous(), stored, self._global)

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(as stored, float32) [row groups, groups] of the present ranges; the second is differentiable."""
        smooth = self._greatest * self.ranges[0]
        stored = self._family.stored_scale(smooth.detach(), self._scheme.bits, self._global)
        scale = self._family.scale_value(stored, self._global)
        if torch.is_grad_enabled():
            # straight through: the stored value forward, the gradient of the unrounded formula backward
            scale = straight_through(smooth / self._family.grid(self._scheme.bits).largest, scale)
        return stored, scale


class _FakeQuantize(torch.autograd.Function):
    """w' = s * R(w/s + V * step) with the straight-through gradients of the module's docstring."""

    @staticmethod
    def forward(ctx, blocks, rounding, scale, grid):
        steps = blocks / scale
        numbers = grid.round(steps, rounding)
        saturated = (numbers.abs() == grid.largest) & (steps.abs() > grid.largest)
        ctx.save_for_backward(steps, numbers, saturated, scale)
        ctx.grid = grid
        return numbers * scale

    @staticmethod
    def backward(ctx, gradient):
        steps, numbers, saturated, scale = ctx.saved_tensors
        passed = gradient.masked_fill(saturated, 0.0)
        d_scale = (gradient * numbers - passed * steps).sum((1, 3), keepdim=True)
        return None, passed.mul_(ctx.grid.step(steps)).mul_(scale), d_scale, None


def _weighted_error(tunable: TunableFloat, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared error [row groups, groups] of the present parameters."""
    blocks = to_blocks(tunable.fake_quantize(), tunable._scheme)
    return (blocks - tunable.blocks).square_().mul_(weights).sum((1, 3))


def to_blocks(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[out, in] to float32 [row groups, rows, groups, length], filled up with zeros at the right and at the bottom."""
    out_features, in_features = weight.shape
    rows = out_features if scheme.group_rows == WHOLE_ROW else scheme.group_rows
    length = scheme.group_length(in_features)
    weight = weight.to(torch.float32)
    padding = (-in_features % length, -out_features % rows)
    if any(padding):
        weight = torch.nn.functional.pad(weight, (0, padding[0], 0, padding[1]))
    return weight.reshape(-1, rows, weight.shape[1] // length, length)


def from_blocks(blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)[: shape[0], : shape[1]]


def _feature_groups(inputs: torch.Tensor, activation: ActivationScheme) -> torch.Tensor:
    """[..., features] to [..., groups, length], zero-padded."""
    length = inputs.shape[-1] if activation.group_size == WHOLE_ROW else activation.group_size
    padding = -inputs.shape[-1] % length
    inputs = torch.nn.functional.pad(inputs, (0, padding)) if padding else inputs
    return inputs.unflatten(-1, (-1, length))
