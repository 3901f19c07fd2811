"""A block of a real model in the shape that algorithms ask for.

No module is wrapped or replaced: the block runs as a function of its parameters (torch.func), and fake-quantized
weights are handed in by name. That serves linear layers, GPT-2's transposed ones and fused experts alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from autoround_core.adapter import LinearSite, fuse
from autoround_core.algorithm import Block
from autoround_core.capture import BlockCall
from autoround_core.family import NumberFamily
from autoround_core.scheme import QuantScheme


class ModelBlock(Block):
    """A module, its sites, how it is called, and its two chains of hidden states."""

    def __init__(
        self, name: str, module: torch.nn.Module, sites: tuple[LinearSite, ...], call: BlockCall, *,
        schemes: Mapping[str, QuantScheme], families: Mapping[str, NumberFamily], compute: Compute,
    ) -> None:
        self.name = name
        self.schemes = schemes
        self.families = families
        self.samples = 0
        self._module, self._call, self._compute = module, call, compute
        self._prefix = len(name) + 1
        self._paths: dict[str, list[LinearSite]] = {}
        for site in sites:
            if any(other.name in schemes for other in sites if other.path == site.path):
                self._paths.setdefault(self._local(site), []).append(site)
        parameters = dict(module.named_parameters())
        self._originals = {
            site.name: site.read(parameters[path]).detach() for path, group in self._paths.items() for site in group
        }
        # only weights handed to `forward` need a gradient. Gains and biases meet the float32 residual stream in
        # float32: products of two dtypes take a slow path
        self._frozen = {
            path: parameter.detach().float() if parameter.dim() < 2 else parameter.detach()
            for path, parameter in parameters.items() if path not in self._paths
        }
        self._weights = {name: weight for name, weight in self._originals.items() if name in schemes}
        self._hidden = self._original = torch.empty(0)
        self._targets_given = True

    def _local(self, site: LinearSite) -> str:
        """Name of the site's parameter within the block (the block itself may be the linear layer: lm_head)."""
        return site.path[self._prefix :]

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._weights

    def set_chains(self, original: torch.Tensor, quantized: torch.Tensor, *, targets_given: bool) -> None:
        """quantized: inputs of the quantized chain. original: what the original block makes of the original chain if
        `targets_given`, else that chain's inputs, from which targets are computed whenever they are asked for.
        """
        self._original, self._hidden, self._targets_given = original, quantized, targets_given
        self.samples = len(quantized)

    def forward(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        weights = {**self._originals, **weights}
        fused = {path: fuse(sites, weights) for path, sites in self._paths.items()}
        return self._run(self._hidden, rows, fused)

    def target(self, rows: torch.Tensor) -> torch.Tensor:
        if self._targets_given:
            return self._compute.fetch(self._original, rows)
        with torch.no_grad():
            return self._run(self._original, rows)

    @torch.no_grad()
    def advance(self, hidden: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Replace the inputs [samples, seqlen, width] by the outputs of the block with the weights it holds now.

        In place: the states of a calibration set are what a run keeps most of in memory.
        """
        for rows in torch.arange(len(hidden)).split(batch_size):
            hidden[rows.to(hidden.device)] = self._run(hidden, rows).to(hidden)
        return hidden

    def _run(
        self, hidden: torch.Tensor, rows: torch.Tensor, fused: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Output for the samples `rows` of `hidden`, with the parameters `fused` in place of the module's own."""
        parameters = self._frozen | dict(fused or {})

        def forward(*args, **kwargs):
            return torch.func.functional_call(self._module, parameters, args, kwargs)

        with self._compute.autocast():
            return self._call.run(forward, self._compute.fetch(hidden, rows), rows)

    @torch.no_grad()
    def input_mean_square(self) -> dict[str, torch.Tensor]:
        statistics = _InputSquares(self._module, self._paths)
        with statistics.watching():
            for rows in torch.arange(self.samples).split(1):
                self._run(self._hidden, rows)
        squares = statistics.mean_squares()
        return {name: squares[name] for name in self.schemes}

    @torch.no_grad()
    def write_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put dequantized weights into the module, in its own dtype."""
        parameters = dict(self._module.named_parameters())
        for path, sites in self._paths.items():
            for site in sites:
                if site.name in weights:
                    site.read(parameters[path]).copy_(weights[site.name])


class Compute:
    """Where and how precisely blocks run. device: of the tuned block. storage: of hidden states between blocks."""

    def __init__(self, device: torch.device, storage: torch.device, dtype: torch.dtype) -> None:
        self.device, self.storage, self.dtype = device, storage, dtype

    def autocast(self):
        """Matrix products in `dtype`; the residual stream, norms and errors stay in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def fetch(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return hidden[rows.to(hidden.device)].to(self.device)


class _InputSquares:
    """Sums the squares of what enters each linear layer: by hook, and for fused experts by watching F.linear."""

    def __init__(self, module: torch.nn.Module, paths: Mapping[str, list[LinearSite]]) -> None:
        self._module, self._paths = module, paths
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        parameters = dict(module.named_parameters())
        self._experts: dict[int, list[LinearSite]] = {}
        for path, sites in paths.items():
            for site in sites:
                self._sums[site.name] = torch.zeros(site.in_features, device=parameters[path].device)
                self._counts[site.name] = 0
                if site.expert is not None:
                    address = parameters[path][site.expert].data_ptr()
                    self._experts.setdefault(address, []).append(site)

    def add(self, sites: list[LinearSite], inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        squares = torch.linalg.vecdot(inputs, inputs, dim=0)
        for site in sites:
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
