"""The conformance kit fails backends and algorithms with a fault; see test_testing.py for what it passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoround_backends.reference import Reference
from autoround_core import Algorithm, Backend, BlockResult, QuantScheme
from autoround_core.rtn import RoundToNearest
from autoround_core.testing import SCHEMES, check_algorithm, check_backend


def test_the_doubles_themselves_are_sound():
    assert check_backend(BackendDouble(), schemes=SCHEMES[:9]).cells == 6 * 9
    assert check_algorithm(AlgorithmDouble()).cells == 5


def fail(*arguments):
    raise RuntimeError("on purpose")


def change_record(layer):
    layer.weight.codes.zero_()
    return layer


# --- backends with a fault ---------------------------------------------------------------------------------


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
    codes[-1, -1] ^= 0x80
    return codes


def raw_inputs(layer):
    """A layer that does not round its inputs."""
    return replace(layer, weight=replace(layer.weight, scheme=replace(layer.weight.scheme, activation=None)))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4", "INT8"])
def test_inputs_that_are_not_rounded_are_noticed(scheme):
    schemes = [QuantScheme.parse(scheme)]
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_backend(BackendDouble(layer=raw_inputs), schemes=schemes, dtype=torch.float32)
    assert check_backend(BackendDouble(), schemes=schemes, dtype=torch.float32).cells == 1


@pytest.mark.parametrize("scheme", ["FPW8A16", "FP8_BLOCK"])
def test_a_wrong_float_is_noticed(scheme):
    double, schemes = BackendDouble(layer=with_weight(codes=one_wrong_code)), [QuantScheme.parse(scheme)]
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_backend(double, schemes=schemes, dtype=torch.float32)


@pytest.mark.parametrize("fault, complaint", [
    ({"layer": with_weight(zero_point=lambda zero: zero.clamp(max=zero.max().item() - 1))}, "outputs are wrong"),
    ({"forward": lambda inner, x: inner(x[:4000])}, "4096 rows .*the output must be"),
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


# --- algorithms with a fault -------------------------------------------------------------------------------


class AlgorithmDouble(Algorithm):
    """Round to nearest, whose block and result are passed through the given functions."""

    name = "double"

    def __init__(self, needs_data=True, block=None, weight=None, result=None):
        self.needs_data = needs_data
        self._block, self._weight, self._result = block, weight, result

    def quantize_block(self, block, run):
        if self._block:
            self._block(block)
        result = RoundToNearest().quantize_block(block, run)
        if self._weight:
            result = BlockResult({name: self._weight(weight) for name, weight in result.weights.items()})
        return self._result(result) if self._result else result


def flip_at_random(codes):
    return codes ^ torch.randint_like(codes, 2)


def with_tensors(**changes):
    def change(weight):
        fields = {name: function(getattr(weight, name)) for name, function in changes.items()}
        return replace(weight, **fields)

    return change


def one_more(result):
    return BlockResult({**result.weights, "more": result.weights["up"]})


def only_up(result):
    return BlockResult({"up": result.weights["up"]})


@pytest.mark.parametrize("fault, complaint", [
    ({"result": only_up}, r"lacks the layers \['down'\]"),
    ({"result": one_more}, r"holds the layers \['more'\]"),
    ({"weight": with_tensors(codes=flip_at_random)}, "two runs with one seed"),
    ({"weight": with_tensors(codes=lambda codes: codes + 240)}, "codes must be from 0 to 15"),
    ({"weight": with_tensors(codes=lambda codes: codes ^ 1)}, "the output error is"),
    ({"weight": with_tensors(scale=lambda scale: scale * 0)}, "a scale is zero"),
    ({"weight": with_tensors(scale=lambda scale: scale * float("inf"))}, "not finite"),
    ({"weight": with_tensors(zero_point=lambda zero: zero - 1)}, "symmetric zero_point must be 8"),
    ({"weight": lambda weight: replace(weight, scheme=QuantScheme(8, 32))}, "has the scheme W8G32"),
    ({"weight": lambda weight: weight.dequantize(torch.float32)}, "a Tensor is no QuantizedWeight"),
    ({"block": lambda block: block.weights["up"].zero_()}, "the original weight `up` is changed"),
    ({"block": fail}, "quantize_block raised RuntimeError: on purpose"),
    ({"needs_data": False, "block": lambda block: block.target(torch.arange(1))}, "needs_data = False, but"),
    ({"needs_data": False, "block": lambda block: block.input_mean_square()}, "needs_data = False, but"),
])
def test_a_faulty_algorithm_fails(fault, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_algorithm(AlgorithmDouble(**fault))
