"""NVFP4 layers through a double of torch's function, which undoes the layouts and multiplies in float64."""

from __future__ import annotations

import pytest
import torch

from autoround_backends import scaled_product
from autoround_backends.nvfp4 import Nvfp4
from autoround_core import FloatWeight, LinearSpec, QuantizedLayer
from autoround_core.scheme import PRESETS
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from scaled_mm_double import assert_like_reference

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCHEME = PRESETS["NVFP4"]


class OnTheCpu(Nvfp4):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, CUDA if device.type == "cpu" else device, dtype)


def layer_of(shape, bias=True, seed=0):
    return random_layer(SCHEME, shape, torch.Generator().manual_seed(seed), bias=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conformance_through_the_double(any_gpu, scaled_mm, dtype):
    assert check_backend(OnTheCpu(), dtype=dtype).cells == 2
    rows = {size for _, size in scaled_mm.calls}
    assert rows == {(n, *shape) for n in (1, 3, 6, 17, 300) for shape in ((512, 64), (256, 128))} | {(4096, 512, 64)}
    assert {kind for kind, _ in scaled_mm.calls} == {"BlockWise1x16"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (144, 128), (272, 544)])
def test_it_gives_what_the_reference_gives(scaled_mm, dtype, shape):
    assert_like_reference(Nvfp4(), layer_of(shape, bias=shape[0] != 48), dtype)
    assert {size[1:] for _, size in scaled_mm.calls} == {(shape[1], shape[0])}


def test_every_code_and_scale_arrives_as_it_is(scaled_mm):
    codes = torch.arange(160 * 160).view(160, 160).remainder(16).to(torch.uint8)
    scale = torch.arange(160 * 10).view(160, 10).remainder(126).add(1).to(torch.uint8).view(torch.float8_e4m3fn)
    weight = FloatWeight(SCHEME, codes, scale, torch.tensor([8.0]))
    # by 384 the scale of an input of one is 384 / 6 = 64, an E4M3 number, and its code that of 6: nothing is rounded
    layer = QuantizedLayer("layer", weight, None, torch.tensor([384.0]))
    module = Nvfp4().build(layer, CPU, torch.float32)
    found, truth = module(torch.eye(160)).T, exact(weight)
    assert torch.equal(found.double(), truth) and torch.equal(module.weight.double(), truth)


def test_global_scales_divide(scaled_mm):
    """Four times the scale for all of the weights: a quarter of the output."""
    layer = layer_of((48, 96), bias=False)
    weight = layer.weight
    larger = FloatWeight(SCHEME, weight.codes, weight.scale, weight.global_scale * 4)
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    found, quarter = (
        Nvfp4().build(QuantizedLayer("layer", given, None, layer.input_scale), CPU, torch.float32)(inputs)
        for given in (weight, larger)
    )
    assert torch.equal(found / 4, quarter) and found.abs().max() > 0


def test_what_it_says_of_itself_and_keeps():
    layer = layer_of((48, 96))
    before = layer.weight.digest()
    module = Nvfp4().build(layer, CPU, BF16)
    assert (module.in_features, module.out_features) == (96, 48) and "NVFP4, backend=nvfp4" in repr(module)
    assert module.codes.nbytes == 48 * 96 // 2 and module.scale.nbytes == 2 * 512
    assert module.record().digest() == before == layer.weight.digest() and not list(module.parameters())
    other = Nvfp4().build(layer_of((48, 96), seed=9), CPU, BF16)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize(
    ("name", "shape", "device", "dtype", "says"),
    [
        ("NVFP4", (48, 96), "cpu", BF16, "runs on cuda, not on cpu"),
        ("NVFP4", (48, 96), "cuda", torch.float64, "needs bfloat16, float16 or float32, got float64"),
        ("NVFP4A16", (48, 96), "cuda", BF16, "16 bits; the backend `reference` runs it"),
        ("MXFP4", (48, 96), "cuda", BF16, "needs numbers of kind nv_fp, got mx_fp"),
        ("NVFP4", (48, 80), "cuda", BF16, "in_features divisible by 32, got 80"),
        ("NVFP4", (40, 96), "cuda", BF16, "out_features divisible by 16, got 40"),
    ],
)
def test_refusals(any_gpu, name, shape, device, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=PRESETS[name])
    assert says in Nvfp4().why_not(spec, torch.device(device), dtype)


@pytest.mark.parametrize(
    ("capability", "says"),
    [((10, 0), None), ((12, 0), None), ((9, 0), "needs compute capability 10.0, cuda has 9.0")],
)
def test_the_capability_that_it_takes(monkeypatch, capability, says):
    monkeypatch.setattr(scaled_product, "why_not_tried", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    spec = LinearSpec("layer", in_features=96, out_features=48, scheme=SCHEME)
    assert Nvfp4().why_not(spec, CUDA, BF16) == says
