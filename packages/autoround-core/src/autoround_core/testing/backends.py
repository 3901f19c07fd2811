"""Does a backend compute x @ W.T + bias, as exactly as its dtype allows, for every layer that it accepts?

The yardstick is computed here in float64 from the record's integers. An output element may be off by a few
roundings of each product that went into it: |error| <= tolerance * (|x| @ |W|.T + |bias|). That bound is
tight enough to catch one wrong scale, and holds for any order of summation.

Integers of every width come in all shapes; floats, layers that round their inputs and ggml's block types in one. What
a layer that rounds its inputs makes of them is asked of the number family, as tuning does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from autoround_core.backend import Backend
from autoround_core.recipe import LinearSpec
from autoround_core.records import AffineWeight, FloatWeight, QuantizedLayer, QuantizedWeight
from autoround_core.registry import get_registry
from autoround_core.scheme import QuantScheme
from autoround_core.testing.cases import (
    OTHER_SCHEMES,
    SCHEMES,
    Checked,
    ask,
    conclude,
    doing,
    one_thread,
    random_layer,
    require,
    spec_of,
)

LARGEST = (64, 384)
SHAPES = ((16, 128), (48, 256), LARGEST, (33, 96), (7, 40), (1, 32))
BLOCKS = (64, 512)  # of schemes with blocks of up to 256 weights in a row, and of 128 rows
ROWS = (0, 1, 3, 17, 300)
MANY_ROWS = 4096
# four roundings: of the weight, of a scale or zero point, of a partial sum, of the output
TOLERANCE = {
    torch.float64: 2.0**-16, torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7,
}


def check_backend(
    backend: Backend, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
    schemes: Sequence[QuantScheme] | None = None, tolerance: float | None = None,
) -> Checked:
    """Build and run every layer that the backend accepts on `device`, with zero to 300 rows of input; of each width
    one with 4096 rows.

    schemes: None = integers of 2 to 8 bits, and every named scheme whose number family is installed. tolerance: of an
    output element; None = four roundings of `dtype`. On a machine without the device, or without what the backend
    needs, nothing is built and the result has 0 cells; why_not is asked all the same. A backend for layers that are
    not quantized is given such.
    """
    device = torch.device(device)
    require(bool(backend.name), f"{type(backend).__name__} has no name")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    _check_answers(backend)
    absent = _absent(device) or backend.missing()
    if backend.support.dense:
        return _check_dense(backend, device, dtype, tolerance, absent)
    cells, refusals = 0, {absent} if absent else set()
    threaded: set[tuple[str, int]] = set()  # kinds of which a layer was run with all threads and many rows
    for index, (scheme, shape) in enumerate(_cases(schemes)):
        bias = (index // 12 + shape[0]) % 2 == 0
        what = f"backend `{backend.name}`, {scheme} [{shape[0]}, {shape[1]}] on {device} in {dtype}"
        reason = ask(what, backend.why_not, spec_of(scheme, shape, bias=bias), device, dtype)
        if reason is not None or absent:
            refusals |= {reason} if reason else set()
            continue
        layer = random_layer(scheme, shape, torch.Generator().manual_seed(index), bias=bias)
        module, truth = _build(backend, layer, device, dtype, what), _truth(layer, dtype)
        with one_thread():
            _check_module(module, truth, device, dtype, tolerance, ROWS, what)
        kind = (scheme.data_type, scheme.bits)
        if shape in (LARGEST, BLOCKS) and kind not in threaded:
            threaded.add(kind)
            _check_module(module, truth, device, dtype, tolerance, (*ROWS, MANY_ROWS), f"{what}, all threads")
        cells += 1
    if absent:
        return Checked(0, tuple(sorted(refusals)))
    return conclude(f"backend `{backend.name}`", cells, refusals)


def _check_dense(
    backend: Backend, device: torch.device, dtype: torch.dtype, tolerance: float, absent: str | None,
) -> Checked:
    cells, refusals = 0, {absent} if absent else set()
    for index, (out_features, in_features) in enumerate(SHAPES):
        what = f"backend `{backend.name}`, a dense layer [{out_features}, {in_features}] on {device} in {dtype}"
        spec = LinearSpec("layer", in_features, out_features, None, index % 2 == 0)
        reason = ask(what, backend.why_not, spec, device, dtype)
        if reason is not None or absent:
            refusals |= {reason} if reason else set()
            continue
        linear = torch.nn.Linear(in_features, out_features, bias=index % 2 == 0, dtype=dtype).to(device)
        bias = None if linear.bias is None else linear.bias.detach().cpu().double()
        truth = _Truth(linear.weight.detach().cpu().double(), bias, lambda inputs: inputs)
        with doing(f"{what}: build_dense"):
            module = backend.build_dense(linear)
        with one_thread():
            _check_module(module, truth, device, dtype, tolerance, ROWS, what)
        cells += 1
    return Checked(0, tuple(sorted(refusals))) if absent else conclude(f"backend `{backend.name}`", cells, refusals)


def _cases(schemes: Sequence[QuantScheme] | None) -> Iterator[tuple[QuantScheme, tuple[int, int]]]:
    """(scheme, shape) of each layer. Schemes of a number family that is not installed are left out."""
    families = get_registry().number_families()
    for scheme in (*SCHEMES, *OTHER_SCHEMES) if schemes is None else schemes:
        if scheme.data_type in families:
            plain = scheme.data_type == "int" and scheme.activation is None
            yield from ((scheme, shape) for shape in (SHAPES if plain else (BLOCKS,)))


def _absent(device: torch.device) -> str | None:
    """Why this machine cannot use the device, None if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        return f"device `{device}` is not here: {str(error).splitlines()[0]}"
    return None


def _check_answers(backend: Backend) -> None:
    """why_not answers any question, also one about a device, a dtype or a number family of somebody else."""
    foreign = QuantScheme(data_type="unheard_of")
    for scheme in (QuantScheme(), QuantScheme(3, 48, False), QuantScheme(8, -1), foreign, None):
        for shape in ((1, 1), (7, 13), (4096, 4096), (151936, 128)):
            spec = LinearSpec("layer", shape[1], shape[0], scheme)
            for device in ("cpu", "cuda", "cuda:1", "xpu", "hpu", "meta"):
                for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                    ask(f"backend `{backend.name}`", backend.why_not, spec, torch.device(device), dtype)


def _inputs(rows: int, in_features: int, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    plain = torch.randn(rows, in_features, generator=generator).to(dtype)
    strided = torch.randn(in_features, rows, generator=generator).to(dtype).T
    cases = [("contiguous", plain), ("non-contiguous", strided)]
    if rows == 3:
        cases += [("3-D", plain[None].repeat(2, 1, 1)), ("1-D", plain[0])]
        cases.append(("3-D, non-contiguous", strided.expand(2, rows, in_features)))
    return cases


def _build(
    backend: Backend, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype, what: str,
) -> torch.nn.Module:
    before = layer.weight.digest()
    with doing(f"{what}: build"):
        module = backend.build(layer, device, dtype)
    require(layer.weight.digest() == before, f"{what}: build changes the record it is given")
    kind = type(module).__name__
    require(isinstance(module, torch.nn.Module), f"{what}: build gives a {kind}, not a module")
    return module


@dataclass(frozen=True, slots=True)
class _Truth:
    """matrix: float64 [out, in]. bias: float64 [out]. entering: what becomes of inputs before they are multiplied."""

    matrix: torch.Tensor
    bias: torch.Tensor | None
    entering: Callable[[torch.Tensor], torch.Tensor]


def _truth(layer: QuantizedLayer, dtype: torch.dtype) -> _Truth:
    bias = None if layer.bias is None else layer.bias.to(dtype).double()
    return _Truth(exact(layer.weight), bias, lambda inputs: _entering(layer, inputs))


def _check_module(
    module: torch.nn.Module, truth: _Truth, device: torch.device, dtype: torch.dtype, tolerance: float,
    row_counts: tuple[int, ...], what: str,
) -> None:
    for rows in row_counts:
        for kind, inputs in _inputs(rows, truth.matrix.shape[1], dtype):
            _check_forward(module, truth, inputs.to(device), tolerance, f"{what}, {rows} rows ({kind})")


def _check_forward(
    module: torch.nn.Module, truth: _Truth, inputs: torch.Tensor, tolerance: float, case: str,
) -> None:
    device, dtype = inputs.device, inputs.dtype
    copy = inputs.clone()
    with doing(f"{case}: forward"), torch.no_grad():
        output = module(inputs)
    require(torch.equal(inputs, copy), f"{case}: forward changes its input")
    shape = (*inputs.shape[:-1], truth.matrix.shape[0])
    require(tuple(output.shape) == shape, f"{case}: the output must be {shape}, got {tuple(output.shape)}")
    require(output.dtype == dtype, f"{case}: the output must be {dtype}, got {output.dtype}")
    require(output.device.type == device.type, f"{case}: the output must be on {device}, got {output.device}")
    x = truth.entering(inputs.cpu()).double()
    expected, bound = x @ truth.matrix.T, x.abs() @ truth.matrix.abs().T
    if truth.bias is not None:
        expected, bound = expected + truth.bias, bound + truth.bias.abs()
    # written so that NaN fails
    wrong = ~((output.cpu().double() - expected).abs() <= tolerance * bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {wrong.numel()} outputs are wrong; at {list(at)} "
            f"{float(expected[at]):.6g} is right, got {float(output[at]):.6g}"
        )


def _entering(layer: QuantizedLayer, inputs: torch.Tensor) -> torch.Tensor:
    """What is multiplied: the inputs, rounded where the layer's scheme says so."""
    scheme = layer.weight.scheme
    if scheme.activation is None:
        return inputs
    family = get_registry().number_family(scheme.data_type)
    return family.quantize_activation(inputs, scheme.activation, layer.input_scale)


def exact(weight: QuantizedWeight) -> torch.Tensor:
    """The weight in float64 [out, in], by second copies of the formulas, to judge the first by.

    ggml's block types are the exception: their own dequantization is compared with ggml's elsewhere.
    """
    if isinstance(weight, FloatWeight):
        return _exact_float(weight)
    if not isinstance(weight, AffineWeight):
        return weight.dequantize(torch.float32).double()
    length = weight.scheme.group_length(weight.shape[1])
    scale, zero_point = (tensor.double().repeat_interleave(length, dim=1)[:, : weight.shape[1]]
                         for tensor in (weight.scale, weight.zero_point))
    return scale * (weight.codes.double() - zero_point)


def _exact_float(weight: FloatWeight) -> torch.Tensor:
    """sign * mantissa * 2**exponent, times the scale of its block."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if weight.scheme.bits == 8 else (2, 1, 1)
    codes = weight.codes.long()
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (codes & (1 << mantissa_bits) - 1).double() / 2**mantissa_bits
    number = torch.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    number = torch.where(codes >> (exponent_bits + mantissa_bits) == 1, -number, number)
    scale = weight.scale.double()
    if weight.scheme.data_type == "mx_fp":
        scale = 2.0 ** (scale - 127)
    if weight.global_scale is not None:
        scale = scale / weight.global_scale.double()
    rows, columns = weight.shape
    tall = rows if weight.scheme.group_rows == -1 else weight.scheme.group_rows
    scale = scale.repeat_interleave(tall, 0)[:rows]
    return number * scale.repeat_interleave(weight.scheme.group_length(columns), 1)[:, :columns]
