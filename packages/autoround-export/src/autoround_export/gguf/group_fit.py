"""The scale, and minimum, of every group by itself: weighted least squares over candidate codes.

For the weights x of a group, with error weights w and codes l = clamp(round((x + m) / s)):

    asymmetric   start from ranges shrunk and stretched; for the codes l of each, the s and m of least
                 sum w (s l - m - x)^2, m >= 0, in closed form; keep the best                (ggml: make_qkx3)
    symmetric    the same with one unknown: keep the greatest (sum w l x)^2 / sum w l^2       (ggml: make_qx)

Groups are columns: sums over a group become sums of long rows, and the temporaries of some thousand groups stay in the
processor's cache.
"""

from __future__ import annotations

import torch

from autoround_core.scheme import BlockType

# of the range's steps; of asymmetric ones ggml tries twice as many, and the refinement finds what lies between
_SHRINKAGE = [i / 10 for i in range(-9, 10)]
# symmetric; the unstretched first, for of scales that float32 cannot tell apart the first that is tried wins
_STRETCH = sorted((i / 10 for i in range(-9, 10)), key=abs)
TINY = 1e-30


class Columns:
    """Weights x and error weights w of some groups, [group_size, groups], and the sums that every fit needs."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor, kind: BlockType) -> None:
        self.x, self.w, self.kind = x, w, kind
        self.wx = w * x
        self.sum_w, self.sum_x = w.sum(0), self.wx.sum(0)
        # asymmetric codes run from 0 to top, symmetric ones from -top to top - 1
        self.low, self.top = (-(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1) if kind.sym else (0, 2**kind.bits - 1)
        self.per_block = kind.block // kind.group_size

    def codes(self, step: torch.Tensor, shift: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Codes for steps and shifts [groups], relative to zero."""
        inverse = torch.where(step == 0, 0.0, 1.0 / step)
        if shift is None:
            codes = torch.mul(self.x, inverse, out=out)
        else:
            codes = torch.add(self.x, shift, out=out).mul_(inverse)
        return codes.round_().clamp_(self.low, self.top)

    def error(self, codes: torch.Tensor, step: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Weighted squared error of each group, [groups]."""
        left = codes * step
        left -= self.x
        if shift is not None:
            left -= shift
        return left.square_().mul_(self.w).sum(0)

    def sums(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum w l, sum w l^2, sum w l x) of each group, for codes l; what a least squares fit needs of them."""
        weighted = codes * self.w
        sum_l = weighted.sum(0)
        sum_ll = weighted.mul_(codes).sum(0)
        return sum_l, sum_ll, torch.mul(codes, self.wx, out=weighted).sum(0)

    def by_block(self, groups: torch.Tensor) -> torch.Tensor:
        """[groups] to [blocks, groups of a block]."""
        return groups.view(-1, self.per_block)

    def spread(self, blocks: torch.Tensor) -> torch.Tensor:
        """[blocks] to [groups]."""
        return blocks.repeat_interleave(self.per_block)


def fit_asymmetric(columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """(step, shift >= 0) [groups] of least error; a group of equal weights has step 0."""
    x, w, top = columns.x, columns.w, columns.top
    low = x.amin(0).clamp_(max=0)
    width = (x.amax(0) - low).clamp_(min=0)
    step, shift = width / top, -low
    codes = columns.codes(step, shift)
    # errors in closed form leave out the constant sum w x^2
    best = columns.error(codes, step, shift) - columns.wx.mul(x).sum(0)
    weighted = torch.empty_like(codes)
    for shrinkage in _SHRINKAGE:
        # as in ggml, from the best minimum so far
        reach = (width + low + shift).clamp_(min=TINY)
        codes = columns.codes(reach / (top + shrinkage), shift, out=codes)
        torch.mul(codes, w, out=weighted)
        sum_l = weighted.sum(0)
        sum_ll, sum_lx = (weighted.mul_(codes)).sum(0), codes.mul_(columns.wx).sum(0)
        new_step, new_shift = solve(columns, sum_l, sum_ll, sum_lx)
        error = new_step * (new_step * sum_ll - 2 * new_shift * sum_l - 2 * sum_lx)
        error += new_shift * (new_shift * columns.sum_w + 2 * columns.sum_x)
        better = (error < best) & (new_step > 0)
        best = torch.where(better, error, best)
        step, shift = torch.where(better, new_step, step), torch.where(better, new_shift, shift)
    return step, shift


def solve(columns: Columns, sum_l, sum_ll, sum_lx) -> tuple[torch.Tensor, torch.Tensor]:
    """The (step, shift >= 0) of least error for codes with these sums."""
    determinant = columns.sum_w * sum_ll - sum_l * sum_l
    sound = determinant > 0
    inverse = torch.where(sound, 1.0 / determinant, 0.0)
    step = (columns.sum_w * sum_lx - columns.sum_x * sum_l) * inverse
    shift = -(sum_ll * columns.sum_x - sum_l * sum_lx) * inverse
    clipped = shift < 0
    step = torch.where(clipped, sum_lx / sum_ll.clamp(min=TINY), step)
    return step, shift.clamp_(min=0)


def fit_symmetric(columns: Columns) -> torch.Tensor:
    """step [groups], of either sign: the weight of greatest magnitude gets the extra code."""
    return signed_scales(columns.x, columns.w, columns.low, columns.top)


def signed_scales(x: torch.Tensor, w: torch.Tensor, low: int, top: int) -> torch.Tensor:
    """The scales s [groups] of least sum w (s l - x)^2 for x [n, groups], low <= l <= top."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    inverse = torch.where(extreme.abs() < TINY, 0.0, 1.0 / extreme)
    wx = w * x
    best = torch.zeros_like(extreme)
    scale = torch.zeros_like(extreme)
    codes, products = torch.empty_like(x), torch.empty_like(x)
    for stretch in _STRETCH:
        torch.mul(x, inverse * (low - stretch), out=codes).round_().clamp_(low, top)
        sum_lx = torch.mul(codes, wx, out=products).sum(0)
        sum_ll = codes.square_().mul_(w).sum(0)
        gain = sum_lx * sum_lx / sum_ll.clamp(min=TINY)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, sum_lx / sum_ll.clamp(min=TINY), scale)
    return scale
