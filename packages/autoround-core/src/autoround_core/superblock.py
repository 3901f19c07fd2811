"""The record of ggml's block types whose scales have two levels: integers in a group, float16 in a block.

What llama.cpp computes from a file, and so what tuning must see, is

    w = (scale * sub_scale) * (code - zero) - minimum * sub_minimum

with `scale` and `minimum` of a block, `sub_scale` and `sub_minimum` of one of its groups, and zero = 2**(bits-1) for
symmetric types, 0 for others. All products are exact in float32 (at most 11 + 7 + 6 bits), so the order in which an
engine multiplies makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autoround_core.records import QuantizedWeight
from autoround_core.scheme import BLOCK_TYPES, QuantScheme


@dataclass(frozen=True, slots=True, eq=False)
class SuperBlockWeight(QuantizedWeight):
    """One weight of a type in BLOCK_TYPES.

    codes: uint8 [out, in], 0 <= code < 2**bits. scale: float16 [out, blocks], of any sign. minimum: float16
    [out, blocks] of asymmetric types, else None. sub_scale: int8 [out, groups], sub_minimum: uint8 [out, groups];
    None, which means ones, where a block is one group. Rows hold whole blocks.
    Raises ValueError when the tensors contradict the scheme or each other.
    """

    scheme: QuantScheme
    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    sub_scale: torch.Tensor | None = None
    sub_minimum: torch.Tensor | None = None

    def __post_init__(self) -> None:
        kind = BLOCK_TYPES.get(self.scheme.data_type)
        if kind is None:
            raise ValueError(f"{self.scheme} is no block type; known: {', '.join(BLOCK_TYPES)}")
        if self.codes.dim() != 2 or self.codes.shape[1] % kind.block:
            raise ValueError(f"codes of {self.scheme} must be [out, in] with in divisible by {kind.block}, "
                             f"got {tuple(self.codes.shape)}")
        out_features, in_features = self.codes.shape
        blocks, groups = (out_features, in_features // kind.block), (out_features, in_features // kind.group_size)
        two_levels = kind.block != kind.group_size
        wanted = {
            "codes": (torch.uint8, tuple(self.codes.shape)),
            "scale": (torch.float16, blocks),
            "minimum": None if kind.sym else (torch.float16, blocks),
            "sub_scale": (torch.int8, groups) if two_levels else None,
            "sub_minimum": (torch.uint8, groups) if two_levels and not kind.sym else None,
        }
        for name, expected in wanted.items():
            tensor = getattr(self, name)
            found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
            if found != expected:
                raise ValueError(f"{name} of {self.scheme} must be {expected}, got {found}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def check(self) -> SuperBlockWeight:
        """The record itself. Raises ValueError when its numbers cannot be; for what comes from a file."""
        if (self.codes >> self.scheme.bits).any():
            raise ValueError(f"code {int(self.codes.max())} does not fit into {self.scheme.bits} bits")
        if not all(bool(torch.isfinite(part).all()) for part in (self.scale, self.minimum) if part is not None):
            raise ValueError("a scale or a minimum is not finite")
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("codes", "scale", "minimum", "sub_scale", "sub_minimum")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        step, shift = group_grid(self.scale, self.minimum, self.sub_scale, self.sub_minimum)
        values = self.codes.to(torch.float32).view(*step.shape, -1)
        if self.scheme.sym:
            values -= 2 ** (self.scheme.bits - 1)
        values *= step.unsqueeze(-1)
        if shift is not None:
            values -= shift.unsqueeze(-1)
        return values.view(self.shape).to(dtype)


def group_grid(
    scale: torch.Tensor, minimum: torch.Tensor | None, sub_scale: torch.Tensor | None,
    sub_minimum: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(step, shift) of every group, float32 [out, groups]: w = step * (code - zero) - shift. shift None = no shift."""
    step = _by_group(scale, sub_scale)
    return step, None if minimum is None else _by_group(minimum, sub_minimum)


def _by_group(outer: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
    outer = outer.to(torch.float32)
    if inner is None:
        return outer
    groups = inner.to(torch.float32).view(*outer.shape, -1)
    return (groups * outer.unsqueeze(-1)).view(inner.shape)
