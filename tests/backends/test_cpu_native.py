"""The native CPU kernels against float64: every width, group and dtype, few rows and many, odd shapes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_backends import native_library
from autoround_backends.cpu_native import MOST_ROWS, CpuNative
from autoround_core import AffineWeight, LinearSpec, QuantizedLayer, QuantScheme
from autoround_core.testing import check_backend

CPU = torch.device("cpu")
BACKEND = CpuNative()
MISSING = BACKEND.missing()
native = pytest.mark.skipif(MISSING is not None, reason=f"cpu_native {MISSING}")
# float32 keeps 24 bits; of the others the rounding of the output is all that is seen
TOLERANCE = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make_layer(scheme, out_features, in_features, *, bias=False, scale_dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, scheme.groups(in_features))
    top = 2**scheme.bits
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    zeros = torch.full(grid, top // 2) if scheme.sym else torch.randint(0, top, grid, generator=generator)
    scale = (0.5 + torch.rand(grid, generator=generator)) * (torch.randint(0, 2, grid, generator=generator) * 2 - 1)
    weight = AffineWeight(scheme, codes.to(torch.uint8), (scale / top).to(scale_dtype), zeros.to(torch.uint8))
    return QuantizedLayer("layer", weight, torch.randn(out_features, generator=generator) if bias else None)


def dense(weight):
    """float64 [out, in], from the integers."""
    length = weight.scheme.group_length(weight.shape[1])
    scale, zero_point = (part.double().repeat_interleave(length, 1)[:, : weight.shape[1]]
                         for part in (weight.scale, weight.zero_point))
    return scale * (weight.codes.double() - zero_point)


def worst(layer, inputs, output):
    """The greatest error of an output as a part of the magnitudes that were added up in it."""
    matrix, x = dense(layer.weight), inputs.double()
    wanted, bound = x @ matrix.T, x.abs() @ matrix.abs().T
    if layer.bias is not None:
        bias = layer.bias.to(inputs.dtype).double()
        wanted, bound = wanted + bias, bound + bias.abs()
    assert output.dtype == inputs.dtype and output.shape == wanted.shape
    return float(((output.double() - wanted).abs() / bound.clamp(min=1e-300)).max()) if wanted.numel() else 0.0


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kit_passes(dtype):
    assert check_backend(BACKEND, dtype=dtype).cells > 150


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_few_rows_and_many(bits, group_size, sym):
    for out_features, in_features in ((5, 128), (9, 1000), (33, 384)):
        layer = make_layer(QuantScheme(bits, group_size, sym), out_features, in_features, bias=True)
        for dtype, tolerance in TOLERANCE.items():
            module = BACKEND.build(layer, CPU, dtype)
            for rows in (1, 7, 9, MOST_ROWS, MOST_ROWS + 1):
                inputs = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
                assert worst(layer, inputs, module(inputs)) < tolerance, (dtype, rows, in_features)


@native
@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), out_features=st.integers(1, 5), in_features=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_codes_come_back_as_they_went_in(bits, out_features, in_features, seed):
    layer = make_layer(QuantScheme(bits, 32, False), out_features, in_features, seed=seed)
    assert torch.equal(BACKEND.build(layer, CPU, torch.float32).weight, layer.weight.dequantize(torch.float32))


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_is_as_small_as_its_bits(bits):
    layer = make_layer(QuantScheme(bits, 128), 64, 1024)
    assert BACKEND.build(layer, CPU, torch.bfloat16).codes.numel() == 64 * 1024 * bits // 8


@native
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_dtype(scale_dtype):
    layer = make_layer(QuantScheme(4, 64, False), 24, 256, scale_dtype=scale_dtype)
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert worst(layer, inputs, BACKEND.build(layer, CPU, torch.float32)(inputs)) < TOLERANCE[torch.float32]


@native
@pytest.mark.parametrize("greatest", [1e-28, 1e-20, 1.0, 1e4, 1e30])
def test_inputs_of_any_magnitude(greatest):
    layer = make_layer(QuantScheme(4, 128), 16, 256)
    inputs = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)) * greatest
    for dtype in (torch.float32, torch.bfloat16):
        given_inputs = inputs.to(dtype)
        output = BACKEND.build(layer, CPU, dtype)(given_inputs)
        assert worst(layer, given_inputs, output) < TOLERANCE[dtype]


@native
def test_beside_a_huge_input_the_others_are_not_lost():
    """Inputs of a block share a step; a thousandfold outlier must cost less than the rounding of the output."""
    layer = make_layer(QuantScheme(4, 128), 64, 128)
    inputs = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    inputs[0, 5] = 3000.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given_inputs = inputs.to(dtype)
        assert worst(layer, given_inputs, BACKEND.build(layer, CPU, dtype)(given_inputs)) < TOLERANCE[dtype]


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    inputs = torch.ones(2, 256)
    inputs[1, 130] = value
    for dtype in (torch.float32, torch.bfloat16):
        output = BACKEND.build(make_layer(QuantScheme(4, 128), 16, 256), CPU, dtype)(inputs.to(dtype))
        assert output[0].isfinite().all() and not output[1].isfinite().any()


@native
def test_zero_inputs_give_the_bias():
    layer = make_layer(QuantScheme(3, 32, False), 10, 96, bias=True)
    output = BACKEND.build(layer, CPU, torch.float32)(torch.zeros(2, 96))
    assert torch.equal(output, layer.bias.expand(2, -1))


@native
def test_one_thread_and_several_give_the_same():
    layer = make_layer(QuantScheme(4, 128), 300, 256)
    module = BACKEND.build(layer, CPU, torch.bfloat16)
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(module(inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@native
def test_casting_or_copying_the_model_does_not_round_scales():
    layer = make_layer(QuantScheme(4, 32), 16, 128, bias=True)
    module = BACKEND.build(layer, CPU, torch.float32)
    inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    wanted = module(inputs)
    assert torch.equal(copy.deepcopy(module).to(torch.bfloat16)(inputs), wanted)


def spec(scheme, in_features=256, out_features=48):
    return LinearSpec("layer", in_features, out_features, scheme)


@native
@pytest.mark.parametrize(
    ("given_spec", "device", "dtype", "says"),
    [
        (spec(QuantScheme(4, 128)), "cuda", torch.bfloat16, "runs on cpu, not on cuda"),
        (spec(QuantScheme(4, 40)), "cpu", torch.bfloat16, "needs group_size 32, 64"),
        (spec(QuantScheme(4, 32, data_type="mx_fp")), "cpu", torch.bfloat16, "needs numbers of kind int, got mx_fp"),
        (spec(QuantScheme(4, 128)), "cpu", torch.float64, "load with --dtype bfloat16"),
    ],
)
def test_refusals(given_spec, device, dtype, says):
    assert says in BACKEND.why_not(given_spec, torch.device(device), dtype)


def test_without_its_library_it_says_so_and_others_take_over(monkeypatch):
    monkeypatch.setattr(native_library, "library", lambda: None)
    reason = BACKEND.why_not(spec(QuantScheme(4, 128)), CPU, torch.bfloat16)
    assert "compile" in reason or "x86-64" in reason


def test_an_unfit_library_is_no_error(tmp_path):
    """A file that is no library, as after copying an environment to another system."""
    code = (
        "from importlib.machinery import ModuleSpec\n"
        "from autoround_backends import native_library\n"
        f"native_library.find_spec = lambda name: ModuleSpec(name, None, origin={os.fspath(tmp_path / 'no.so')!r})\n"
        "assert native_library.missing()\n"
    )
    (tmp_path / "no.so").write_bytes(b"not a library")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
