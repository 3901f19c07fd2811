"""AWQ's kernel through a recorded double of GPTQModel's class: every number, and each refusal. No GPU runs here."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.awq_gemm import AwqGemm
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from gptqmodel_double import Double, install, on_the_cpu

CPU, HALF, BF16 = torch.device("cpu"), torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def double(monkeypatch):
    install(monkeypatch)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_conformance_through_the_double(dtype):
    assert check_backend(on_the_cpu(AwqGemm()), dtype=dtype).cells == 4  # of the kit's shapes, [64, 384] fits
    assert {(seen["group_size"], seen["sym"]) for seen in Double.seen} == {
        (size, sym) for size in (32, 64) for sym in (True, False)
    }


@pytest.mark.parametrize("scheme", ["W4G128-asym", "W4G-1-asym", "W4G128"])
def test_larger_groups_need_more_outputs(scheme):
    layer = random_layer(QuantScheme.parse(scheme), (256, 128), torch.Generator().manual_seed(4), bias=True)
    module = AwqGemm().build(layer, CPU, HALF)
    assert torch.equal(module.weight, exact(layer.weight).to(HALF))
    assert (module.in_features, module.out_features) == (128, 256) and "backend=awq_gemm" in repr(module)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "says"),
    [
        (QuantScheme(4, 64), (64, 128), torch.float32, "needs float16 or bfloat16, got float32"),
        (QuantScheme(3, 64), (64, 128), HALF, "needs bits 4, got 3"),
        (QuantScheme(4, 16), (64, 128), HALF, "needs group_size -1, 32, 64 or 128, got 16"),
        (QuantScheme(4, 32), (96, 128), HALF, "out_features divisible by 64, got 96"),
        (QuantScheme(4, 128), (64, 128), HALF, "out_features divisible by the group size 128, got 64"),
    ],
)
def test_refusals(scheme, shape, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in AwqGemm().why_not(spec, torch.device("cuda"), dtype)
