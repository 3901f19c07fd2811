"""torch's XPU operator through a recorded double: the documented product in float64, on the CPU's tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoround_backends import torch_xpu
from autoround_backends.torch_xpu import TorchXpu
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer

NAME = "_weight_int4pack_mm_with_scales_and_zeros"
CPU, XPU, BF16, HALF = torch.device("cpu"), torch.device("xpu"), torch.bfloat16, torch.float16
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


@pytest.fixture
def calls():
    """The operator has no CPU kernel, so a double takes the place of one. Gives the arguments of each call."""
    made = []

    def double(rows, words, length, scale, zero_point):
        (count, wide), tall = rows.shape, words.shape[0]
        assert rows.dtype in (BF16, HALF) and rows.is_contiguous() and count
        assert words.dtype == torch.int32 and words.shape == (tall, wide // 8) and words.is_contiguous()
        assert length > 1 and length % 32 == 0 and wide % length == 0
        assert scale.dtype == rows.dtype and zero_point.dtype == torch.int8
        assert scale.shape == zero_point.shape == (wide // length, tall)
        assert scale.is_contiguous() and zero_point.is_contiguous()  # oneDNN reads them with strides of its own
        made.append((length, rows.dtype))
        codes = ((words.unsqueeze(-1) >> SHIFTS) & 15).reshape(tall, wide).T.double()
        scale, zero_point = (part.double().repeat_interleave(length, 0) for part in (scale, zero_point))
        return (rows.double() @ (scale * (codes - zero_point))).to(rows.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl(NAME, double, "CPU")
    yield made
    library._destroy()


class OnTheCpu(TorchXpu):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, XPU if device.type == "cpu" else device, dtype)


def test_the_schema_of_the_operator_is_the_one_that_the_double_has():
    schema = str(getattr(torch.ops.aten, NAME).default._schema)
    assert schema == f"aten::{NAME}(Tensor self, Tensor mat2, int qGroupSize, Tensor qScale, Tensor qZeros) -> Tensor"


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_conformance_through_the_double(calls, dtype):
    assert check_backend(OnTheCpu(), dtype=dtype).cells == 2 * (5 + 4 + 5 + 5)
    assert {length for length, _ in calls} == {32, 64, 96, 128, 256, 384} and {kind for _, kind in calls} == {dtype}


def test_every_code_and_zero_point_arrives_as_it_is(calls):
    layer = random_layer(QuantScheme(4, 32, False), (24, 128), torch.Generator().manual_seed(8))
    module = TorchXpu().build(layer, CPU, HALF)
    matrix = exact(layer.weight).to(HALF)
    assert torch.equal(module(torch.eye(128, dtype=HALF)).T, matrix) and torch.equal(module.weight, matrix)
    assert module(torch.empty(0, 128, dtype=HALF)).shape == (0, 24) and len(calls) == 1
    assert (module.in_features, module.out_features) == (128, 24) and "W4G32-asym, backend=torch_xpu" in repr(module)


@pytest.mark.parametrize(
    ("scheme", "in_features", "device", "dtype", "says"),
    [
        (QuantScheme(4, 128), 256, "cpu", BF16, "runs on xpu, not on cpu"),
        (QuantScheme(4, 128), 256, "xpu", torch.float32, "needs bfloat16 or float16, got float32"),
        (QuantScheme(8, 128), 256, "xpu", BF16, "needs bits 4, got 8"),
        (QuantScheme(4, 48), 96, "xpu", BF16, "group_size divisible by 32, got 48"),
        (QuantScheme(4, -1), 40, "xpu", BF16, "in_features divisible by 32, got 40"),
        (QuantScheme(4, 64), 96, "xpu", BF16, "divisible by the group size 64, got 96"),
    ],
)
def test_refusals(scheme, in_features, device, dtype, says):
    spec = LinearSpec("layer", in_features=in_features, out_features=64, scheme=scheme)
    assert says in TorchXpu().why_not(spec, torch.device(device), dtype)


def test_a_torch_without_the_operator(monkeypatch):
    old = SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace()), __version__="2.6.0")
    monkeypatch.setattr(torch_xpu, "torch", old)
    assert "torch 2.6.0" in TorchXpu().missing() and "pip install torch>=" in TorchXpu().missing()
