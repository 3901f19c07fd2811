"""4-bit weights on torch's own operator for Intel GPUs, `_weight_int4pack_mm_with_scales_and_zeros`.

Unlike its CPU sibling it takes plain words (int32 [out, in / 8], the first code in the lowest bits), scales
[groups, out] in the dtype of the rows, and zero points int8 [groups, out] that are subtracted from the codes as they
are; oneDNN multiplies. No XPU has run this: a recorded double of the operator shows the arguments that it would get.
"""

from __future__ import annotations

import torch

from autoround_backends.scale_range import rounded_scale
from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support, pack_bits, unpack_bits

_BITS = 4
_GROUP = 32  # the operator wants a multiple of it


class TorchXpu(Backend):
    """float16 and bfloat16: oneDNN has no other 4-bit product on an XPU."""

    name = "torch_xpu"
    priority = 40
    support = Support(
        devices=("xpu",), dtypes=("bfloat16", "float16"), bits=(_BITS,), whole_groups=True, in_multiple=_GROUP,
        install="autoround-backends[xpu]",
    )

    def missing(self) -> str | None:
        if hasattr(torch.ops.aten, "_weight_int4pack_mm_with_scales_and_zeros"):
            return None
        return f"torch {torch.__version__} has no _weight_int4pack_mm_with_scales_and_zeros; pip install torch>=2.8"

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        assert spec.scheme is not None
        length = spec.scheme.group_length(spec.in_features)
        return f"needs a group_size divisible by {_GROUP}, got {length}" if length % _GROUP else None

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when `dtype` cannot hold a scale."""
        return _XpuLinear(layer, device, dtype)


class _XpuLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme = weight.scheme
        self._length = weight.scheme.group_length(self.in_features)
        self.register_buffer("packed", pack_bits(weight.codes, _BITS).to(device))
        self.register_buffer("scale", rounded_scale(layer, dtype).T.contiguous().to(device))
        self.register_buffer("zero_point", weight.zero_point.to(torch.int8).T.contiguous().to(device))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features).contiguous()
        if not len(rows):
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        output = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
            rows, self.packed, self._length, self.scale, self.zero_point
        )
        output = output if self.bias is None else output + self.bias
        return output.reshape(*inputs.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves."""
        codes = unpack_bits(self.packed, _BITS, self.in_features)
        scale, zero_point = self.scale.T.contiguous(), self.zero_point.T.to(torch.uint8).contiguous()
        return AffineWeight(self._scheme, codes, scale, zero_point).dequantize(scale.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=torch_xpu"
