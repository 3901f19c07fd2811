"""The interface of a number family: how weights of one `data_type` are tuned and finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from autoround_core.errors import UnsupportedError
from autoround_core.recipe import LinearSpec
from autoround_core.records import QuantizedWeight
from autoround_core.scheme import ActivationScheme, QuantScheme


class TunableWeight(ABC):
    """One weight between 16 bits and its record, with the parameters that tuning moves.

    rounding: offset of each weight, in steps of the grid; starts at zero, of any shape. ranges: factors of
    the clipping range, kept within [0, 1]. Both are leaf tensors that require a gradient; an algorithm
    updates them in place. `fake_quantize` and `finish` agree exactly: the float32 value of the first is
    what the record of the second dequantizes to.
    """

    rounding: torch.Tensor
    ranges: tuple[torch.Tensor, ...]

    @abstractmethod
    def fake_quantize(self) -> torch.Tensor:
        """The quantized weight, float32 [out, in], differentiable in `rounding` and `ranges`."""

    @abstractmethod
    def finish(self) -> QuantizedWeight:
        """The record for the present parameters."""


class NumberFamily(ABC):
    """All weights of one `data_type`. Instances are stateless."""

    data_type: str
    starts_from_search: bool = False
    """Whether tuning begins at `search`, whose scales it does not move: see `tunable_from`."""

    @abstractmethod
    def why_not(self, scheme: QuantScheme) -> str | None:
        """None if this family can represent `scheme`, otherwise the reason as one sentence."""

    def why_not_layer(self, spec: LinearSpec) -> str | None:
        """The same for a layer of a size; to be overridden where a scheme does not fit every size."""
        assert spec.scheme is not None
        return self.why_not(spec.scheme)

    @abstractmethod
    def round_to_nearest(self, weight: torch.Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """Quantize weight [out, in] by its range alone."""

    @abstractmethod
    def search(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> QuantizedWeight:
        """Quantize weight [out, in] with the scales of least squared error, weighted by importance [in] > 0."""

    @abstractmethod
    def tunable(self, weight: torch.Tensor, scheme: QuantScheme) -> TunableWeight:
        """Parameters that start at `round_to_nearest`."""

    def tunable_from(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> TunableWeight:
        """Parameters for a weight whose channels have this importance [in] > 0; start at `search` if
        `starts_from_search`."""
        return self.tunable(weight, scheme)

    def for_group(self, weights: Sequence[torch.Tensor]) -> NumberFamily:
        """The family for layers that engines run as one, which may share a number; by itself, nothing is shared."""
        return self

    def input_scale(self, activation: ActivationScheme, greatest: torch.Tensor) -> torch.Tensor:
        """float32 [1], what a calibrated activation stores; greatest: the largest |input| of the calibration set."""
        raise UnsupportedError(f"number family {self.data_type} has no calibrated activations, got {activation}")

    def quantize_activation(
        self, inputs: torch.Tensor, activation: ActivationScheme, input_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """What a layer makes of its inputs [..., in], in their dtype; gradients pass straight through."""
        raise UnsupportedError(f"number family {self.data_type} does not quantize activations, got {activation}")


def straight_through(value: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` forward, bit for bit; the gradient goes to `value`, of the same shape."""
    return _StraightThrough.apply(value, quantized) if value.requires_grad else quantized


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, quantized):
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
