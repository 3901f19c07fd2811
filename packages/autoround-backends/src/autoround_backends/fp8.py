"""8-bit floats (E4M3) on both sides, on torch's scaled matrix product.

    FP8_DYNAMIC, FP8_STATIC   a scale for each token and each output feature: torch's recipe RowWise. A static scale is
                              the same for each token. With one scale for the matrix as well: TensorWise
    FP8_BLOCK                 scales of 1 x 128 inputs and of 128 x 128 weights: BlockWise1x128 and BlockWise128x128,
                              which torch has for Hopper (compute capability 9) only

The rows of block scales must start at multiples of 16 bytes: those of the inputs are stored feature by feature, so rows
of zeros are added until there are a multiple of 16. Products of tokens and of matrices run in torch's CPU build too,
slowly, and were compared with float64 there. **No GPU has run this**; `scaled_product` says what takes its place, and
that the backend `reference` emulates the same layers everywhere.
"""

from __future__ import annotations

import torch

from autoround_backends.scaled_product import Operand, ScaledBackend, ScaledLinear
from autoround_core import FloatWeight, LinearSpec, QuantScheme, Support
from autoround_core.float_family import Fp

_BLOCK = 128
_ROWS = 16


def _why_not_rows(spec: LinearSpec) -> str | None:
    scheme = spec.scheme
    if scheme.group_size == -1:
        return None
    return f"needs scales of whole rows, or of {_BLOCK} x {_BLOCK} weights, got {scheme}"


def _why_not_blocks(spec: LinearSpec) -> str | None:
    scheme = spec.scheme
    if (scheme.group_size, scheme.group_rows) != (_BLOCK, _BLOCK):
        return f"needs blocks of {_BLOCK} x {_BLOCK} weights, got {scheme}"
    if spec.in_features % _BLOCK or spec.out_features % _BLOCK:
        return f"needs whole blocks of {_BLOCK} x {_BLOCK}, got {spec.out_features} x {spec.in_features}"
    return None


def _recipes(scheme: QuantScheme) -> tuple[str, str]:
    """Of the inputs and of the weight."""
    if scheme.group_rows > 1:
        return "BlockWise1x128", "BlockWise128x128"
    alone = scheme.group_rows == -1 and not scheme.activation.dynamic
    return ("TensorWise",) * 2 if alone else ("RowWise",) * 2


class _Fp8Linear(ScaledLinear):
    """scale: float32. TensorWise [1, 1], RowWise [1, out], blocks [out / 128, in / 128], rows filled up to whole 4."""

    def __init__(self, backend, family, layer, device, dtype) -> None:
        super().__init__(backend, family, layer, device, dtype)
        scale = layer.weight.scale.to(torch.float32)
        self._recipes = _recipes(self._scheme)
        if self._recipes[1] == "BlockWise128x128":
            scale = torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4))
        elif self._recipes[1] == "RowWise":
            scale = scale.T.expand(1, self.out_features)
        self.register_buffer("codes", layer.weight.codes.to(device))
        self.register_buffer("scale", scale.contiguous().to(device))

    def input_operand(self, codes: torch.Tensor, scale: torch.Tensor) -> Operand:
        kind = self._recipes[0]
        if kind == "TensorWise":
            scale = self.input_scale
        elif kind == "BlockWise1x128":
            more = -len(codes) % _ROWS
            codes = torch.nn.functional.pad(codes, (0, 0, 0, more))
            scale = torch.nn.functional.pad(scale, (0, 0, 0, more), value=1.0).T.contiguous().T
        else:
            scale = scale.contiguous()
        return Operand(codes.view(torch.float8_e4m3fn), (scale,), (kind,))

    def weight_operand(self) -> Operand:
        kind = self._recipes[1]
        scale = self.scale.T if kind == "BlockWise128x128" else self.scale
        return Operand(self.codes.view(torch.float8_e4m3fn), (scale,), (kind,))

    def record(self) -> FloatWeight:
        groups = self._scheme.groups(self.in_features)
        if self._recipes[1] == "BlockWise128x128":
            scale = self.scale[:, :groups]
        else:
            scale = self.scale.T[: self._scheme.row_groups(self.out_features)]
        return FloatWeight(self._scheme, self.codes, scale)


class Fp8(ScaledBackend):
    """torch wants 16 to divide both sides of a matrix, and 128 where scales are of blocks."""

    name, family, linear = "fp8", Fp(), _Fp8Linear
    support = Support(
        devices=("cuda",), dtypes=("bfloat16", "float16", "float32"), data_types=("fp",), bits=(8,),
        group_sizes=(-1, _BLOCK), sym=(True,), activations=True, in_multiple=16, out_multiple=16,
    )  # fmt: skip

    def why_not_scales(self, spec: LinearSpec) -> str | None:
        return _why_not_blocks(spec) if spec.scheme.group_rows > 1 else _why_not_rows(spec)

    def capability(self, scheme: QuantScheme) -> tuple[tuple[int, int], tuple[int, int] | None]:
        return ((9, 0), (9, 9)) if scheme.group_rows > 1 else ((8, 9), None)
