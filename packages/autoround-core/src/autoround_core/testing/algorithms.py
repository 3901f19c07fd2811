"""Does an algorithm return sound records for every layer, the same each time, and no worse than rounding?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autoround_core.algorithm import Algorithm, Block, BlockResult, Run
from autoround_core.family import NumberFamily
from autoround_core.int_family import IntFamily
from autoround_core.records import AffineWeight, QuantizedWeight
from autoround_core.scheme import QuantScheme
from autoround_core.settings import TuningSettings
from autoround_core.testing.cases import Checked, conclude, doing, one_thread, require

# the default, few bits with a free zero point, whole rows, groups that leave a rest
ALGORITHM_SCHEMES = (
    QuantScheme(4, 32), QuantScheme(2, 32, False), QuantScheme(3, -1), QuantScheme(4, 24, False),
    QuantScheme(8, 128),
)
_WIDTH, _HIDDEN, _SAMPLES, _SEQLEN = 40, 64, 12, 16


class ToyBlock(Block):
    """x + down(silu(up(x))): two linear layers that see correlated channels, some of them large.

    The same numbers each time. with_data: False = no calibration samples, and asking for them is a failure.
    """

    name = "toy"

    def __init__(
        self, scheme: QuantScheme, families: Mapping[str, NumberFamily], *, with_data: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self._weights = {
            "up": normal(_HIDDEN, _WIDTH) / _WIDTH**0.5, "down": normal(_WIDTH, _HIDDEN) / _HIDDEN**0.5,
        }
        mixing = normal(_WIDTH, _WIDTH) / _WIDTH**0.5 + torch.eye(_WIDTH)
        sizes = torch.logspace(-1, 1, _WIDTH)
        self._original = normal(_SAMPLES, _SEQLEN, _WIDTH) @ mixing * sizes
        # what reaches a block has passed through quantized ones: close to the original, not equal
        self._quantized = self._original + 0.02 * sizes * normal(_SAMPLES, _SEQLEN, _WIDTH)
        self.samples = _SAMPLES if with_data else 0
        self.validation = torch.arange(self.samples)
        self.schemes = dict.fromkeys(self._weights, scheme)
        self.families = dict.fromkeys(self._weights, families[scheme.data_type])

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._weights

    def forward(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return self._run({**self._weights, **weights}, self._rows(self._quantized, rows))[0]

    def target(self, rows: torch.Tensor) -> torch.Tensor:
        return self._run(self._weights, self._rows(self._original, rows))[0]

    @torch.no_grad()
    def error(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> float:
        return float(torch.nn.functional.mse_loss(self.forward(weights, rows), self.target(rows)))

    def gradients(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {name: weight.detach().float().requires_grad_() for name, weight in weights.items()}
        error = torch.nn.functional.mse_loss(self.forward(leaves, rows), self.target(rows))
        return dict(zip(leaves, torch.autograd.grad(error, list(leaves.values())), strict=True))

    def input_mean_square(self) -> dict[str, torch.Tensor]:
        inputs = self._rows(self._quantized, torch.arange(_SAMPLES))
        return {"up": _mean_square(inputs), "down": _mean_square(self._run(self._weights, inputs)[1])}

    def _rows(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        require(self.samples > 0, "the algorithm says needs_data = False, but asks for calibration data")
        return states[rows]

    @staticmethod
    def _run(weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, what enters `down`)."""
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(inputs, weights["up"]))
        return inputs + torch.nn.functional.linear(hidden, weights["down"]), hidden


def _mean_square(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).square().mean(0)


def check_algorithm(
    algorithm: Algorithm, *, schemes: Sequence[QuantScheme] = ALGORITHM_SCHEMES,
    families: Sequence[NumberFamily] = (),
) -> Checked:
    """Quantize a toy block with each scheme that its number family can represent.

    families: number families besides the integer one. With needs_data the output error must not be above
    that of rounding to nearest.
    """
    require(bool(algorithm.name), f"{type(algorithm).__name__} has no name")
    known = {family.data_type: family for family in (IntFamily(), *families)}
    cells, refusals = 0, set()
    for scheme in schemes:
        reason = known[scheme.data_type].why_not(scheme)
        if reason is not None:
            refusals.add(reason)
            continue
        with one_thread():
            _check_cell(algorithm, scheme, known)
        cells += 1
    return conclude(f"algorithm `{algorithm.name}`", cells, refusals)


def _check_cell(algorithm: Algorithm, scheme: QuantScheme, families: Mapping[str, NumberFamily]) -> None:
    what = f"algorithm `{algorithm.name}`, {scheme}"
    block = ToyBlock(scheme, families, with_data=algorithm.needs_data)
    originals = {name: weight.clone() for name, weight in block.weights.items()}
    result = _quantize(algorithm, block, what, noise=1)
    missing = block.weights.keys() - result.weights.keys()
    require(not missing, f"{what}: the result lacks the layers {sorted(missing)}")
    extra = result.weights.keys() - block.weights.keys()
    require(not extra, f"{what}: the result holds the layers {sorted(extra)}, which the block does not have")
    for name, weight in result.weights.items():
        unchanged = torch.equal(block.weights[name], originals[name])
        require(unchanged, f"{what}: the original weight `{name}` is changed")
        _check_record(weight, scheme, tuple(originals[name].shape), f"{what}, layer `{name}`")
    # another state of the global generator must not matter: the run's seed is the only one
    again = _quantize(algorithm, ToyBlock(scheme, families, with_data=algorithm.needs_data), what, noise=2)
    for name, weight in result.weights.items():
        require(again.weights[name].digest() == weight.digest(),
                f"{what}: two runs with one seed give different records for `{name}`")
    if algorithm.needs_data:
        nearest = {
            name: block.families[name].round_to_nearest(weight, scheme) for name, weight in originals.items()
        }
        error, limit = _output_error(block, result.weights), _output_error(block, nearest)
        require(error <= limit * (1 + 1e-5),
                f"{what}: the output error is {error:.4g}, rounding to nearest has {limit:.4g}")


def _output_error(block: ToyBlock, weights: Mapping[str, QuantizedWeight]) -> float:
    dense = {name: weight.dequantize(torch.float32) for name, weight in weights.items()}
    return block.error(dense, torch.arange(_SAMPLES))


def _quantize(algorithm: Algorithm, block: ToyBlock, what: str, *, noise: int) -> BlockResult:
    settings = TuningSettings(
        algorithm=algorithm.name, iters=16, nsamples=_SAMPLES, seqlen=_SEQLEN, batch_size=4,
    )
    with torch.random.fork_rng(devices=[]), doing(f"{what}: quantize_block"):
        torch.manual_seed(noise)
        return algorithm.quantize_block(block, Run(settings, seed=7))


def _check_record(weight: QuantizedWeight, scheme: QuantScheme, shape: tuple[int, ...], what: str) -> None:
    require(isinstance(weight, QuantizedWeight), f"{what}: a {type(weight).__name__} is no QuantizedWeight")
    require(weight.scheme == scheme, f"{what}: the record has the scheme {weight.scheme}")
    require(weight.shape == shape, f"{what}: the record is {weight.shape}, the weight is {shape}")
    require(bool(torch.isfinite(weight.dequantize(torch.float32)).all()), f"{what}: the record is not finite")
    if not isinstance(weight, AffineWeight):
        return
    top = 2**scheme.bits - 1
    for name in ("codes", "zero_point"):
        largest = int(getattr(weight, name).max())
        require(largest <= top, f"{what}: {name} must be from 0 to {top}, got {largest}")
    require(bool((weight.scale != 0).all()), f"{what}: a scale is zero")
    if scheme.sym:
        middle = 2 ** (scheme.bits - 1)
        require(bool((weight.zero_point == middle).all()), f"{what}: a symmetric zero_point must be {middle}")
