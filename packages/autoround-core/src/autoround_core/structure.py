"""Finds blocks and linear layers by what modules are made of, not by the names of models.

The blocks are the largest list of modules that is not inside another list. Layers are the linear modules
inside them and the matrices of experts that Transformers keeps in one three-dimensional parameter. Every
other matrix of a block stays in 16 bits and is listed with the reason: nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from autoround_core.adapter import LinearSite
from autoround_core.checkpoint_names import aliases, expert_names, stored_names
from autoround_core.errors import UnsupportedError

_ROUTER = "decides which experts run"
_SHARED = "is used by more than one block"
_JOINED = "is stored as a part of another tensor"
_PRECISE = "is kept in float32 by Transformers"


def find_blocks(
    model: torch.nn.Module, inside: str = "", without: Sequence[str] = ()
) -> tuple[str, torch.nn.ModuleList]:
    """(path, list of blocks). inside: path of the module to look into. without: paths of those to leave out.

    Raises UnsupportedError when there is none.
    """
    found = model.get_submodule(inside).named_modules(prefix=inside)
    modules = [(name, module) for name, module in found
               if not any(f"{name}.".startswith(f"{path}.") for path in without)]
    lists = {name: module for name, module in modules if isinstance(module, torch.nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    largest = max(outermost, key=lambda name: _size(lists[name]), default=None)
    if largest is None or _size(lists[largest]) == 0:
        raise UnsupportedError(f"`{type(model).__name__}` has no list of like blocks to quantize")
    return largest, lists[largest]


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class SiteFinder:
    """Finds the layers of blocks; gathers in `kept` the matrices that stay in 16 bits and why."""

    def __init__(self, model: torch.nn.Module) -> None:
        own = dict(model.state_dict(keep_vars=True))
        self._model = model
        self._width = model.get_input_embeddings().weight.shape[1]
        self._stored = stored_names(model, own)
        self._first = {name: names[0] for names in aliases(own).values() if len(names) > 1 for name in names}
        self._precise = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        self.kept: dict[str, str] = {}

    def sites(self, block_name: str, block: torch.nn.Module) -> tuple[LinearSite, ...]:
        """The layers of one block, in the order of its modules."""
        modules = dict(block.named_modules(prefix=block_name))
        experts = {path: module for path, module in modules.items() if _is_experts(module)}
        routers = {path for name in (*experts, *_lists_of_experts(modules))
                   for path in self._routers(name, modules)}
        found: list[LinearSite] = []
        for path, module in modules.items():
            if path in experts:
                found += self._experts(path, module)
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if parameter.dim() < 2 or any(site.path == name for site in found):
                    continue
                reason = _ROUTER if path in routers else self._why_kept(name, module)
                if reason:
                    # a tied weight is stored under the first of its names
                    name = self._first.get(name, name)
                    self.kept[self._stored.get(name, name).removesuffix(".weight")] = reason
                else:
                    found.append(self.linear(path, module))
        return tuple(found)

    def linear(self, path: str, module: torch.nn.Module) -> LinearSite:
        """The site of a linear module."""
        transposed = _is_conv1d(module)
        shape = module.weight.shape[::-1] if transposed else module.weight.shape
        stored = self._stored.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
        return LinearSite(stored, path, "weight", shape[0], shape[1], transposed)

    def _why_kept(self, name: str, module: torch.nn.Module) -> str | None:
        if not name.endswith(".weight") or not (isinstance(module, torch.nn.Linear) or _is_conv1d(module)):
            return f"a {type(module).__name__} is no linear layer"
        if name in self._first:
            return _SHARED
        if any(f".{part}." in f".{name}." for part in self._precise):
            return _PRECISE
        return None if name in self._stored else _JOINED

    def _experts(self, path: str, module: torch.nn.Module) -> Iterator[LinearSite]:
        for parameter, parts in _fused_parameters(path, module):
            experts, rows, in_features = getattr(module, parameter).shape
            names = expert_names(self._model, f"{path}.{parameter}", experts, parts)
            if not names:
                raise UnsupportedError(f"checkpoints of this model keep the experts of `{path}` in one "
                                       "tensor, which no quantized format of ours can name yet")
            for (expert, part), name in sorted(names.items()):
                yield LinearSite(name, path, parameter, rows // parts, in_features,
                                 expert=expert, part=part, parts=parts)

    def _routers(self, experts: str, modules: dict[str, torch.nn.Module]) -> Iterator[str]:
        """Modules beside `experts` that decide among them: what has a number per expert (or one number, a
        gate) and nothing that leads back to the width of the model.
        """
        parent = experts.rpartition(".")[0]
        count = _count(modules[experts])
        for name in {f"{parent}.{child}" for child, _ in modules[parent].named_children()} - {experts}:
            inside = {path: module for path, module in modules.items() if f"{path}.".startswith(f"{name}.")}
            rows = {module.weight.shape[0] for module in inside.values() if _has_matrix(module)}
            if rows & {1, count} and self._width not in rows:
                yield from inside


def _has_matrix(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and weight.dim() == 2


def _is_conv1d(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_experts(module: torch.nn.Module) -> bool:
    """Whether a module keeps all its experts in three-dimensional parameters, as Transformers 5 does."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.dim() == 3


def _lists_of_experts(modules: dict[str, torch.nn.Module]) -> list[str]:
    """Experts kept in other ways: a list of modules, or a three-dimensional weight of no convolution."""
    return [
        path for path, module in modules.items()
        if isinstance(module, torch.nn.ModuleList)
        or (isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter) and weight.dim() == 3
            and not isinstance(module, torch.nn.modules.conv._ConvNd))
    ]


def _count(experts: torch.nn.Module) -> int:
    if isinstance(experts, torch.nn.ModuleList):
        return len(experts)
    return next(parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.dim() == 3)


def _fused_parameters(path: str, module: torch.nn.Module) -> list[tuple[str, int]]:
    """(parameter, slices along the output) of an experts module whose matrices are [out, in]."""
    parameters = dict(module.named_parameters(recurse=False))
    name, parts = ("gate_up_proj", 2) if "gate_up_proj" in parameters else ("up_proj", 1)
    first, down = parameters.get(name), parameters["down_proj"]
    # what goes in comes out, and the slices of one are the input of the other
    if first is None or first.shape[2] != down.shape[1] or first.shape[1] != parts * down.shape[2]:
        raise UnsupportedError(f"the experts of `{path}` are not stored as one [out, in] matrix each, "
                               "which is not supported yet")
    return [(name, parts), ("down_proj", 1)]
