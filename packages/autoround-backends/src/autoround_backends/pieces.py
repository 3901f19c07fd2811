"""Products of many rows on a CPU, with a weight that is made dense a piece at a time.

A piece fits the caches, and is in the dtype that the processor multiplies fastest: bfloat16 for bfloat16 rows where it
is faster at that, float32 everywhere else. On processors without AVX-512 that is several times the speed of torch's
product of bfloat16 matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoround_core import product_dtype

_PIECE = 1 << 20  # weights: 4 MB of float32
_CPU = torch.device("cpu")


def fastest_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of `dtype` are multiplied in."""
    # float16 has more digits than bfloat16
    return product_dtype(dtype, _CPU, None) if dtype == torch.bfloat16 else torch.float32


def multiply(
    rows: torch.Tensor, out_features: int, fill: Callable[[int, torch.Tensor], object], bias: torch.Tensor | None,
) -> torch.Tensor:
    """rows [rows, in] to [rows, out], in their dtype.

    fill(start, piece): puts the weights of output features from start on into piece [features, in], in `fastest_dtype`
    and always the same memory. bias: float32 [out].
    """
    inputs, step = rows.to(fastest_dtype(rows.dtype)), max(1, _PIECE // rows.shape[1])
    memory = torch.empty(min(step, out_features), rows.shape[1], dtype=inputs.dtype)
    output = torch.empty(len(rows), out_features, dtype=rows.dtype)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        piece = memory[: stop - start]
        fill(start, piece)
        product = inputs @ piece.T
        output[:, start:stop] = product if bias is None else product + bias[start:stop]
    return output
