"""OCP MX numbers on both sides, on torch's scaled matrix product: 32 E2M1 or E4M3 numbers to a power of two.

Codes of 4 bits go two to a byte, scales as E8M0 bytes in the tiles of `scale_layout`: torch's recipe BlockWise1x32
with SWIZZLE_32_4_4. That takes Blackwell, compute capability 10.0. The 4-bit product comes from a library that torch is
built with on Linux; it is for B200 and B300 only, and its results are bfloat16. The 8-bit one is cuBLAS's.

**No GPU has run this**; `scaled_product` says what takes its place, and that the backend `reference` emulates the same
layers everywhere.
"""

from __future__ import annotations

import torch

from autoround_backends.scale_layout import from_pairs, from_tiles, to_pairs, to_tiles
from autoround_backends.scaled_product import Operand, ScaledBackend, ScaledLinear
from autoround_core import FloatWeight, QuantScheme, Support
from autoround_core.float_family import MxFp


class _MxLinear(ScaledLinear):
    """codes: uint8 [out, in], of 4 bits [out, in / 2]. scale: uint8, in tiles."""

    def __init__(self, backend, family, layer, device, dtype) -> None:
        super().__init__(backend, family, layer, device, dtype)
        self.register_buffer("codes", self._packed(layer.weight.codes).to(device))
        self.register_buffer("scale", to_tiles(layer.weight.scale).to(device))

    def input_operand(self, codes: torch.Tensor, scale: torch.Tensor) -> Operand:
        return self._operand(self._packed(codes), to_tiles(scale))

    def weight_operand(self) -> Operand:
        return self._operand(self.codes, self.scale)

    def record(self) -> FloatWeight:
        codes = from_pairs(self.codes) if self._scheme.bits == 4 else self.codes
        groups = self._scheme.groups(self.in_features)
        return FloatWeight(self._scheme, codes, from_tiles(self.scale, self.out_features, groups))

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        return to_pairs(codes) if self._scheme.bits == 4 else codes

    def _operand(self, codes: torch.Tensor, tiles: torch.Tensor) -> Operand:
        kind = torch.float4_e2m1fn_x2 if self._scheme.bits == 4 else torch.float8_e4m3fn
        return Operand(codes.view(kind), (tiles.view(torch.float8_e8m0fnu),), ("BlockWise1x32",), tiled=True)


class Mxfp4(ScaledBackend):
    """Whole groups of 32 in a row; torch wants 16 to divide out_features."""

    name, family, linear = "mxfp4", MxFp(), _MxLinear
    support = Support(
        devices=("cuda",), dtypes=("bfloat16",), data_types=("mx_fp",), bits=(4,), group_sizes=(32,), sym=(True,),
        activations=True, in_multiple=32, out_multiple=16,
    )  # fmt: skip

    def capability(self, scheme: QuantScheme) -> tuple[tuple[int, int], tuple[int, int] | None]:
        return (10, 0), (10, 9)


class Mxfp8(ScaledBackend):
    """Whole groups of 32 in a row; torch wants 16 to divide out_features."""

    name, family, linear = "mxfp8", MxFp(), _MxLinear
    support = Support(
        devices=("cuda",), dtypes=("bfloat16", "float16", "float32"), data_types=("mx_fp",), bits=(8,),
        group_sizes=(32,), sym=(True,), activations=True, in_multiple=32, out_multiple=16,
    )  # fmt: skip

    def capability(self, scheme: QuantScheme) -> tuple[tuple[int, int], tuple[int, int] | None]:
        return (10, 0), None
