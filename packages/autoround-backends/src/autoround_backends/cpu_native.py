"""Integers of any group size on CPUs, with kernels of our own: `native/`.

Up to a few dozen rows of input, codes are unpacked in registers and multiplied as integers, see native/inputs.h; the
weights are read once, in as many bits as they have. For more rows, a piece of the weight at a time is dequantized and
torch multiplies, see `pieces`.
"""

from __future__ import annotations

import torch

from autoround_backends import native_library, pieces
from autoround_core import AffineWeight, Backend, QuantizedLayer, Support

MOST_ROWS = 24  # above this torch's matrix product is faster
_STORED_BITS = {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
# as bits, because `model.to(dtype)` would round floats
_SAME_BITS = {torch.float16: torch.int16, torch.float32: torch.int32}


class CpuNative(Backend):
    """2, 3, 4 and 8 bits as they are; 5, 6 and 7 bits take a byte each."""

    name = "cpu_native"
    priority = 30
    support = Support(
        devices=("cpu",), dtypes=("bfloat16", "float16", "float32"), bits=tuple(_STORED_BITS),
        group_sizes=(32, 64, 128, 256, 512, 1024, -1),
    )

    def missing(self) -> str | None:
        return native_library.missing()

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _NativeLinear(layer, dtype)


class _NativeLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme, self._dtype = weight.scheme, dtype
        stored = _STORED_BITS[weight.scheme.bits]
        scale = weight.scale if weight.scale.dtype in _SAME_BITS else weight.scale.float()
        self._numbers = (
            self.out_features, self.in_features, weight.scheme.group_length(self.in_features), stored,
            native_library.DTYPES[scale.dtype],
        )
        implied = weight.scheme.sym and stored == weight.scheme.bits
        self.register_buffer("codes", native_library.pack(weight.codes, stored))
        self.register_buffer("scale", scale.contiguous().view(_SAME_BITS[scale.dtype]))
        self.register_buffer("zero_point", None if implied else weight.zero_point.contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype).float().view(torch.int32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) <= MOST_ROWS:
            output = self._multiply(rows.contiguous())
        else:
            bias = None if self.bias is None else self.bias.view(torch.float32)
            output = pieces.multiply(rows, self.out_features, self._dequantize, bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        output = torch.empty(len(rows), self.out_features, dtype=rows.dtype)
        failed = native_library.library().autoround_multiply(
            *self._numbers, *self._pointers(), rows.data_ptr(), len(rows), native_library.DTYPES[rows.dtype],
            None if self.bias is None else self.bias.data_ptr(), output.data_ptr(), native_library.instructions(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {len(rows)} rows of {self.in_features} inputs")
        return output

    def _dequantize(self, first: int, out: torch.Tensor) -> torch.Tensor:
        native_library.library().autoround_dequantize(
            *self._numbers, *self._pointers(), first, len(out), native_library.DTYPES[out.dtype], out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _pointers(self) -> tuple[int, int, int | None]:
        zero_point = None if self.zero_point is None else self.zero_point.data_ptr()
        return self.codes.data_ptr(), self.scale.data_ptr(), zero_point

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized, for models that read a layer's weight themselves."""
        return self._dequantize(0, torch.empty(self.out_features, self.in_features, dtype=self._dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=cpu_native"
