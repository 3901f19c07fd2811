"""The order of block scales against the index formula of its description."""

from __future__ import annotations

import pytest
import torch

from autoround_backends.scale_layout import swizzled


@pytest.mark.parametrize("rows, blocks", [(1, 1), (128, 4), (129, 5), (300, 9), (31, 16)])
def test_every_scale_is_where_it_belongs(rows, blocks):
    scale = torch.randint(1, 255, (rows, blocks), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    flat = swizzled(scale)
    wide = -(-blocks // 4)
    assert len(flat) == -(-rows // 128) * wide * 512
    wanted = torch.zeros_like(flat)
    for r in range(rows):
        for c in range(blocks):
            wanted[(r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    assert torch.equal(flat, wanted)
