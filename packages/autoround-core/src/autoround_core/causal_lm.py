"""Any decoder that Transformers can build, found by structure and not by a list of names.

The blocks are the largest list of modules that is not inside another list; the layers are the linear
modules inside them and the experts that Transformers 5 keeps in one three-dimensional parameter.
Checkpoint names come from Transformers' own conversion, asked with tiny numbered tensors, so that an
expert is called what every engine calls it (`experts.3.gate_proj`, or `w1` in Mixtral).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autoround_core.adapter import BlockView, LinearSite, ModelAdapter, ModelView, fuse
from autoround_core.errors import ModelError, UnsupportedError

_log = logging.getLogger(__name__)
_ROUTER = "decides which experts run"


class CausalLM(ModelAdapter):
    """Decoder-only language models of Transformers."""

    def load(self, path: Path, *, trust_remote_code: bool) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        with _readable(path), _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
        # Transformers fills what is missing with random numbers and drops what it does not know
        if info["missing_keys"]:
            raise ModelError(f"`{path}` has no weights for {_some(info['missing_keys'])}")
        if info["unexpected_keys"]:
            _log.warning("%s: the model does not use, and the result will not hold, %s", path, _some(info["unexpected_keys"]))
        return _prepare(model)

    def skeleton(self, path: Path, *, trust_remote_code: bool, dtype: torch.dtype | None = None) -> torch.nn.Module:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        with _readable(path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            # parameters without memory, buffers (rotary frequencies) computed as usual
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype or config.dtype or torch.bfloat16, trust_remote_code=trust_remote_code
                )
        return _prepare(model)

    def view(self, model: torch.nn.Module) -> ModelView:
        list_name, blocks = _find_blocks(model)
        finder = _SiteFinder(model)
        views = tuple(
            BlockView(f"{list_name}.{i}", block, finder.sites(f"{list_name}.{i}", block))
            for i, block in enumerate(blocks)
        )
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head_name = next((name for name, module in model.named_modules() if module is head), None)
        embedding = model.get_input_embeddings()
        tied = head is not None and embedding is not None and head.weight is embedding.weight
        site = finder.linear(head_name, head) if head_name and isinstance(head, torch.nn.Linear) else None
        return ModelView(model, views, None if tied else site, tied, finder.kept)

    def rest(self, view: ModelView, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        sites = [*view.sites(), *([view.head] if view.head else [])]
        chosen = [site for site in sites if site.name in quantized]
        taken = {site.path for site in chosen}
        taken |= {f"{site.module}.bias" for site in chosen if view.bias(site) is not None}
        seen: set[int] = set()
        plain = {}
        for name, tensor in view.model.state_dict(keep_vars=True).items():
            # a tied weight appears under each of its names and is stored once
            if name not in taken and id(tensor) not in seen:
                seen.add(id(tensor))
                plain[name] = tensor.detach()
        yield from _checkpoint_names(view.model, plain).items()
        # some experts of a fused parameter may stay in 16 bits while their siblings are quantized
        for site in sites:
            if site.path in taken and site.name not in quantized:
                yield f"{site.name}.weight", site.read(view.parameter(site)).detach().contiguous()

    def fill(self, view: ModelView, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        model = view.model
        fused: dict[str, list[LinearSite]] = {}
        for site in view.sites():
            if site.expert is not None:
                fused.setdefault(site.path, []).append(site)
        own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        names = {name: stored for stored, name in _numbered_names(model, own).items()}
        missing = []
        for name, parameter in own.items():
            if name in fused:
                weights = {site.name: tensors.get(f"{site.name}.weight") for site in fused[name]}
                tensor = None if None in weights.values() else fuse(fused[name], weights)
            else:
                tensor = tensors.get(names.get(name, name))
            if tensor is not None:
                _assign(model, name, tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor)
            elif parameter.is_meta:
                missing.append(name)
        model.tie_weights()
        return [name for name in missing if model.state_dict()[name].is_meta]

    def tokenizer(self, path: Path, *, trust_remote_code: bool) -> Any:
        from transformers import AutoTokenizer

        with _readable(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers' own bars and load report off the screen: what matters of them is checked and said here."""
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class _readable:
    """Turns what Transformers raises for a directory it cannot read into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        # SafetensorError is raised bare by the Rust library and has no common root with the others
        if error is not None and (isinstance(error, (OSError, ValueError, KeyError)) or kind.__name__ == "SafetensorError"):
            first = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
            if "trust_remote_code" in str(error):
                first = "it needs code of its own; read that code, then pass --trust_remote_code"
            raise ModelError(f"cannot load `{self._path}`: {first}") from error


def _prepare(model: torch.nn.Module) -> torch.nn.Module:
    # names as a fresh skeleton of this class has them, whatever prefix the source used
    model.tie_weights()
    model._weight_conversions = None
    if model._can_set_experts_implementation():
        # one matrix product per expert: the grouped kernels cannot be followed weight by weight
        model.set_experts_implementation("eager")
    return model.eval()


def _find_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    names = {name for name, _ in lists}
    outermost = [
        (name, module) for name, module in lists
        if not any(name.startswith(f"{other}.") for other in names)
    ]
    sizes = [(sum(p.numel() for p in module.parameters()), name, module) for name, module in outermost]
    if not sizes or max(sizes, key=lambda item: item[0])[0] == 0:
        raise UnsupportedError(f"`{type(model).__name__}` has no list of like blocks to quantize")
    _, name, module = max(sizes, key=lambda item: item[0])
    return name, module


class _SiteFinder:
    """Finds the layers of blocks; gathers in `kept` the matrices that stay in 16 bits and why."""

    def __init__(self, model: torch.nn.Module) -> None:
        own = dict(model.state_dict(keep_vars=True))
        self._names = {name: stored for stored, name in _numbered_names(model, own).items()}
        self._expert_names = _expert_names(model)
        self.kept: dict[str, str] = {}

    def sites(self, name: str, block: torch.nn.Module) -> tuple[LinearSite, ...]:
        found: list[LinearSite] = []
        routers = set()
        for path, module in block.named_modules(prefix=name):
            if _is_experts(module):
                found += self._experts(path, module)
                # what sits beside the experts decides among them
                routers |= {f"{path.rpartition('.')[0]}.{child}" for child, _ in
                            block.get_submodule(path.rpartition(".")[0][len(name) + 1:]).named_children()}
        for path, module in block.named_modules(prefix=name):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 2:
                continue
            if path in routers:
                self.kept[self._stored(path)] = _ROUTER
            elif isinstance(module, torch.nn.Linear) or _is_conv1d(module):
                found.append(self.linear(path, module))
            else:
                self.kept[self._stored(path)] = f"a {type(module).__name__} is no linear layer"
        return tuple(found)

    def linear(self, path: str, module: torch.nn.Module) -> LinearSite:
        transposed = _is_conv1d(module)
        shape = module.weight.shape[::-1] if transposed else module.weight.shape
        return LinearSite(self._stored(path), path, "weight", shape[0], shape[1], transposed)

    def _stored(self, path: str) -> str:
        return self._names.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")

    def _experts(self, path: str, module: torch.nn.Module) -> list[LinearSite]:
        if not getattr(module, "is_concatenated", True):
            raise UnsupportedError(f"`{path}` interleaves gate and up of its experts, which is not supported yet")
        sites = []
        for parameter, parts in _fused_parameters(module):
            shape = getattr(module, parameter).shape
            transposed = module.is_transposed
            out_features, in_features = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
            for expert in range(shape[0]):
                for part in range(parts):
                    name = self._expert_names[f"{path}.{parameter}", expert, part]
                    sites.append(LinearSite(name, path, parameter, out_features // parts, in_features,
                                            transposed, expert, part, parts))
        return sites


def _is_conv1d(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_experts(module: torch.nn.Module) -> bool:
    """Whether a module keeps all its experts in three-dimensional parameters, as Transformers 5 does."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.dim() == 3


def _fused_parameters(module: torch.nn.Module) -> list[tuple[str, int]]:
    """(parameter, slices along the output) of an experts module."""
    return [("gate_up_proj", 2) if module.has_gate else ("up_proj", 1), ("down_proj", 1)]


def _checkpoint_names(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _numbered_names(model: torch.nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """{checkpoint name: parameter name} for every tensor but fused experts, by sending numbers through the conversion."""
    names = [name for name, tensor in own.items() if tensor.dim() != 3]
    numbered = {name: torch.full((1, 1), i, dtype=torch.int64) for i, name in enumerate(names)}
    return {stored: names[int(tensor)] for stored, tensor in _checkpoint_names(model, numbered).items()
            if tensor.numel() == 1}


def _expert_names(model: torch.nn.Module) -> dict[tuple[str, int, int], str]:
    """{(parameter, expert, part): checkpoint name without `.weight`} of all fused experts."""
    names: dict[tuple[str, int, int], str] = {}
    for path, module in model.named_modules():
        if not _is_experts(module):
            continue
        for parameter, parts in _fused_parameters(module):
            full, experts = f"{path}.{parameter}", getattr(module, parameter).shape[0]
            numbers = torch.arange(experts * parts).view(experts, parts, 1)
            stored = _checkpoint_names(model, {full: numbers})
            if len(stored) != experts * parts:
                raise UnsupportedError(f"checkpoints of this model keep the experts of `{path}` in one tensor, "
                                       "which no quantized format of ours can name yet")
            for name, number in stored.items():
                names[full, int(number) // parts, int(number) % parts] = name.removesuffix(".weight")
    return names


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    if tuple(old.shape) != tuple(tensor.shape):
        raise ModelError(f"`{name}` must be {tuple(old.shape)}, the checkpoint holds {tuple(tensor.shape)}")
    if isinstance(old, torch.nn.Parameter):
        module.register_parameter(attribute, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(attribute, tensor)
