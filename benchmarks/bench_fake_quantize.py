"""One fake-quantization with its backward pass, the elementwise part of a tuning step."""

import pytest
import torch

from autoround_core import QuantScheme, get_registry

SIZE = 1024


@pytest.mark.parametrize("scheme", ["W4G128", "W2G64", "W4G128-asym"])
def bench_fake_quantize(benchmark, scheme):
    tunable = get_registry().number_family("int").tunable(torch.randn(SIZE, SIZE), QuantScheme.parse(scheme))
    gradient = torch.randn(SIZE, SIZE)

    def step():
        tunable.fake_quantize().backward(gradient)
        tunable.rounding.grad = None

    benchmark(step)
