"""Scales in the dtype that a kernel takes. Rounding one is as good as rounding its products; losing it is not."""

from __future__ import annotations

import torch

from autoround_core import AffineWeight, QuantizedLayer, UnsupportedError

_ROUNDING = 2.0**-8  # that of bfloat16, the coarsest dtype in which a model computes


def rounded_scale(layer: QuantizedLayer, dtype: torch.dtype) -> torch.Tensor:
    """The scales [out, groups] of an affine layer in `dtype`.

    Raises UnsupportedError when `dtype` cannot hold one, as float16 cannot some of bfloat16.
    """
    weight = layer.weight
    assert isinstance(weight, AffineWeight)
    exact, rounded = weight.scale.float(), weight.scale.to(dtype)
    # written so that an infinite one fails
    if not bool(((rounded.float() - exact).abs() <= _ROUNDING * exact.abs()).all()):
        kind = str(dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"layer `{layer.name}` has scales from {float(exact.abs().min()):.3g} to {float(exact.abs().max()):.3g}, "
            f"which {kind} cannot hold; load with --dtype bfloat16 or --backend reference"
        )
    return rounded
