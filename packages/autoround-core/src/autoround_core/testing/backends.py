"""Does a backend compute x @ W.T + bias, as exactly as its dtype allows, for every layer that it accepts?

The yardstick is computed here in float64 from the record's integers. An output element may be off by a few
roundings of each product that went into it: |error| <= tolerance * (|x| @ |W|.T + |bias|). That bound is
tight enough to catch one wrong scale, and holds for any order of summation.
"""

from __future__ import annotations

import torch

from autoround_core.backend import Backend
from autoround_core.recipe import LinearSpec
from autoround_core.records import AffineWeight, QuantizedLayer
from autoround_core.scheme import QuantScheme
from autoround_core.testing.cases import (
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
ROWS = (0, 1, 3, 17, 300)
# four roundings: of the weight, of a scale or zero point, of a partial sum, of the output
TOLERANCE = {
    torch.float64: 2.0**-16, torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7,
}


def check_backend(
    backend: Backend, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
    tolerance: float | None = None,
) -> Checked:
    """Build and run every layer that the backend accepts on `device`, with zero to 300 rows of input.

    tolerance: of an output element; None = four roundings of `dtype`. On a machine without the device nothing
    is built and the result has 0 cells; why_not is asked all the same.
    """
    device = torch.device(device)
    require(bool(backend.name), f"{type(backend).__name__} has no name")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    _check_answers(backend)
    absent = _absent(device)
    cells, refusals = 0, {absent} if absent else set()
    threaded: set[int] = set()  # bits for which a layer was run with all threads
    for index, scheme in enumerate(SCHEMES):
        for shape in SHAPES:
            bias = (index // 2 + shape[0]) % 2 == 0
            what = f"backend `{backend.name}`, {scheme} [{shape[0]}, {shape[1]}] on {device} in {dtype}"
            reason = ask(what, backend.why_not, spec_of(scheme, shape, bias=bias), device, dtype)
            if reason is not None or absent:
                refusals |= {reason} if reason else set()
                continue
            layer = random_layer(scheme, shape, torch.Generator().manual_seed(index), bias=bias)
            module = _build(backend, layer, device, dtype, what)
            with one_thread():
                _check_module(module, layer, device, dtype, tolerance, what)
            if shape == LARGEST and scheme.bits not in threaded:
                threaded.add(scheme.bits)
                _check_module(module, layer, device, dtype, tolerance, f"{what}, all threads")
            cells += 1
    if absent:
        return Checked(0, tuple(sorted(refusals)))
    return conclude(f"backend `{backend.name}`", cells, refusals)


def _absent(device: torch.device) -> str | None:
    """Why this machine cannot use the device, None if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
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


def _check_module(
    module: torch.nn.Module, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype, tolerance: float,
    what: str,
) -> None:
    for rows in ROWS:
        for kind, inputs in _inputs(rows, layer.weight.shape[1], dtype):
            _check_forward(module, layer, inputs.to(device), tolerance, f"{what}, {rows} rows ({kind})")


def _check_forward(
    module: torch.nn.Module, layer: QuantizedLayer, inputs: torch.Tensor, tolerance: float, case: str,
) -> None:
    device, dtype, weight = inputs.device, inputs.dtype, layer.weight
    assert isinstance(weight, AffineWeight)
    copy = inputs.clone()
    with doing(f"{case}: forward"), torch.no_grad():
        output = module(inputs)
    require(torch.equal(inputs, copy), f"{case}: forward changes its input")
    shape = (*inputs.shape[:-1], weight.shape[0])
    require(tuple(output.shape) == shape, f"{case}: the output must be {shape}, got {tuple(output.shape)}")
    require(output.dtype == dtype, f"{case}: the output must be {dtype}, got {output.dtype}")
    require(output.device.type == device.type, f"{case}: the output must be on {device}, got {output.device}")
    matrix, x = exact(weight), inputs.cpu().double()
    expected, bound = x @ matrix.T, x.abs() @ matrix.abs().T
    if layer.bias is not None:
        bias = layer.bias.to(dtype).double()
        expected, bound = expected + bias, bound + bias.abs()
    # written so that NaN fails
    wrong = ~((output.cpu().double() - expected).abs() <= tolerance * bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{case}: {int(wrong.sum())} of {wrong.numel()} outputs are wrong; at {list(at)} "
            f"{float(expected[at]):.6g} is right, got {float(output[at]):.6g}"
        )


def exact(weight: AffineWeight) -> torch.Tensor:
    """scale * (code - zero_point), float64 [out, in]: a second copy of the formula, to judge the first by."""
    length = weight.scheme.group_length(weight.shape[1])
    scale, zero_point = (tensor.double().repeat_interleave(length, dim=1)[:, : weight.shape[1]]
                         for tensor in (weight.scale, weight.zero_point))
    return scale * (weight.codes.double() - zero_point)
