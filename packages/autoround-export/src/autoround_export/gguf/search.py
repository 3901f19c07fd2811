"""The scales of ggml's two-level block types for a whole matrix, chunk by chunk.

Each group is fitted by itself (`group_fit`), then a block's scales are rounded together and refined against the codes
that will be stored (`block_grid`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autoround_core import UnsupportedError
from autoround_core.scheme import BLOCK_TYPES, BlockType
from autoround_export.gguf.block_grid import block_grid
from autoround_export.gguf.group_fit import Columns

# large enough that a step is work and not overhead, small enough that its temporaries stay in the cache
CHUNK_WEIGHTS = 2**18


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found for a matrix: the fields of a SuperBlockWeight but its codes, shaped as there."""

    scale: torch.Tensor
    minimum: torch.Tensor | None
    sub_scale: torch.Tensor | None
    sub_minimum: torch.Tensor | None


@torch.no_grad()
def fit(weight: torch.Tensor, data_type: str, importance: torch.Tensor | None = None) -> Fit:
    """Scales for weight [out, in]. importance [in] > 0: of the input channels, None = unknown.

    Raises UnsupportedError when a scale is more than float16 can hold.
    """
    kind = BLOCK_TYPES[data_type]
    grids = []
    for rows in _chunks(weight):
        weights = _error_weights(rows, data_type, kind, importance)
        grid = block_grid(Columns(_turned(rows, kind), _turned(weights, kind), kind))
        if not torch.isfinite(grid.error).all():
            raise UnsupportedError("a block needs a scale that is more than float16 can hold (65504)")
        grids.append(grid.stored(len(rows)))
    parts = [None if part[0] is None else torch.cat(part) for part in zip(*grids, strict=True)]
    return Fit(*parts)


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    for rows in weight.split(max(1, CHUNK_WEIGHTS // weight.shape[1])):
        yield rows.to(torch.float32).contiguous()


def _turned(rows: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """[r, in] to [group_size, groups], a group as a column."""
    return rows.reshape(-1, kind.group_size).T.contiguous()


def _error_weights(rows, data_type: str, kind: BlockType, importance: torch.Tensor | None) -> torch.Tensor:
    """What an error counts, [r, in]: the importance of its channel, and more for large weights. ggml multiplies by the
    root of a weight's square and its block's mean square; the root of that root is better, see docs/algorithms.md.
    """
    squares = rows.square()
    if importance is None:
        if data_type == "q2_k":
            return rows.abs()
        if kind.block == kind.group_size:
            return torch.ones_like(rows)
        if kind.sym:
            return squares
        groups = squares.view(len(rows), -1, kind.group_size)
        return (groups.mean(-1, keepdim=True).sqrt() + groups.sqrt()).view_as(rows)
    if data_type == "q6_k":
        return importance.to(rows).expand_as(rows)
    two_levels = kind.block > kind.group_size
    blocks = squares.view(len(rows), -1, kind.block if two_levels else rows.shape[1])
    mean = blocks.mean(-1, keepdim=True)
    return (blocks + 2 * mean).sqrt_().sqrt_().view_as(rows).mul_(importance.to(rows))
