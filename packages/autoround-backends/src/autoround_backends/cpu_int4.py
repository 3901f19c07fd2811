"""4-bit weights on torch's own CPU operator, `_weight_int4pack_mm_for_cpu`.

The operator multiplies bfloat16 rows by (code - 8) * scale + zero; a stored zero point becomes
zero = (8 - zero_point) * scale. Up to a few dozen rows it reads a quarter of the bytes and wins; for more,
dequantizing once and multiplying in bfloat16 is faster, so the codes are kept a second time, two per byte,
for that path. Measured crossover on AVX-512: between 64 and 128 rows.
"""

from __future__ import annotations

import torch

from autoround_core import AffineWeight, Backend, QuantizedLayer, Support, pack_bits, unpack_bits

GROUP_SIZES = (32, 64, 128, 256)
MOST_ROWS = 64  # above this the dequantizing path is faster
_BITS = 4


class CpuInt4(Backend):
    """bfloat16 only: the operator's float32 and float16 variants are scalar code, fifty times slower."""

    name = "cpu_int4"
    priority = 20
    support = Support(
        devices=("cpu",), dtypes=("bfloat16",), bits=(_BITS,), group_sizes=GROUP_SIZES, whole_groups=True,
        out_multiple=16,
    )

    def missing(self) -> str | None:
        if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return None
        return f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu; pip install torch>=2.6"

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _Int4Linear(layer)


class _Int4Linear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme = weight.scheme
        self._group_length = weight.scheme.group_length(self.in_features)
        zero = (8 - weight.zero_point.float()) * weight.scale.float()
        grid = torch.stack([weight.scale.float(), zero], dim=-1).transpose(0, 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("grid", grid.contiguous().to(torch.bfloat16))
        self.register_buffer("words", pack_bits(weight.codes, _BITS))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(torch.bfloat16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if 0 < len(rows) <= MOST_ROWS:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), self.packed, self._group_length, self.grid
            )
            output = output if self.bias is None else output + self.bias
        else:
            output = torch.nn.functional.linear(rows, self.weight, self.bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized, for many rows and for models that read a layer's weight themselves."""
        codes = unpack_bits(self.words, _BITS, self.in_features)
        return AffineWeight(self._scheme, codes, self.scale, self.zero_point).dequantize(torch.bfloat16)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=cpu_int4"
