"""Each CPU backend against torch's bfloat16 matrix product of the same size, by number of rows."""

import pytest
import torch

from autoround_core import LinearSpec, QuantizedLayer, QuantScheme, get_registry

SIZE = 2048
CPU = torch.device("cpu")
CASES = [
    ("reference", "W4G128"), ("cpu_native", "W2G128"), ("cpu_native", "W3G128"), ("cpu_native", "W4G128"),
    ("cpu_native", "W8G128"), ("ark", "W4G128"), ("cpu_int4", "W4G128"), ("cpu_int8", "W8G-1"), ("mlx", "W4G128"),
    ("cpu_dense", None),
]  # fmt: skip


def build(name, spelling):
    """A backend's layer of SIZE x SIZE weights; skips where it cannot run."""
    backend = get_registry().backends()[name]
    scheme = QuantScheme.parse(spelling) if spelling else None
    reason = backend.why_not(LinearSpec("layer", SIZE, SIZE, scheme), CPU, torch.bfloat16)
    if reason:
        pytest.skip(reason)
    if scheme is None:
        linear = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
        return backend.build(linear, CPU, torch.bfloat16)
    weight = get_registry().number_family("int").round_to_nearest(torch.randn(SIZE, SIZE), scheme)
    return backend.build(QuantizedLayer("layer", weight), CPU, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize(("name", "scheme"), [("torch", "bfloat16"), *CASES])
def bench_linear(benchmark, name, scheme, rows):
    inputs = torch.randn(rows, SIZE, dtype=torch.bfloat16)
    benchmark.group = f"{rows} rows"
    is_torch = name == "torch"
    module = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16) if is_torch else build(name, scheme)
    with torch.no_grad():
        benchmark(module, inputs)
