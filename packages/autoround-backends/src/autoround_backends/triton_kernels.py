"""Triton kernels for the layout of `triton_int`: y = x @ w.T + bias with w never in memory, and w itself.

A row of weights is cut into planes of `width` neighbours. Word w of a row holds weight w of every plane, so plane
j of a tile of words is the weights j * width + w: consecutive, as are the inputs they meet. A kernel loads each
word once, takes its planes one after the other, and nothing is ever shuffled. The order in which the products of
a row are added is of no importance, which is what makes this possible.

Codes become floats without a conversion: 2**23 + code is the bits of 2**23 with the code in its last places, and
subtracting 2**23 + zero_point is exact. A weight is computed and summed in float32.

`few` (a decode step) reads weights as fast as memory gives them: each program owns some output features and all
of their words. `many` multiplies tiles with `tl.dot`; where there are too few tiles to fill a device, programs
share the words of a tile, and their sums are added afterwards, always in the same order.

Compiled once for each in_features, bits and group size; the fastest configuration is found at the first call for
each shape. TRITON_CACHE_AUTOTUNING=1 makes Triton remember it on disk. `enable_fp_fusion` allows a multiplication and
an addition to be one instruction; Triton's default changes with its version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from autoround_backends.triton_int import interpreted

if TYPE_CHECKING:
    from autoround_backends.triton_int import PackedWeight

FEW_ROWS = 4
_TILE_ROWS = (16, 32, 64)
_PROGRAMS = 256  # fewer than this leave a large GPU idle
_MOST_SPLITS = 8
_INTERPRETED = interpreted()


def _configs(choices: tuple[tuple[int, int, int, int], ...]) -> list[triton.Config]:
    """From (BLOCK_N, BLOCK_W, num_warps, num_stages); the interpreter has no clock to choose by and gets one."""
    if _INTERPRETED:
        choices = ((64, 32, 1, 1),)
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_W": w}, num_warps=warps, num_stages=stages)
        for n, w, warps, stages in choices
    ]


def _prune(configs: list[triton.Config], arguments: dict, **constants: int) -> list[triton.Config]:
    """Configurations whose tiles lie in one group; if there are none, those with the smallest tiles."""
    group, width, inputs = (constants[name] for name in ("GROUP", "WIDTH", "IN"))
    whole = [c for c in configs if group >= inputs or not (group % c.kwargs["BLOCK_W"] or width % c.kwargs["BLOCK_W"])]
    smallest = min(c.kwargs["BLOCK_W"] for c in configs)
    return whole or [c for c in configs if c.kwargs["BLOCK_W"] == smallest]


_KEY = ["out_features", "IN", "GROUP", "BITS", "TILE_ROWS"]


@triton.jit
def _load_words(words, n, w, inside, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """int32 words of output features n at columns w: one of each column, with 3 bits three, in the order of `pack`."""
    if BITS == 3:
        at = words + n * (3 * WIDTH) + w
        low = tl.load(at, mask=inside, other=0)
        middle = tl.load(at + WIDTH, mask=inside, other=0)
        high = tl.load(at + 2 * WIDTH, mask=inside, other=0)
    else:
        low = tl.load(words + n * WIDTH + w, mask=inside, other=0)
        middle = low
        high = low
    return low, middle, high


@triton.jit
def _weights(
    low, middle, high, scale, zero, n, w, first, j, half: tl.constexpr, out_features,
    IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """float32 weights of plane j; n and w are of a shape that broadcasts to the tile, first is the least of w.

    half: 1 for planes whose low bits are in `middle`.
    """
    if BITS == 3:
        part = middle if half else low
        code = ((part >> (2 * j - 32 * half)) & 3) | (((high >> j) & 1) << 2)
    else:
        code = (low >> (BITS * j)) & ((1 << BITS) - 1)
    value = (code | 0x4B000000).to(tl.float32, bitcast=True)
    groups: tl.constexpr = (IN + GROUP - 1) // GROUP
    if groups == 1:
        at = n
    elif GROUP % BLOCK_W == 0 and WIDTH % BLOCK_W == 0:  # the whole tile has one group
        at = n + tl.minimum((j * WIDTH + first) // GROUP, groups - 1) * out_features
    else:
        # columns after the last weight meet inputs that are zero; they only need some finite scale
        at = n + tl.minimum((j * WIDTH + w) // GROUP, groups - 1) * out_features
    present = n < out_features
    if zero is None:
        value -= 8388608.0 + (1 << (BITS - 1))
    else:
        value -= tl.load(zero + at, mask=present, other=0).to(tl.float32) + 8388608.0
    return value * tl.load(scale + at, mask=present, other=0).to(tl.float32)


@triton.autotune(
    configs=_configs((
        (4, 128, 4, 1), (8, 128, 4, 1), (4, 128, 2, 1), (8, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1),
        (16, 16, 4, 1),
    )),
    key=_KEY,
    prune_configs_by={"early_config_prune": _prune},
)  # fmt: skip
@triton.jit(do_not_specialize=["rows"])
def few_kernel(
    x, words, scale, zero, bias, y, rows, out_features,
    IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    STEPS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Up to TILE_ROWS rows. The sum over columns stays spread over threads until the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, TILE_ROWS)
    sums = tl.zeros((TILE_ROWS, BLOCK_N, BLOCK_W), dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)[None, :]
        tile = (n[:, None] < out_features) & (w < WIDTH)
        low, middle, high = _load_words(words, n[:, None], w, tile, WIDTH, BITS)
        at = x + m[:, None] * IN + w
        inside = (m[:, None] < rows) & (w < WIDTH)
        for step in range(STEPS):
            for i in tl.static_range(PLANES // STEPS):
                j = i * STEPS + step
                weights = _weights(
                    low, middle, high, scale, zero, n[:, None], w, first, j, i * STEPS // 16, out_features,
                    IN, GROUP, WIDTH, BITS, BLOCK_W,
                )  # fmt: skip
                inputs = tl.load(at + j * WIDTH, mask=inside & (w < IN - j * WIDTH), other=0).to(tl.float32)
                sums += inputs[:, None, :] * weights[None, :, :]
    total = tl.sum(sums, axis=2)
    if bias is not None:
        total += tl.load(bias + n, mask=n < out_features, other=0).to(tl.float32)[None, :]
    at = m[:, None] * out_features + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < out_features))


@triton.autotune(
    configs=_configs((
        (64, 32, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 3), (64, 32, 4, 1), (64, 16, 4, 2),
        (64, 16, 4, 1),  # what is staged once fits into the shared memory of any device
    )),
    key=_KEY,
    prune_configs_by={"early_config_prune": _prune},
)  # fmt: skip
@triton.jit(do_not_specialize=["rows"])
def many_kernel(
    x, words, scale, zero, bias, y, rows, out_features,
    IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    STEPS: tl.constexpr, TILE_ROWS: tl.constexpr, SPLITS: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of y [SPLITS, rows, out]; split s takes every SPLITS-th tile of words. TYPE is what is multiplied."""
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    program, split = tl.program_id(0), tl.program_id(1)
    # neighbours share words, not inputs: there are more of them
    m = (program % row_tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    n = (program // row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
    for first in range(split * BLOCK_W, WIDTH, SPLITS * BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        tile = (n < out_features) & (w[:, None] < WIDTH)
        low, middle, high = _load_words(words, n, w[:, None], tile, WIDTH, BITS)
        at = x + m * IN + w[None, :]
        inside = (m < rows) & (w[None, :] < WIDTH)
        for step in range(STEPS):
            for i in tl.static_range(PLANES // STEPS):
                j = i * STEPS + step
                weights = _weights(
                    low, middle, high, scale, zero, n, w[:, None], first, j, i * STEPS // 16, out_features,
                    IN, GROUP, WIDTH, BITS, BLOCK_W,
                )  # fmt: skip
                inputs = tl.load(at + j * WIDTH, mask=inside & (w[None, :] < IN - j * WIDTH), other=0)
                sums = tl.dot(inputs.to(TYPE), weights.to(TYPE), sums)
    if bias is not None:
        if split == 0:
            sums += tl.load(bias + n, mask=n < out_features, other=0).to(tl.float32)
    at = (split * rows + m) * out_features + n
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(m < rows) & (n < out_features))


@triton.jit
def dense_kernel(
    words, scale, zero, dense, out_features,
    IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dense [out, IN], rounded once to its dtype."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    first = tl.program_id(1) * BLOCK_W
    w = first + tl.arange(0, BLOCK_W)[None, :]
    inside = (n < out_features) & (w < WIDTH)
    low, middle, high = _load_words(words, n, w, inside, WIDTH, BITS)
    at = dense + n.to(tl.int64) * IN + w  # a dense matrix may have more than 2**31 elements
    for step in range(STEPS):
        for i in tl.static_range(PLANES // STEPS):
            j = i * STEPS + step
            weights = _weights(
                low, middle, high, scale, zero, n, w, first, j, i * STEPS // 16, out_features,
                IN, GROUP, WIDTH, BITS, BLOCK_W,
            )  # fmt: skip
            tl.store(at + j * WIDTH, weights.to(dense.dtype.element_ty), mask=inside & (w < IN - j * WIDTH))


def few(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in], contiguous, 1 to FEW_ROWS rows -> [rows, out] of its dtype."""
    rows, out_features = len(x), weight.out_features
    y = x.new_empty(rows, out_features)
    few_kernel[lambda meta: (triton.cdiv(out_features, meta["BLOCK_N"]),)](
        x, weight.words, weight.scale, weight.zero_point, bias, y, rows, out_features,
        **weight.constants(), TILE_ROWS=triton.next_power_of_2(rows), enable_fp_fusion=True,
    )  # fmt: skip
    return y


def many(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in], contiguous, at least one row, float16 or bfloat16 -> [rows, out] of its dtype."""
    rows, out_features = len(x), weight.out_features
    tile_rows = next((size for size in _TILE_ROWS if rows <= size), _TILE_ROWS[-1])
    row_tiles = triton.cdiv(rows, tile_rows)
    splits = _splits(row_tiles * triton.cdiv(out_features, 64), triton.cdiv(weight.words.shape[-1], 32))
    y = x.new_empty(splits, rows, out_features, dtype=x.dtype if splits == 1 else torch.float32)
    many_kernel[lambda meta: (row_tiles * triton.cdiv(out_features, meta["BLOCK_N"]), splits)](
        x, weight.words, weight.scale, weight.zero_point, bias, y, rows, out_features,
        **weight.constants(), TILE_ROWS=tile_rows, SPLITS=splits, TYPE=_multiplied(x.dtype),
        enable_fp_fusion=True,
    )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def _splits(tiles: int, steps: int) -> int:
    """Programs that share a tile of the output whose columns are `steps` tiles of words."""
    splits = 1
    while tiles * splits < _PROGRAMS and splits * 2 <= min(steps, _MOST_SPLITS):
        splits *= 2
    return splits


def _multiplied(dtype: torch.dtype) -> tl.dtype:
    """The type in Triton. numpy has no bfloat16, so that the interpreter multiplies float32 in its place."""
    if dtype == torch.bfloat16:
        return tl.float32 if _INTERPRETED else tl.bfloat16
    return tl.float16


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
    out_features = weight.out_features
    dense = torch.empty(out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    tall, wide = (64, 128) if _INTERPRETED else (8, 64)
    if not _INTERPRETED and weight.group < weight.in_features and weight.group % wide:
        tall, wide = 16, 32
    grid = (triton.cdiv(out_features, tall), triton.cdiv(weight.words.shape[-1], wide))
    dense_kernel[grid](
        weight.words, weight.scale, weight.zero_point, dense, out_features, **weight.constants(),
        BLOCK_N=tall, BLOCK_W=wide, enable_fp_fusion=True,
    )  # fmt: skip
    return dense
