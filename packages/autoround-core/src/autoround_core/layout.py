"""The interface of a tensor layout: one record to named tensors and back, bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from autoround_core.recipe import LinearSpec
from autoround_core.records import QuantizedWeight
from autoround_core.scheme import QuantScheme


class TensorLayout(ABC):
    """How one weight lies in a file. Pure: no file, no model, names without the layer's prefix.

    tensor_names: what is always there. optional_names: what some schemes or some writers add, and `unpack` takes.
    input_scale_name: what the layer's `input_scale` is called beside them.
    """

    name: str
    tensor_names: tuple[str, ...]
    optional_names: tuple[str, ...] = ()
    input_scale_name: str = "input_scale"

    @abstractmethod
    def why_not(self, spec: LinearSpec) -> str | None:
        """None if a layer of this size and scheme fits the layout, otherwise the reason as one sentence."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors that store `weight`; `unpack(pack(w), scheme)` equals w, bit for bit."""

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        """The record that the tensors store. shape: (out, in), for layouts whose padding hides it."""
