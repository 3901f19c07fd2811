"""Does a backend compute x @ W.T + bias, as exactly as its dtype allows, for every layer that it accepts?

The yardstick is computed here in float64 from the record's integers. An output element may be off by a few
roundings of each product that went into it: |error| <= tolerance * (|x| @ |W|.T + |bias|). That bound is
tight enough to catch one wrong scale, and holds for any order of summation.

Integers of every width come in all shapes; floats, layers that round their inputs and ggml's block types in three. What
a layer that rounds its inputs makes of them is asked of the number family, as tuning does. The inputs are chosen so
that none lies just between two numbers, where a kernel that multiplies by 1 / scale may round the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from autoround_core.backend import Backend
from autoround_core.recipe import LinearSpec
from autoround_core.records import QuantizedLayer
from autoround_core.registry import get_registry
from autoround_core.scheme import BLOCK_TYPES, QuantScheme
from autoround_core.testing.cases import (
    MANY_ROWS,
    OTHER_SCHEMES,
    SCHEMES,
    Checked,
    ask,
    conclude,
    doing,
    exact,
    one_thread,
    random_inputs,
    random_layer,
    require,
    spec_of,
)

SHAPES = ((16, 128), (48, 256), (64, 384), (33, 96), (7, 40), (1, 32))
# of the others: many groups in a row; whole blocks of 128 rows; blocks and groups that are cut off at both edges
OTHER_SHAPES = ((64, 512), (128, 256), (150, 208))
ROWS = (0, 1, 3, 17, 300)
# with all threads
FEW_AND_MANY, FEW = (1, 17, MANY_ROWS), (1, 300)
# four roundings: of the weight, of a scale or zero point, of a partial sum, of the output
TOLERANCE = {
    torch.float64: 2.0**-16, torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7,
}


@dataclass(frozen=True, slots=True)
class _Case:
    """A layer to be made. shape: (out, in)."""

    scheme: QuantScheme
    shape: tuple[int, int]
    bias: bool
    seed: int


def check_backend(
    backend: Backend, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
    schemes: Sequence[QuantScheme] | None = None, tolerance: float | None = None,
) -> Checked:
    """Build and run every layer that the backend accepts on `device`, with zero to 300 rows of input.

    Of each width, and of each scheme that is not of plain integers, the largest layer is run again with all threads,
    with a bias if it had none and without if it had one; of each width and number family one with 4096 rows.

    schemes: None = integers of 2 to 8 bits, and every named scheme whose number family is installed. tolerance: of an
    output element; None = four roundings of `dtype`. On a machine without the device, or without what the backend
    needs, nothing is built, and the result has 0 cells and the reason first; why_not is asked all the same. So it is
    for a device other than the CPU that is here, when `support` would take layers and why_not_layer takes none. A
    backend for layers that are not quantized is given such.
    """
    device = torch.device(device)
    require(bool(backend.name), f"{type(backend).__name__} has no name")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    _check_answers(backend)
    absent = _absent(device) or backend.missing()
    if backend.support.dense:
        return _check_dense(backend, device, dtype, tolerance, absent)
    cases = list(_cases(schemes))
    accepted, refusals = _accepted(backend, cases, device, dtype)
    if absent:
        return Checked(0, (absent, *sorted(refusals - {absent})))
    if not accepted and device.type != "cpu" and _within_support(backend, cases, device, dtype):
        return Checked(0, tuple(sorted(refusals)))
    for case in accepted:
        with one_thread():
            _check_layer(backend, case, device, dtype, tolerance, ROWS)
    widths: set[tuple[str, int]] = set()
    for case in _largest(accepted):
        turned, more = _accepted(backend, [replace(case, bias=not case.bias)], device, dtype)
        width = (case.scheme.data_type, case.scheme.bits)
        rows = FEW if width in widths else FEW_AND_MANY
        _check_layer(backend, [*turned, case][0], device, dtype, tolerance, rows, "all threads")
        refusals, widths = refusals | more, widths | {width}
    return conclude(f"backend `{backend.name}`", len(accepted), refusals)


def _cases(schemes: Sequence[QuantScheme] | None) -> Iterator[_Case]:
    """Schemes of a number family that is not installed are left out."""
    families, seed = get_registry().number_families(), 0
    for scheme in (*SCHEMES, *OTHER_SCHEMES) if schemes is None else schemes:
        if scheme.data_type not in families:
            continue
        for shape in SHAPES if _plain(scheme) else OTHER_SHAPES:
            if scheme.data_type in BLOCK_TYPES:
                shape = (shape[0], -(-shape[1] // 256) * 256)
            yield _Case(scheme, shape, (seed // 12 + shape[0]) % 2 == 0, seed)
            seed += 1


def _plain(scheme: QuantScheme) -> bool:
    return scheme.data_type == "int" and scheme.activation is None


def _largest(cases: Sequence[_Case]) -> Iterable[_Case]:
    """The largest of each width, and of each scheme that is not of plain integers."""
    found: dict[int | QuantScheme, _Case] = {}
    for case in cases:
        kind = case.scheme.bits if _plain(case.scheme) else case.scheme
        if kind not in found or case.shape[0] * case.shape[1] > found[kind].shape[0] * found[kind].shape[1]:
            found[kind] = case
    return found.values()


def _accepted(
    backend: Backend, cases: Sequence[_Case], device: torch.device, dtype: torch.dtype
) -> tuple[list[_Case], set[str]]:
    """The cases that the backend takes, and why it does not take the others."""
    accepted, refusals = [], set()
    for case in cases:
        spec = spec_of(case.scheme, case.shape, bias=case.bias)
        reason = ask(_words(backend, case, device, dtype), backend.why_not, spec, device, dtype)
        if reason is None:
            accepted.append(case)
        else:
            refusals.add(reason)
    return accepted, refusals


def _within_support(
    backend: Backend, cases: Sequence[_Case], device: torch.device, dtype: torch.dtype
) -> bool:
    specs = (spec_of(case.scheme, case.shape, bias=case.bias) for case in cases)
    return any(backend.support.why_not(spec, device, dtype) is None for spec in specs)


def _words(backend: Backend, case: _Case, device: torch.device, dtype: torch.dtype) -> str:
    out_features, in_features = case.shape
    return f"backend `{backend.name}`, {case.scheme} [{out_features}, {in_features}] on {device} in {dtype}"


def _check_layer(
    backend: Backend, case: _Case, device: torch.device, dtype: torch.dtype, tolerance: float,
    rows: tuple[int, ...], how: str = "",
) -> None:
    what = _words(backend, case, device, dtype)
    layer = random_layer(case.scheme, case.shape, torch.Generator().manual_seed(case.seed), bias=case.bias)
    module = _build(backend, layer, device, dtype, what)
    _check_module(module, _truth(layer, dtype), device, dtype, tolerance, rows, f"{what}, {how}" if how else what)


def _check_dense(
    backend: Backend, device: torch.device, dtype: torch.dtype, tolerance: float, absent: str | None,
) -> Checked:
    cells, refusals = 0, set()
    for index, ((out_features, in_features), has_bias) in enumerate(product(SHAPES, (True, False))):
        what = f"backend `{backend.name}`, a dense layer [{out_features}, {in_features}] on {device} in {dtype}"
        spec = LinearSpec("layer", in_features, out_features, None, has_bias)
        reason = ask(what, backend.why_not, spec, device, dtype)
        if reason is not None or absent:
            refusals |= {reason} if reason else set()
            continue
        linear = torch.nn.utils.skip_init(torch.nn.Linear, in_features, out_features, bias=has_bias, dtype=dtype)
        generator = torch.Generator().manual_seed(index)
        for parameter in linear.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) / in_features**0.5).to(dtype)
        bias = linear.bias.detach().double() if has_bias else None
        truth = _Truth(linear.weight.detach().double(), bias, lambda inputs: inputs)
        linear = linear.to(device)
        with doing(f"{what}: build"):
            module = backend.build(linear, device, dtype)
        with one_thread():
            _check_module(module, truth, device, dtype, tolerance, ROWS, what)
        if not cells % 4:
            _check_module(module, truth, device, dtype, tolerance, (MANY_ROWS,), f"{what}, all threads")
        cells += 1
    if absent:
        return Checked(0, (absent, *sorted(refusals - {absent})))
    return conclude(f"backend `{backend.name}`", cells, refusals)


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
        for kind, inputs in random_inputs(rows, truth.matrix.shape[1], dtype):
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
