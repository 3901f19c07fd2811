"""Models of images and text: which part is the language tower, and which parts stand outside it.

Nothing is known by a name. A configuration holds one configuration for each part, and the part is the module that was
built with it; so the language tower is the module with the text configuration, a vision or audio tower one with any
other. What is left, between the towers, are projectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from autoround_core import BlockView, CalibrationSet, ModelError, TransformersAdapter
from autoround_core.checkpoint_names import follow_names, stored_names
from autoround_core.shards import TensorFiles
from autoround_core.structure import SiteFinder
from autoround_core.transformers_adapter import quiet, readable

DEFAULT_DATASET = "synthetic"
# models that speak besides, by model_type: the module that takes images and text
_ENTRIES = {"qwen2_5_omni": "thinker", "qwen3_omni_moe": "thinker"}


class ImageTextLM(TransformersAdapter):
    """Whatever `AutoModelForImageTextToText` or `AutoModelForMultimodalLM` builds around a decoder."""

    def auto_class(self, config: Any) -> Any:
        from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

        known = type(config) in AutoModelForImageTextToText._model_mapping
        return AutoModelForImageTextToText if known else AutoModelForMultimodalLM

    def load(self, path: Path, *, trust_remote_code: bool) -> torch.nn.Module:
        with readable(path):
            config = self.config(path, trust_remote_code=trust_remote_code)
        if config.model_type not in _ENTRIES:
            return super().load(path, trust_remote_code=trust_remote_code)
        # their own `from_pretrained` cannot say what is missing
        with readable(path), quiet():
            model = self.auto_class(config).from_pretrained(path, dtype="auto", trust_remote_code=trust_remote_code)
        stored = set(TensorFiles(path).names())
        if missing := [name for name in stored_names(model, model.state_dict()).values() if name not in stored]:
            raise ModelError(f"`{path}` has no weights for `{min(missing)}`")
        return model

    def skeleton(self, path: Path, *, trust_remote_code: bool, dtype: torch.dtype | None = None) -> torch.nn.Module:
        model = super().skeleton(path, trust_remote_code=trust_remote_code, dtype=dtype)
        if any(path.glob("model*.safetensors")):
            self.follow(model, TensorFiles(path).names())
        return model

    def prepare(self, model: torch.nn.Module) -> None:
        super().prepare(model)
        if entry := _entry(model):
            inner = model.get_submodule(entry)
            for name in ("forward", "get_input_embeddings", "get_output_embeddings"):
                setattr(model, name, getattr(inner, name))

    def follow(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        follow_names(model, names)

    def language_tower(self, model: torch.nn.Module) -> str:
        text = model.get_submodule(_entry(model)).config.get_text_config()
        # the first is the outermost; the model itself where its configuration is that of the text too
        return next((path for path, module in _parts(model) if module.config is text), "")

    def other_towers(self, model: torch.nn.Module) -> list[str]:
        """Paths of the outermost parts that are built with a configuration of their own, not that of the text."""
        language, found = self.language_tower(model), []
        for path, module in _parts(model):
            outer = f"{language}.".startswith(f"{path}.")
            inner = any(f"{path}.".startswith(f"{tower}.") for tower in found)
            shared = module.config is model.config or module.config is model.get_submodule(language).config
            if not (outer or inner or shared):
                found.append(path)
        return found

    def nontext(self, model: torch.nn.Module, finder: SiteFinder) -> tuple[tuple[BlockView, ...], ...]:
        language, towers = self.language_tower(model), self.other_towers(model)
        ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
        ends.add(id(model.get_submodule(language)))
        # a language tower may hold the others
        inner = f"{language}." if language else ""
        starts = [_entry(model), *(path for path in towers if f"{path}.".startswith(inner))]
        chains = (chain for path in starts for chain in _chains(path, model.get_submodule(path), ends))
        views = (tuple(BlockView(path, block, finder.sites(path, block)) for path, block in chain) for chain in chains)
        # what has matrices but no linear layer (a convolution over patches) has told `finder` why they are kept
        return tuple(chain for chain in views if any(block.sites for block in chain))

    def calibration_set(
        self, dataset: Any, processor: Any, path: Path | None, *, nsamples: int, seqlen: int, seed: int,
        skip_bad_samples: bool, trust_remote_code: bool,
    ) -> CalibrationSet:
        from autoround_mllm.samples import image_text_samples

        processor = self._processor(processor, path, trust_remote_code=trust_remote_code)
        return image_text_samples(
            DEFAULT_DATASET if dataset is None else dataset, processor, processor.tokenizer,
            nsamples=nsamples, seqlen=seqlen, seed=seed, skip_bad_samples=skip_bad_samples,
        )

    def probe_inputs(
        self, model: torch.nn.Module, processor: Any, path: Path | None, *, trust_remote_code: bool
    ) -> dict[str, Any]:
        """A drawn image and what is said of it."""
        from autoround_mllm.drawings import drawings
        from autoround_mllm.samples import encode

        processor = self._processor(processor, path, trust_remote_code=trust_remote_code)
        sample = encode(next(drawings("evaluation")), processor, processor.tokenizer)
        return {"input_ids": sample.ids[None], "attention_mask": sample.mask[None].long(), **sample.extras}

    def tokenizer(self, path: Path, *, trust_remote_code: bool) -> Any | None:
        from autoround_mllm.processor import load_processor

        found = load_processor(path, trust_remote_code=trust_remote_code)
        return super().tokenizer(path, trust_remote_code=trust_remote_code) if found is None else found.tokenizer

    def _processor(self, given: Any, path: Path | None, *, trust_remote_code: bool) -> Any:
        from autoround_mllm.processor import load_processor

        found = given
        if found is None and path is not None:
            found = load_processor(path, trust_remote_code=trust_remote_code)
        if found is None:
            where = f"`{path}` has no processor (preprocessor_config.json)" if path else "no processor was given"
            raise ModelError(f"{where}; calibration with images needs the one of the original model")
        return found


def _entry(model: torch.nn.Module) -> str:
    """Path of what takes images and text: as a rule the model itself."""
    return _ENTRIES.get(model.config.model_type, "")


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules inside the model with a configuration, outermost first."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and path:
            yield path, module


def _chains(path: str, module: torch.nn.Module, ends: set[int]) -> Iterator[list[tuple[str, torch.nn.Module]]]:
    """Lists of blocks, and all else that has matrices one by one; not what is in `ends`."""
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    if _is_list_of_blocks(module):
        yield children
    elif id(module) in ends or not any(parameter.dim() > 1 for parameter in module.parameters()):
        return
    elif path and not any(id(part) in ends or _is_list_of_blocks(part) for part in module.modules()) and not isinstance(
        module, torch.nn.ModuleList
    ):
        yield [(path, module)]
    else:
        for child_path, child in children:
            yield from _chains(child_path, child, ends)


def _is_list_of_blocks(module: torch.nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, torch.nn.ModuleList) and len(module) > 0 and all(
        isinstance(child, GradientCheckpointingLayer) for child in module
    )
