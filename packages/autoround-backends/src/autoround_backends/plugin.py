"""The backends of this package, as a plugin of autoround-core."""

from __future__ import annotations

from importlib import import_module

from autoround_core.hookspecs import hookimpl

_CLASSES = {
    "Reference": "reference", "CpuNative": "cpu_native", "CpuDense": "cpu_dense", "CpuInt4": "cpu_int4",
    "CpuInt8": "cpu_int8", "Ark": "ark", "TritonInt": "triton_int", "Marlin": "marlin", "ExllamaV2": "exllamav2",
    "AwqGemm": "awq_gemm", "Fp8": "fp8", "Mxfp4": "mx", "Mxfp8": "mx", "Nvfp4": "nvfp4", "TorchXpu": "torch_xpu",
    "Hpu": "hpu", "Mlx": "mlx",
}  # fmt: skip


@hookimpl
def autoround_backends():
    # these modules import torch, but none of the libraries that they call
    return [getattr(import_module(f"autoround_backends.{module}"), name)() for name, module in _CLASSES.items()]
