"""Marlin through a recorded double of GPTQModel's class: every number, and each refusal. No GPU runs here."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.marlin import Marlin
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from gptqmodel_double import Double, MarlinLinear, install, on_the_cpu

CPU, HALF, BF16 = torch.device("cpu"), torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def double(monkeypatch):
    install(monkeypatch)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_conformance_through_the_double(dtype):
    assert check_backend(on_the_cpu(Marlin()), dtype=dtype).cells == 2 * 4
    assert {(seen["bits"], seen["group_size"], seen["sym"]) for seen in Double.seen} == {
        (bits, size, True) for bits in (4, 8) for size in (32, 64, 128, -1)
    }
    assert {seen["dtype"] for seen in Double.seen} == {dtype}


def test_what_the_module_tells():
    layer = random_layer(QuantScheme(4, 128), (64, 128), torch.Generator().manual_seed(1), bias=True)
    module = Marlin().build(layer, CPU, HALF)
    assert isinstance(module.inner, MarlinLinear) and Double.seen[-1]["name"] == "layer"
    assert torch.equal(module.weight, exact(layer.weight).to(HALF))
    assert (module.in_features, module.out_features) == (128, 64) and "W4G128, backend=marlin" in repr(module)
    assert not module.train().inner.training and not module.eval().training
    # outside of no_grad the output must be fit for autograd, although the inner layer uses inference mode
    output = module(torch.ones(2, 128, dtype=HALF, requires_grad=True))
    assert not output.is_inference()


@pytest.mark.parametrize(
    ("scheme", "shape", "device", "dtype", "says"),
    [
        (QuantScheme(4, 128), (64, 128), "cpu", HALF, "runs on cuda, not on cpu"),
        (QuantScheme(4, 128), (64, 128), "cuda", torch.float32, "needs float16 or bfloat16, got float32"),
        (QuantScheme(3, 128), (64, 128), "cuda", HALF, "needs bits 4 or 8, got 3"),
        (QuantScheme(4, 128, False), (64, 128), "cuda", HALF, "needs symmetric weights"),
        (QuantScheme(4, 256), (64, 512), "cuda", HALF, "needs group_size -1, 32, 64 or 128, got 256"),
        (QuantScheme(4, 32), (96, 128), "cuda", HALF, "out_features divisible by 64, got 96"),
        (QuantScheme(4, 32), (64, 192), "cuda", HALF, "64 to divide one side and 128 the other, got 64 x 192"),
        (QuantScheme(4, 32), (64, 128), "cuda:3", HALF, "torch sees no GPU `cuda:3` here"),
    ],
)
def test_refusals(scheme, shape, device, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in Marlin().why_not(spec, torch.device(device), dtype)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("autoround_core.support.find_spec", lambda name: None)
    spec = LinearSpec("layer", in_features=128, out_features=64, scheme=QuantScheme())
    says = Marlin().why_not(spec, torch.device("cuda"), HALF)
    assert says == "gptqmodel not installed; pip install gptqmodel"
