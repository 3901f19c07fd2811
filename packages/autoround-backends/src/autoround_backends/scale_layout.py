"""Where the scales of blocks lie for the tensor cores of Blackwell, and how 4-bit codes share a byte.

cuBLAS wants one-byte scales [rows, groups] in tiles of 128 rows and 4 groups, filled up with zeros. Tiles follow one
another along a row of tiles. Within a tile the rows r, r + 32, r + 64 and r + 96 lie together, 4 bytes each, so the
scale of row r and group g is at the byte

    512 (ceil(groups / 4) (r div 128) + g div 4) + 16 (r mod 32) + 4 (r mod 128 div 32) + g mod 4
"""

from __future__ import annotations

import torch

_ROWS, _GROUPS, _APART = 128, 4, 32


def to_tiles(scale: torch.Tensor) -> torch.Tensor:
    """uint8 scales [rows, groups] to uint8 [ceil(rows / 128) * ceil(groups / 4) * 512], in a new contiguous tensor."""
    rows, groups = scale.shape
    whole = torch.nn.functional.pad(scale, (0, -groups % _GROUPS, 0, -rows % _ROWS))
    parts = whole.reshape(-1, _ROWS // _APART, _APART, whole.shape[1] // _GROUPS, _GROUPS)
    return parts.permute(0, 3, 2, 1, 4).contiguous().view(-1)


def from_tiles(tiles: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `to_tiles`: uint8 [rows, groups], contiguous."""
    wide = -(-groups // _GROUPS)
    parts = tiles.view(-1, wide, _APART, _ROWS // _APART, _GROUPS).permute(0, 3, 2, 1, 4)
    return parts.reshape(-1, wide * _GROUPS)[:rows, :groups].contiguous()


def to_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes of 4 bits [rows, even] to bytes [rows, even / 2], the first of two codes in the lower bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def from_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_pairs`."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
