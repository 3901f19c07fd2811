"""The integer family: scale * (code - zero_point), tuned as in SignRound (arXiv 2309.05516).

With a, c the range factors and V the rounding offset of a group w (low, high its range):

    sym:   m = -low*a if high*c < -low*a else -high*c     s = f16(m / 2^(b-1))           z = 2^(b-1)
    asym:  s = f16((high*c - low*a) / (2^b - 1))          z = round(-low*a / s)
    code = clamp(round(w/s + V) + z, 0, 2^b - 1)          w' = s * (code - z)

Rounding passes gradients straight through, a clamped code passes none to w/s. The backward pass is written
out by hand: autograd would keep a dozen temporaries of the weight's size for every step, this keeps three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoround_core import affine
from autoround_core.errors import UnsupportedError
from autoround_core.family import NumberFamily, TunableWeight, straight_through
from autoround_core.records import AffineWeight
from autoround_core.scheme import PRESETS, ActivationScheme, QuantScheme

# factors of the min-max scale tried by the search; above 1 for the side that the full range cuts off
_SEARCH_FACTORS = [i / 100 for i in range(30, 122, 2)]

_SMALLEST_INPUT = 1e-10  # keeps a token of zeros finite


class IntFamily(NumberFamily):
    """`data_type` "int", 2 to 8 bits, any group size.

    positive: symmetric scales are never negative, for kernels that want them so; the larger side then need not be
    the one with the extra code, and the error is a little larger.
    """

    data_type = "int"

    def __init__(self, *, positive: bool = False) -> None:
        self._positive = positive

    def _range(self, groups: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = affine.weight_range(groups)
        if not (self._positive and scheme.sym):
            return low, high
        # a range of which the lower side is the larger, and which still holds both
        codes = 2 ** (scheme.bits - 1)
        return -torch.maximum(-low, high * (codes / (codes - 1))), torch.zeros_like(high)

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.group_rows != 1:
            return f"integers have a scale for a row or a part of it, got {scheme}"
        if scheme.activation is None or scheme == PRESETS["INT8"]:
            return None
        return f"beside integers inputs stay in 16 bits, or all is INT8, got {scheme}"

    def round_to_nearest(self, weight: torch.Tensor, scheme: QuantScheme) -> AffineWeight:
        low, high = self._range(affine.to_groups(weight, scheme), scheme)
        return affine.quantize(weight, scheme, *affine.scale_and_zero(low, high, scheme))

    def search(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> AffineWeight:
        groups = affine.to_groups(weight, scheme)
        weights = affine.to_groups(importance.view(1, -1), scheme).to(groups.device)
        low, high = self._range(groups, scheme)
        best_scale, best_zero = affine.scale_and_zero(low, high, scheme)
        best_error = _weighted_error(groups, weights, best_scale, best_zero, scheme.bits)
        for scale, zero_point in _candidates(low, high, scheme, both_signs=not self._positive):
            error = _weighted_error(groups, weights, scale, zero_point, scheme.bits)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
        return affine.quantize(weight, scheme, best_scale, best_zero)

    def tunable(self, weight: torch.Tensor, scheme: QuantScheme) -> TunableInt:
        return TunableInt(weight, scheme, self._range)

    def quantize_activation(
        self, inputs: torch.Tensor, activation: ActivationScheme, input_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Symmetric, a scale for each token: greatest / 127."""
        values = inputs.detach().float()
        scale = values.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_INPUT) / 127
        codes = (values / scale).round_().clamp_(-128, 127)
        return straight_through(inputs, codes.mul_(scale).to(inputs.dtype))


def _candidates(low, high, scheme: QuantScheme, *, both_signs: bool):
    """Yield (scale, zero_point) pairs, [out, groups]: shrunk ranges, for sym of either sign if `both_signs`."""
    for factor in _SEARCH_FACTORS:
        try:
            scale, zero_point = affine.scale_and_zero(low * factor, high * factor, scheme)
        except UnsupportedError:  # a stretched range may need a scale that float16 cannot hold
            continue
        yield scale, zero_point
        if scheme.sym and both_signs:
            yield -scale, zero_point


def _weighted_error(groups, weights, scale, zero_point, bits: int) -> torch.Tensor:
    """Weighted squared error [out, groups] of rounding `groups` to the grid."""
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    values = (groups / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    values.sub_(zero_point).mul_(scale).sub_(groups).square_().mul_(weights)
    return values.sum(-1)


class TunableInt(TunableWeight):
    """A weight with the tuned parameters V (`rounding`) and a, c (`ranges`) of this module's formulas."""

    def __init__(self, weight: torch.Tensor, scheme: QuantScheme, range_of: Callable[..., tuple]) -> None:
        """range_of: (groups, scheme) to the (low, high) of each group."""
        self._scheme = scheme
        self._in_features = weight.shape[1]
        self._groups = affine.to_groups(weight, scheme)
        self._low, self._high = range_of(self._groups, scheme)
        self.rounding = torch.zeros_like(self._groups, requires_grad=True)
        ones = torch.ones_like(self._low)
        self.ranges = (ones.clone().requires_grad_(), ones.clone().requires_grad_())

    def fake_quantize(self) -> torch.Tensor:
        scale, zero_point = self._grid()
        groups = _FakeQuantize.apply(self._groups, self.rounding, scale, zero_point, self._scheme.bits)
        return affine.from_groups(groups, self._in_features)

    @torch.no_grad()
    def finish(self) -> AffineWeight:
        weight = affine.from_groups(self._groups, self._in_features)
        return affine.quantize(weight, self._scheme, *self._grid(), self.rounding)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero_point) [out, groups] of the present ranges, differentiable."""
        low, high = self._low * self.ranges[0], self._high * self.ranges[1]
        scale, zero_point = affine.scale_and_zero(low.detach(), high.detach(), self._scheme)
        if not torch.is_grad_enabled():
            return scale, zero_point
        # straight through: the stored values forward, the gradient of the unrounded formula backward
        if self._scheme.sym:
            smooth = torch.where(high < -low, -low, -high) / 2 ** (self._scheme.bits - 1)
            return scale + (smooth - smooth.detach()), zero_point
        smooth = (high - low) / (2**self._scheme.bits - 1)
        scale = scale + (smooth - smooth.detach())
        smooth_zero = -low / scale
        return scale, zero_point + (smooth_zero - smooth_zero.detach())


class _FakeQuantize(torch.autograd.Function):
    """w' = s * (clamp(round(w/s + V) + z) - z) with the straight-through gradients of the module's docstring."""

    @staticmethod
    def forward(ctx, groups, rounding, scale, zero_point, bits):
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        steps = groups / scale
        rounded = (steps + rounding).round_().add_(zero_point)
        codes = rounded.clamp(0, 2**bits - 1)
        clamped = codes != rounded
        codes -= zero_point
        ctx.save_for_backward(steps, codes, clamped, scale)
        ctx.tune_zero = ctx.needs_input_grad[3]
        return codes * scale

    @staticmethod
    def backward(ctx, gradient):
        steps, codes, clamped, scale = ctx.saved_tensors
        passed = gradient.masked_fill(clamped, 0.0)
        d_scale = torch.sub(torch.linalg.vecdot(gradient, codes), torch.linalg.vecdot(passed, steps))
        d_zero = None
        if ctx.tune_zero:
            d_zero = (passed.sum(-1) - gradient.sum(-1)) * scale.squeeze(-1)
        return None, passed.mul_(scale), d_scale, d_zero, None
