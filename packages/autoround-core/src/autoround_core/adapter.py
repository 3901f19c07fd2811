"""The interface of a model adapter: which weights a model has, and where they live.

Algorithms and formats know a linear layer by its checkpoint name and a matrix [out, in]. In a module tree the
same matrix may be transposed (GPT-2's Conv1D) or a slice of a three-dimensional parameter that holds all
experts of a layer. `LinearSite` is the one place that knows the difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoround_core.calibration_set import CalibrationSet

_NONTEXT = "is outside the language tower; --quant_nontext_module quantizes it"


@dataclass(frozen=True, slots=True)
class LinearSite:
    """Where one linear weight lives.

    name: in the checkpoint, without `.weight`. module: path of the owning module in the model. parameter: its
    attribute. expert, part, parts: for a fused parameter, which expert and which of its equal slices along
    the output (gate = 0, up = 1). transposed: stored [in, out].
    """

    name: str
    module: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool = False
    expert: int | None = None
    part: int = 0
    parts: int = 1

    @property
    def path(self) -> str:
        """Full name of the parameter in the model."""
        return f"{self.module}.{self.parameter}"

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight [out, in], a view of the parameter."""
        if self.expert is not None:
            parameter = parameter[self.expert]
        matrix = parameter.T if self.transposed else parameter
        return matrix[self.part * self.out_features : (self.part + 1) * self.out_features]


def by_expert(sites: Iterable[LinearSite]) -> list[list[LinearSite]]:
    """The sites of one fused parameter, expert by expert, each with its parts in order."""
    ordered = sorted(sites, key=lambda site: (site.expert or 0, site.part))
    parts = ordered[0].parts
    return [ordered[i : i + parts] for i in range(0, len(ordered), parts)]


def fuse(sites: Iterable[LinearSite], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter that all `sites` of one path make together. Differentiable in the weights."""
    groups = by_expert(sites)
    first = groups[0][0]
    matrices = [weights[group[0].name] if len(group) == 1 else torch.cat([weights[site.name] for site in group])
                for group in groups]
    if first.transposed:
        matrices = [matrix.T for matrix in matrices]
    return matrices[0] if first.expert is None else torch.stack(matrices)


@dataclass(frozen=True, slots=True)
class BlockView:
    """One of the model's like blocks. name: its path. sites: its linear layers, in the model's order."""

    name: str
    module: torch.nn.Module
    sites: tuple[LinearSite, ...]

    @property
    def stored(self) -> str:
        """What checkpoints call the block."""
        for site in self.sites:
            inner = site.module.removeprefix(self.name)
            if site.expert is None and site.name.endswith(inner):
                return site.name.removesuffix(inner)
        return self.name


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as the driver sees it.

    head: the site of lm_head, None if there is none or it shares its weight with the embedding (`tied_head`).
    kept: weight matrices inside blocks that are never quantized, checkpoint name -> reason. embedding: the matrix that
    token ids are looked up in. nontext: blocks outside the language tower (of a vision or audio tower, a projector),
    each tuple a chain that runs one block after another; nontext_kept: as `kept`, of those.
    """

    model: torch.nn.Module
    blocks: tuple[BlockView, ...]
    head: LinearSite | None
    tied_head: bool
    kept: Mapping[str, str]
    embedding: LinearSite | None = None
    nontext: tuple[tuple[BlockView, ...], ...] = ()
    nontext_kept: Mapping[str, str] = field(default_factory=dict)

    def outer(self) -> tuple[LinearSite, ...]:
        """The matrices outside the blocks: the embedding, and lm_head where it has a weight of its own."""
        return tuple(site for site in (self.embedding, self.head) if site is not None)

    def sites(self) -> Iterator[LinearSite]:
        """All linear layers of the blocks, in order."""
        for block in self.blocks:
            yield from block.sites

    def nontext_sites(self) -> Iterator[LinearSite]:
        """All linear layers outside the language tower, in order."""
        for chain in self.nontext:
            for block in chain:
                yield from block.sites

    def all_sites(self) -> tuple[LinearSite, ...]:
        """Every matrix that may be quantized."""
        return (*self.nontext_sites(), *self.sites(), *self.outer())

    def stored_blocks(self, quantized: Collection[str]) -> list[str]:
        """What checkpoints call the blocks of the language tower, and of other towers with a layer in `quantized`."""
        others = (chain for chain in self.nontext if len(chain) > 1
                  and any(site.name in quantized for block in chain for site in block.sites))
        return [block.stored for chain in (self.blocks, *others) for block in chain]

    def all_kept(self, *, nontext: bool) -> dict[str, str]:
        """Every weight matrix that stays in 16 bits whatever the recipe says. nontext: whether towers are quantized."""
        towers = {} if nontext else {site.name: _NONTEXT for site in self.nontext_sites()}
        return {**self.kept, **self.nontext_kept, **towers}

    def parameter(self, site: LinearSite) -> torch.Tensor:
        return getattr(self.model.get_submodule(site.module), site.parameter)

    def bias(self, site: LinearSite) -> torch.Tensor | None:
        """Bias [out] of a layer of its own; fused experts have none here."""
        module = self.model.get_submodule(site.module)
        return None if site.expert is not None else getattr(module, "bias", None)


class ModelAdapter(ABC):
    """Builds and reads one kind of model. Instances are stateless."""

    @abstractmethod
    def load(self, path: Path, *, trust_remote_code: bool) -> torch.nn.Module:
        """The model with its weights, on the CPU, in the dtype of its checkpoint."""

    @abstractmethod
    def skeleton(self, path: Path, *, trust_remote_code: bool, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The model on the meta device: shapes and names, buffers computed, no weights."""

    @abstractmethod
    def view(self, model: torch.nn.Module) -> ModelView:
        """Blocks and layers. The model is put into the state that tuning needs: not training, weights tied, experts run
        one by one. Raises UnsupportedError when it has no list of like blocks.
        """

    def tuning(self, model: torch.nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """A context for capture and tuning, for a model that runs faster another way where gradients are wanted."""
        return nullcontext()

    def follow(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        """Let a skeleton call its tensors as a checkpoint does that holds `names`, where there are several ways."""
        return

    def calibration_set(
        self, dataset: Any, processor: Any, path: Path | None, *, nsamples: int, seqlen: int, seed: int,
        skip_bad_samples: bool, trust_remote_code: bool,
    ) -> CalibrationSet | None:
        """Samples for a model that takes more than text; None = rows of text, which the driver makes.

        dataset: as the user gave it, None = the default. processor: given by the user, None = the one at `path`.
        """
        return None

    def probe_inputs(
        self, model: torch.nn.Module, processor: Any, path: Path | None, *, trust_remote_code: bool
    ) -> dict[str, Any] | None:
        """Keyword arguments for a short forward pass of the whole model; None = a few tokens will do."""
        return None

    def serve(self, model: torch.nn.Module, device: torch.device) -> None:
        """Prepare a loaded model for inference on `device`; numbers change by roundings at most. Nothing by default."""
        return

    @abstractmethod
    def rest(self, view: ModelView, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, tensor) of all that is stored besides the layers named in `quantized` and their biases."""

    @abstractmethod
    def fill(self, view: ModelView, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Put tensors by checkpoint name into a skeleton; return the names of parameters still without weights."""

    def unexpected(self, view: ModelView, names: Iterable[str]) -> list[str]:
        """Which of these names of tensors in a checkpoint the model has no place for, as far as that can be told."""
        return []

    @abstractmethod
    def tokenizer(self, path: Path, *, trust_remote_code: bool) -> Any | None:
        """The tokenizer beside the model, None if there is none."""
