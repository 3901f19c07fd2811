"""The conformance kit skips backends whose device is not here, and fails algorithms with a fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoround_core import Algorithm, Backend, BlockResult, QuantScheme, Support
from autoround_core.rtn import RoundToNearest
from autoround_core.testing import SCHEMES, check_algorithm, check_backend

# --- backends that cannot run here -------------------------------------------------------------------------


class Needy(Backend):
    """Wants a device, a package, a capability."""

    name = "needy"

    def __init__(self, device, package=None, reason=None):
        packages = (package,) if package else ()
        self.support = Support(devices=(device,), data_types=(), activations=True, packages=packages, install="x[y]")
        self._reason = reason

    def why_not_layer(self, spec, device, dtype):
        return self._reason

    def build(self, layer, device, dtype):
        raise RuntimeError("built all the same")


@pytest.mark.parametrize("backend, device, reason", [
    (Needy("hpu"), "hpu", "device `hpu` is not here"),
    (Needy("cpu", "no_such_package"), "cpu", "no_such_package not installed; pip install x[y]"),
    (Needy("meta", reason="needs compute capability 10.0, got 9.0"), "meta", "needs compute capability 10.0, got 9.0"),
])
def test_what_is_not_here_is_skipped_with_the_reason_first(backend, device, reason):
    checked = check_backend(backend, device=device, schemes=SCHEMES[:2])
    assert checked.cells == 0 and checked.refusals[0].startswith(reason)


def test_a_refusal_of_everything_is_no_absence():
    with pytest.raises(AssertionError, match="nothing was checked"):  # its support says no
        check_backend(Needy("cuda"), device="meta", schemes=SCHEMES[:2])
    with pytest.raises(AssertionError, match="nothing was checked"):  # the CPU is always here
        check_backend(Needy("cpu", reason="needs luck"), schemes=SCHEMES[:2])


# --- algorithms with a fault -------------------------------------------------------------------------------


def test_the_double_itself_is_sound():
    assert check_algorithm(AlgorithmDouble()).cells == 5


def fail(*arguments):
    raise RuntimeError("on purpose")


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
