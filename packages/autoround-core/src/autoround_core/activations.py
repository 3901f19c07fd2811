"""Quantized activations in a model of Transformers: hooks through which the inputs of layers pass.

Only layers that are modules can be reached so. The experts that Transformers keeps in one tensor run with inputs in 16
bits here, as they do when a checkpoint is loaded; engines quantize those too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from autoround_core.family import NumberFamily
from autoround_core.fusing import sharing_layers
from autoround_core.scheme import ActivationScheme, QuantScheme


class QuantizedInputs:
    """The layers of a model whose inputs are quantized from the moment they were added."""

    def __init__(self) -> None:
        self._on = True

    def add(
        self, module: torch.nn.Module, family: NumberFamily, activation: ActivationScheme,
        input_scale: torch.Tensor | None,
    ) -> None:
        """module: called with its input [..., in] first. input_scale: float32 [1] for calibrated activations."""

        def quantize(_, args):
            return (family.quantize_activation(args[0], activation, input_scale), *args[1:]) if self._on else None

        module.register_forward_pre_hook(quantize)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model with inputs in 16 bits."""
        self._on = False
        try:
            yield
        finally:
            self._on = True


def shared_greatest(
    greatest: Mapping[str, torch.Tensor], schemes: Mapping[str, QuantScheme], model_type: str | None
) -> dict[str, torch.Tensor]:
    """Greatest input magnitude of each layer, where layers that engines run as one have the greatest of them all.

    So an expert that no token reached has that of the others.
    """
    result = dict(greatest)
    for members in sharing_layers(schemes, model_type):
        result |= dict.fromkeys(members, torch.stack([greatest[member] for member in members]).max())
    return result


def families_of(
    schemes: Mapping[str, QuantScheme], weights: Mapping[str, torch.Tensor], families: Mapping[str, NumberFamily],
    model_type: str | None,
) -> dict[str, NumberFamily]:
    """The family of each layer; layers that engines run as one and are of one data type get one `for_group`."""
    result = {name: families[scheme.data_type] for name, scheme in schemes.items()}
    for members in sharing_layers(schemes, model_type):
        if _alike(schemes[member].data_type for member in members):
            result |= dict.fromkeys(members, result[members[0]].for_group([weights[member] for member in members]))
    return result


def _alike(values: Iterable[str]) -> bool:
    return len(set(values)) == 1
