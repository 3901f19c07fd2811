"""Round to nearest against Intel's auto-round 0.16.1: the same codes, scales and zero points, bit for bit.

`tests/data/make_peer_rtn.py` made the file from what that program itself wrote, and says how.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autoround_core.int_family import IntFamily
from autoround_core.scheme import QuantScheme

FILE = Path(__file__).parents[1] / "data" / "peer_rtn.safetensors"
SCHEMES = [
    QuantScheme(bits, group_size, sym)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128, -1)
    for sym in (True, False)
]


@pytest.fixture(scope="module")
def tensors():
    with safe_open(FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_the_file_holds_every_cell_and_a_weight_worth_comparing(tensors):
    assert tensors.keys() == {"weight"} | {
        f"{s}.{part}" for s in SCHEMES for part in ("codes", "scale", "zero_point")
    }
    weight = tensors["weight"].float()
    assert weight.shape == (32, 256) and FILE.stat().st_size < 400_000
    # a dead row, a dead group, one-sided rows, an outlier, a row of the smallest scales
    assert not weight[0].any() and not weight[1, 32:64].any() and weight[2].min() >= 0 >= weight[3].max()
    assert weight[4].abs().max() > 50 * weight[4].abs().median()
    assert tensors["W8G32.scale"].abs().min() == torch.tensor(1e-5).half()
    assert (tensors["W4G128.scale"] < 0).any() and (tensors["W4G128.scale"] > 0).any()
    assert {0, 15} <= set(tensors["W4G128-asym.zero_point"].flatten().tolist())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_same_integers_and_scales(tensors, scheme):
    record = IntFamily().round_to_nearest(tensors["weight"], scheme)
    for part, tensor in record.tensors().items():
        peer = tensors[f"{scheme}.{part}"]
        assert tensor.dtype == peer.dtype and tensor.shape == peer.shape
        assert torch.equal(tensor, peer), f"{int((tensor != peer).sum())} of {tensor.numel()} {part} differ"
