"""The conformance kit builds and runs what it promises, and fails backends with a fault; see test_testing.py for what
it passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoround_backends.reference import Reference
from autoround_core import Backend, QuantScheme
from autoround_core.scheme import BLOCK_TYPES
from autoround_core.testing import OTHER_SCHEMES, SCHEMES, Checked, check_backend
from autoround_core.testing.cases import random_inputs

# --- doubles ----------------------------------------------------------------------------------------------


class BackendDouble(Backend):
    """The reference, whose answer, layer, input and output are passed through the given functions."""

    name = "double"

    def __init__(self, why_not=None, layer=None, forward=None):
        self._why_not, self._layer, self._forward = why_not, layer, forward

    def why_not(self, spec, device, dtype):
        return self._why_not(spec) if self._why_not else None

    def build(self, layer, device, dtype):
        module = Reference().build(self._layer(layer) if self._layer else layer, device, dtype)
        return ModuleDouble(module, self._forward) if self._forward else module


class ModuleDouble(torch.nn.Module):
    def __init__(self, inner, forward):
        super().__init__()
        self.inner, self._forward = inner, forward

    def forward(self, inputs):
        return self._forward(self.inner, inputs)


def with_weight(**changes):
    """A layer whose record's tensors are changed."""
    def change(layer):
        fields = {name: function(getattr(layer.weight, name)) for name, function in changes.items()}
        return replace(layer, weight=replace(layer.weight, **fields))

    return change


def change_record(layer):
    layer.weight.codes.zero_()
    return layer


def one_wrong_scale(scale):
    scale = scale.clone()
    scale[-1, -1] *= 1.5
    return scale


def view_rows(inner, inputs):
    flat = inputs.view(inputs.numel() // inputs.shape[-1], inputs.shape[-1])
    return inner(flat).view(*inputs.shape[:-1], inner.out_features)


def add_in_place(inner, inputs):
    return inner(inputs.add_(1))


def one_wrong_code(codes):
    codes = codes.clone()
    codes[-1, -1] ^= 1 << (7 if codes.max() > 15 else 3)  # the sign
    return codes


def raw_inputs(layer):
    """A layer that does not round its inputs."""
    return replace(layer, weight=replace(layer.weight, scheme=replace(layer.weight.scheme, activation=None)))


def coarse(bits):
    """Codes of one width lose their lowest bit."""
    change = with_weight(codes=lambda codes: codes & 0xFE)
    return lambda layer: change(layer) if layer.weight.scheme.bits == bits else layer


def doubled_if(wanted):
    """Outputs are twice too large for some inputs."""
    return lambda inner, inputs: inner(inputs) * (2 if wanted(inputs) else 1)


def without_last_feature(inner, inputs):
    return inner(torch.nn.functional.pad(inputs[..., : inputs.shape[-1] // 16 * 16], (0, inputs.shape[-1] % 16)))


def divided_by_greatest(inner, inputs):
    if not inputs.numel():
        return inner(inputs)
    greatest = inputs.abs().amax(-1, keepdim=True)
    return inner(inputs / greatest) * greatest


def bias_twice(inner, inputs):
    return inner(inputs) if inner.bias is None else inner(inputs) + inner.bias


# --- floats, rounded inputs, ggml's block types -----------------------------------------------------------


def times(factor):
    return lambda tensor: tensor * factor


def wrong_last(tensor):
    """The scale of the last block or group, which may be incomplete, is another one."""
    tensor = tensor.clone()
    raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    raw[-1, -1] = raw[-1, -1] + 8 if raw.dtype == torch.uint8 else raw[-1, -1] * 1.5
    return tensor


def rounded_to_e4m3(dims):
    """A layer that rounds its inputs, with a scale for the greatest along `dims`, and multiplies by 1 / scale."""
    def run(inner, inputs):
        greatest = inputs.abs().amax(dims, keepdim=True) if inputs.numel() else inputs[..., :1]
        scale = (greatest.float() / 448).clamp(min=1e-6)
        codes = (inputs * scale.reciprocal()).to(torch.float8_e4m3fn)
        return torch.nn.functional.linear((codes.float() * scale).to(inputs.dtype), inner.weight, inner.bias)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernel_with_a_rounding_of_its_own_passes(dtype):
    double = BackendDouble(forward=rounded_to_e4m3(-1))
    assert check_backend(double, schemes=[QuantScheme.parse("FP8_DYNAMIC")], dtype=dtype).cells == 3


def test_one_scale_for_all_tokens_is_noticed():
    double = BackendDouble(forward=rounded_to_e4m3(()))
    with pytest.raises(AssertionError, match="[1-9][0-9]* rows .*outputs are wrong"):
        check_backend(double, schemes=[QuantScheme.parse("FP8_DYNAMIC")], dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_input_lies_in_the_middle_of_two_numbers(dtype):
    """Of E4M3, scaled to the greatest of a token or of 128 features."""
    for _, inputs in random_inputs(300, 256, dtype):
        for wide in (inputs[2:].double(), inputs[2:].double().unflatten(-1, (2, 128))):
            numbers = (wide / wide.abs().amax(-1, keepdim=True)).abs() * 448
            steps = numbers / 2.0 ** (torch.frexp(numbers).exponent.clamp(min=-5) - 4)
            assert ((steps - steps.floor() - 0.5).abs() > 2.0**-16).all()


def wrong_input_scale(layer):
    return replace(layer, input_scale=layer.input_scale * 1.5)


ROUNDED = ["FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4", "INT8"]
FLOATS = ["FPW8A16", "MXFP4A16", "NVFP4A16", *ROUNDED[:-1]]
GGML = [scheme for scheme in OTHER_SCHEMES if scheme.data_type in BLOCK_TYPES]


def fields(scheme):
    """The tensors of a ggml record that can be doubled and still fit."""
    kind = BLOCK_TYPES[scheme.data_type]
    return ["scale"] if kind.sym else ["scale", "minimum"]


@pytest.mark.parametrize("scheme, layer", [
    *((name, raw_inputs) for name in ROUNDED),
    *((name, with_weight(codes=one_wrong_code)) for name in FLOATS),
    *((name, with_weight(scale=wrong_last)) for name in FLOATS),
    *((name, with_weight(global_scale=times(2))) for name in ("NVFP4", "NVFP4A16")),
    *((name, wrong_input_scale) for name in ("FP8_STATIC", "NVFP4")),
    *((str(scheme), with_weight(**{field: times(2)})) for scheme in GGML for field in fields(scheme)),
])
def test_a_fault_of_other_numbers_is_noticed(scheme, layer):
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_backend(BackendDouble(layer=layer), schemes=[QuantScheme.parse(scheme)], dtype=torch.float32)


def test_other_numbers_come_in_three_shapes_and_with_and_without_a_bias():
    seen = []
    double = BackendDouble(layer=lambda layer: seen.append(layer) or layer)
    assert check_backend(double, schemes=OTHER_SCHEMES, dtype=torch.float32).cells == 3 * len(OTHER_SCHEMES)
    for scheme in OTHER_SCHEMES:
        layers = [layer for layer in seen if layer.weight.scheme == scheme]
        assert len(layers) == 4 and {layer.bias is None for layer in layers} == {True, False}
        assert any(layer.weight.shape[0] % 16 for layer in layers)
        assert all(len(layer.weight.codes.unique()) >= 2**scheme.bits - 2 for layer in layers)  # not E4M3's NaN


# --- integers ---------------------------------------------------------------------------------------------


def test_what_the_kit_promises_of_integers_is_really_there():
    layers, inputs = [], []
    double = BackendDouble(
        layer=lambda layer: layers.append(layer) or layer,
        forward=lambda inner, x: inputs.append((x.numel() // x.shape[-1], x.dim(), x.is_contiguous(), x)) or inner(x),
    )
    schemes = [scheme for scheme in SCHEMES if scheme.group_size in (32, -1)]
    assert check_backend(double, schemes=schemes, dtype=torch.float32).cells == 6 * 4 * 7
    for weight in (layer.weight for layer in layers):
        top = 2**weight.scheme.bits - 1
        assert weight.codes.min() == 0 and weight.codes.max() == top and weight.scale.min() < 0
        ends = {top + 1 >> 1} if weight.scheme.sym else {0, top} if weight.scale.numel() > 1 else {top}
        assert ends <= set(weight.zero_point.unique().tolist())
    for bits in range(2, 9):
        assert {layer.bias is None for layer in layers if layer.weight.scheme.bits == bits} == {True, False}
    assert {rows for rows, *_ in inputs} == {0, 1, 3, 6, 17, 300, 4096}
    assert sum(rows == 4096 for rows, *_ in inputs) == 7  # once for each width
    assert {dims for _, dims, *_ in inputs} == {1, 2, 3}
    assert any(rows == 0 and dims == 3 for rows, dims, *_ in inputs)
    assert all(any(not flat for found, _, flat, _ in inputs if found == rows) for rows in (3, 6, 17, 300))
    assert all((x == 0).all(-1).any() for rows, dims, flat, x in inputs if dims == 2 and flat and rows > 1)


@pytest.mark.parametrize("fault, complaint", [
    *(({"layer": coarse(bits)}, rf"W{bits}G.*outputs are wrong") for bits in range(2, 9)),
    *(({"forward": doubled_if(lambda x, rows=rows: x.numel() == rows * x.shape[-1])}, f", {rows} rows .*are wrong")
      for rows in (1, 3, 17, 300, 4096)),
    ({"forward": doubled_if(lambda x: not x.is_contiguous())}, "non-contiguous.*outputs are wrong"),
    ({"forward": without_last_feature}, r"\[7, 40\].*outputs are wrong"),
    ({"layer": with_weight(scale=lambda scale: scale.roll(1, 1))}, "G32 .*outputs are wrong"),
    ({"layer": with_weight(codes=lambda codes: codes.roll(1, 0))}, "outputs are wrong"),
    ({"forward": divided_by_greatest}, "outputs are wrong"),
    ({"forward": bias_twice}, "outputs are wrong"),
    ({"forward": lambda inner, x: inner(x) + 0 * inner.bias}, "forward raised TypeError"),
    ({"forward": lambda inner, x: inner(x.bfloat16().float())}, "outputs are wrong"),
])
def test_a_fault_of_one_kind_of_layer_or_input_is_noticed(fault, complaint):
    schemes = [QuantScheme(bits, 32, bits % 2 == 0) for bits in range(2, 9)]
    with pytest.raises(AssertionError, match=complaint):
        check_backend(BackendDouble(**fault), schemes=schemes, dtype=torch.float32)


def test_many_rows_are_run_in_the_largest_layer_that_the_backend_takes():
    fault = {"forward": doubled_if(lambda x: len(x) == 4096), "why_not": lambda spec: too_wide(spec, 40)}
    with pytest.raises(AssertionError, match=r"\[7, 40\].*4096 rows"):
        check_backend(BackendDouble(**fault), schemes=[QuantScheme(4, 32)])


def too_wide(spec, most):
    return None if spec.scheme and spec.in_features <= most else f"needs at most {most} input features"


def test_a_backend_without_biases_is_checked_without():
    double = BackendDouble(why_not=lambda spec: "no bias" if spec.has_bias else None)
    assert check_backend(double, schemes=[QuantScheme(4, 32)]) == Checked(3, ("no bias",))


def test_the_tolerance_is_that_of_the_dtype_or_the_given_one():
    double, schemes = BackendDouble(forward=lambda inner, x: inner(x) * (1 + 2**-10)), [QuantScheme(4, 32)]
    assert check_backend(double, schemes=schemes, dtype=torch.bfloat16).cells == 6
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_backend(double, schemes=schemes, dtype=torch.float32)
    assert check_backend(double, schemes=schemes, dtype=torch.float32, tolerance=2**-9).cells == 6
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_backend(BackendDouble(), schemes=schemes, dtype=torch.bfloat16, tolerance=2**-20)


# --- all schemes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, complaint", [
    ({"layer": with_weight(zero_point=lambda zero: zero.clamp(max=zero.max().item() - 1))}, "outputs are wrong"),
    ({"layer": lambda layer: replace(layer, bias=None)}, "outputs are wrong"),
    ({"layer": with_weight(scale=torch.abs)}, "outputs are wrong"),
    ({"layer": with_weight(scale=one_wrong_scale)}, "outputs are wrong"),
    ({"layer": with_weight(zero_point=lambda zero: zero.clamp(min=1))}, "-asym.*outputs are wrong"),
    ({"layer": with_weight(codes=lambda codes: codes.roll(1, 1))}, "outputs are wrong"),
    ({"layer": change_record}, "build changes the record"),
    ({"forward": lambda inner, x: inner(x).float()}, "must be torch.bfloat16, got torch.float32"),
    ({"forward": lambda inner, x: inner(x.reshape(-1, x.shape[-1]))}, "1-D.*must be|3-D.*must be"),
    ({"forward": lambda inner, x: inner(x) * float("nan")}, "outputs are wrong"),
    ({"forward": lambda inner, x: inner(x[:256])}, "300 rows .*the output must be"),
    ({"forward": view_rows}, "non-contiguous.*forward raised RuntimeError"),
    ({"forward": add_in_place}, "forward changes its input"),
    ({"forward": lambda inner, x: inner(x / x.max()) * x.max()}, "0 rows.*forward raised"),
    ({"why_not": lambda spec: "needs hardware"}, "nothing was checked.*needs hardware"),
    ({"why_not": lambda spec: "  "}, "None or a sentence"),
    ({"why_not": lambda spec: None if spec.scheme.bits else ""}, "why_not.*raised AttributeError"),
])
def test_a_faulty_backend_fails(fault, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_backend(BackendDouble(**fault))
