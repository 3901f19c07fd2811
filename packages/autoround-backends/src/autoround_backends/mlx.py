"""Apple's MLX: mx.quantized_matmul, w = scale * code + offset with offset = -scale * zero_point.

The operator multiplies in the type of its operands, and on a CPU adds up in it too: in bfloat16 the sum of a row is
off by more than its products, and an offset of 8 bits loses bits. So rows, scales and offsets are float32, where all
of our offsets are exact. MLX copies what it takes from torch; what torch takes from MLX is the same memory, so the
buffers are views of MLX's arrays and stay where those are. Run on MLX's CPU build for Linux; no Apple machine ran it.
"""

from __future__ import annotations

from typing import Any

import torch

from autoround_core import AffineWeight, Backend, QuantizedLayer, Support, pack_bits


class Mlx(Backend):
    """Below the native kernels of a CPU: it is for Apple's GPU, which its arrays use by default."""

    name = "mlx"
    priority = 15
    support = Support(
        devices=("cpu", "mps"), dtypes=("float32", "bfloat16", "float16"), bits=(2, 3, 4, 5, 6, 8),
        group_sizes=(32, 64, 128), whole_groups=True, packages=("mlx",), install="autoround-backends[mlx]",
    )

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _MlxLinear(layer, device, dtype)


class _MlxLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme, self._dtype, self._device = weight.scheme, dtype, device
        scale = weight.scale.float()
        parts = {
            "packed": pack_bits(weight.codes, weight.scheme.bits), "scale": scale, "offset": -scale * weight.zero_point,
        }
        self._arrays = {name: _array(tensor) for name, tensor in parts.items()}
        for name, array in self._arrays.items():
            self.register_buffer(name, torch.from_dlpack(array))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> _MlxLinear:
        """Moves the bias only: the other buffers are MLX's memory, which serves CPU and GPU."""
        if self.bias is not None:
            self.bias = fn(self.bias)
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        import mlx.core as mx

        rows = inputs.detach().reshape(-1, self.in_features)
        if len(rows):
            product = mx.quantized_matmul(_array(rows.float()), *self._operands(), transpose=True, **self._grid())
            mx.eval(product)
            output = torch.from_dlpack(product).to(inputs.device, inputs.dtype)
        else:
            output = rows.new_empty(0, self.out_features)
        output = output if self.bias is None else output + self.bias
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def _operands(self) -> tuple[Any, Any, Any]:
        import mlx.core as mx

        return self._arrays["packed"].view(mx.uint32), self._arrays["scale"], self._arrays["offset"]

    def _grid(self) -> dict[str, int]:
        return {"group_size": self._scheme.group_length(self.in_features), "bits": self._scheme.bits}

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves."""
        import mlx.core as mx

        return torch.from_dlpack(mx.dequantize(*self._operands(), **self._grid())).to(self._device, self._dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=mlx"


def _array(tensor: torch.Tensor) -> Any:
    """A copy of a tensor as an array of MLX."""
    import mlx.core as mx

    array = mx.from_dlpack(tensor.detach().cpu().contiguous())
    mx.eval(array)
    return array
