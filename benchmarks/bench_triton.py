"""The Triton backend beside a bfloat16 matrix product and beside the time that its bytes take to be read.

    python benchmarks/bench_triton.py

One row is a decode step, 512 rows are a prefill. `bound` is the bytes of weights, scales, inputs and outputs over the
bandwidth that a large copy reaches on the same device; a decode step cannot be faster. Medians, with the cache of
the device cleared before each call.
"""

from __future__ import annotations

import sys

import torch

from autoround_core import QuantizedLayer, QuantScheme, get_registry

SIZES = ((4096, 4096), (4096, 14336))  # in, out
ROWS = (1, 512)
BITS = (2, 3, 4, 8)
COPIED = 2**30  # bytes
DTYPE = torch.bfloat16


def find_device() -> torch.device:
    for kind in ("cuda", "xpu"):
        if torch.get_device_module(kind).is_available():
            return torch.device(kind)
    sys.exit("bench_triton: needs a CUDA or XPU device, and torch finds none")


def seconds(function) -> float:
    from triton.testing import do_bench

    return do_bench(function, return_mode="median") / 1000


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source))


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layer_of(bits: int, in_features: int, out_features: int) -> QuantizedLayer:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) / in_features**0.5
    return QuantizedLayer("layer", get_registry().number_family("int").round_to_nearest(weight, QuantScheme(bits, 128)))


def main() -> None:
    from autoround_backends.triton_int import TritonInt

    device = find_device()
    speed = bandwidth(device)
    name = torch.get_device_module(device).get_device_name()
    print(f"{name}, copies at {speed / 1e9:.0f} GB/s, torch {torch.__version__}")
    print(f"{'in':>6} {'out':>6} {'rows':>5}  {'':8} {'us':>8} {'x bf16':>7} {'bound us':>9} {'of bound':>9}")
    for in_features, out_features in SIZES:
        dense = torch.nn.Linear(in_features, out_features, bias=False, dtype=DTYPE, device=device)
        modules = {"bfloat16": dense}
        for bits in BITS:
            modules[f"W{bits}G128"] = TritonInt().build(layer_of(bits, in_features, out_features), device, DTYPE)
        for rows in ROWS:
            measure(modules, rows, in_features, out_features, device, speed)


def measure(modules, rows: int, in_features: int, out_features: int, device: torch.device, speed: float) -> None:
    inputs = torch.randn(rows, in_features, device=device).to(DTYPE)
    base = None
    for name, module in modules.items():
        with torch.no_grad():
            outputs = module(inputs)  # and let Triton choose its configuration
            taken = seconds(lambda module=module: module(inputs))
        base = taken if base is None else base
        bound = size((*module.parameters(), *module.buffers(), inputs, outputs)) / speed
        print(f"{in_features:6} {out_features:6} {rows:5}  {name:8} {taken * 1e6:8.1f} {base / taken:7.2f} "
              f"{bound * 1e6:9.1f} {bound / taken:9.2f}")


if __name__ == "__main__":
    main()
