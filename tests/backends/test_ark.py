"""auto-round-lib: the real library on a CPU where it is installed, and a recorded double for every device."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch

from autoround_backends.ark import CPU, XPU, Ark, ArkLinear
from autoround_core import LinearSpec, QuantizedLayer, QuantScheme, UnsupportedError
from autoround_core.testing import check_backend
from autoround_core.testing.backends import exact
from autoround_core.testing.cases import random_layer

BACKEND, DEVICE = Ark(), torch.device("cpu")


class Double:
    """The library's three functions as documented, in float64, with what they were given."""

    def __init__(self):
        self.packed, self.calls = [], []

    def repack_quantized_weight(self, codes, scale, zero_point, length, compute, kind, scale_kind, asym):
        assert codes.dtype == zero_point.dtype == torch.int8 and codes.is_contiguous() and zero_point.is_contiguous()
        assert scale.is_contiguous() and scale.dtype == {"fp32": torch.float32, "fp16": torch.float16}[scale_kind]
        self.packed.append((codes, scale, zero_point, length, compute, kind, asym))
        return torch.tensor([len(self.packed) - 1], dtype=torch.int8)

    def woqgemm(self, rows, blob, bias, out_features, in_features, length, compute, kind, scale_kind, asym):
        codes, scale, zero_point, *options = self.packed[int(blob)]
        assert options == [length, compute, kind, asym] and codes.shape == (in_features, out_features)
        # bare pointers: whatever is not of this dtype is read wrongly, and written past its end
        assert rows.dtype == scale.dtype and rows.is_contiguous() and len(rows)
        assert bias.dtype == scale.dtype and bias.numel() in (0, out_features)
        self.calls.append((rows.dtype, compute, kind, scale_kind, asym))
        output = rows.double() @ self._matrix(codes, scale, zero_point, length, asym)
        return (output + bias.double() if bias.numel() else output).to(rows.dtype)

    def unpack_weight(self, blob, dtype, out_features, in_features, length, compute, kind, scale_kind, asym):
        codes, scale, zero_point, *_ = self.packed[int(blob)]
        return self._matrix(codes, scale, zero_point, length, asym).T.to(dtype)

    def _matrix(self, codes, scale, zero_point, length, asym):
        zeros = zero_point.double().repeat_interleave(length, 0) if asym else 0.0
        return scale.double().repeat_interleave(length, 0) * (codes.double() - zeros)


@pytest.fixture
def double(monkeypatch):
    module, made = ModuleType("auto_round_kernel"), Double()
    for name in ("repack_quantized_weight", "woqgemm", "unpack_weight"):
        setattr(module, name, getattr(made, name))
    module.cpu_lib = module.xpu_lib = object()
    monkeypatch.setitem(sys.modules, "auto_round_kernel", module)
    return made


def make_layer(scheme=None, shape=(96, 128), bias=True):
    return random_layer(scheme or QuantScheme(4, 32), shape, torch.Generator().manual_seed(3), bias=bias)


def assert_right(layer, inputs, output, tolerance):
    matrix, x = exact(layer.weight), inputs.double()
    wanted, bound = x @ matrix.T, x.abs() @ matrix.abs().T
    if layer.bias is not None:
        wanted, bound = wanted + layer.bias.double(), bound + layer.bias.double().abs()
    assert output.dtype == inputs.dtype and output.shape == wanted.shape
    assert bool(((output.double() - wanted).abs() <= tolerance * bound).all())


# --- the library itself --------------------------------------------------------------------------------------


@pytest.fixture
def library():
    return pytest.importorskip("auto_round_kernel", reason="needs auto-round-lib")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conformance_on_a_cpu(library, dtype):
    checked = check_backend(BACKEND, dtype=dtype)
    assert checked.cells == 7 * 4 * 2  # every width, group size and symmetry, for the one shape that is wide enough


@pytest.mark.parametrize("scheme", ["W2G32-asym", "W3G-1", "W4G128", "W5G8-asym", "W8G64", "W8G96-asym"])
@pytest.mark.parametrize("shape", [(64, 32), (65, 192), (130, 7), (257, 1152)])
@pytest.mark.parametrize("rows", [1, 5, 260])
def test_shapes_that_no_tile_divides(library, scheme, shape, rows):
    scheme = QuantScheme.parse(scheme)
    if shape[1] % scheme.group_length(shape[1]):
        pytest.skip("the group size does not divide the row")
    layer = make_layer(scheme, shape)
    module = BACKEND.build(layer, DEVICE, torch.float32)
    inputs = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    assert_right(layer, inputs, module(inputs), 2.0**-20)
    assert torch.allclose(module.weight.double(), exact(layer.weight), rtol=2.0**-20, atol=0)
    assert torch.equal(copy.deepcopy(module)(inputs), module(inputs))


def test_a_model_moved_to_16_bits_still_computes_in_float32(library):
    layer = make_layer()
    module = BACKEND.build(layer, DEVICE, torch.float32).to(torch.bfloat16)
    inputs = torch.randn(5, 128).to(torch.bfloat16)
    assert_right(layer, inputs, module(inputs), 2.0**-7)


# --- the calls ----------------------------------------------------------------------------------------------


class OnThisMachine(Ark):
    """Builds with the types of an XPU, on the CPU's tensors."""

    def why_not(self, spec, device, dtype):
        return super().why_not(spec, torch.device("xpu") if device.type == "cpu" else device, dtype)

    def build(self, layer, device, dtype):
        return ArkLinear(layer, device, dtype, XPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_gets_float32_whatever_the_model_has(double, dtype):
    assert check_backend(BACKEND, dtype=dtype).cells == 56
    assert {call[:2] for call in double.calls} == {(torch.float32, "fp32")}
    assert {call[2:] for call in double.calls} == {
        (f"int{bits}", "fp32", asym) for bits in range(2, 9) for asym in (True, False)
    }


def test_an_xpu_gets_float16_and_symmetric_weights(double):
    assert check_backend(OnThisMachine(), dtype=torch.float16).cells == 2 * 4
    assert set(double.calls) == {(torch.float16, "fp16", f"int{bits}", "fp16", False) for bits in (4, 8)}


def test_codes_and_zero_points_lose_half_of_the_range(double):
    layer = make_layer(QuantScheme(8, 32, False))
    BACKEND.build(layer, DEVICE, torch.float32)
    codes, scale, zero_point, *rest = double.packed[0]
    assert torch.equal(codes.T.to(torch.int16) + 128, layer.weight.codes.to(torch.int16))
    assert torch.equal(zero_point.T.to(torch.int16) + 128, layer.weight.zero_point.to(torch.int16))
    assert torch.equal(scale.T, layer.weight.scale.float()) and rest == [32, "fp32", "int8", True]


def test_no_rows_make_no_call_and_the_module_says_what_it_is(double):
    module = BACKEND.build(make_layer(), DEVICE, torch.bfloat16)
    assert module(torch.empty(2, 0, 128, dtype=torch.bfloat16)).shape == (2, 0, 96) and not double.calls
    assert (module.in_features, module.out_features) == (128, 96)
    assert "W4G32, backend=ark" in repr(module) and set(module.state_dict()) == {"packed", "bias"}


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shape", "device", "dtype", "says"),
    [
        (QuantScheme(4, 128), (64, 256), "cuda", torch.float16, "runs on cpu or xpu, not on cuda"),
        (QuantScheme(4, 128), (64, 256), "cpu", torch.float64, "needs float32, bfloat16 or float16, got float64"),
        (QuantScheme(4, 128), (64, 192), "cpu", torch.float32, "divisible by the group size 128, got 192"),
        (QuantScheme(4, 128), (16, 256), "cpu", torch.float32, "needs at least 64 out_features, got 16"),
        (QuantScheme(4, 128, False), (64, 256), "xpu", torch.float16, "4 or 8 bits on xpu, got W4G128-asym"),
        (QuantScheme(3, 128), (64, 256), "xpu", torch.float16, "4 or 8 bits on xpu, got W3G128"),
        (QuantScheme(4, 128), (64, 256), "xpu", torch.bfloat16, "got bfloat16; load with --dtype float16"),
    ],
)
def test_refusals(double, scheme, shape, device, dtype, says):
    spec = LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme)
    assert says in BACKEND.why_not(spec, torch.device(device), dtype)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("autoround_core.support.find_spec", lambda name: None)
    spec = LinearSpec("layer", in_features=128, out_features=64, scheme=QuantScheme())
    says = BACKEND.why_not(spec, DEVICE, torch.float32)
    assert says == "auto_round_kernel not installed; pip install autoround-backends[cpu]"


def test_a_library_that_does_not_load(double, monkeypatch):
    monkeypatch.setattr(sys.modules["auto_round_kernel"], "cpu_lib", None)
    with pytest.raises(UnsupportedError, match="its cpu library does not load here"):
        BACKEND.build(make_layer(), DEVICE, torch.float32)


def test_packed_weights_stay_where_they_were_packed(double):
    module = BACKEND.build(make_layer(), DEVICE, torch.float32)
    with pytest.raises(UnsupportedError, match="packed by ark for cpu cannot run on meta"):
        module(torch.empty(1, 128, device="meta"))


def test_a_scale_that_float16_cannot_hold(double):
    layer = make_layer()
    weight = layer.weight
    tiny = type(weight)(weight.scheme, weight.codes, weight.scale.to(torch.bfloat16) * 2.0**-20, weight.zero_point)
    ArkLinear(QuantizedLayer("layer", tiny), DEVICE, torch.float32, CPU)
    with pytest.raises(UnsupportedError, match="layer `layer` has scales from .* which float16 cannot hold"):
        ArkLinear(QuantizedLayer("layer", tiny), DEVICE, torch.float16, XPU)
