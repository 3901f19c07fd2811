"""Layers of 16-bit floats on CPUs: what a checkpoint leaves unquantized, the head above all.

For a few rows torch's product of bfloat16 matrices runs at a half to a tenth of the speed at which the weights can be
read, and on processors without AVX-512 it is far slower than float32 for any number of rows. Here few rows go through
a kernel of ours that reads the weights once and adds up in float32; for many, see `pieces`.
"""

from __future__ import annotations

import torch

from autoround_backends import native_library, pieces
from autoround_core import Backend, Support

MOST_ROWS = 16  # above this torch's matrix product of converted pieces is faster


class CpuDense(Backend):
    """Takes the parameters as they are; they stay shared with an embedding that they are tied to."""

    name = "cpu_dense"
    priority = 30
    support = Support(devices=("cpu",), dtypes=("bfloat16", "float16"), data_types=(), dense=True)

    def missing(self) -> str | None:
        return native_library.missing()

    def build(self, layer: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _DenseLinear(layer)


class _DenseLinear(torch.nn.Linear):
    """A Linear to everybody who asks, such as adapters; only its product is another."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        ours = inputs.dtype == weight.dtype and weight.dtype in native_library.DTYPES and weight.itemsize == 2
        learning = torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad)
        if not ours or weight.device.type != "cpu" or learning:
            return torch.nn.functional.linear(inputs, weight, self.bias)
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) <= MOST_ROWS:
            output = self._multiply(rows)
        elif pieces.fastest_dtype(weight.dtype) == weight.dtype:
            output = torch.nn.functional.linear(rows, weight, self.bias)
        else:
            bias = None if self.bias is None else self.bias.float()
            output = pieces.multiply(rows, self.out_features, self._copy, bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        output = torch.empty(len(rows), self.out_features, dtype=rows.dtype)
        inputs, weight = rows.float().contiguous(), self.weight.contiguous()
        bias = None if self.bias is None else self.bias.float()
        native_library.library().autoround_multiply_dense(
            self.out_features, self.in_features, weight.data_ptr(), native_library.DTYPES[weight.dtype],
            inputs.data_ptr(), len(rows), None if bias is None else bias.data_ptr(), output.data_ptr(),
            torch.get_num_threads(),
        )
        return output

    def _copy(self, start: int, piece: torch.Tensor) -> None:
        piece.copy_(self.weight.detach()[start : start + len(piece)])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, backend=cpu_dense"
