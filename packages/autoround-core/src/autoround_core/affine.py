"""Numerics of integer weights: ranges, scales, rounding, scale search.

Everything here is a function of tensors. A weight [out, in] is viewed as groups [out, groups, length]; a
row that the group size does not divide is filled up with zeros, which no range or error notices.

The scale is rounded to float16, as it will be stored, *before* codes are chosen: dequantizing the stored
numbers then gives back exactly what was measured. A symmetric range is full: the side with the larger
magnitude is mapped to the extra code -2**(bits-1), so a scale may be negative. Formulas as in SignRound
(arXiv 2309.05516) and its public implementation; `tests/data/peer_rtn.safetensors` holds the comparison.
"""

from __future__ import annotations

import torch

from autoround_core.errors import UnsupportedError
from autoround_core.records import AffineWeight
from autoround_core.scheme import QuantScheme

SMALLEST_SCALE = 1e-5  # keeps an all-zero group finite; a multiple of float16's subnormal step


def to_groups(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[out, in] to float32 [out, groups, length], zero-padded at the end of each row."""
    out_features, in_features = weight.shape
    length = scheme.group_length(in_features)
    padding = scheme.groups(in_features) * length - in_features
    weight = weight.to(torch.float32)
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(out_features, -1, length)


def from_groups(groups: torch.Tensor, in_features: int) -> torch.Tensor:
    """[out, groups, length] to [out, in]: the inverse of `to_groups`."""
    return groups.reshape(groups.shape[0], -1)[:, :in_features]


def weight_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low <= 0, high >= 0), each [out, groups]: the range of a group, made to contain zero."""
    low, high = torch.aminmax(groups, dim=-1)
    return low.clamp_(max=0), high.clamp_(min=0)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round a float32 scale as float16 will store it, and keep it at least SMALLEST_SCALE from zero.

    Raises UnsupportedError when it does not fit into float16.
    """
    rounded = scale.to(torch.float16)
    if not torch.isfinite(rounded).all():
        largest = float(scale.abs().max())
        raise UnsupportedError(f"a group needs the scale {largest:g}, more than float16 can hold (65504)")
    smallest = torch.tensor(SMALLEST_SCALE, dtype=torch.float16, device=scale.device)
    rounded = torch.where(rounded < 0, rounded.clamp(max=-smallest), rounded.clamp(min=smallest))
    return rounded.to(torch.float32)


def symmetric_scale(low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale [out, groups] that maps the larger of |low|, high to the code -2**(bits-1)."""
    extreme = torch.where(high < -low, -low, -high)
    return stored_scale(extreme / 2 ** (bits - 1))


def asymmetric_scale(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero_point), each float32 [out, groups], that map [low, high] to 0 .. 2**bits - 1."""
    levels = 2**bits - 1
    scale = stored_scale((high - low) / levels)
    return scale, torch.round(-low / scale).clamp_(0, levels)


def scale_and_zero(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero_point), float32 [out, groups], for a range and a scheme."""
    if scheme.sym:
        scale = symmetric_scale(low, high, scheme.bits)
        return scale, torch.full_like(scale, 2 ** (scheme.bits - 1))
    return asymmetric_scale(low, high, scheme.bits)


def quantize(
    weight: torch.Tensor, scheme: QuantScheme, scale: torch.Tensor, zero_point: torch.Tensor,
    rounding: torch.Tensor | None = None,
) -> AffineWeight:
    """Choose the codes: clamp(round(w / scale + rounding) + zero_point).

    weight: [out, in]. scale, zero_point: float32 [out, groups], the scale already as stored. rounding: offset
    [out, groups, length] added before rounding half to even, or None.
    """
    in_features = weight.shape[1]
    steps = to_groups(weight, scheme) / scale.unsqueeze(-1)
    if rounding is not None:
        steps += rounding
    codes = steps.round_().add_(zero_point.unsqueeze(-1)).clamp_(0, 2**scheme.bits - 1)
    return AffineWeight(
        scheme=scheme,
        codes=from_groups(codes, in_features).to(torch.uint8).contiguous(),
        scale=scale.to(torch.float16),
        zero_point=zero_point.to(torch.uint8),
    )
