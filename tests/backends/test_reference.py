"""The reference backend against float64, for every scheme, dtype and shape of input."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.reference import Reference
from autoround_core import AffineWeight, LinearSpec, QuantizedLayer, QuantScheme

CPU = torch.device("cpu")
# relative to |x| @ |w|.T: the weight, every product's sum and the result are each rounded once
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def make_layer(scheme, out_features=24, in_features=80, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid, top = (out_features, scheme.groups(in_features)), 2**scheme.bits
    zeros = torch.full(grid, top // 2) if scheme.sym else torch.randint(0, top, grid, generator=generator)
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    scale = torch.randn(grid, generator=generator) / top
    weight = AffineWeight(scheme, codes.to(torch.uint8), scale.to(torch.float16), zeros.to(torch.uint8))
    return QuantizedLayer("layer", weight, torch.randn(out_features, generator=generator) if bias else None)


def truth(layer, inputs):
    """(x @ w.T + bias, |x| @ |w|.T + |bias|) in float64, with the weight spelled out group by group."""
    weight, columns = layer.weight, []
    size = weight.scheme.group_size if weight.scheme.group_size > 0 else weight.shape[1]
    for i in range(weight.shape[1]):
        group = i // size
        columns.append(
            weight.scale[:, group].double()
            * (weight.codes[:, i].double() - weight.zero_point[:, group].double())
        )
    dense, x = torch.stack(columns, dim=1), inputs.double()
    bias = torch.zeros(len(dense)).double() if layer.bias is None else layer.bias.double()
    return x @ dense.T + bias, x.abs() @ dense.abs().T + bias.abs()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(2, 32),
        QuantScheme(3, 16, False),
        QuantScheme(4, 48),
        QuantScheme(5, -1, False),
        QuantScheme(8, 7, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_by_the_dequantized_weight(dtype, scheme, bias):
    layer = make_layer(scheme, bias=bias)
    module = Reference().build(layer, CPU, dtype)
    for rows in (0, 1, 5, 64, 300):
        inputs = torch.randn(rows, 80, generator=torch.Generator().manual_seed(rows)).to(dtype)
        output = module(inputs)
        wanted, magnitude = truth(layer, inputs)
        assert output.dtype == dtype and output.shape == (rows, 24)
        assert ((output.double() - wanted).abs() <= TOLERANCE[dtype] * magnitude).all()


@pytest.mark.parametrize("shape", [(80,), (3, 80), (2, 3, 80), (2, 1, 3, 80), (0, 3, 80)])
def test_any_leading_dimensions(shape):
    module = Reference().build(make_layer(QuantScheme(4, 32)), CPU, torch.float32)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    output = module(inputs)
    assert output.shape == (*shape[:-1], 24)
    torch.testing.assert_close(output.reshape(-1, 24), module(inputs.reshape(-1, 80)), rtol=1e-5, atol=1e-5)


def test_an_input_with_strides():
    module = Reference().build(make_layer(QuantScheme(4, 32)), CPU, torch.float32)
    inputs = torch.randn(160, 6, generator=torch.Generator().manual_seed(1))[::2].T
    torch.testing.assert_close(module(inputs), module(inputs.contiguous()), rtol=1e-5, atol=1e-5)


def test_the_record_is_the_only_copy_of_the_weight():
    layer = make_layer(QuantScheme(4, 32))
    module = Reference().build(layer, CPU, torch.bfloat16)
    before = layer.weight.digest()
    module(torch.randn(3, 80).bfloat16())
    assert layer.weight.digest() == before
    assert {name for name, _ in module.named_buffers()} == {"bias"} and list(module.parameters()) == []
    assert module.bias.dtype == torch.bfloat16
    assert (module.in_features, module.out_features) == (80, 24)
    assert "W4G32" in repr(module) and "reference" in repr(module)


def test_it_takes_everything_and_comes_last():
    reference = Reference()
    assert reference.name == "reference" and reference.priority == 0
    for scheme in (QuantScheme(2, 7, False), QuantScheme(8, -1), QuantScheme(4, 32, data_type="mxfp")):
        for device, dtype in (
            (CPU, torch.float32),
            (torch.device("cuda"), torch.float16),
            (torch.device("meta"), torch.bfloat16),
        ):
            assert (
                reference.why_not(
                    LinearSpec("fc", in_features=13, out_features=3, scheme=scheme), device, dtype
                )
                is None
            )
