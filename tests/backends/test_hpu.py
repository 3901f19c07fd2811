"""Gaudi's operator through a recorded double: the documented matrix in float64, on the CPU's tensors."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from autoround_backends.hpu import Hpu
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer

CPU, HPU, BF16 = torch.device("cpu"), torch.device("hpu"), torch.bfloat16
SCHEMA = "convert_from_uint4(Tensor input, Tensor scale, Tensor? zero_point, ScalarType out_dtype) -> Tensor"


@pytest.fixture
def calls(monkeypatch):
    """The bridge's package, and its operator with the schema that it registers. Gives the arguments of each call."""
    made = []

    def unpack(words):
        return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(-2).double()

    def double(words, scale, zero_point, dtype):
        assert words.dtype == zero_point.dtype == torch.int32 and scale.dtype == dtype == BF16
        assert scale.shape == (zero_point.shape[0], words.shape[1] * 8) and zero_point.shape[1] == words.shape[1]
        assert all(tensor.is_contiguous() for tensor in (words, scale, zero_point))
        made.append((tuple(words.shape), tuple(scale.shape)))
        length = words.shape[0] // scale.shape[0]
        zeros, scale = (part.double().repeat_interleave(length, 0) for part in (unpack(zero_point), scale))
        return (scale * (unpack(words) - zeros)).to(dtype)

    for name in ("habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    library = torch.library.Library("hpu", "DEF")
    library.define(SCHEMA)
    library.impl("convert_from_uint4", double, "CPU")
    yield made
    library._destroy()


class OnTheCpu(Hpu):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, HPU if device.type == "cpu" else device, dtype)


def test_conformance_through_the_double(calls):
    assert check_backend(OnTheCpu(), dtype=BF16).cells == 2 * 4 * 3  # the three shapes whose outputs fill words
    assert {grid[0] for _, grid in calls} >= {1, 2, 3, 12}  # whole rows, and 128 to 32 of 384


def test_what_the_module_tells(calls):
    layer = random_layer(QuantScheme(4, 40, False), (16, 120), torch.Generator().manual_seed(9), bias=True)
    module = Hpu().build(layer, CPU, BF16)
    rounded = type(layer.weight)(
        layer.weight.scheme, layer.weight.codes, layer.weight.scale.to(BF16), layer.weight.zero_point
    )
    assert torch.equal(module.weight, exact(rounded).to(BF16)) and calls == [((120, 2), (3, 16))]
    assert (module.in_features, module.out_features) == (120, 16) and "W4G40-asym, backend=hpu" in repr(module)


@pytest.mark.parametrize(
    ("scheme", "out_features", "device", "dtype", "says"),
    [
        (QuantScheme(4, 128), 64, "cpu", BF16, "runs on hpu, not on cpu"),
        (QuantScheme(4, 128), 64, "hpu", torch.float16, "needs bfloat16, got float16; load with --dtype bfloat16"),
        (QuantScheme(8, 128), 64, "hpu", BF16, "needs bits 4, got 8"),
        (QuantScheme(4, 96), 64, "hpu", BF16, "divisible by the group size 96, got 128"),
        (QuantScheme(4, 128), 60, "hpu", BF16, "out_features divisible by 8, got 60"),
    ],
)
def test_refusals(calls, scheme, out_features, device, dtype, says):
    spec = LinearSpec("layer", in_features=128, out_features=out_features, scheme=scheme)
    assert says in Hpu().why_not(spec, torch.device(device), dtype)


def test_without_the_bridge():
    spec = LinearSpec("layer", in_features=128, out_features=64, scheme=QuantScheme())
    assert "needs torch with Intel's Gaudi bridge" in Hpu().why_not(spec, HPU, BF16)
