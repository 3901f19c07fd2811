"""ExLlamaV2 through a recorded double of GPTQModel's class: every number, the scratch buffer, each refusal."""

from __future__ import annotations

import gc

import pytest
import torch

from autoround_backends.exllamav2 import ExllamaV2
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from gptqmodel_double import Double, ScratchSpace, install, on_the_cpu

CPU, HALF = torch.device("cpu"), torch.float16


@pytest.fixture(autouse=True)
def double(monkeypatch):
    install(monkeypatch)


def make_layer(shape, scheme=None):
    return random_layer(scheme or QuantScheme(4, 32, False), shape, torch.Generator().manual_seed(2), bias=True)


def test_conformance_through_the_double():
    checked = check_backend(on_the_cpu(ExllamaV2()), dtype=HALF)
    assert checked.cells == 2 * 4
    assert {(seen["bits"], seen["group_size"], seen["sym"]) for seen in Double.seen} == {
        (4, size, sym) for size in (32, 64, 128, -1) for sym in (True, False)
    }


def test_layers_of_one_device_share_the_largest_scratch_buffer():
    backend = ExllamaV2()
    small, large, again = (backend.build(make_layer(shape), CPU, HALF) for shape in ((32, 64), (64, 128), (32, 64)))
    assert ScratchSpace.made == [32 * 64 * 2 + 128, 64 * 128 * 2 + 128]
    assert again.scratch is large.scratch and small.scratch is not large.scratch
    del small, large, again
    gc.collect()
    backend.build(make_layer((32, 64)), CPU, HALF)
    assert len(ScratchSpace.made) == 3  # nothing is kept for a model that is gone


def test_what_the_module_tells():
    layer = make_layer((32, 64))
    module = ExllamaV2().build(layer, CPU, HALF)
    assert torch.equal(module.weight, exact(layer.weight).to(HALF))
    assert (module.in_features, module.out_features) == (64, 32) and "W4G32-asym, backend=exllamav2" in repr(module)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "says"),
    [
        (QuantScheme(4, 128), (64, 128), torch.bfloat16, "needs float16, got bfloat16; load with --dtype float16"),
        (QuantScheme(8, 128), (64, 128), HALF, "needs bits 4, got 8"),
        (QuantScheme(4, 16), (64, 128), HALF, "needs group_size -1, 32, 64 or 128, got 16"),
        (QuantScheme(4, -1), (64, 40), HALF, "in_features divisible by 32, got 40"),
        (QuantScheme(4, 32), (48, 64), HALF, "out_features divisible by 32, got 48"),
    ],
)
def test_refusals(scheme, shape, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in ExllamaV2().why_not(spec, torch.device("cuda"), dtype)
