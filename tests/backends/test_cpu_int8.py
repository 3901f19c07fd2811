"""The 8-bit CPU backend against float64, on both sides of its crossover, and each of its refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoround_backends import cpu_int8
from autoround_backends.cpu_int8 import MOST_ROWS, CpuInt8
from autoround_core import AffineWeight, LinearSpec, QuantizedLayer, QuantScheme

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS = (0, 1, 5, MOST_ROWS, MOST_ROWS + 1, 64, 65, 300)
BACKEND, SCHEME = CpuInt8(), QuantScheme(8, -1)


def make_layer(out_features=48, in_features=256, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out_features, in_features), generator=generator)
    codes[0, :2] = torch.tensor([0, 255])
    grid = (out_features, 1)
    scale = (
        (0.5 + torch.rand(grid, generator=generator))
        * (torch.randint(0, 2, grid, generator=generator) * 2 - 1)
        / 1024
    )
    weight = AffineWeight(
        SCHEME, codes.to(torch.uint8), scale.to(torch.float16), torch.full(grid, 128, dtype=torch.uint8)
    )
    return QuantizedLayer(
        "layer", weight, torch.randn(out_features, generator=generator).to(BF16) if bias else None
    )


def make_inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_right(layer, inputs, output):
    dense = layer.weight.scale.double() * (layer.weight.codes.double() - 128)
    wanted = inputs.double() @ dense.T
    if layer.bias is not None:
        wanted = wanted + layer.bias.double()
    assert output.dtype == BF16 and output.shape == wanted.shape
    if wanted.numel():
        # rounding scales, weights and sums to bfloat16 is 0.003; a zero point off by one is 0.008 and more
        assert float((output.double() - wanted).norm() / wanted.norm()) < 0.006
        assert float((output.double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_on_both_sides_of_the_crossover(rows, bias):
    layer, inputs = make_layer(bias=bias), make_inputs(rows, 256)
    before = inputs.clone()
    assert_right(layer, inputs, BACKEND.build(layer, CPU, BF16)(inputs))
    assert torch.equal(inputs, before)


def test_every_code_is_worth_its_distance_from_128():
    """Each weight alone: a one in the input picks a column of codes from end to end."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight = AffineWeight(
        SCHEME, codes, torch.ones(16, 1, dtype=torch.float16), torch.full((16, 1), 128, dtype=torch.uint8)
    )
    module = BACKEND.build(QuantizedLayer("layer", weight), CPU, BF16)
    one_by_one = torch.cat([module(torch.eye(16, dtype=BF16)[[i]]) for i in range(16)])
    many = module(torch.eye(32, 16, dtype=BF16))[:16]
    assert torch.equal(one_by_one.T.float(), codes.float() - 128)
    assert torch.equal(many.T.float(), codes.float() - 128)


def test_a_float32_bias_is_taken():
    layer = QuantizedLayer(
        "layer", make_layer().weight, torch.randn(48, generator=torch.Generator().manual_seed(2))
    )
    for rows in (3, 70):
        assert_right(layer, make_inputs(rows, 256), BACKEND.build(layer, CPU, BF16)(make_inputs(rows, 256)))


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (5, 20, 256), (2, 1, 2, 256), (0, 4, 256)])
def test_any_leading_dimensions(shape):
    layer, inputs = make_layer(bias=True), make_inputs(*shape)
    assert_right(layer, inputs, BACKEND.build(layer, CPU, BF16)(inputs))


@pytest.mark.parametrize("rows", [7, 90])
def test_inputs_with_strides(rows):
    layer = make_layer()
    module = BACKEND.build(layer, CPU, BF16)
    for inputs in (
        make_inputs(256, rows).T,
        make_inputs(rows, 512)[:, ::2],
        make_inputs(rows, 300)[:, 13:269],
        make_inputs(1, 256).expand(rows, 256),
    ):
        assert not inputs.is_contiguous()
        assert_right(layer, inputs, module(inputs))


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 16), (3, 32), (16, 48), (17, 80), (50, 272)])
def test_small_and_odd_sizes(out_features, in_features):
    layer = make_layer(out_features, in_features, bias=True)
    assert BACKEND.why_not(spec(SCHEME, in_features, out_features), CPU, BF16) is None
    module = BACKEND.build(layer, CPU, BF16)
    for rows in (1, 3, MOST_ROWS, MOST_ROWS + 1):
        inputs = make_inputs(rows, in_features)
        assert_right(layer, inputs, module(inputs))


def test_the_record_is_not_changed_and_the_module_says_what_it_is():
    layer = make_layer()
    before = layer.weight.digest()
    module = BACKEND.build(layer, CPU, BF16)
    for rows in (1, 65):
        module(make_inputs(rows, 256))
    assert layer.weight.digest() == before
    assert (module.in_features, module.out_features) == (256, 48)
    assert "W8G-1" in repr(module) and "cpu_int8" in repr(module)


# --- refusals -----------------------------------------------------------------------------------------------


def spec(scheme, in_features=256, out_features=48):
    return LinearSpec("layer", in_features=in_features, out_features=out_features, scheme=scheme)


def test_what_it_takes():
    for size in (-1, 256, 1000):  # all are whole rows of 256
        assert BACKEND.why_not(spec(QuantScheme(8, size)), CPU, BF16) is None


@pytest.mark.parametrize(
    ("given", "device", "dtype", "says"),
    [
        (spec(SCHEME), "cuda", BF16, "runs on cpu, not on cuda"),
        (spec(SCHEME), "meta", BF16, "runs on cpu, not on meta"),
        (spec(QuantScheme(4, -1)), "cpu", BF16, "needs bits 8, got 4"),
        (spec(QuantScheme(8, -1, data_type="fp8")), "cpu", BF16, "needs numbers of kind int, got fp8"),
        (spec(None), "cpu", BF16, "the layer is not quantized"),
        (spec(SCHEME), "cpu", torch.float16, "needs bfloat16, got float16"),
        (spec(SCHEME), "cpu", torch.float32, "load with --dtype bfloat16"),
        (
            spec(QuantScheme(8, -1, False)),
            "cpu",
            BF16,
            "needs symmetric weights, got W8G-1-asym",
        ),
        (spec(QuantScheme(8, 128)), "cpu", BF16, "needs group_size -1, got 128"),
        (spec(SCHEME, in_features=40), "cpu", BF16, "in_features divisible by 16, got 40"),
    ],
)
def test_refusals(given, device, dtype, says):
    assert says in BACKEND.why_not(given, torch.device(device), dtype)


def test_a_torch_without_the_operator(monkeypatch):
    old = SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace()), __version__="2.1.0", bfloat16=BF16)
    monkeypatch.setattr(cpu_int8, "torch", old)
    reason = BACKEND.missing()
    assert "torch 2.1.0" in reason and "pip install torch>=" in reason
