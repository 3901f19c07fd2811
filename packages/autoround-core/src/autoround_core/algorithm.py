"""The interface of an algorithm, and what it sees of a model: one block at a time, as numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from autoround_core.family import NumberFamily
from autoround_core.records import QuantizedWeight
from autoround_core.scheme import QuantScheme
from autoround_core.settings import TuningSettings


class Block(ABC):
    """One block of the model as an algorithm sees it: weights, a forward function, a target.

    The model behind it is reached only through `forward`: an algorithm never touches a module.
    """

    name: str
    samples: int
    """Calibration samples; 0 when the algorithm needs no data."""
    validation: torch.Tensor
    """The fixed rows on which candidates are compared, and a block's error is reported."""
    schemes: Mapping[str, QuantScheme]
    families: Mapping[str, NumberFamily]

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The original weight of each layer, [out, in], in the model's dtype on the compute device."""

    @abstractmethod
    def forward(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Output on the *quantized* chain's input with `weights` in place, float32 [rows, seqlen, width].

        weights: by layer name, [out, in], any float dtype; a layer left out keeps its original weight.
        """

    @abstractmethod
    def target(self, rows: torch.Tensor) -> torch.Tensor:
        """Output of the original block on the original chain's input, float32 [rows, seqlen, width]."""

    @abstractmethod
    def error(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> float:
        """Mean square distance of `forward(weights, rows)` from `target(rows)`."""

    @abstractmethod
    def gradients(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient of `error`, times a positive constant, by each of `weights`; float32 [out, in].

        A weight that the samples did not reach (an expert without tokens) is left out.
        """

    @abstractmethod
    def input_mean_square(self) -> dict[str, torch.Tensor]:
        """Mean square of each input channel of each layer, float32 [in], on the quantized chain's input."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """weights: the records, one per layer of the block. steps: optimizer steps done. best_step: the one kept.
    start_error: on the validation rows, where tuning began; None if nothing was tuned."""

    weights: dict[str, QuantizedWeight]
    steps: int = 0
    best_step: int = 0
    notes: tuple[str, ...] = ()
    start_error: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What an algorithm is told about the run besides the block.

    seed: of this block. progress: called with (step, steps, loss) as the block is tuned.
    """

    settings: TuningSettings
    seed: int
    progress: Callable[[int, int, float], None] = field(default=lambda step, steps, loss: None)


class Algorithm(ABC):
    """Turns the float weights of a block into records. Instances are stateless."""

    name: str
    needs_data: bool = True

    @abstractmethod
    def quantize_block(self, block: Block, run: Run) -> BlockResult:
        """Quantize every layer of `block.schemes`."""
