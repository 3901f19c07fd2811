"""The 4-bit CPU backend against float64, on both sides of its crossover, and each of its refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoround_backends import cpu_int4
from autoround_backends.cpu_int4 import MOST_ROWS, CpuInt4
from autoround_core import AffineWeight, LinearSpec, QuantizedLayer, QuantScheme

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS = (0, 1, 5, 64, 65, 300)
BACKEND = CpuInt4()


def make_layer(scheme, out_features=48, in_features=256, bias=False, zero_point=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, scheme.groups(in_features))
    zeros = torch.full(grid, 8) if scheme.sym else torch.randint(0, 16, grid, generator=generator)
    if zero_point is not None:
        zeros = torch.full(grid, zero_point)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    scale = (
        (0.5 + torch.rand(grid, generator=generator))
        * (torch.randint(0, 2, grid, generator=generator) * 2 - 1)
        / 64
    )
    weight = AffineWeight(scheme, codes.to(torch.uint8), scale.to(torch.float16), zeros.to(torch.uint8))
    return QuantizedLayer(
        "layer", weight, torch.randn(out_features, generator=generator).to(BF16) if bias else None
    )


def dense(weight):
    """float64 [out, in], column by column."""
    size = weight.scheme.group_size if weight.scheme.group_size > 0 else weight.shape[1]
    return torch.stack(
        [
            weight.scale[:, i // size].double()
            * (weight.codes[:, i].double() - weight.zero_point[:, i // size].double())
            for i in range(weight.shape[1])
        ],
        dim=1,
    )


def make_inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_right(layer, inputs, output):
    wanted = inputs.double() @ dense(layer.weight).T
    if layer.bias is not None:
        wanted = wanted + layer.bias.double()
    assert output.dtype == BF16 and output.shape == wanted.shape
    if wanted.numel():
        # a code or zero point off by one is 0.1 and more; rounding scales and sums to bfloat16 is 0.003
        assert float((output.double() - wanted).norm() / wanted.norm()) < 0.008
        assert float((output.double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, size, sym) for size in (32, 64, 128, 256, -1) for sym in (True, False)], ids=str
)
def test_rows_on_both_sides_of_the_crossover(scheme):
    assert 64 <= MOST_ROWS < 65  # otherwise the rows below miss a path
    layer = make_layer(scheme)
    module = BACKEND.build(layer, CPU, BF16)
    for rows in ROWS:
        inputs = make_inputs(rows, 256)
        before = inputs.clone()
        assert_right(layer, inputs, module(inputs))
        assert torch.equal(inputs, before)


@pytest.mark.parametrize("zero_point", [0, 1, 7, 8, 15])
@pytest.mark.parametrize("rows", [1, 65])
def test_zero_points_from_end_to_end(zero_point, rows):
    layer = make_layer(QuantScheme(4, 32, False), zero_point=zero_point)
    assert_right(layer, make_inputs(rows, 256), BACKEND.build(layer, CPU, BF16)(make_inputs(rows, 256)))


@pytest.mark.parametrize("rows", ROWS)
def test_the_bias_is_added_once(rows):
    with_bias = make_layer(QuantScheme(4, 64, False), bias=True)
    without = QuantizedLayer("layer", with_bias.weight)
    inputs = make_inputs(rows, 256)
    output = BACKEND.build(with_bias, CPU, BF16)(inputs)
    assert_right(with_bias, inputs, output)
    plain = BACKEND.build(without, CPU, BF16)(inputs)
    torch.testing.assert_close(output - plain, with_bias.bias.expand(rows, -1), rtol=0, atol=0.1)


def test_a_float32_bias_is_taken():
    layer = make_layer(QuantScheme(4, 32))
    layer = QuantizedLayer("layer", layer.weight, torch.randn(48, generator=torch.Generator().manual_seed(2)))
    for rows in (3, 70):
        assert_right(layer, make_inputs(rows, 256), BACKEND.build(layer, CPU, BF16)(make_inputs(rows, 256)))


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (5, 20, 256), (2, 1, 2, 256), (0, 4, 256)])
def test_any_leading_dimensions(shape):
    layer = make_layer(QuantScheme(4, 128, False), bias=True)
    inputs = make_inputs(*shape)
    assert_right(layer, inputs, BACKEND.build(layer, CPU, BF16)(inputs))


@pytest.mark.parametrize("rows", [7, 90])
def test_inputs_with_strides(rows):
    layer = make_layer(QuantScheme(4, 32, False))
    module = BACKEND.build(layer, CPU, BF16)
    for inputs in (
        make_inputs(256, rows).T,
        make_inputs(rows, 512)[:, ::2],
        make_inputs(rows, 300)[:, 13:269],
        make_inputs(1, 256).expand(rows, 256),
    ):
        assert not inputs.is_contiguous()
        assert_right(layer, inputs, module(inputs))


@pytest.mark.parametrize(
    ("out_features", "in_features"), [(16, 32), (16, 64), (32, 96), (80, 160), (112, 512)]
)
def test_small_and_odd_sizes(out_features, in_features):
    layer = make_layer(QuantScheme(4, 32, False), out_features, in_features, bias=True)
    assert BACKEND.why_not(spec(layer.weight.scheme, in_features, out_features), CPU, BF16) is None
    module = BACKEND.build(layer, CPU, BF16)
    for rows in (1, 65):
        inputs = make_inputs(rows, in_features)
        assert_right(layer, inputs, module(inputs))


def test_the_record_is_not_changed_and_the_module_says_what_it_is():
    layer = make_layer(QuantScheme(4, 32, False))
    before = layer.weight.digest()
    module = BACKEND.build(layer, CPU, BF16)
    for rows in (1, 65):
        module(make_inputs(rows, 256))
    assert layer.weight.digest() == before
    assert (module.in_features, module.out_features) == (256, 48)
    assert "W4G32-asym" in repr(module) and "cpu_int4" in repr(module)


# --- refusals -----------------------------------------------------------------------------------------------


def spec(scheme, in_features=256, out_features=48):
    return LinearSpec("layer", in_features=in_features, out_features=out_features, scheme=scheme)


def test_what_it_takes():
    for size in (32, 64, 128, 256, -1, 1000):
        for sym in (True, False):
            assert BACKEND.why_not(spec(QuantScheme(4, size, sym)), CPU, BF16) is None


@pytest.mark.parametrize(
    ("given", "device", "dtype", "says"),
    [
        (spec(QuantScheme(4, 32)), "cuda", BF16, "runs on cpu, not on cuda"),
        (spec(QuantScheme(4, 32)), "meta", BF16, "runs on cpu, not on meta"),
        (spec(QuantScheme(3, 32)), "cpu", BF16, "needs bits 4, got 3"),
        (spec(QuantScheme(8, 32)), "cpu", BF16, "needs bits 4, got 8"),
        (spec(QuantScheme(4, 32, data_type="mxfp")), "cpu", BF16, "needs numbers of kind int, got mxfp"),
        (spec(None), "cpu", BF16, "the layer is not quantized"),
        (spec(QuantScheme(4, 32)), "cpu", torch.float16, "needs bfloat16, got float16"),
        (spec(QuantScheme(4, 32)), "cpu", torch.float32, "load with --dtype bfloat16"),
        (spec(QuantScheme(4, 16)), "cpu", BF16, "group_size 32, 64, 128 or 256, got 16"),
        (spec(QuantScheme(4, -1), in_features=512), "cpu", BF16, "group_size 32, 64, 128 or 256, got 512"),
        (
            spec(QuantScheme(4, 128), in_features=320),
            "cpu",
            BF16,
            "in_features divisible by the group size 128, got 320",
        ),
        (spec(QuantScheme(4, 32), out_features=40), "cpu", BF16, "out_features divisible by 16, got 40"),
    ],
)
def test_refusals(given, device, dtype, says):
    assert says in BACKEND.why_not(given, torch.device(device), dtype)


def test_a_torch_without_the_operator(monkeypatch):
    old = SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace()), __version__="2.1.0", bfloat16=BF16)
    monkeypatch.setattr(cpu_int4, "torch", old)
    reason = BACKEND.missing()
    assert "torch 2.1.0" in reason and "pip install torch>=" in reason
