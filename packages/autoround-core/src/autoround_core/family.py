"""The interface of a number family: how weights of one `data_type` are tuned and finished."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from autoround_core.records import QuantizedWeight
from autoround_core.scheme import QuantScheme


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

    @abstractmethod
    def why_not(self, scheme: QuantScheme) -> str | None:
        """None if this family can represent `scheme`, otherwise the reason as one sentence."""

    @abstractmethod
    def round_to_nearest(self, weight: torch.Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """Quantize weight [out, in] by its range alone."""

    @abstractmethod
    def search(self, weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> QuantizedWeight:
        """Quantize weight [out, in] with the scales of least squared error, weighted by importance [in] > 0."""

    @abstractmethod
    def tunable(self, weight: torch.Tensor, scheme: QuantScheme) -> TunableWeight:
        """Parameters that start at `round_to_nearest`."""
