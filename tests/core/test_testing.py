"""The conformance kit passes what is right and, shown by doubles with one fault each, fails what is wrong.

The faulty backends are in test_testing_backends.py, the algorithms in test_testing_modules.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from autoround_backends.reference import Reference
from autoround_core import (
    AffineWeight,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    QuantScheme,
    TensorLayout,
    get_registry,
)
from autoround_core.testing import (
    OTHER_SCHEMES,
    SCHEMES,
    check_algorithm,
    check_backend,
    check_format,
    check_layout,
)
from autoround_export.auto_round import AutoRoundFormat
from autoround_export.awq_layout import AwqLayout
from autoround_export.dense import DenseFormat
from autoround_export.gptq_layout import GptqLayout

# --- what is ours passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, cells", [(GptqLayout(0), 200), (GptqLayout(1), 100), (AwqLayout(), 40)])
def test_own_layouts_pass(layout, cells):
    assert check_layout(layout).cells >= cells


def test_a_layout_is_checked_with_the_given_schemes_only():
    checked = check_layout(GptqLayout(0), schemes=[QuantScheme(4, 32)])
    assert checked.cells == 4
    assert set(checked.refusals) == {
        *(f"in_features must be divisible by 32, got {size}" for size in (100, 33, 40)),
        *(f"out_features must be divisible by 32, got {size}" for size in (16, 8)),
    }


# a GGUF file holds a whole model with its tokenizer, not the few layers of the kit: tests/export/gguf/test_format.py
OWN_FORMATS = sorted(get_registry().formats().keys() - {"gguf"})
VARIANTS = ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel"]


@pytest.mark.parametrize("name", [*OWN_FORMATS, *VARIANTS])
def test_registered_formats_pass(name, tmp_path):
    assert check_format(get_registry().format(name), tmp_path).cells > 1


@pytest.mark.parametrize("name", sorted(get_registry().backends()))
def test_registered_backends_pass(name):
    backend = get_registry().backends()[name]
    device = next((kind for kind in ("cpu", "cuda", "xpu", "hpu") if kind in backend.support.devices), "cpu")
    checked = check_backend(backend, device=device)
    if not checked.cells:
        assert device != "cpu" or backend.missing()
        pytest.skip(f"{name}: {checked.refusals[0]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_passes_in_other_dtypes(dtype):
    assert check_backend(Reference(), dtype=dtype).cells == 6 * len(SCHEMES) + 3 * len(OTHER_SCHEMES)


@pytest.mark.parametrize("name", sorted(get_registry().algorithms()))
def test_registered_algorithms_pass(name):
    assert check_algorithm(get_registry().algorithm(name)).cells == 5


def test_an_absent_device_is_no_failure_and_no_success():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    checked = check_backend(Reference(), device="cuda")
    assert checked.cells == 0
    assert "device `cuda` is not here" in checked.refusals[0]


def test_the_kit_needs_no_test_runner():
    code = "import sys, autoround_core.testing; sys.exit(bool({'pytest', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- layouts with a fault ----------------------------------------------------------------------------------


class LayoutDouble(TensorLayout):
    """A GPTQ layout whose steps are passed through the given functions."""

    name = "double"

    def __init__(self, why_not=None, pack=None, unpack=None, names=("qweight", "qzeros", "scales")):
        self.tensor_names = names
        self._inner = GptqLayout(0)
        self._why_not, self._pack, self._unpack = why_not, pack, unpack

    def why_not(self, spec):
        return self._why_not(spec) if self._why_not else self._inner.why_not(spec)

    def pack(self, weight):
        tensors = self._inner.pack(weight)
        return self._pack(weight, tensors) if self._pack else tensors

    def unpack(self, tensors, scheme, shape=None):
        weight = self._inner.unpack(tensors, scheme, shape)
        return self._unpack(weight, shape) if self._unpack else weight


def lose_signs(weight, tensors):
    return {**tensors, "scales": tensors["scales"].abs()}


def transpose_scales(weight, tensors):
    return {**tensors, "scales": tensors["scales"].T}


def change_input(weight, tensors):
    weight.scale.mul_(2)
    return tensors


def random_zeros(weight, tensors):
    return {**tensors, "qzeros": torch.randint_like(tensors["qzeros"], 9)}


def off_by_one(weight, shape):
    return replace(weight, zero_point=weight.zero_point + 1)


def guess_wrong(weight, shape):
    return weight if shape else AffineWeight(
        weight.scheme, weight.codes.flip(0).contiguous(), weight.scale, weight.zero_point
    )


def fail(*arguments):
    raise RuntimeError("on purpose")


def raise_refusal(spec):
    raise KeyError(spec.name)


@pytest.mark.parametrize("fault, complaint", [
    ({"pack": lose_signs}, "`scale` differs after pack and unpack"),
    ({"pack": change_input}, "pack changes the record"),
    ({"pack": random_zeros}, "other tensors the second time"),
    ({"pack": fail}, "pack raised RuntimeError: on purpose"),
    ({"pack": transpose_scales}, "`scales` is not contiguous"),
    ({"unpack": off_by_one}, "`zero_point` differs"),
    ({"unpack": guess_wrong}, "`codes` differs"),
    ({"unpack": fail}, "unpack raised RuntimeError"),
    ({"names": ("qweight", "scales")}, r"tensor_names says \['qweight', 'scales'\]"),
    ({"why_not": lambda spec: "never"}, "nothing was checked, because every case was refused: never"),
    ({"why_not": lambda spec: None}, "raised"),
    ({"why_not": lambda spec: ""}, "None or a sentence, got ''"),
    ({"why_not": lambda spec: (False, "too wide")}, "None or a sentence"),
    ({"why_not": raise_refusal}, "why_not.* raised KeyError"),
])
def test_a_faulty_layout_fails(fault, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_layout(LayoutDouble(**fault))


def test_nothing_to_check_fails():
    with pytest.raises(AssertionError, match=r"nothing was checked.*none was given"):
        check_layout(GptqLayout(0), schemes=[])


# --- formats with a fault ----------------------------------------------------------------------------------


class FormatDouble(CheckpointFormat):
    """A format around another one, whose steps are passed through the given functions."""

    def __init__(self, inner=None, why_not=None, recognizes=None, add=None, keep=None, read=None):
        self._inner = inner or AutoRoundFormat()
        self.name, self.stores_records = "double", self._inner.stores_records
        self._why_not, self._recognizes, self._read = why_not, recognizes, read
        self._add, self._keep = add, keep

    def why_not(self, spec):
        return self._why_not(spec) if self._why_not else self._inner.why_not(spec)

    def open(self, directory, context):
        return WriterDouble(self._inner.open(directory, context), self._add, self._keep)

    def recognizes(self, directory):
        return self._recognizes(directory) if self._recognizes else self._inner.recognizes(directory)

    def read(self, directory):
        return self._read(self._inner, directory) if self._read else self._inner.read(directory)


class WriterDouble(CheckpointWriter):
    def __init__(self, inner, add, keep):
        self._inner, self._add, self._keep = inner, add, keep

    def add(self, layer):
        layer = self._add(layer) if self._add else layer
        if layer is not None:
            self._inner.add(layer)

    def keep(self, name, tensor):
        self._inner.keep(name, self._keep(tensor) if self._keep else tensor)

    def finish(self):
        self._inner.finish()


class Once(CheckpointReader):
    """A reader that can be asked once: its iterators are used up."""

    def __init__(self, inner, directory):
        reader = inner.read(directory)
        self.config, self._layers, self._rest = reader.config, reader.layers(), reader.rest()

    def layers(self):
        return self._layers

    def rest(self):
        return self._rest


def read_json_only(inner, directory):
    (directory / "config.json").read_text()
    return inner.read(directory)


def lose_sign(weight):
    return replace(weight, scale=weight.scale.abs())


def change_record(layer):
    layer.weight.codes.zero_()
    return layer


@pytest.mark.parametrize("fault, complaint", [
    ({"add": lambda layer: None if "down" in layer.name else layer}, "the layers .* were written"),
    ({"add": lambda layer: replace(layer, bias=None)}, "the bias of .*o_proj` differs"),
    ({"add": change_record}, "the writer changes the record"),
    ({"add": fail}, "writing raised RuntimeError: on purpose"),
    ({"add": lambda layer: replace(layer, weight=lose_sign(layer.weight))}, "the record of .* differs"),
    ({"keep": lambda tensor: tensor.float()}, "tensor `model.embed_tokens.weight` differs"),
    ({"recognizes": lambda directory: True}, "recognizes an empty directory"),
    ({"recognizes": lambda folder: (folder / "config.json").is_file()}, "recognizes a checkpoint with an"),
    ({"recognizes": lambda directory: False}, "does not recognize what it wrote"),
    ({"recognizes": lambda folder: not (folder / "config.json").stat()}, "raised FileNotFoundError"),
    ({"read": Once}, "are read"),
    ({"read": read_json_only}, "empty directory must raise CheckpointError, got FileNotFoundError"),
    ({"why_not": lambda spec: "never"}, "nothing was checked"),
    ({"inner": DenseFormat(), "add": change_record}, "the writer changes the record"),
    ({"inner": DenseFormat(), "keep": lambda tensor: tensor * 2}, "differs"),
])
def test_a_faulty_format_fails(fault, complaint, tmp_path):
    with pytest.raises(AssertionError, match=complaint):
        check_format(FormatDouble(**fault), tmp_path)


def test_a_format_of_records_must_not_take_a_plain_model(tmp_path):
    def ours_or_plain(directory):
        return AutoRoundFormat().recognizes(directory) or DenseFormat().recognizes(directory)

    with pytest.raises(AssertionError, match="recognizes a model that is not quantized"):
        check_format(FormatDouble(recognizes=ours_or_plain), tmp_path)


def test_the_doubles_themselves_are_sound(tmp_path):
    assert check_layout(LayoutDouble()) == check_layout(GptqLayout(0))
    assert check_format(FormatDouble(), tmp_path).cells > 50
