"""NVFP4 on both sides, on torch's scaled matrix product: 16 E2M1 numbers to an E4M3 scale, and a scale for all.

Codes go two to a byte, the E4M3 scales in the tiles of `scale_layout`, and the scale for all as a number by which to
multiply: our records divide by it, so it is inverted. torch's recipes are BlockWise1x16 with SWIZZLE_32_4_4, and
TensorWise. That takes Blackwell, compute capability 10.0.

**No GPU has run this**; `scaled_product` says what takes its place, and that the backend `reference` emulates the same
layers everywhere.
"""

from __future__ import annotations

import torch

from autoround_backends.scale_layout import from_pairs, from_tiles, to_pairs, to_tiles
from autoround_backends.scaled_product import Operand, ScaledBackend, ScaledLinear
from autoround_core import FloatWeight, QuantScheme, Support
from autoround_core.float_family import NvFp

_RECIPES = ("BlockWise1x16", "TensorWise")


class _NvLinear(ScaledLinear):
    """codes: uint8 [out, in / 2]. scale: uint8, E4M3 bytes in tiles. global_scale: float32 [1], as in the record."""

    def __init__(self, backend, family, layer, device, dtype) -> None:
        super().__init__(backend, family, layer, device, dtype)
        self.register_buffer("codes", to_pairs(layer.weight.codes).to(device))
        self.register_buffer("scale", to_tiles(layer.weight.scale.view(torch.uint8)).to(device))
        self.register_buffer("global_scale", layer.weight.global_scale.to(device))

    def input_operand(self, codes: torch.Tensor, scale: torch.Tensor) -> Operand:
        return _operand(to_pairs(codes), to_tiles(scale.view(torch.uint8)), self.input_scale)

    def weight_operand(self) -> Operand:
        return _operand(self.codes, self.scale, self.global_scale)

    def record(self) -> FloatWeight:
        scale = from_tiles(self.scale, self.out_features, self._scheme.groups(self.in_features))
        return FloatWeight(
            self._scheme, from_pairs(self.codes), scale.view(torch.float8_e4m3fn), self.global_scale
        )


def _operand(pairs: torch.Tensor, tiles: torch.Tensor, global_scale: torch.Tensor) -> Operand:
    scales = (tiles.view(torch.float8_e4m3fn), global_scale.reciprocal())
    return Operand(pairs.view(torch.float4_e2m1fn_x2), scales, _RECIPES, tiled=True)


class Nvfp4(ScaledBackend):
    """A row of codes must be a multiple of 16 bytes; torch wants 16 to divide out_features."""

    name, family, linear = "nvfp4", NvFp(), _NvLinear
    support = Support(
        devices=("cuda",), dtypes=("bfloat16", "float16", "float32"), data_types=("nv_fp",), bits=(4,),
        group_sizes=(16,), sym=(True,), activations=True, in_multiple=32, out_multiple=16,
    )  # fmt: skip

    def capability(self, scheme: QuantScheme) -> tuple[tuple[int, int], tuple[int, int] | None]:
        return (10, 0), None
