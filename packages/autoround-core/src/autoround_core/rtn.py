"""The algorithms without gradients: round to nearest, and round with searched scales."""

from __future__ import annotations

from autoround_core.algorithm import Algorithm, Block, BlockResult, Run


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
        importance = block.input_mean_square()
        weights, notes = {}, []
        for name, weight in block.weights.items():
            channels = importance[name].clone()
            mean = channels.mean()
            if mean == 0:
                notes.append(f"{name}: no calibration token reached it; its channels weigh alike")
                channels.fill_(1.0)
            else:
                # a channel that was silent in the calibration set still deserves a finite weight
                channels.clamp_(min=float(mean) * 1e-4)
            weights[name] = block.families[name].search(weight, block.schemes[name], channels)
        return BlockResult(weights, notes=tuple(notes))
