"""The algorithms without gradients: each layer by its own family and scheme, importance from the data."""

from __future__ import annotations

import pytest
import torch

from autoround_core.algorithm import Block, Run
from autoround_core.int_family import IntFamily
from autoround_core.rtn import RoundToNearest, SearchedScales
from autoround_core.scheme import QuantScheme
from autoround_core.settings import TuningSettings

RUN = Run(TuningSettings(iters=0), seed=0)


class FakeBlock(Block):
    """Two layers; refuses to be run, because these algorithms need no forward pass of their own."""

    name, samples = "model.layers.0", 0

    def __init__(self, mean_square=None):
        generator = torch.Generator().manual_seed(5)
        self._weights = {
            "up": torch.randn(16, 64, generator=generator),
            "down": torch.randn(8, 32, generator=generator),
        }
        self.schemes = {"up": QuantScheme(3, 32), "down": QuantScheme(2, -1, False)}
        self.families = {name: IntFamily() for name in self.schemes}
        self._mean_square = mean_square

    @property
    def weights(self):
        return self._weights

    def forward(self, weights, rows):
        raise AssertionError("no forward pass")

    def target(self, rows):
        raise AssertionError("no target")

    def error(self, weights, rows):
        raise AssertionError("no error")

    def gradients(self, weights, rows):
        raise AssertionError("no gradients")

    def input_mean_square(self):
        assert self._mean_square is not None, "no data is needed"
        return self._mean_square


def digests(weights):
    return {name: weight.digest() for name, weight in weights.items()}


def importance(up, down=None):
    return {"up": torch.as_tensor(up, dtype=torch.float32), "down": torch.ones(32) if down is None else down}


def test_round_to_nearest_needs_no_data_and_asks_the_family_for_each_layer():
    block = FakeBlock()
    result = RoundToNearest().quantize_block(block, RUN)
    assert not RoundToNearest.needs_data and SearchedScales.needs_data
    assert digests(result.weights) == digests(
        {
            name: IntFamily().round_to_nearest(weight, block.schemes[name])
            for name, weight in block.weights.items()
        }
    )
    assert (result.steps, result.notes) == (0, ())


def test_the_search_weighs_channels_by_what_flows_through_them():
    mean_square = importance(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
    block = FakeBlock(mean_square)
    result = SearchedScales().quantize_block(block, RUN)
    assert digests(result.weights) == digests(
        {
            name: IntFamily().search(weight, block.schemes[name], mean_square[name])
            for name, weight in block.weights.items()
        }
    )
    alike = SearchedScales().quantize_block(FakeBlock(importance(torch.ones(64))), RUN)
    assert result.weights["up"].digest() != alike.weights["up"].digest()
    assert result.weights["down"].digest() == alike.weights["down"].digest()
    assert result.notes == ()


class Listening(IntFamily):
    """Remembers the importance that it was asked to search with."""

    def search(self, weight, scheme, importance):
        self.heard = importance.clone()
        return IntFamily.search(self, weight, scheme, importance)


def test_a_silent_channel_still_counts_a_little():
    mean_square = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 1.0
    mean_square[::2] = 0.0
    block = FakeBlock(importance(mean_square))
    block.families = {name: Listening() for name in block.schemes}
    assert SearchedScales().quantize_block(block, RUN).notes == ()
    heard, mean = block.families["up"].heard, float(mean_square.double().mean())
    assert torch.equal(heard[1::2], mean_square[1::2])
    torch.testing.assert_close(heard[::2], torch.full((32,), 1e-4 * mean))


def test_a_layer_that_no_token_reached_is_told_and_searched_all_the_same():
    result = SearchedScales().quantize_block(FakeBlock(importance(torch.zeros(64))), RUN)
    alike = SearchedScales().quantize_block(FakeBlock(importance(torch.ones(64))), RUN)
    assert digests(result.weights) == digests(alike.weights)
    (note,) = result.notes
    assert note.startswith("up: no calibration token reached it")


@pytest.mark.parametrize(
    "algorithm", [RoundToNearest(), SearchedScales()], ids=lambda algorithm: algorithm.name
)
def test_nothing_of_the_block_is_changed(algorithm):
    mean_square = importance(torch.tensor([0.0, 1.0] * 32))
    block = FakeBlock({name: value.clone() for name, value in mean_square.items()})
    before = {name: weight.clone() for name, weight in block.weights.items()}
    algorithm.quantize_block(block, RUN)
    assert all(torch.equal(block.weights[name], before[name]) for name in before)
    assert all(torch.equal(block.input_mean_square()[name], mean_square[name]) for name in mean_square)
