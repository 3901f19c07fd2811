"""MLX on its CPU build, where it is installed: every number against float64; and each refusal."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.mlx import Mlx
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer

BACKEND, CPU = Mlx(), torch.device("cpu")


@pytest.fixture
def library():
    return pytest.importorskip("mlx.core", reason="needs mlx")


def make_layer(scheme, shape=(24, 128)):
    return random_layer(QuantScheme.parse(scheme), shape, torch.Generator().manual_seed(6), bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conformance(library, dtype):
    # widths, symmetry, and how many shapes each of the four group sizes leaves
    assert check_backend(BACKEND, dtype=dtype).cells == 6 * 2 * (5 + 4 + 4 + 2)


@pytest.mark.parametrize("scheme", ["W2G32-asym", "W3G64", "W8G128-asym"])
def test_the_weight_is_exact_and_its_buffers_are_the_arrays(library, scheme):
    layer = make_layer(scheme)
    module = BACKEND.build(layer, CPU, torch.float32)
    assert torch.allclose(module.weight.double(), exact(layer.weight), rtol=2.0**-20, atol=2.0**-20 / 8)
    inputs = torch.randn(3, 128)
    before = module(inputs) - layer.bias.float()
    module.scale.mul_(2)  # in place, as load_state_dict does
    module.offset.mul_(2)
    assert torch.allclose(module(inputs) - layer.bias.float(), 2 * before, rtol=1e-5, atol=1e-5)
    assert set(module.state_dict()) == {"packed", "scale", "offset", "bias"}


def test_a_cast_of_the_model_does_not_reach_the_weight(library):
    layer = make_layer("W8G32-asym")
    module = BACKEND.build(layer, CPU, torch.float32).to(torch.bfloat16)
    assert module.scale.dtype == torch.float32 and module.bias.dtype == torch.bfloat16
    inputs = torch.randn(3, 128).to(torch.bfloat16)
    wanted = inputs.double() @ exact(layer.weight).T + layer.bias.double()
    bound = inputs.double().abs() @ exact(layer.weight).abs().T + layer.bias.double().abs()
    assert bool(((module(inputs).double() - wanted).abs() <= 2.0**-7 * bound).all())
    assert "W8G32-asym, backend=mlx" in repr(module) and (module.in_features, module.out_features) == (128, 24)


@pytest.mark.parametrize(
    ("scheme", "in_features", "device", "says"),
    [
        (QuantScheme(4, 128), 256, "cuda", "runs on cpu or mps, not on cuda"),
        (QuantScheme(7, 128), 256, "cpu", "needs bits 2, 3, 4, 5, 6 or 8, got 7"),
        (QuantScheme(4, -1), 256, "mps", "needs group_size 32, 64 or 128, got 256"),
        (QuantScheme(4, 64), 96, "cpu", "in_features divisible by the group size 64, got 96"),
    ],
)
def test_refusals(scheme, in_features, device, says):
    spec = LinearSpec("layer", in_features=in_features, out_features=64, scheme=scheme)
    assert says in BACKEND.why_not(spec, torch.device(device), torch.float32)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("autoround_core.support.find_spec", lambda name: None)
    spec = LinearSpec("layer", in_features=128, out_features=64, scheme=QuantScheme())
    assert BACKEND.why_not(spec, CPU, torch.float32) == "mlx not installed; pip install autoround-backends[mlx]"
