"""What the backends over GPTQModel share: the words against GPTQModel's own torch layers, and every refusal."""

from __future__ import annotations

import sys

import pytest
import torch

from autoround_backends import gptqmodel_layers
from autoround_backends.gptqmodel_layers import awq_words, gptq_words, group_size_of, why_not_gpu
from autoround_backends.marlin import Marlin
from autoround_backends.scale_range import rounded_scale
from autoround_core import QuantizedLayer, QuantScheme, UnsupportedError
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer
from gptqmodel_double import MarlinLinear, install, unpack

GPU, CPU, HALF, BF16 = torch.device("cuda"), torch.device("cpu"), torch.float16, torch.bfloat16


def make_layer(scheme, shape=(64, 128), bias=False):
    return random_layer(scheme, shape, torch.Generator().manual_seed(5), bias=bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_words_hold_the_codes_and_unshifted_zero_points(bits):
    weight = make_layer(QuantScheme(bits, 32, False)).weight
    words = gptq_words(weight)
    assert torch.equal(unpack(words["qweight"], bits, 0, False).T, weight.codes.int())
    assert torch.equal(unpack(words["qzeros"], bits, 1, False).T, weight.zero_point.int())
    assert words["qweight"].shape == (128 * bits // 32, 64) and words["qzeros"].shape == (4, 64 * bits // 32)
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in words.values())


def test_awq_words_hold_the_same_along_the_output():
    weight = make_layer(QuantScheme(4, 32, False)).weight
    words = awq_words(weight)
    assert torch.equal(unpack(words["qweight"], 4, 1, True).T, weight.codes.int())
    assert torch.equal(unpack(words["qzeros"], 4, 1, True).T, weight.zero_point.int())
    assert words["qweight"].shape == (128, 8) and words["qzeros"].shape == (4, 8)


# --- GPTQModel itself ---------------------------------------------------------------------------------------


@pytest.fixture
def gptqmodel(monkeypatch):
    """GPTQModel, whose classes for a GPU are let be made without one."""
    pytest.importorskip("gptqmodel", reason="needs GPTQModel", exc_type=ImportError)
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear, marlin

    monkeypatch.setattr(marlin, "marlin_import_exception", None)
    monkeypatch.setattr(BaseQuantLinear, "cached_validate_once", classmethod(lambda cls: (True, None)))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scheme", ["W4G32", "W4G128-asym", "W4G-1-asym", "W8G64", "W8G32-asym", "W2G64-asym"])
@pytest.mark.parametrize("kind", ["torch.TorchLinear", "torch_awq.AwqTorchLinear"])
def test_its_torch_layers_read_our_words_as_the_same_numbers(gptqmodel, kind, scheme):
    scheme, awq = QuantScheme.parse(scheme), "awq" in kind
    if awq and scheme.bits != 4:
        pytest.skip("AWQ has 4 bits")
    layer = make_layer(scheme, (64, 256))
    module, name = kind.split(".")
    kind = gptqmodel_layers.class_named(f"nn_modules.qlinear.{module}", name)
    words = awq_words(layer.weight) if awq else gptq_words(layer.weight)
    if not awq:  # the torch layer reads groups from it, where the kernels read whether rows were moved
        words["g_idx"] = torch.arange(256, dtype=torch.int32) // scheme.group_length(256)
    inner = gptqmodel_layers.make_inner(kind, layer, words, CPU, HALF).eval()
    inner.post_init()
    matrix = inner(torch.eye(256, dtype=HALF)).T
    assert torch.equal(matrix, exact(layer.weight).to(HALF))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("module", "name", "scheme", "dtype"),
    [
        ("marlin", "MarlinLinear", "W4G128", BF16), ("marlin", "MarlinLinear", "W8G-1", HALF),
        ("exllamav2", "ExllamaV2Linear", "W4G32-asym", HALF), ("gemm_awq", "AwqGEMMLinear", "W4G32-asym", BF16),
    ],
)
def test_its_gpu_layers_take_our_tensors(gptqmodel, module, name, scheme, dtype):
    layer = make_layer(QuantScheme.parse(scheme), (128, 256))
    words = awq_words(layer.weight) if "awq" in module else gptq_words(layer.weight)
    kind = gptqmodel_layers.class_named(f"nn_modules.qlinear.{module}", name)
    validate = kind.validate
    kind.validate = classmethod(lambda cls, device=None, **options: validate(**options))  # no GPU to ask about
    try:
        inner = gptqmodel_layers.make_inner(kind, layer, words, CPU, dtype)
    finally:
        del kind.validate
    for key, tensor in {**words, "scales": layer.weight.scale.T.to(inner.scales.dtype)}.items():
        assert torch.equal(inner.state_dict()[key], tensor), key


# --- refusals -----------------------------------------------------------------------------------------------


def test_why_a_gpu_does_not_fit(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert why_not_gpu(GPU, HALF, (7, 5)) == "torch sees no GPU `cuda` here"
    install(monkeypatch)
    assert why_not_gpu(GPU, HALF, (7, 5)) is None
    assert why_not_gpu(torch.device("cuda:1"), HALF, (7, 5)) == "torch sees no GPU `cuda:1` here"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    assert why_not_gpu(GPU, HALF, (7, 5)) is None
    assert why_not_gpu(GPU, BF16, (7, 5)) == "needs compute capability 8.0 for bfloat16, cuda has 7.5"
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert "built for ROCm" in why_not_gpu(GPU, HALF, (7, 5))


def test_gptqmodels_own_no_is_passed_on(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(MarlinLinear, "refusal", NotImplementedError("only on\n  Tuesdays"))
    with pytest.raises(UnsupportedError, match="layer `layer`: GPTQModel refuses MarlinLinear: only on Tuesdays"):
        Marlin().build(make_layer(QuantScheme(4, 128)), CPU, HALF)


def test_a_kernel_that_does_not_compile(monkeypatch):
    install(monkeypatch)

    def fail(self):
        raise ModuleNotFoundError("no nvcc")

    monkeypatch.setattr(MarlinLinear, "post_init", fail)
    with pytest.raises(UnsupportedError, match="cannot compile MarlinLinear: no nvcc"):
        Marlin().build(make_layer(QuantScheme(4, 128)), CPU, HALF)


def test_a_gptqmodel_that_does_not_import(monkeypatch):
    for name in ("gptqmodel", "gptqmodel.nn_modules.qlinear.marlin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="gptqmodel is installed but does not import"):
        gptqmodel_layers.class_named("nn_modules.qlinear.marlin", "MarlinLinear")


def test_whole_rows_have_one_name():
    assert [group_size_of(QuantScheme(4, size), 128) for size in (-1, 128, 1000, 64)] == [-1, -1, -1, 64]


# --- scales -------------------------------------------------------------------------------------------------


def with_scale(scale):
    layer = make_layer(QuantScheme(4, 128), (2, 128))
    weight = layer.weight
    scale = torch.tensor(scale).view(2, 1)
    return QuantizedLayer("fc", type(weight)(weight.scheme, weight.codes, scale.to(BF16), weight.zero_point))


@pytest.mark.parametrize("scale", [(0.5, -0.001), (0.0, 60000.0), (-1e-5, 1e-5)])
def test_scales_that_float16_holds(scale):
    assert torch.equal(rounded_scale(with_scale(scale), HALF), torch.tensor(scale).view(2, 1).to(BF16).to(HALF))


@pytest.mark.parametrize("scale", [(1e6, 1.0), (1.0, -1e-7), (1e-9, 1.0)])
def test_scales_that_float16_loses(scale):
    with pytest.raises(UnsupportedError, match="layer `fc` has scales from .* which float16 cannot hold"):
        rounded_scale(with_scale(scale), HALF)
