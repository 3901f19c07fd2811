"""The number families of ggml's two-level block types: scales by search, rounding by tuning.

The search fixes the integers of the scales and their float16 numbers. Tuning moves the rounding alone, with V the
offset of a weight w in a group of step s and shift m, both as llama.cpp will compute them:

    code = clamp(round((w + m) / s + V) + zero, 0, 2^b - 1)          w' = s * (code - zero) - m

so what tuning measures is what the file holds. Rounding passes gradients straight through, a clamped code none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from autoround_core import LinearSpec, NumberFamily, QuantScheme, SuperBlockWeight, TunableWeight
from autoround_core.scheme import BLOCK_TYPES
from autoround_core.superblock import group_grid
from autoround_export.gguf.search import CHUNK_WEIGHTS, Fit, fit


class SuperBlockFamily(NumberFamily):
    """One of BLOCK_TYPES."""

    starts_from_search = True

    def __init__(self, data_type: str) -> None:
        self.data_type = data_type
        kind = BLOCK_TYPES[data_type]
        self._scheme = QuantScheme(kind.bits, kind.group_size, kind.sym, data_type)
        self._block = kind.block

    def why_not(self, scheme: QuantScheme) -> str | None:
        return None if scheme == self._scheme else f"{self.data_type} is {self._scheme} and nothing else, got {scheme}"

    def why_not_layer(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        if spec.in_features % self._block:
            return f"{self._scheme} needs rows divisible by {self._block}, got {spec.in_features}"
        return self.why_not(spec.scheme)

    def round_to_nearest(self, weight: torch.Tensor, scheme: QuantScheme) -> SuperBlockWeight:
        return _nearest(weight, scheme, fit(weight, scheme.data_type))

    def search(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> SuperBlockWeight:
        return _nearest(weight, scheme, fit(weight, scheme.data_type, importance))

    def tunable(self, weight: torch.Tensor, scheme: QuantScheme) -> TunableWeight:
        return TunableSuperBlock(weight, scheme, fit(weight, scheme.data_type))

    def tunable_from(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> TunableWeight:
        return TunableSuperBlock(weight, scheme, fit(weight, scheme.data_type, importance))


def super_block_families() -> Iterable[NumberFamily]:
    return [SuperBlockFamily(data_type) for data_type in BLOCK_TYPES]


@torch.no_grad()
def _nearest(weight: torch.Tensor, scheme: QuantScheme, found: Fit) -> SuperBlockWeight:
    """The record of the nearest codes, some rows at a time: an embedding in float32 may be larger than the model."""
    step, shift = group_grid(found.scale, found.minimum, found.sub_scale, found.sub_minimum)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    low, top = _code_range(scheme)
    for rows in torch.arange(len(weight)).split(max(1, CHUNK_WEIGHTS // weight.shape[1])):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        places = _places(weight[part], step[part], None if shift is None else shift[part])
        codes[part] = places.round_().clamp_(low, top).sub_(low).view(len(rows), -1)
    return SuperBlockWeight(scheme, codes, found.scale, found.minimum, found.sub_scale, found.sub_minimum)


def _places(weight: torch.Tensor, step: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """(w + m) / s, where an unrounded code would be, float32 [out, groups, group_size]; 0 where s is 0."""
    groups = weight.to(torch.float32).reshape(*step.shape, -1)
    inverse = torch.where(step == 0, 0.0, 1.0 / step).unsqueeze(-1)
    return groups * inverse if shift is None else (groups + shift.unsqueeze(-1)) * inverse


def _code_range(scheme: QuantScheme) -> tuple[int, int]:
    """(least, greatest) code relative to zero."""
    zero = 2 ** (scheme.bits - 1) if scheme.sym else 0
    return -zero, 2**scheme.bits - 1 - zero


class TunableSuperBlock(TunableWeight):
    """A weight with fixed scales and the tuned offsets V (`rounding`)."""

    ranges = ()

    def __init__(self, weight: torch.Tensor, scheme: QuantScheme, found: Fit) -> None:
        self._scheme, self._fit, self._shape = scheme, found, weight.shape
        step, shift = group_grid(found.scale, found.minimum, found.sub_scale, found.sub_minimum)
        self._step, self._shift = step.unsqueeze(-1), None if shift is None else shift.unsqueeze(-1)
        self._places = _places(weight, step, shift)
        self._low, self._top = _code_range(scheme)
        self.rounding = torch.zeros_like(self._places, requires_grad=True)

    def fake_quantize(self) -> torch.Tensor:
        values = _FakeQuantize.apply(self.rounding, self._places, self._step, self._shift, self._low, self._top)
        return values.view(self._shape)

    @torch.no_grad()
    def finish(self) -> SuperBlockWeight:
        codes = (self._places + self.rounding).round_().clamp_(self._low, self._top).sub_(self._low)
        found = self._fit
        return SuperBlockWeight(self._scheme, codes.to(torch.uint8).view(self._shape), found.scale, found.minimum,
                                found.sub_scale, found.sub_minimum)


class _FakeQuantize(torch.autograd.Function):
    """w' = s * clamp(round(place + V)) - m with the straight-through gradient of V."""

    @staticmethod
    def forward(ctx, rounding, places, step, shift, low, top):
        rounded = (places + rounding).round_()
        codes = rounded.clamp(low, top)
        ctx.save_for_backward(codes != rounded, step)
        codes *= step
        return codes if shift is None else codes.sub_(shift)

    @staticmethod
    def backward(ctx, gradient):
        clamped, step = ctx.saved_tensors
        return gradient.masked_fill(clamped, 0.0).mul_(step), None, None, None, None, None
