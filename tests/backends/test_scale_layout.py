"""Where scales lie in their tiles, by the formula of cuBLAS's documentation, and which half of a byte comes first."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.scale_layout import from_pairs, from_tiles, to_pairs, to_tiles
from scaled_mm_double import tile_index

SHAPES = [(1, 1), (3, 5), (128, 4), (129, 4), (32, 8), (200, 9), (384, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_scale_lies_where_the_formula_says_and_the_rest_is_zero(shape):
    scale = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before, tiles = scale.clone(), to_tiles(scale)
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
    assert tiles.shape == (-(-shape[0] // 128) * 128 * -(-shape[1] // 4) * 4,)
    at = tile_index(*shape)
    assert torch.equal(tiles[at], scale) and len(set(at.flatten().tolist())) == scale.numel()
    assert int((tiles != 0).sum()) == scale.numel()
    assert torch.equal(from_tiles(tiles, *shape), scale) and torch.equal(scale, before)


def test_one_tile_spelled_out():
    """The 512 bytes of a tile: rows 0, 32, 64 and 96 in the first 16, then rows 1, 33, 65 and 97."""
    scale = (torch.arange(128).view(128, 1) * 2 + torch.tensor([0, 0, 1, 1])).to(torch.uint8)
    tile = to_tiles(scale).view(32, 4, 4).long()
    assert tile[0].tolist() == [[2 * row, 2 * row, 2 * row + 1, 2 * row + 1] for row in (0, 32, 64, 96)]
    assert tile[1, :, 0].tolist() == [2 * row for row in (1, 33, 65, 97)]


def test_scales_that_are_not_contiguous():
    scale = torch.arange(200, dtype=torch.uint8).view(5, 40).T
    assert torch.equal(to_tiles(scale), to_tiles(scale.contiguous()))


def test_the_first_of_two_codes_is_in_the_lower_bits():
    codes = torch.tensor([[1, 2, 15, 0], [0, 15, 7, 8]], dtype=torch.uint8)
    assert to_pairs(codes).tolist() == [[0x21, 0x0F], [0xF0, 0x87]] and to_pairs(codes).dtype == torch.uint8
    every = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(from_pairs(to_pairs(every)), every)
    assert from_pairs(torch.empty(0, 4, dtype=torch.uint8)).shape == (0, 8)
