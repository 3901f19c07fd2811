"""Each CPU backend against a bfloat16 matrix product of the same size, by number of rows."""

import pytest
import torch

from autoround_core import LinearSpec, QuantizedLayer, QuantScheme, get_registry

SIZE = 2048
CASES = {"reference": "W4G128", "cpu_int4": "W4G128", "cpu_int8": "W8G-1"}


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("name", ["bfloat16", *CASES])
def bench_linear(benchmark, name, rows):
    inputs = torch.randn(rows, SIZE, dtype=torch.bfloat16)
    benchmark.group = f"{rows} rows"
    if name == "bfloat16":
        module = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    else:
        scheme = QuantScheme.parse(CASES[name])
        backend = get_registry().backends()[name]
        cpu = torch.device("cpu")
        assert backend.why_not(LinearSpec("layer", SIZE, SIZE, scheme), cpu, torch.bfloat16) is None
        weight = get_registry().number_family("int").round_to_nearest(torch.randn(SIZE, SIZE), scheme)
        module = backend.build(QuantizedLayer("layer", weight), cpu, torch.bfloat16)
    with torch.no_grad():
        benchmark(module, inputs)
