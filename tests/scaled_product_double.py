"""A stand-in for torch's block-scaled product: undoes the layouts, index by index, and multiplies in float64."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, SwizzleType

_E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
_LENGTHS = {ScalingType.BlockWise1x16: 16, ScalingType.BlockWise1x32: 32}


class RecordedProduct:
    """Called like `scaled_mm`; keeps the shapes of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a=None, swizzle_b=None, output_dtype=None):
        assert b.stride(0) == 1, "the second matrix must be laid out by columns"
        self.calls.append((tuple(a.shape), tuple(b.shape)))
        left = matrix(a, scale_a, recipe_a, swizzle_a)
        right = matrix(b.T, scale_b, recipe_b, swizzle_b)
        return (left @ right.T).to(output_dtype)


def matrix(elements, scale, recipe, swizzle):
    """float64 [rows, in]."""
    factor = 1.0
    if isinstance(scale, list):
        assert recipe[1] == ScalingType.TensorWise and swizzle[1] == SwizzleType.NO_SWIZZLE
        assert scale[1].dtype == torch.float32 and scale[1].numel() == 1
        factor, scale, recipe, swizzle = scale[1].double(), scale[0], recipe[0], swizzle[0]
    assert swizzle == SwizzleType.SWIZZLE_32_4_4 and scale.dim() == 1
    numbers = numbers_of(elements)
    rows, columns = numbers.shape
    length = _LENGTHS[recipe]
    blocks = columns // length
    wide = -(-blocks // 4)
    assert len(scale) == -(-rows // 128) * wide * 512
    assert scale.dtype == (torch.float8_e4m3fn if length == 16 else torch.float8_e8m0fnu)
    scale = scale.float().double()
    at = [[(r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4 for c in range(blocks)]
          for r in range(rows)]
    return numbers * scale[torch.tensor(at)].repeat_interleave(length, 1) * factor


def numbers_of(elements):
    if elements.dtype == torch.float8_e4m3fn:
        return elements.double()
    assert elements.dtype == torch.float4_e2m1fn_x2
    pairs = elements.view(torch.uint8).long()
    return torch.stack([_E2M1[pairs & 15], _E2M1[pairs >> 4]], -1).flatten(1)
