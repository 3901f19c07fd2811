"""8-bit weights with one scale per row on torch's own CPU operator, `_weight_int8pack_mm`."""

from __future__ import annotations

import torch

from autoround_core import AffineWeight, Backend, QuantizedLayer, Support

MOST_ROWS = 16  # above this dequantizing once and multiplying in bfloat16 is faster
_ZERO = 128
_COLUMNS = 16  # the operator reads rows in steps of 16 and does not check that they end there


class CpuInt8(Backend):
    """Symmetric, whole rows, bfloat16; the operator takes no groups and no zero points."""

    name = "cpu_int8"
    priority = 20
    support = Support(
        devices=("cpu",), dtypes=("bfloat16",), bits=(8,), sym=(True,), group_sizes=(-1,), in_multiple=_COLUMNS
    )

    def missing(self) -> str | None:
        if hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            return None
        return f"torch {torch.__version__} has no _weight_int8pack_mm; pip install torch>=2.6"

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _Int8Linear(layer)


class _Int8Linear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme = weight.scheme
        codes = (weight.codes.to(torch.int16) - _ZERO).to(torch.int8)
        self.register_buffer("codes", codes)
        # the operator multiplies by bfloat16 scales; float32 ones serve the dequantizing path
        self.register_buffer("scale", weight.scale.flatten().float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(torch.bfloat16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if 0 < len(rows) <= MOST_ROWS:
            output = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.codes, self.scale.to(torch.bfloat16))
            output = output if self.bias is None else output + self.bias
        else:
            output = torch.nn.functional.linear(rows, self.weight, self.bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized, for many rows and for models that read a layer's weight themselves."""
        return (self.codes.float() * self.scale.unsqueeze(-1)).to(torch.bfloat16)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=cpu_int8"
