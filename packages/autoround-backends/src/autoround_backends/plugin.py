"""The backends of this package, as a plugin of autoround-core."""

from __future__ import annotations

from importlib import import_module

from autoround_core.hookspecs import hookimpl

_CLASSES = {
    "reference": "Reference", "cpu_native": "CpuNative", "cpu_dense": "CpuDense", "cpu_int4": "CpuInt4",
    "cpu_int8": "CpuInt8", "ark": "Ark", "triton_int": "TritonInt", "marlin": "Marlin", "exllamav2": "ExllamaV2",
    "awq_gemm": "AwqGemm", "fp8": "Fp8", "nvfp4": "NvFp4", "torch_xpu": "TorchXpu", "hpu": "Hpu", "mlx": "Mlx",
}  # fmt: skip


@hookimpl
def autoround_backends():
    # these modules import torch, but none of the libraries that they call
    found = [getattr(import_module(f"autoround_backends.{module}"), name)() for module, name in _CLASSES.items()]
    mx = import_module("autoround_backends.mx")
    return [*found, *(mx.Mx(bits) for bits in (4, 8))]
