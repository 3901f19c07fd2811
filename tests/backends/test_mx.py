"""MXFP4 and MXFP8 layers through a double of torch's function, which undoes the layouts and multiplies in float64."""

from __future__ import annotations

import pytest
import torch

from autoround_backends import scaled_product
from autoround_backends.mx import Mxfp4, Mxfp8
from autoround_core import ActivationScheme, FloatWeight, LinearSpec, QuantizedLayer, QuantScheme
from autoround_core.scheme import PRESETS
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from scaled_mm_double import assert_like_reference

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
BACKENDS = {"MXFP4": Mxfp4(), "MXFP8": Mxfp8()}
CASES = [("MXFP4", BF16), *(("MXFP8", dtype) for dtype in (BF16, torch.float16, torch.float32))]


class OnTheCpu4(Mxfp4):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, CUDA if device.type == "cpu" else device, dtype)


class OnTheCpu8(Mxfp8):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, CUDA if device.type == "cpu" else device, dtype)


def layer_of(name, shape, bias=True, seed=0):
    return random_layer(PRESETS[name], shape, torch.Generator().manual_seed(seed), bias=bias)


@pytest.mark.parametrize("name", BACKENDS)
def test_conformance_through_the_double(any_gpu, scaled_mm, name):
    checked = check_backend({"MXFP4": OnTheCpu4(), "MXFP8": OnTheCpu8()}[name])
    assert checked.cells == 2 and {kind for kind, _ in scaled_mm.calls} == {"BlockWise1x32"}
    assert {size[1:] for _, size in scaled_mm.calls} == {(512, 64), (256, 128)}


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (144, 128), (272, 544)])
def test_it_gives_what_the_reference_gives(scaled_mm, name, dtype, shape):
    assert_like_reference(BACKENDS[name], layer_of(name, shape, bias=shape[0] != 48), dtype)
    assert {size[1:] for _, size in scaled_mm.calls} == {(shape[1], shape[0])}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_code_and_scale_arrives_as_it_is(scaled_mm, name):
    bits = PRESETS[name].bits
    codes = torch.arange(160 * 160).view(160, 160).remainder(2**bits).to(torch.uint8)
    codes[codes == 127], codes[codes == 255] = 0, 0  # E4M3's not a number
    scale = torch.arange(160 * 5).view(160, 5).remainder(200).add(27).to(torch.uint8)  # no overflow in float32
    layer = QuantizedLayer("layer", FloatWeight(PRESETS[name], codes, scale))
    module = BACKENDS[name].build(layer, CPU, BF16)
    found, truth = module(torch.eye(160, dtype=BF16)).T, exact(layer.weight)
    assert torch.equal(found, truth.to(BF16)) and torch.equal(module.weight, truth.to(BF16))


@pytest.mark.parametrize("name", BACKENDS)
def test_what_it_says_of_itself_and_keeps(name):
    layer = layer_of(name, (48, 96))
    before = layer.weight.digest()
    module = BACKENDS[name].build(layer, CPU, BF16)
    assert BACKENDS[name].name == name.lower() and BACKENDS[name].priority == 45
    assert (module.in_features, module.out_features) == (96, 48)
    assert f"{name}, backend={name.lower()}" in repr(module)
    assert module.codes.nbytes == 48 * 96 * layer.weight.scheme.bits // 8 and module.scale.nbytes == 512
    assert module.record().digest() == before == layer.weight.digest() and not list(module.parameters())
    other = BACKENDS[name].build(layer_of(name, (48, 96), seed=9), CPU, BF16)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


STRANGE = QuantScheme(4, 32, True, "mx_fp", ActivationScheme(8, "mx_fp", 32))


@pytest.mark.parametrize(
    ("backend", "scheme", "shape", "device", "dtype", "says"),
    [
        (Mxfp4(), PRESETS["MXFP4"], (48, 96), "cpu", BF16, "runs on cuda, not on cpu"),
        (Mxfp4(), PRESETS["MXFP4"], (48, 96), "cuda", torch.float16, "needs bfloat16, got float16"),
        (Mxfp4(), PRESETS["MXFP8"], (48, 96), "cuda", BF16, "needs bits 4, got 8"),
        (Mxfp8(), PRESETS["MXFP4"], (48, 96), "cuda", BF16, "needs bits 8, got 4"),
        (Mxfp4(), PRESETS["MXFP4A16"], (48, 96), "cuda", BF16, "16 bits; the backend `reference` runs it"),
        (Mxfp4(), PRESETS["NVFP4"], (48, 96), "cuda", BF16, "needs numbers of kind mx_fp, got nv_fp"),
        (Mxfp4(), PRESETS["MXFP4"], (48, 80), "cuda", BF16, "in_features divisible by 32, got 80"),
        (Mxfp8(), PRESETS["MXFP8"], (40, 96), "cuda", BF16, "out_features divisible by 16, got 40"),
        (Mxfp4(), STRANGE, (48, 96), "cuda", BF16, "needs inputs of the kind of the weight"),
    ],
)
def test_refusals(any_gpu, backend, scheme, shape, device, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in backend.why_not(spec, torch.device(device), dtype)


@pytest.mark.parametrize(
    ("name", "capability", "says"),
    [
        ("MXFP4", (10, 0), None),
        ("MXFP4", (10, 3), None),
        ("MXFP4", (9, 0), "needs compute capability 10.0 to 10.9, cuda has 9.0"),
        ("MXFP4", (12, 0), "needs compute capability 10.0 to 10.9, cuda has 12.0"),
        ("MXFP8", (12, 0), None),
        ("MXFP8", (9, 0), "needs compute capability 10.0, cuda has 9.0"),
    ],
)
def test_the_capability_that_it_takes(monkeypatch, name, capability, says):
    monkeypatch.setattr(scaled_product, "why_not_tried", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    spec = LinearSpec("layer", in_features=96, out_features=48, scheme=PRESETS[name])
    assert BACKENDS[name].why_not(spec, CUDA, BF16) == says
