"""Intel's CPU and XPU kernels for integers, from the package auto-round-lib.

The library takes codes and zero points as signed bytes [in, out] and [groups, out], both less 2**(bits-1), with
scales [groups, out], packs them into one blob, and multiplies rows by that. It reads inputs and bias through bare
pointers: on a CPU it reads float32 whatever it is given and writes past the end of anything narrower, so rows and
bias become float32 first. With 16 outputs or fewer and some 250 rows its scheduler never returns, so narrow layers
are refused. No XPU has run this; a recorded double shows which calls one would get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autoround_backends.scale_range import rounded_scale
from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support, UnsupportedError

_PACKAGE = "auto_round_kernel"
_XPU_BITS = (4, 8)
FEWEST_OUTPUTS = 64  # the endless loop was seen up to 16, on AVX2; tiles of other processors are up to 64 wide


@dataclass(frozen=True, slots=True)
class ArkTypes:
    """What one device computes with: names as the library spells them, and torch's dtype of rows, bias and scales."""

    compute: str
    scale: str
    dtype: torch.dtype


# "auto" may round the inputs to 8 bits where the processor is fast at that; "fp32" never does
CPU = ArkTypes(compute="fp32", scale="fp32", dtype=torch.float32)
XPU = ArkTypes(compute="fp16", scale="fp16", dtype=torch.float16)


class Ark(Backend):
    """Every width on a CPU, exact to float32; 4 and 8 bits, symmetric, in float16 on an XPU."""

    name = "ark"
    priority = 25
    support = Support(
        devices=("cpu", "xpu"), dtypes=("float32", "bfloat16", "float16"), whole_groups=True,
        packages=(_PACKAGE,), install="autoround-backends[cpu]",
    )

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        assert spec.scheme is not None
        if spec.out_features < FEWEST_OUTPUTS:
            return f"needs at least {FEWEST_OUTPUTS} out_features, got {spec.out_features}"
        if device.type != "xpu":
            return None
        if spec.scheme.bits not in _XPU_BITS or not spec.scheme.sym:
            return f"needs symmetric weights of 4 or 8 bits on xpu, got {spec.scheme}"
        if dtype != torch.float16:
            return f"computes in float16 on xpu, got {str(dtype).removeprefix('torch.')}; load with --dtype float16"
        return None

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when the library does not load here, or float16 cannot hold a scale."""
        return ArkLinear(layer, device, dtype, XPU if device.type == "xpu" else CPU)


class ArkLinear(torch.nn.Module):
    """One layer in the library's packing. types: those of the device that it runs on."""

    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype, types: ArkTypes) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, AffineWeight)
        self.out_features, self.in_features = weight.shape
        self._scheme, self._dtype, self._types, self._device = weight.scheme, dtype, types, device.type
        # in the order in which every function of the library takes them
        self._options = (
            weight.scheme.group_length(self.in_features), types.compute, f"int{weight.scheme.bits}", types.scale,
            not weight.scheme.sym,
        )
        library = _library(device.type)
        half = 2 ** (weight.scheme.bits - 1)
        codes, zero_point = (
            (tensor.to(torch.int16) - half).to(torch.int8).T.contiguous().to(device)
            for tensor in (weight.codes, weight.zero_point)
        )
        scale = rounded_scale(layer, types.dtype).T.contiguous().to(device)
        blob = library.repack_quantized_weight(codes, scale, zero_point, *self._options)
        self.register_buffer("packed", blob)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device.type != self._device:
            raise UnsupportedError(
                f"weights packed by ark for {self._device} cannot run on {inputs.device.type}; load the model there"
            )
        rows = inputs.reshape(-1, self.in_features).to(self._types.dtype).contiguous()
        if len(rows):
            bias = rows.new_empty(0) if self.bias is None else self.bias.to(self._types.dtype)
            library = _library(self._device)  # not kept: a module that holds a module cannot be copied
            rows = library.woqgemm(rows, self.packed, bias, self.out_features, self.in_features, *self._options)
        return rows.reshape(*inputs.shape[:-1], self.out_features).to(inputs.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves."""
        matrix = _library(self._device).unpack_weight(
            self.packed, self._types.dtype, self.out_features, self.in_features, *self._options
        )
        return matrix.to(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend=ark"


def _library(device: str) -> Any:
    """The library's module. It says that a part of it did not load by leaving the part None."""
    import auto_round_kernel

    part = auto_round_kernel.xpu_lib if device == "xpu" else auto_round_kernel.cpu_lib
    if part is None:
        raise UnsupportedError(
            f"auto-round-lib is installed, but its {device} library does not load here; "
            "choose another one with --backend"
        )
    return auto_round_kernel
