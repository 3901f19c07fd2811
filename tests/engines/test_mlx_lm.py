"""mlx-lm loads our checkpoints and computes what was meant, on MLX's CPU build. Run by `tox -e mlx`."""

from __future__ import annotations

import pytest
import torch

from engine_cases import token_ids

mlx_lm = pytest.importorskip("mlx_lm", reason="tox -e mlx")
MOST = 0.05  # nats, in bfloat16


@pytest.mark.parametrize("scheme", ["W2G64", "W3G64-asym", "W4G64", "W4G64-asym", "W8G128"])
def test_mlx_computes_what_was_meant(checkpoint, scheme):
    import mlx.core as mx

    directory, expected = checkpoint(scheme, "mlx")
    model, _ = mlx_lm.load(str(directory))
    ids = token_ids()
    logits = model(mx.array([ids])).astype(mx.float32)[0]
    table = torch.tensor(logits.tolist()).log_softmax(-1)
    found = [table[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= MOST
