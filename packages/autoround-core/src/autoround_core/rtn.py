"""The algorithms without gradients: round to nearest, and round with searched scales."""

from __future__ import annotations

import torch

from autoround_core.algorithm import Algorithm, Block, BlockResult, Run
from autoround_core.errors import in_layer


class RoundToNearest(Algorithm):
    """Codes from the range of each group alone. Needs no calibration data."""

    name = "rtn"
    needs_data = False

    def quantize_block(self, block: Block, run: Run) -> BlockResult:
        return BlockResult({
            name: block.families[name].round_to_nearest(weight, block.schemes[name])
            for name, weight in block.weights.items()
        })


class SearchedScales(Algorithm):
    """Scales of least squared error, each input channel weighted by the mean square of what flows through it.

    An expert that no token reached weighs its channels alike, and the result says so.
    """

    name = "opt_rtn"

    def quantize_block(self, block: Block, run: Run) -> BlockResult:
        importance, notes = channel_importance(block)
        weights = {}
        for name, weight in block.weights.items():
            with in_layer(name):
                weights[name] = block.families[name].search(weight, block.schemes[name], importance[name])
        return BlockResult(weights, notes=notes)


def channel_importance(block: Block) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """(importance > 0 of each layer's input channels, float32 [in]; notes on layers that saw nothing)."""
    importance, notes = {}, []
    for name, squares in block.input_mean_square().items():
        if not squares.any():
            notes.append(f"{name}: no calibration token reached it; its channels weigh alike")
        importance[name] = importance_of(squares)
    return importance, tuple(notes)


def importance_of(mean_square: torch.Tensor) -> torch.Tensor:
    """The importance [in] > 0 of channels whose inputs have this mean square."""
    mean = float(mean_square.mean())
    if mean == 0:
        return torch.ones_like(mean_square)
    # a channel that was silent in the calibration set still deserves a finite weight
    return mean_square.clamp(min=mean * 1e-4)
