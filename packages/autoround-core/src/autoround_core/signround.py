"""SignRound: rounding offsets and clipping ranges tuned by signed gradient descent (arXiv 2309.05516).

Each step runs the block with fake-quantized weights on a random batch and moves every parameter by the
learning rate against the sign of its gradient; the rate falls linearly to zero, so that an offset travels
at most half a rounding step. The error is the mean square distance from the output of the original block.

Three things differ from the public implementation. The parameters that are kept are those with the least
error on a fixed slice of the calibration set, not those that met the easiest random batch; the parameters
after the last step are a candidate like the others; and rounding to nearest, where the block began, stays
if nothing beat it.
"""

from __future__ import annotations

import random

import torch

from autoround_core.algorithm import Algorithm, Block, BlockResult, Run
from autoround_core.errors import in_layer
from autoround_core.family import TunableWeight
from autoround_core.rtn import channel_importance

_CHECKS = 5


class SignRound(Algorithm):
    """Signed gradient descent on the output error of a block."""

    name = "signround"

    def quantize_block(self, block: Block, run: Run) -> BlockResult:
        settings = run.settings
        tunables = _tunables(block)
        rates = {name: settings.rates(block.schemes[name].bits) for name in tunables}
        batches = _batches(block.samples, settings.batch_size * settings.gradient_accumulate_steps, run.seed)
        start_error = block.error(_weights(block, tunables), block.validation)
        keeper = _Keeper(tunables, start_error)
        checks = _check_steps(settings.iters)
        for step in range(settings.iters):
            _set_gradients(block, tunables, next(batches))
            _descend(tunables, rates, 1.0 - step / settings.iters)
            if step + 1 in checks:
                keeper.offer(step + 1, block.error(_weights(block, tunables), block.validation))
            run.progress(step + 1, settings.iters, keeper.error)
        keeper.restore()
        weights = {name: tunable.finish() for name, tunable in tunables.items()}
        return BlockResult(weights, steps=settings.iters, best_step=keeper.step, start_error=start_error)


def _tunables(block: Block) -> dict[str, TunableWeight]:
    searched = any(block.families[name].starts_from_search for name in block.schemes)
    importance, _ = channel_importance(block) if searched else ({}, ())
    tunables = {}
    for name, weight in block.weights.items():
        family, scheme = block.families[name], block.schemes[name]
        with in_layer(name):
            tunables[name] = (family.tunable_from(weight, scheme, importance[name]) if family.starts_from_search
                              else family.tunable(weight, scheme))
    return tunables


def _check_steps(iters: int) -> set[int]:
    """Steps after which the slice is measured: evenly spread, the last among them."""
    return {round(iters * (i + 1) / _CHECKS) for i in range(_CHECKS)} - {0}


def _batches(samples: int, size: int, seed: int):
    """Yield random rows without end; every sample once per pass, a partial batch is left to the next shuffle."""
    shuffler, size = random.Random(seed), min(size, samples)
    while True:
        order = list(range(samples))
        shuffler.shuffle(order)
        for start in range(0, samples - size + 1, size):
            yield torch.tensor(order[start : start + size])


def _set_gradients(block: Block, tunables: dict[str, TunableWeight], rows: torch.Tensor) -> None:
    """Fill the gradients of all parameters. Weights are quantized once per step, however the batch is run."""
    quantized = {name: tunable.fake_quantize() for name, tunable in tunables.items()}
    gradients = block.gradients({n: w.detach().to(block.weights[n].dtype) for n, w in quantized.items()}, rows)
    # an expert that no token of the batch reached has no gradient and stays where it is
    torch.autograd.backward([quantized[name] for name in gradients], list(gradients.values()))


@torch.no_grad()
def _descend(tunables: dict[str, TunableWeight], rates: dict[str, tuple[float, float]], share: float) -> None:
    for name, tunable in tunables.items():
        rate, range_rate = rates[name]
        if tunable.rounding.grad is None:
            continue
        tunable.rounding.add_(tunable.rounding.grad.sign_(), alpha=-rate * share)
        tunable.rounding.grad = None
        for factor in tunable.ranges:
            if factor.grad is not None:
                factor.add_(factor.grad.sign_(), alpha=-range_rate * share).clamp_(0.0, 1.0)
                factor.grad = None


@torch.no_grad()
def _weights(block: Block, tunables: dict[str, TunableWeight]) -> dict[str, torch.Tensor]:
    """The fake-quantized weights for the present parameters, in the dtype they will be written back in."""
    return {name: tunable.fake_quantize().to(block.weights[name].dtype) for name, tunable in tunables.items()}


class _Keeper:
    """Remembers the parameters of least error; step 0, where they start, needs no copy."""

    def __init__(self, tunables: dict[str, TunableWeight], error: float) -> None:
        self._tunables = tunables
        self._best: list[torch.Tensor] | None = None
        self.step, self.error = 0, error

    def _parameters(self) -> list[torch.Tensor]:
        return [p for tunable in self._tunables.values() for p in (tunable.rounding, *tunable.ranges)]

    def offer(self, step: int, error: float) -> None:
        # a NaN error is never the better one
        if error < self.error:
            self.step, self.error = step, error
            self._best = [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best parameters back; those of step 0 are known without a copy."""
        for i, parameter in enumerate(self._parameters()):
            if self._best is not None:
                parameter.copy_(self._best[i])
        if self._best is None:
            for tunable in self._tunables.values():
                tunable.rounding.zero_()
                for factor in tunable.ranges:
                    factor.fill_(1.0)
