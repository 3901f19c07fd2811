"""Layers that are not quantized, against float64, and where `load` uses them."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.cpu_dense import MOST_ROWS, CpuDense
from autoround_core import LinearSpec, QuantScheme

CPU = torch.device("cpu")
BACKEND = CpuDense()
native = pytest.mark.skipif(BACKEND.missing() is not None, reason=f"cpu_dense {BACKEND.missing()}")
TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make(out_features, in_features, dtype, bias=True):
    torch.manual_seed(out_features)
    return torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (33, 129), (64, 256), (5, 1000)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_and_many(dtype, shape, bias):
    linear = make(*shape, dtype, bias)
    module = BACKEND.build(linear, CPU, linear.weight.dtype)
    for rows in (0, 1, 2, 9, MOST_ROWS, MOST_ROWS + 1, 100):
        inputs = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        weight, x = linear.weight.double(), inputs.double()
        wanted, bound = x @ weight.T, x.abs() @ weight.abs().T
        if bias:
            wanted, bound = wanted + linear.bias.double(), bound + linear.bias.double().abs()
        output = module(inputs)
        assert output.dtype == dtype and output.shape == (rows, shape[0])
        assert ((output.double() - wanted).abs() <= TOLERANCE[dtype] * bound).all(), rows


@native
def test_strides_and_leading_dimensions():
    linear = make(24, 96, torch.bfloat16)
    module = BACKEND.build(linear, CPU, linear.weight.dtype)
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(0)).bfloat16().T.reshape(2, 3, 96)
    assert module(inputs).shape == (2, 3, 24)
    torch.testing.assert_close(module(inputs), linear(inputs), rtol=0.02, atol=0.02)
    torch.testing.assert_close(module(inputs[0, 0]), linear(inputs[0, 0]), rtol=0.02, atol=0.02)


@native
def test_the_parameters_stay_the_same_objects_and_gradients_flow():
    linear = make(8, 16, torch.bfloat16)
    module = BACKEND.build(linear, CPU, linear.weight.dtype)
    assert module.weight is linear.weight and module.bias is linear.bias
    inputs = torch.randn(1, 16).bfloat16().requires_grad_()
    module(inputs).sum().backward()
    assert torch.equal(inputs.grad[0], linear.weight.sum(0))


@native
def test_a_head_that_is_trained_gets_its_gradient():
    linear = make(8, 16, torch.bfloat16).requires_grad_()
    BACKEND.build(linear, CPU, linear.weight.dtype)(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.full((8, 16), 2.0, dtype=torch.bfloat16))
    assert torch.equal(linear.bias.grad, torch.full((8,), 2.0, dtype=torch.bfloat16))


@native
def test_it_takes_layers_that_are_not_quantized_and_no_others():
    def answer(scheme, dtype=torch.bfloat16, device="cpu"):
        return BACKEND.why_not(LinearSpec("lm_head", 64, 32, scheme), torch.device(device), dtype)

    assert answer(None) is None
    assert answer(QuantScheme()) == "the layer is quantized"
    assert "not on cuda" in answer(None, device="cuda")
    assert "needs bfloat16 or float16" in answer(None, torch.float32)
