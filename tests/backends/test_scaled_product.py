"""FP8, MX and NVFP4 layers: FP8 on torch's own CPU product, the others on a stand-in that undoes their layouts."""

from __future__ import annotations

import pytest
import torch

from autoround_backends import scaled_product
from autoround_backends.fp8 import Fp8
from autoround_backends.mx import Mx
from autoround_backends.nvfp4 import NvFp4
from autoround_backends.reference import Reference
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing import check_backend, random_layer
from scaled_product_double import RecordedProduct

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BACKENDS = {"FP8_DYNAMIC": Fp8(), "FP8_STATIC": Fp8(), "MXFP4": Mx(4), "MXFP8": Mx(8), "NVFP4": NvFp4()}


class OnCpu(Fp8):
    """A backend of these as if the CPU were its device, for the conformance kit."""

    def __init__(self, inner):
        self.inner, self.name = inner, inner.name

    def why_not(self, spec, device, dtype):
        wanted = spec.scheme is not None and spec.scheme.data_type in self.inner.support.data_types
        return None if wanted else "not here"

    def build(self, layer, device, dtype):
        return self.inner.build(layer, device, dtype)


@pytest.fixture
def recorded(monkeypatch):
    double = RecordedProduct()
    monkeypatch.setattr(scaled_product, "product", double)
    return double


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_STATIC"])
def test_fp8_passes_the_kit_on_torchs_cpu_product(name):
    assert check_backend(OnCpu(BACKENDS[name]), schemes=[QuantScheme.parse(name)]).cells == 1


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "NVFP4"])
def test_blocks_pass_the_kit_through_the_double(name, recorded):
    assert check_backend(OnCpu(BACKENDS[name]), schemes=[QuantScheme.parse(name)]).cells == 1
    assert recorded.calls


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (160, 128)])
def test_the_numbers_are_those_of_the_reference(name, shape, recorded, monkeypatch):
    if name.startswith("FP8"):
        monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(QuantScheme.parse(name), shape, generator, bias=True)
    module, reference = (backend.build(layer, CPU, BF16) for backend in (BACKENDS[name], Reference()))
    assert torch.equal(module.weight, reference.weight)
    for inputs in (torch.randn(1, shape[1]), torch.randn(2, 3, shape[1]), torch.randn(shape[1], 150).T):
        inputs = inputs.to(BF16)
        exact = reference._family.quantize_activation(inputs, reference._activation, layer.input_scale)
        wanted = exact.double() @ layer.weight.dequantize(torch.float64).T + layer.bias.double()
        bound = exact.double().abs() @ layer.weight.dequantize(torch.float64).abs().T + layer.bias.double().abs()
        assert ((module(inputs).double() - wanted).abs() <= 2.0**-7 * bound).all()
    assert module(torch.zeros(0, shape[1], dtype=BF16)).shape == (0, shape[0])


def spec(name, in_features=64, out_features=32):
    return LinearSpec("layer", in_features, out_features, QuantScheme.parse(name))


@pytest.mark.parametrize("backend, given, device, says", [
    (Fp8(), spec("FP8_DYNAMIC"), "cpu", "runs on cuda, not on cpu"),
    (Fp8(), spec("FP8_BLOCK", 128, 128), "cuda", "needs group_size -1, got 128"),
    (Fp8(), spec("FPW8A16"), "cuda", "the reference backend takes it"),
    (Fp8(), spec("FP8_DYNAMIC", 40), "cuda", "in_features divisible by 16, got 40"),
    (Mx(4), spec("MXFP8"), "cuda", "needs bits 4, got 8"),
    (Mx(8), spec("MXFP4A16"), "cuda", "needs bits 8, got 4"),
    (NvFp4(), spec("NVFP4A16"), "cuda", "the reference backend takes it"),
    (NvFp4(), spec("W4G128", 128), "cuda", "needs numbers of kind nv_fp, got int"),
])
def test_refusals(backend, given, device, says):
    assert says in backend.why_not(given, torch.device(device), BF16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", BACKENDS)
def test_without_a_gpu_it_says_so(name):
    assert BACKENDS[name].why_not(spec(name), torch.device("cuda"), BF16) == "no such CUDA device is here"


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert "pip install torch>=" in Fp8().missing()
