"""A block of a real model in the shape that algorithms ask for.

No module is wrapped or replaced: fake-quantized weights stand in for the parameters while the block runs.
That serves linear layers and GPT-2's transposed ones; a list of matrices stands in for the parameter of all
experts of a layer, because the gradient of one matrix cut from it would be as large as all of them, for every
expert in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from autoround_core.adapter import LinearSite, by_expert, fuse
from autoround_core.algorithm import Block
from autoround_core.capture import BlockCall
from autoround_core.compute import Compute
from autoround_core.family import NumberFamily
from autoround_core.scheme import QuantScheme

T = TypeVar("T")
VALIDATION_SAMPLES = 16
_LOSS_FACTOR = 1000.0  # only the sign of a gradient counts; this keeps small ones from vanishing in bfloat16


class ModelBlock(Block):
    """A module, its sites, how it is called, and its two chains of hidden states."""

    def __init__(
        self, name: str, module: torch.nn.Module, sites: tuple[LinearSite, ...], call: BlockCall, *,
        schemes: Mapping[str, QuantScheme], families: Mapping[str, NumberFamily], compute: Compute,
        mask: torch.Tensor | None = None,
    ) -> None:
        """mask: bool [samples, tokens], False where a row is padding, which counts for nothing; None = nowhere."""
        self.name = name
        self.schemes = schemes
        self.families = families
        self.samples, self.validation = 0, torch.arange(0)
        self._module, self._compute, self._mask = module, compute, mask
        # without autocast whatever meets the float32 states must be float32 too
        self._autocast = compute.dtype != torch.float32
        # a model whose dtype is that of the products runs as it would run for its users; any other keeps a float32
        # residual stream, because what a block adds is small beside what it passes through
        native = self._autocast and all(parameter.dtype == compute.dtype for parameter in module.parameters())
        self._dtype = compute.dtype if native else torch.float32
        self._call = call.on(compute.device, None if self._autocast else torch.float32)
        self._prefix = len(name) + 1
        self._paths: dict[str, list[LinearSite]] = {}
        tuned = {site.path for site in sites if site.name in schemes}
        for site in sites:
            if site.path in tuned:
                self._paths.setdefault(self._local(site), []).append(site)
        parameters = {path: parameter.detach() for path, parameter in module.named_parameters()}
        self._parameters = parameters
        self._originals = {
            site.name: site.read(parameters[path]) for path, group in self._paths.items() for site in group
        }
        # gains and biases meet a float32 residual stream in float32: products of two dtypes take a slow
        # path, or none; matrices do so unless autocast takes them down
        self._frozen = {} if native else {
            path: parameter.float()
            for path, parameter in parameters.items()
            if path not in self._paths and (parameter.dim() < 2 or not self._autocast)
        }
        self._weights = {name: weight for name, weight in self._originals.items() if name in schemes}
        self._hidden = self._original = torch.empty(0)
        self._targets_given = True

    def _local(self, site: LinearSite) -> str:
        """Name of the site's parameter within the block (which may be the linear layer itself: lm_head)."""
        return site.path[self._prefix :]

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._weights

    def set_chains(self, original: torch.Tensor, quantized: torch.Tensor, *, targets_given: bool) -> None:
        """quantized: inputs of the quantized chain. original: what the original block makes of the original
        chain if `targets_given`, else that chain's inputs, from which targets are computed when asked for.
        """
        self._original, self._hidden, self._targets_given = original, quantized, targets_given
        self.samples = len(quantized)
        self.validation = torch.arange(min(VALIDATION_SAMPLES, self.samples))

    def forward(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        with self._substituted(weights):
            return torch.cat(self._map(lambda piece: self._run(self._hidden, piece), rows)).float()

    def target(self, rows: torch.Tensor) -> torch.Tensor:
        if self._targets_given:
            return self._compute.fetch(self._original, rows, torch.float32)
        with torch.no_grad(), self._substituted({}):
            return torch.cat(self._map(lambda piece: self._run(self._original, piece), rows)).float()

    @torch.no_grad()
    def error(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> float:
        return sum(map(float, self._map_errors(lambda error: error, weights, rows)))

    def gradients(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        sums: dict[str, torch.Tensor] = {}

        def differentiate(error: torch.Tensor) -> None:
            parts = torch.autograd.grad(error * _LOSS_FACTOR, list(leaves.values()), allow_unused=True)
            # added at once, in float32: the gradients of all pieces would outweigh the block
            for name, part in zip(leaves, parts, strict=True):
                if part is not None:
                    sums[name] = sums[name].add_(part) if name in sums else part.float()

        self._map_errors(differentiate, leaves, rows)
        return sums

    def _map_errors(self, function: Callable[[torch.Tensor], T], weights, rows: torch.Tensor) -> list[T]:
        """[function(share of a piece in the mean square error over `rows`) for each piece]."""
        whole = self._size(rows)

        def piece_error(piece: torch.Tensor, target: torch.Tensor) -> T:
            output, share = self._run(self._hidden, piece).float(), self._size(piece) / whole
            return function(self._mean_square(output, target, piece) * share)

        if self._targets_given:
            with self._substituted(weights):
                return self._map(lambda piece: piece_error(piece, self.target(piece)), rows)
        results: list[T] = []
        for row in rows.split(1):
            target = self.target(row)
            with self._substituted(weights):
                results += self._map(lambda piece, target=target: piece_error(piece, target), row)
        return results

    def _size(self, rows: torch.Tensor) -> int:
        """How much samples count for."""
        return len(rows) if self._mask is None else int(self._mask[rows].sum())

    def _mean_square(self, output: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of the difference [samples, tokens, width], without padding."""
        # what a projector returns has no padding
        if self._mask is not None and output.shape[1] == self._mask.shape[1]:
            valid = self._mask[rows].to(output.device)
            if not valid.all():
                output, target = output[valid], target[valid]
        return torch.nn.functional.mse_loss(output, target)

    @torch.no_grad()
    def advance(self, hidden: torch.Tensor) -> torch.Tensor:
        """Replace inputs [samples, seqlen, width] by the outputs of the block with the weights it holds now.

        In place: the states of a calibration set are what a run keeps most of in memory.
        """

        def step(piece: torch.Tensor) -> None:
            hidden[int(piece[0]) : int(piece[-1]) + 1] = self._run(hidden, piece).to(hidden)

        with self._substituted({}):
            self._map(step, torch.arange(len(hidden)))
        return hidden

    def _map(self, function: Callable[[torch.Tensor], T], rows: torch.Tensor) -> list[T]:
        return self._compute.map(function, rows, self._hidden.shape[1])

    def _run(
        self, hidden: torch.Tensor, piece: torch.Tensor, statistics: _InputStatistics | None = None
    ) -> torch.Tensor:
        """Output for some samples of `hidden`; autocast and weights in place are the caller's business."""
        if statistics is not None and self._mask is not None and self._call.shapes is None:
            statistics.valid = self._mask[piece].flatten().to(self._compute.device)
        return self._call.run(self._module, self._compute.fetch(hidden, piece, self._dtype), piece)

    def _stand_ins(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """What the block runs with instead of its own parameters, by local path; a list holds experts."""
        tensors: dict[str, torch.Tensor | list[torch.Tensor]] = dict(self._frozen)
        known = {**self._originals, **weights}
        for path, sites in self._paths.items():
            if sites[0].expert is not None:
                tensors[path] = [self._expert(path, group, weights) for group in by_expert(sites)]
            elif weights or not self._autocast:
                tensors[path] = self._operand(fuse(sites, known))
        return tensors

    def _expert(
        self, path: str, group: list[LinearSite], weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if not any(site.name in weights for site in group):
            return self._operand(self._parameters[path][group[0].expert])
        parts = [weights.get(site.name, self._originals[site.name]) for site in group]
        return self._operand(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _operand(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self._autocast else weight.float()

    @contextmanager
    def _substituted(self, weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """Let `weights` (and float32 gains and biases) stand in for the module's parameters.

        An instance attribute shadows the parameter of the same name; the parameter itself is not touched.
        """
        tensors = self._stand_ins(weights)
        splits = [path.rpartition(".") for path in tensors]
        owners = [(self._module.get_submodule(parent), attribute) for parent, _, attribute in splits]
        try:
            for (owner, attribute), tensor in zip(owners, tensors.values(), strict=True):
                owner.__dict__[attribute] = tensor
            yield tensors
        finally:
            for owner, attribute in owners:
                owner.__dict__.pop(attribute, None)

    @torch.no_grad()
    def input_mean_square(self) -> dict[str, torch.Tensor]:
        with self._substituted({}) as tensors:
            squares = self._watch_inputs(tensors).mean_squares()
        return {name: squares[name] for name in self.schemes}

    @torch.no_grad()
    def input_greatest(self) -> dict[str, torch.Tensor]:
        """Greatest magnitude that enters each layer on the quantized chain's input, float32 []; 0 if nothing did."""
        with self._substituted({}) as tensors:
            greatest = self._watch_inputs(tensors).greatest
        return {name: greatest[name] for name in self.schemes}

    def _watch_inputs(self, tensors: Mapping[str, Any]) -> _InputStatistics:
        statistics = _InputStatistics(self._module, self._paths, tensors, self._compute.device)
        with statistics.watching():
            self._map(lambda piece: self._run(self._hidden, piece, statistics), torch.arange(self.samples))
        return statistics

    @torch.no_grad()
    def write_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put dequantized weights into the module, in its own dtype."""
        for name, weight in weights.items():
            self._originals[name].copy_(weight)  # a view of the parameter


class _InputStatistics:
    """Squares and greatest magnitudes of what enters each layer: by hook, for fused experts by watching F.linear."""

    def __init__(
        self, module: torch.nn.Module, paths: Mapping[str, list[LinearSite]], tensors: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """tensors: what the module runs with, by the same paths."""
        self._module, self._paths = module, paths
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.greatest: dict[str, torch.Tensor] = {}
        self._experts: dict[int, list[LinearSite]] = {}
        self.valid: torch.Tensor | None = None  # bool [tokens] of what runs at the moment, None = all
        for path, sites in paths.items():
            for site in sites:
                self._sums[site.name] = torch.zeros(site.in_features, device=device)
                self._counts[site.name] = 0
                self.greatest[site.name] = torch.zeros((), device=device)
            if sites[0].expert is not None:
                groups = zip(tensors[path], by_expert(sites), strict=True)
                self._experts |= {matrix.data_ptr(): group for matrix, group in groups}

    def add(self, sites: list[LinearSite], inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        # experts are given a choice of the tokens, of which nobody here knows which are padding
        if self.valid is not None and len(self.valid) == len(inputs):
            inputs = inputs[self.valid]
        if not len(inputs):
            return
        squares = torch.linalg.vecdot(inputs, inputs, dim=0)
        greatest = inputs.abs().max()
        for site in sites:
            self.greatest[site.name] = torch.maximum(self.greatest[site.name], greatest)
            self._sums[site.name] += squares
            self._counts[site.name] += len(inputs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for path, sites in self._paths.items():
            if sites[0].expert is None:
                owner = self._module.get_submodule(path.rpartition(".")[0])
                handles.append(owner.register_forward_pre_hook(self._hook(sites)))
        try:
            with _WatchLinear(self._experts, self.add):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, sites: list[LinearSite]):
        return lambda module, args: self.add(sites, args[0])

    def mean_squares(self) -> dict[str, torch.Tensor]:
        return {name: total / max(1, self._counts[name]) for name, total in self._sums.items()}


class _WatchLinear(TorchFunctionMode):
    """Reports the input of each F.linear whose weight begins at one of the given addresses."""

    def __init__(self, addresses: Mapping[int, list[LinearSite]], report) -> None:
        super().__init__()
        self._addresses, self._report = addresses, report

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and args[1].data_ptr() in self._addresses:
            self._report(self._addresses[args[1].data_ptr()], args[0])
        return function(*args, **(kwargs or {}))
