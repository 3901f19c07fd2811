"""The interface of a checkpoint format: a writer that records are pushed into, and a reader.

Writers are pushed to, layer by layer as tuning goes, so that several formats can be written in one run
without one waiting for another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoround_core.errors import UsageError
from autoround_core.recipe import LinearSpec, QuantRecipe
from autoround_core.records import QuantizedLayer
from autoround_core.scheme import QuantScheme
from autoround_core.settings import TuningSettings
from autoround_core.target import Target, Verdict


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """What a format that chooses schemes by itself is told of a model, before anything is computed.

    config: the model's config.json. shapes: of every tensor of its checkpoint, by name. directory: where its tokenizer
    lies, None if it has none. options: the format's own, see `CheckpointFormat.option_names`. calibrated: whether the
    importance of input channels will be known. alone: whether no other format is written in the same run. name: of the
    model, fit for a file's name.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    directory: Path | None
    options: Mapping[str, Any]
    calibrated: bool
    alone: bool = True
    name: str = "model"


@dataclass(frozen=True, slots=True)
class SchemeChoice:
    """What a format makes of one matrix. reason: why it stays in 16 bits, where scheme is None."""

    scheme: QuantScheme | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointContext:
    """What a writer is told before the first layer.

    config: the model's config.json. layers: every linear layer of the blocks, and what else is quantized (lm_head,
    the embedding); scheme None = stays in 16 bits. blocks: names of the blocks. kept: other matrices inside blocks
    that stay in 16 bits, such as routers. transposed: layers whose float weight the model stores as [in, out].
    dtype: of what is not quantized. model: as `choose_schemes` saw it.
    """

    config: Mapping[str, Any]
    recipe: QuantRecipe
    layers: Sequence[LinearSpec]
    blocks: Sequence[str]
    kept: Sequence[str]
    transposed: Sequence[str]
    dtype: torch.dtype
    settings: TuningSettings
    model: ModelOutline | None = None


class CheckpointWriter(ABC):
    """Writes one checkpoint into an empty directory."""

    @abstractmethod
    def add(self, layer: QuantizedLayer) -> None:
        """Store a quantized layer."""

    @abstractmethod
    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor as it is, under its checkpoint name."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is left, the index and the configuration."""


class CheckpointReader(ABC):
    """Reads one checkpoint. Both iterators may be asked for more than once."""

    config: Mapping[str, Any]

    @abstractmethod
    def layers(self) -> Iterator[QuantizedLayer]:
        """The quantized layers, one at a time."""

    def layer_names(self) -> list[str]:
        """Names of the quantized layers; to be overridden where they are known without reading the layers."""
        return [layer.name for layer in self.layers()]

    @abstractmethod
    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything else."""


class CheckpointFormat(ABC):
    """One format for `--format`. Instances are stateless."""

    name: str
    summary: str = ""
    stores_records: bool = True
    """Whether `read` gives back the records; False for a format that stores dequantized weights."""
    fused: bool = False
    """Whether its readers run q, k and v, gate and up, and the experts of a layer as one, see `fused_layers`."""
    stores_outer: bool = False
    """Whether it stores what another format of the run quantizes outside the blocks: the embedding and lm_head."""
    option_names: tuple[str, ...] = ()
    """Options of its own, given to AutoRound as `format_options`."""
    dtype: torch.dtype | None = None
    """In which `load` computes when nobody says; None = as the model's configuration says."""

    def variant(self, text: str) -> CheckpointFormat:
        """The format spelled `name:text`. Raises UsageError unless the format has variants."""
        raise UsageError(f"format `{self.name}` has no variant `{text}`; write `{self.name}`")

    def choose_schemes(self, model: ModelOutline) -> Mapping[str, SchemeChoice] | None:
        """{layer name: choice} of a format that decides what becomes of each matrix, the embedding and lm_head among
        them; None for all others, which take what the user's scheme says.

        Asked before anything is computed, so this is also where to raise for a model that cannot be written.
        """
        return None

    @abstractmethod
    def why_not(self, spec: LinearSpec) -> str | None:
        """None if a layer of this size and scheme can be stored, otherwise the reason as one sentence."""

    def why_not_together(self, specs: Sequence[LinearSpec]) -> str | None:
        """None if these quantized layers fit into one checkpoint. Asked when each of them fits by itself."""
        return None

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        """What the engine makes of a checkpoint of these layers, of which scheme None stays in 16 bits.

        Asked only when the user named an engine.
        """
        return Verdict(f"it is not known to read format {self.name}")

    def home(self, path: Path) -> AbstractContextManager[Path]:
        """A directory with the config.json and the tokenizer of the checkpoint at `path`."""
        return nullcontext(path)

    @abstractmethod
    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        """A writer into `directory`, which exists and is empty."""

    @abstractmethod
    def recognizes(self, directory: Path) -> bool:
        """Whether `directory` holds a checkpoint of this format (or is one, for formats of a single file). Looks at
        small files only."""

    @abstractmethod
    def read(self, directory: Path) -> CheckpointReader:
        """A reader. Raises CheckpointError when files are missing or broken."""
