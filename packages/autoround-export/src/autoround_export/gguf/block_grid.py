"""The scales of a block: one float16 number times a small integer for each group, and the same for the minima.

Rounding the fitted scales of the groups loses some of what they gained. It is won back here, which ggml does not do:
the float16 scales are fitted again to the codes, by least squares, and every group tries the integers next to its own,
its minimum refitted, by the error that is left. A change stays only where it lowers the error of its block, and all
errors are those of the numbers that will be stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from autoround_export.gguf.group_fit import TINY, Columns, fit_asymmetric, fit_symmetric, signed_scales, solve

_REFINEMENTS = 3
_REFINEMENTS_OF_SIX_BITS = 1  # steps so fine leave little to win
_NEIGHBOURS = (0, -1, 1)
_STRETCH = [i / 10 for i in range(-4, 5)]
# greatest sub-scale by (bits, symmetric); symmetric ones run from -top - 1
_SUB_TOP = {(2, False): 15, (4, False): 63, (5, False): 63, (3, True): 31, (6, True): 127}


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """float32: scale, minimum [blocks], as float16 holds them; sub_scale, sub_minimum [groups], whole numbers.

    error: weighted squared error of each block. minimum is None for symmetric types; the sub-scales are None where
    a block is one group.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None
    sub_scale: torch.Tensor | None
    sub_minimum: torch.Tensor | None
    error: torch.Tensor

    def stored(self, rows: int) -> tuple[torch.Tensor | None, ...]:
        """(scale, minimum, sub_scale, sub_minimum) as a SuperBlockWeight holds them, [rows, ...]."""
        dtypes = (torch.float16, torch.float16, torch.int8, torch.uint8)
        parts = (self.scale, self.minimum, self.sub_scale, self.sub_minimum)
        return tuple(None if part is None else part.to(dtype).view(rows, -1)
                     for part, dtype in zip(parts, dtypes, strict=True))


def block_grid(columns: Columns) -> Grid:
    """The grid of all blocks in `columns`."""
    if columns.per_block == 1:
        return _one_level(columns)
    grid = _rounded(columns)
    for _ in range(_REFINEMENTS_OF_SIX_BITS if columns.kind.bits == 6 else _REFINEMENTS):
        grid = _better(grid, _refined(grid, columns), columns)
    return grid


def _half(values: torch.Tensor) -> torch.Tensor:
    """As float16 will store it, in float32."""
    return values.to(torch.float16).to(torch.float32)


def _one_level(columns: Columns) -> Grid:
    """A block is one group, its scale and minimum float16: rounded, then fitted again to the codes that this gives."""

    def measured(step: torch.Tensor, shift: torch.Tensor) -> Grid:
        step, shift = _half(step), _half(shift)
        return Grid(step, shift, None, None, columns.error(columns.codes(step, shift), step, shift))

    grid = measured(*fit_asymmetric(columns))
    for _ in range(_REFINEMENTS):
        codes = columns.codes(grid.scale, grid.minimum)
        grid = _better(grid, measured(*solve(columns, *columns.sums(codes))), columns)
    return grid


def _better(old: Grid, new: Grid, columns: Columns) -> Grid:
    """Block by block the one of less error."""
    # an infinite error is an overflow, which must stay seen
    better = (new.error < old.error) & torch.isfinite(old.error)
    of_groups = columns.spread(better)
    return replace(
        old,
        scale=torch.where(better, new.scale, old.scale),
        minimum=None if old.minimum is None else torch.where(better, new.minimum, old.minimum),
        sub_scale=None if old.sub_scale is None else torch.where(of_groups, new.sub_scale, old.sub_scale),
        sub_minimum=None if old.sub_minimum is None else torch.where(of_groups, new.sub_minimum, old.sub_minimum),
        error=torch.where(better, new.error, old.error),
    )


def _sub_range(columns: Columns) -> tuple[int, int]:
    top = _SUB_TOP[columns.kind.bits, columns.kind.sym]
    return (-top - 1, top) if columns.kind.sym else (0, top)


def _rounded(columns: Columns) -> Grid:
    """The fitted scales of the groups, rounded to what a block can hold."""
    low, top = _sub_range(columns)
    weights = columns.by_block(columns.sum_w).T.contiguous()

    def rounded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = columns.by_block(values).T.contiguous()
        outer = _half(signed_scales(blocks, weights, low, top) if low else _positive_scales(blocks, weights, top))
        return outer, _whole(values, columns.spread(outer), low, top)

    if columns.kind.sym:
        scale, sub_scale = rounded(fit_symmetric(columns))
        return _measured(scale, None, sub_scale, None, columns)
    step, shift = fit_asymmetric(columns)
    (scale, sub_scale), (minimum, sub_minimum) = rounded(step), rounded(shift)
    return _measured(scale, minimum, sub_scale, sub_minimum, columns)


def _whole(values: torch.Tensor, outer: torch.Tensor, low: int, top: int) -> torch.Tensor:
    """The whole numbers l of least |outer * l - value|."""
    return torch.where(outer == 0, 0.0, values / outer).round_().clamp_(low, top)


def _positive_scales(x: torch.Tensor, w: torch.Tensor, top: int) -> torch.Tensor:
    """The scales s [blocks] of least sum w (s l - x)^2 for x >= 0 [groups of a block, blocks], 0 <= l <= top."""
    greatest = x.amax(0)
    best, scale = torch.full_like(greatest, torch.inf), greatest / top
    for stretch in _STRETCH:
        codes = (x * ((top + stretch) / greatest.clamp(min=TINY))).round_().clamp_(0, top)
        weighted = codes * w
        fitted = (weighted * x).sum(0) / (weighted * codes).sum(0).clamp(min=TINY)
        error = (codes * fitted - x).square_().mul_(w).sum(0)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, fitted, scale)
    return scale


def _measured(scale, minimum, sub_scale, sub_minimum, columns: Columns) -> Grid:
    step, shift = _step(scale, sub_scale, columns), _step(minimum, sub_minimum, columns)
    error = columns.error(columns.codes(step, shift), step, shift)
    return Grid(scale, minimum, sub_scale, sub_minimum, columns.by_block(error).sum(1))


def _step(outer: torch.Tensor | None, inner: torch.Tensor | None, columns: Columns) -> torch.Tensor | None:
    return None if outer is None else columns.spread(outer) * inner


def _refined(grid: Grid, columns: Columns) -> Grid:
    scale, minimum = _outer_again(grid, columns)
    sub_scale, sub_minimum, error = _inner_again(scale, minimum, grid.sub_scale, grid.sub_minimum, columns)
    return Grid(scale, minimum, sub_scale, sub_minimum, columns.by_block(error).sum(1))


def _outer_again(grid: Grid, columns: Columns) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float16 scales d, e of least sum w (d u - e v - x)^2 where u = sub_scale * code and v = sub_minimum."""
    step = _step(grid.scale, grid.sub_scale, columns)
    sum_l, sum_ll, sum_lx = columns.sums(columns.codes(step, _step(grid.minimum, grid.sub_minimum, columns)))
    sub = grid.sub_scale
    uu, ux = (columns.by_block(part).sum(1) for part in (sub * sub * sum_ll, sub * sum_lx))
    alone = torch.where(uu > 0, ux / uu.clamp(min=TINY), grid.scale)
    if grid.minimum is None:
        return _half(alone), None
    least = grid.sub_minimum
    uv, vv, vx = (columns.by_block(part).sum(1) for part in (
        sub * least * sum_l, least * least * columns.sum_w, least * columns.sum_x))
    determinant = uu * vv - uv * uv
    sound = determinant > 1e-6 * uu * vv
    inverse = torch.where(sound, 1.0 / determinant, 0.0)
    scale, minimum = (ux * vv - uv * vx) * inverse, (uv * ux - uu * vx) * inverse
    sound &= (scale > 0) & (minimum >= 0)
    return (_half(torch.where(sound, scale, grid.scale)), _half(torch.where(sound, minimum, grid.minimum)))


def _inner_again(scale, minimum, sub_scale, sub_minimum, columns: Columns):
    """(sub_scale, sub_minimum, error) [groups]: of the neighbours of each group's integers those of least error."""
    low, top = _sub_range(columns)
    outer = columns.spread(scale)
    outer_minimum = None if minimum is None else columns.spread(minimum)
    best = None
    for neighbour in _NEIGHBOURS:
        candidate = (sub_scale + neighbour).clamp_(low, top)
        step, least = outer * candidate, sub_minimum
        codes = columns.codes(step, None if minimum is None else outer_minimum * least)
        if minimum is not None:
            sum_l = (codes * columns.w).sum(0)
            wanted = (step * sum_l - columns.sum_x) / columns.sum_w.clamp(min=TINY)
            least = _whole(wanted, outer_minimum, low, top)
            codes = columns.codes(step, outer_minimum * least, out=codes)
        error = columns.error(codes, step, None if minimum is None else outer_minimum * least)
        if best is None:
            best = (candidate, least, error)
            continue
        better = error < best[2]
        best = (
            torch.where(better, candidate, best[0]),
            None if minimum is None else torch.where(better, least, best[1]),
            torch.where(better, error, best[2]),
        )
    return best
