"""What the checks share: schemes, random records, and how a failure is worded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoround_core.recipe import LinearSpec
from autoround_core.records import AffineWeight, FloatWeight, QuantizedLayer, QuantizedWeight
from autoround_core.registry import get_registry
from autoround_core.scheme import BLOCK_TYPES, GGUF_TYPES, MAX_BITS, MIN_BITS, PRESETS, QuantScheme

_REASONS = 4  # refusals shown in an error
MANY_ROWS = 4096
_APART = 128  # of outliers in a row of inputs
SCHEMES: tuple[QuantScheme, ...] = tuple(
    QuantScheme(bits, group_size, sym)
    for bits in range(MIN_BITS, MAX_BITS + 1)
    for group_size in (32, 64, 128, -1)
    for sym in (True, False)
)
# floats, inputs that are rounded, and ggml's block types
OTHER_SCHEMES: tuple[QuantScheme, ...] = (
    *PRESETS.values(), *(scheme for scheme in GGUF_TYPES.values() if scheme.data_type in BLOCK_TYPES)
)


@dataclass(frozen=True, slots=True)
class Checked:
    """cells: cases that were run and passed. refusals: the different reasons why others were not run."""

    cells: int
    refusals: tuple[str, ...] = ()


def require(condition: bool, sentence: str) -> None:
    """Raise AssertionError with the sentence unless the condition holds; unlike `assert`, also under -O."""
    if not condition:
        raise AssertionError(sentence)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is the plugin's failure at `what`."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny matrices are not worth sharing: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ask(what: str, why_not: Callable[..., Any], *question: Any) -> str | None:
    """The answer of a `why_not`, which must be None or a sentence and must not be an exception."""
    with doing(f"{what}: why_not{question}"):
        reason = why_not(*question)
    require(reason is None or (isinstance(reason, str) and bool(reason.strip())),
            f"{what}: why_not{question} must be None or a sentence, got {reason!r}")
    return reason


def conclude(what: str, cells: int, refusals: set[str]) -> Checked:
    """The result of a check. Raises AssertionError when there was nothing to check."""
    reasons = tuple(sorted(refusals))
    few = "; ".join(reasons[:_REASONS]) or "none was given"
    more = f"; and {len(reasons) - _REASONS} more reasons" if len(reasons) > _REASONS else ""
    require(cells > 0, f"{what}: nothing was checked, because every case was refused: {few}{more}")
    return Checked(cells, reasons)


def spec_of(scheme: QuantScheme, shape: tuple[int, int], *, bias: bool = False) -> LinearSpec:
    """The question about a layer of `shape` (out, in)."""
    return LinearSpec("layer", in_features=shape[1], out_features=shape[0], scheme=scheme, has_bias=bias)


def random_weight(
    scheme: QuantScheme, shape: tuple[int, int], generator: torch.Generator, *, extreme: bool = False,
) -> AffineWeight:
    """A record [out, in] with codes and zero points from end to end, and scales of either sign.

    Scales are such that a row has a norm near 1. extreme: the smallest and the largest float16 are there.
    """
    out_features, in_features = shape
    top = 2**scheme.bits - 1
    grid = (out_features, scheme.groups(in_features))
    codes = torch.randint(0, top + 1, shape, generator=generator)
    codes.view(-1)[0], codes.view(-1)[-1] = top, 0
    zero_point = torch.full(grid, 2 ** (scheme.bits - 1))
    if not scheme.sym:
        zero_point = torch.randint(0, top + 1, grid, generator=generator)
        zero_point.view(-1)[0], zero_point.view(-1)[-1] = 0, top
    scale = 0.5 + torch.rand(grid, generator=generator)
    scale *= torch.randint(0, 2, grid, generator=generator) * 2 - 1
    scale.view(-1)[0] = -scale.view(-1)[0].abs()
    scale /= 2**scheme.bits * in_features**0.5
    if extreme:
        scale.view(-1)[0], scale.view(-1)[-1] = 2.0**-24, -65504.0
    return AffineWeight(scheme, codes.to(torch.uint8), scale.to(torch.float16), zero_point.to(torch.uint8))


def random_layer(
    scheme: QuantScheme, shape: tuple[int, int], generator: torch.Generator, *, name: str = "layer",
    bias: bool = False,
) -> QuantizedLayer:
    """A layer with a random weight of any kind, its bias [out] in bfloat16."""
    input_scale = None
    if scheme.data_type == "int":
        weight: QuantizedWeight = random_weight(scheme, shape, generator)
    elif scheme.data_type in BLOCK_TYPES:
        values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weight = get_registry().number_family(scheme.data_type).round_to_nearest(values, scheme)
    else:
        weight = random_float_weight(scheme, shape, generator)
    if scheme.activation and scheme.activation.calibrated:
        # inputs of the checks are normal, about 4 is the greatest; those that are greater are clipped by everybody
        input_scale = torch.tensor([448 * 6 / 4.0 if scheme.data_type == "nv_fp" else 4.0 / 448])
    values = torch.randn(shape[0], generator=generator).to(torch.bfloat16) if bias else None
    return QuantizedLayer(name, weight, values, input_scale)


def random_float_weight(scheme: QuantScheme, shape: tuple[int, int], generator: torch.Generator) -> FloatWeight:
    """A record [out, in] with any finite code of either sign. Rows have a norm near 1."""
    out_features, in_features = shape
    grid = (scheme.row_groups(out_features), scheme.groups(in_features))
    codes = torch.randint(0, 2**scheme.bits, shape, generator=generator).to(torch.uint8)
    greatest = 6.0
    if scheme.bits == 8:
        codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)  # not NaN
        greatest = 448.0
    size = (0.5 + torch.rand(grid, generator=generator)) / (greatest * in_features**0.5)
    if scheme.data_type == "mx_fp":
        return FloatWeight(scheme, codes, (torch.log2(size).round() + 127).to(torch.uint8))
    if scheme.data_type == "nv_fp":
        factor = torch.tensor([64.0])
        return FloatWeight(scheme, codes, (size * factor).to(torch.float8_e4m3fn), factor)
    return FloatWeight(scheme, codes, size)


def random_inputs(rows: int, in_features: int, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Inputs [..., rows, in] of layers, with and without strides, and what to call them. Many come in one way only."""
    generator = torch.Generator().manual_seed(rows)
    plain = _with_outliers(torch.randn(rows, in_features, generator=generator).to(dtype))
    plain[1:2] = 0  # a token of zeros, as padding is: nothing to scale by
    if rows == MANY_ROWS:
        return [("contiguous", plain)]
    strided = _with_outliers(torch.randn(in_features, rows, generator=generator).to(dtype).T)
    cases = [("contiguous", plain), ("non-contiguous", strided)]
    if rows == 0:
        cases.append(("3-D", plain.expand(2, 0, in_features)))
    if rows == 3:
        cases += [("3-D", plain[None].repeat(2, 1, 1)), ("1-D", plain[0])]
        cases.append(("3-D, non-contiguous", strided.expand(2, rows, in_features)))
    return cases


def _with_outliers(inputs: torch.Tensor) -> torch.Tensor:
    """`inputs` [rows, in], whose greatest of each 128 become three numbers by turns, from 9 to 16.

    The mantissa of each is a prime. So no other input, divided by it and multiplied by 448, is in the middle of two
    numbers of E4M3, where a kernel that multiplies by 1 / scale may round the other way.
    """
    mantissas = torch.tensor((251, 193, 149) if inputs.dtype == torch.bfloat16 else (2039, 1583, 1193))
    rows, blocks = torch.arange(len(inputs)).view(-1, 1), torch.arange(-(-inputs.shape[1] // _APART))
    greatest = 16 * mantissas[(rows + blocks) % 3] / (256 if inputs.dtype == torch.bfloat16 else 2048)
    inputs[:, ::_APART] = greatest.to(inputs.dtype).copysign(inputs[:, ::_APART])
    return inputs


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


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
