"""What all models that Transformers can build have in common: loaded, looked into, written and filled again.

What is a block and what is a layer is decided by structure (`structure`), what each is called in a checkpoint
by Transformers' own conversion (`checkpoint_names`); no model is known by its name.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from autoround_core.adapter import BlockView, LinearSite, ModelAdapter, ModelView, fuse
from autoround_core.attention import tuning_attention
from autoround_core.checkpoint_names import aliases, assembled, stored_names, to_checkpoint
from autoround_core.compute import product_dtype
from autoround_core.errors import ModelError
from autoround_core.serving_attention import serve_in_float32
from autoround_core.structure import SiteFinder, find_blocks

_log = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


class TransformersAdapter(ModelAdapter):
    """A model class of Transformers whose blocks are those of a language model, the whole or a part of it."""

    @abstractmethod
    def auto_class(self, config: Any) -> Any:
        """The class with `from_pretrained` and `from_config` for a Transformers configuration."""

    def config(self, path: Path, *, trust_remote_code: bool) -> Any:
        """The configuration that the model is built from, without a section on quantization."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def language_tower(self, model: torch.nn.Module) -> str:
        """Path of the module that holds the blocks; "" = they may lie anywhere in the model."""
        return ""

    def other_towers(self, model: torch.nn.Module) -> Sequence[str]:
        """Paths of the parts for images and sound."""
        return ()

    def nontext(self, model: torch.nn.Module, finder: SiteFinder) -> tuple[tuple[BlockView, ...], ...]:
        """The chains of blocks outside the language tower. finder: gathers what of them is never quantized."""
        return ()

    def load(self, path: Path, *, trust_remote_code: bool) -> torch.nn.Module:
        with readable(path), quiet():
            config = self.config(path, trust_remote_code=trust_remote_code)
            model, info = self.auto_class(config).from_pretrained(
                path, config=config, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
        # Transformers fills what is missing with random numbers and drops what it does not know
        if info["missing_keys"]:
            raise ModelError(f"`{path}` has no weights for {_some(info['missing_keys'])}")
        if info["unexpected_keys"]:
            names = _some(info["unexpected_keys"])
            _log.warning("%s: the model does not use, and the result will not hold, %s", path, names)
        return model

    def skeleton(
        self, path: Path, *, trust_remote_code: bool, dtype: torch.dtype | None = None
    ) -> torch.nn.Module:
        from accelerate import init_empty_weights

        with readable(path), quiet():
            config = self.config(path, trust_remote_code=trust_remote_code)
            # parameters without memory, buffers (rotary frequencies) computed as usual
            with init_empty_weights(include_buffers=False):
                model = self.auto_class(config).from_config(
                    config, dtype=dtype or config.dtype or torch.bfloat16, trust_remote_code=trust_remote_code
                )
        return model

    def view(self, model: torch.nn.Module) -> ModelView:
        self.prepare(model)
        list_name, blocks = find_blocks(model, self.language_tower(model), self.other_towers(model))
        finder, others = SiteFinder(model), SiteFinder(model)
        nontext = self.nontext(model, others)
        views = tuple(
            BlockView(f"{list_name}.{i}", block, finder.sites(f"{list_name}.{i}", block))
            for i, block in enumerate(blocks)
        )
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {module: name for name, module in model.named_modules()}
        looked_up = finder.linear(names[embedding], embedding) if isinstance(embedding, torch.nn.Embedding) else None
        linear = isinstance(head, torch.nn.Linear)
        tied = linear and embedding is not None and head.weight is embedding.weight
        site = finder.linear(names[head], head) if linear and not tied else None
        return ModelView(model, views, site, tied, finder.kept, looked_up, nontext, others.kept)

    def prepare(self, model: torch.nn.Module) -> None:
        """Put a model into the state that tuning needs."""
        model.eval()
        model.tie_weights()
        if model._can_set_experts_implementation():
            # one matrix product per expert: the grouped kernels cannot be followed weight by weight
            model.set_experts_implementation("eager")

    def tuning(self, model: torch.nn.Module, device: torch.device) -> AbstractContextManager[None]:
        return tuning_attention(model) if device.type == "cpu" else nullcontext()

    def serve(self, model: torch.nn.Module, device: torch.device) -> None:
        if device.type == "cpu" and product_dtype(torch.bfloat16, device, None) == torch.float32:
            serve_in_float32(model)

    def rest(self, view: ModelView, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        sites = view.all_sites()
        chosen = [site for site in sites if site.name in quantized]
        taken = {site.path for site in chosen}
        taken |= {f"{site.module}.bias" for site in chosen if view.bias(site) is not None}
        own = view.model.state_dict(keep_vars=True)
        # a tied weight appears under each of its names and is stored under the first
        first = [names[0] for names in aliases(own).values()]
        plain = {name: own[name].detach() for name in first if name not in taken}
        yield from to_checkpoint(view.model, plain).items()
        # some experts of a fused parameter may stay in 16 bits while their siblings are quantized
        for site in sites:
            if site.path in taken and site.name not in quantized:
                yield f"{site.name}.weight", site.read(view.parameter(site)).detach()

    def fill(self, view: ModelView, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        model = view.model
        fused: dict[str, list[LinearSite]] = {}
        for site in view.all_sites():
            if site.expert is not None:
                fused.setdefault(site.path, []).append(site)
        own = model.state_dict(keep_vars=True)
        # a checkpoint may keep all experts of a layer in one tensor, as long as none is quantized
        single = {path: {site.name: tensors.get(f"{site.name}.weight") for site in sites}
                  for path, sites in fused.items()}
        fused = {path: sites for path, sites in fused.items() if any(w is not None for w in single[path].values())}
        whole = {name: tensor for name, tensor in own.items() if name not in fused}
        names = stored_names(model, whole)
        odd = {name: tensor for name, tensor in whole.items() if name not in names}
        pieced = assembled(model, odd, tensors)
        missing = []
        for name, parameter in own.items():
            if name in fused:
                complete = all(weight is not None for weight in single[name].values())
                tensor = fuse(fused[name], single[name]) if complete else None
            else:
                tensor = tensors.get(names[name]) if name in names else pieced.get(name)
            if tensor is not None:
                _assign(model, name, tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor)
            elif parameter.is_meta:
                missing.append(name)
        model.tie_weights()
        filled = model.state_dict()
        return [name for name in missing if filled[name].is_meta]

    def unexpected(self, view: ModelView, names: Iterable[str]) -> list[str]:
        model = view.model
        fused = {site.path for site in view.all_sites() if site.expert is not None}
        own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in fused}
        stored = stored_names(model, own)
        if len(stored) < len(own):
            return []  # some are stored in pieces, whose names nobody knows beforehand
        whole = (name for path in fused for name in to_checkpoint(model, {path: model.get_parameter(path).to("meta")}))
        known = {*stored.values(), *whole, *(f"{site.name}.weight" for site in view.all_sites())}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        return [name for name in names
                if name not in known and not any(re.search(pattern, name) for pattern in ignored)]

    def tokenizer(self, path: Path, *, trust_remote_code: bool) -> Any | None:
        from transformers import AutoTokenizer

        # asked for a directory without one, Transformers makes up a tokenizer that knows no word
        if not any(file.name.startswith(_TOKENIZER_FILES) for file in path.iterdir()):
            return None
        with readable(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def takes_images(config: Mapping[str, Any]) -> bool:
    """Whether Transformers builds a model of images and text from this config.json."""
    from transformers.models.auto import modeling_auto as auto

    known = {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    return config.get("model_type") in known


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers' own bars and load report off the screen: what matters of them is said here."""
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


class readable:
    """Turns what Transformers raises for a directory it cannot read into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        # SafetensorError is raised bare by the Rust library and has no common root with the others
        expected = isinstance(error, (OSError, ValueError, KeyError))
        if error is not None and (expected or kind.__name__ == "SafetensorError"):
            first = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
            if "trust_remote_code" in str(error):
                first = "it needs code of its own; read that code, then pass --trust_remote_code"
            raise ModelError(f"cannot load `{self._path}`: {first}") from error


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
