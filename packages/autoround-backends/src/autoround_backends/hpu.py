"""4-bit weights on Intel Gaudi: the bridge's `hpu::convert_from_uint4` makes the matrix, and torch multiplies.

The operator takes codes as int32 [in, out / 8] and zero points as int32 [groups, out / 8], eight along the output in
a word, the first in the lowest bits, and scales [groups, out]; it gives scale * (code - zero_point) as [in, out] in
the dtype asked for. No Gaudi has run this: a recorded double of the operator shows the arguments that it would get.
"""

from __future__ import annotations

import torch

from autoround_backends.scale_range import rounded_scale
from autoround_core import AffineWeight, Backend, QuantizedLayer, Support, pack_bits

_BITS = 4
_PER_WORD = 32 // _BITS


class Hpu(Backend):
    """bfloat16, Gaudi's own dtype."""

    name = "hpu"
    priority = 40
    support = Support(
        devices=("hpu",), dtypes=("bfloat16",), bits=(_BITS,), whole_groups=True, out_multiple=_PER_WORD,
        packages=("habana_frameworks",), install="autoround-backends[hpu]",
    )

    def missing(self) -> str | None:
        """The bridge comes with Intel's Gaudi software, not from PyPI."""
        return "needs torch with Intel's Gaudi bridge, habana_frameworks" if self.support.missing() else None

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when `dtype` cannot hold a scale."""
        import habana_frameworks.torch.core  # noqa: F401  registers the operator

        return _HpuLinear(layer, device, dtype)


class _HpuLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme, self._dtype = weight.scheme, dtype
        self.register_buffer("packed", pack_bits(weight.codes.T.contiguous(), _BITS).to(device))
        self.register_buffer("zero_point", pack_bits(weight.zero_point.T.contiguous(), _BITS).to(device))
        self.register_buffer("scale", rounded_scale(layer, dtype).T.contiguous().to(device))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        output = torch.matmul(rows, self._matrix())
        output = output if self.bias is None else output + self.bias
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def _matrix(self) -> torch.Tensor:
        return torch.ops.hpu.convert_from_uint4(self.packed, self.scale, self.zero_point, self._dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves."""
        return self._matrix().T

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=hpu"
