"""FP8 layers: tokens and matrices on torch's own CPU product against float64, blocks through the double of it."""

from __future__ import annotations

import pytest
import torch

from autoround_backends import scaled_product
from autoround_backends.fp8 import Fp8
from autoround_backends.reference import Reference
from autoround_core import ActivationScheme, FloatWeight, LinearSpec, QuantizedLayer, QuantScheme
from autoround_core.scheme import PRESETS
from autoround_core.testing import check_backend
from autoround_core.testing.cases import random_layer
from scaled_mm_double import assert_like_reference

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [PRESETS["FP8_DYNAMIC"], PRESETS["FP8_STATIC"]]
BLOCKS = PRESETS["FP8_BLOCK"]
# one scale for a matrix, as files of others have it
MATRIX = [QuantScheme(8, -1, True, "fp", ActivationScheme(8, "fp", -1, dynamic), -1) for dynamic in (True, False)]


class OnTheCpu(Fp8):
    def why_not(self, spec, device, dtype):
        return super().why_not(spec, CUDA if device.type == "cpu" else device, dtype)


def layer_of(scheme, shape=(48, 80), bias=True, seed=0):
    return random_layer(scheme, shape, torch.Generator().manual_seed(seed), bias=bias)


# --- torch's CPU product ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conformance_on_torchs_cpu_product(any_gpu, dtype):
    checked = check_backend(OnTheCpu(), dtype=dtype, schemes=[*ROWS, PRESETS["FPW8A16"]])
    assert checked.cells == 2 * 2  # of the kit's three shapes, those that 16 divides
    assert any("16 bits; the backend `reference` runs it" in reason for reason in checked.refusals)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [*ROWS, *MATRIX], ids=["tokens", "static", "matrix", "matrix-static"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (176, 528)])
def test_torchs_cpu_product_gives_what_the_reference_gives(scheme, shape, dtype):
    assert_like_reference(Fp8(), layer_of(scheme, shape), dtype)


@pytest.mark.parametrize("scheme", ROWS, ids=str)
def test_every_code_is_multiplied_as_the_number_it_is(scheme):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes[codes % 128 == 127] = 0  # not a number
    layer = QuantizedLayer("layer", FloatWeight(scheme, codes, torch.full((16, 1), 0.5)), None, torch.tensor([1 / 448]))
    module = Fp8().build(layer, CPU, torch.float32)
    wanted = codes.view(torch.float8_e4m3fn).float() * 0.5
    assert torch.allclose(module(torch.eye(16)).T, wanted, rtol=1e-6, atol=0) and torch.equal(module.weight, wanted)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_taken_as_they_are(kind):
    weight = layer_of(ROWS[0]).weight
    layer = QuantizedLayer("layer", FloatWeight(weight.scheme, weight.codes, weight.scale.to(kind)))
    assert_like_reference(Fp8(), layer, torch.float32)


# --- through the double -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_conform_through_the_double(any_gpu, scaled_mm, dtype):
    assert check_backend(OnTheCpu(), dtype=dtype, schemes=[BLOCKS]).cells == 1  # the shape of whole blocks
    assert {size for _, size in scaled_mm.calls} == {(rows, 256, 128) for rows in (16, 32, 304, 4096)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 640), (384, 512)])
def test_blocks_give_what_the_reference_gives(scaled_mm, shape, dtype):
    assert_like_reference(Fp8(), layer_of(BLOCKS, shape), dtype)
    assert {kind for kind, _ in scaled_mm.calls} == {"BlockWise1x128"}
    assert {rows for _, (rows, *_) in scaled_mm.calls} == {16, 304}  # whole 16, to align a column of scales


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(ROWS[0], "RowWise"), (ROWS[1], "RowWise"), (MATRIX[0], "RowWise"), (MATRIX[1], "TensorWise")],
    ids=["tokens", "static", "matrix", "matrix-static"],
)
def test_torch_would_accept_the_arguments_on_cuda(scaled_mm, scheme, kind):
    assert_like_reference(Fp8(), layer_of(scheme), BF16)
    assert {found for found, _ in scaled_mm.calls} == {kind}


# --- refusals -----------------------------------------------------------------------------------------------

LONG = QuantScheme(8, 64, True, "fp", ActivationScheme(8, "fp", 64), 64)
STRANGE = QuantScheme(8, -1, True, "fp", ActivationScheme())
MIXED = QuantScheme(8, -1, True, "fp", ActivationScheme(8, "fp", 128))


@pytest.mark.parametrize(
    ("scheme", "shape", "device", "dtype", "says"),
    [
        (ROWS[0], (48, 80), "cpu", BF16, "runs on cuda, not on cpu"),
        (ROWS[0], (48, 80), "cuda", torch.float64, "got float64; load with --dtype bfloat16"),
        (ROWS[0], (48, 40), "cuda", BF16, "in_features divisible by 16, got 40"),
        (ROWS[0], (40, 80), "cuda", BF16, "out_features divisible by 16, got 40"),
        (PRESETS["FPW8A16"], (48, 80), "cuda", BF16, "leaves them in 16 bits; the backend `reference` runs it"),
        (PRESETS["MXFP8"], (48, 96), "cuda", BF16, "needs numbers of kind fp, got mx_fp"),
        (QuantScheme(), (48, 128), "cuda", BF16, "needs numbers of kind fp, got int"),
        (BLOCKS, (128, 192), "cuda", BF16, "needs whole blocks of 128 x 128, got 128 x 192"),
        (BLOCKS, (192, 128), "cuda", BF16, "needs whole blocks of 128 x 128, got 192 x 128"),
        (LONG, (128, 128), "cuda", BF16, "needs group_size -1 or 128, got 64"),
        (STRANGE, (48, 80), "cuda", BF16, "needs inputs of the kind of the weight"),
        (MIXED, (48, 80), "cuda", BF16, "needs inputs of the kind of the weight"),
    ],
)
def test_refusals(any_gpu, scheme, shape, device, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in Fp8().why_not(spec, torch.device(device), dtype)


@pytest.mark.parametrize(
    ("scheme", "capability", "says"),
    [
        (ROWS[0], (8, 9), None),
        (ROWS[0], (12, 0), None),
        (ROWS[0], (8, 6), "needs compute capability 8.9, cuda has 8.6"),
        (BLOCKS, (9, 0), None),
        (BLOCKS, (8, 9), "needs compute capability 9.0 to 9.9, cuda has 8.9"),
        (BLOCKS, (10, 0), "needs compute capability 9.0 to 9.9, cuda has 10.0"),
    ],
)
def test_the_capability_that_it_takes(monkeypatch, scheme, capability, says):
    monkeypatch.setattr(scaled_product, "why_not_tried", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    spec = LinearSpec("layer", in_features=256, out_features=128, scheme=scheme)
    assert Fp8().why_not(spec, CUDA, BF16) == says


def test_what_it_says_of_itself():
    backend, layer = Fp8(), layer_of(ROWS[0])
    before = layer.weight.digest()
    module = backend.build(layer, CPU, BF16)
    assert (module.in_features, module.out_features) == (80, 48) and "FP8_DYNAMIC, backend=fp8" in repr(module)
    assert {name for name, _ in module.named_buffers()} == {"bias", "codes", "scale"} and not list(module.parameters())
    assert layer.weight.digest() == before and backend.priority == 45
    assert Reference().why_not(LinearSpec("layer", 80, 48, PRESETS["FPW8A16"]), CUDA, BF16) is None
