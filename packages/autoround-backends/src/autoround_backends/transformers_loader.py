"""`from_pretrained` of Transformers for checkpoints of quant_method auto-round, gptq and awq, with our kernels.

Transformers builds the model and loads what is not quantized. Quantized layers are taken out before, so that nobody
fills them with random numbers, and put back afterwards as modules of our backends, made from the records that the
checkpoint's own format reads. Experts that Transformers keeps in one tensor are dequantized.

To import this module is to register it, whoever loaded these checkpoints before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import AutoRoundConfig, GPTQConfig

from autoround_core import (
    CheckpointError,
    CheckpointReader,
    LinearSite,
    TensorFiles,
    UnsupportedError,
    get_registry,
    select_backend,
)
from autoround_core.adapter import fuse
from autoround_core.backend import AUTO, Backend
from autoround_core.loading import find_format, spec_of, speed_up_dense

_INITIALIZED = "_is_hf_initialized"  # how Transformers marks what it need not fill with random numbers
METHODS = ("auto-round", "gptq", "awq")


class Pending(torch.nn.Module):
    """Where a quantized layer will be: nothing that Transformers could load or initialize."""

    def __init__(self, site: LinearSite) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        setattr(self, _INITIALIZED, True)
        # some models initialize the weights of their layers by name
        self.weight = torch.empty(0, device="cpu")
        setattr(self.weight, _INITIALIZED, True)


class AutoRoundLoader(HfQuantizer):
    """One instance loads one model, and saves it again."""

    requires_calibration = True  # Transformers: a model that is not quantized yet is refused

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not get_registry().formats():
            raise CheckpointError("no checkpoint format is installed; pip install autoround-export")

    def update_device_map(self, device_map: Any) -> Any:
        """One device for all, which "auto" and its like choose here; several are refused."""
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len({str(place) for place in places}) > 1 or "disk" in places:
            named = sorted(map(str, places))
            raise UnsupportedError(f"quantized layers load onto one device, device_map names {named}")
        return device_map

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not checkpoint_files:
            raise CheckpointError("a quantized model can only be loaded from files")
        self._directory = Path(checkpoint_files[0]).parent
        self._reader: CheckpointReader = find_format(self._directory).read(self._directory)
        self._original_config = json.loads((self._directory / "config.json").read_text(encoding="utf-8"))
        self._sites = self._find_sites(model)
        for site in self._sites.values():
            if site.expert is None:
                model.set_submodule(site.module, Pending(site))
        # the packed tensors are ours to read, and the experts ours to fill
        # under the names that the checkpoint has, and those of the model
        packed = {_pattern(name) for name in self._reader.layer_names()}
        packed |= {_pattern(site.module) for site in self._sites.values() if site.expert is None}
        packed |= {rf"\.{kind}$" for kind in self._kinds() - {"weight", "bias"}}  # under names that are changed first
        experts = {re.escape(path) + "$" for path in self._experts}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *packed}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *experts}

    def _find_sites(self, model: Any) -> dict[str, LinearSite]:
        """The place of each quantized layer by its name in the checkpoint."""
        adapter = get_registry().adapter(self._original_config)
        experts = getattr(model.config, "_experts_implementation", None)
        with torch.device("cpu"):  # Transformers builds the model under the device meta
            adapter.follow(model, TensorFiles(self._directory).names())
            view = adapter.view(model)
        if experts:
            model.set_experts_implementation(experts)
        sites = {site.name: site for site in view.all_sites() if site is not view.embedding}
        inner = (*view.nontext_sites(), *view.sites())
        self._linears = {site.module for site in inner if site.expert is None}
        prefix = f"{model.base_model_prefix}."
        found = {}
        for name in self._reader.layer_names():
            # a model without its head knows the layers without the prefix
            site = sites.get(name) or sites.get(name.removeprefix(prefix))
            if site is not None:
                found[name] = site
            elif model.get_output_embeddings() is not None or name != "lm_head":
                raise CheckpointError(f"`{self._directory}` holds a quantized layer `{name}` that is not in the model")
        # one quantized expert, and all are ours: Transformers cannot join packed ones and others
        ours = any(site.expert is not None for site in found.values())
        self._experts: dict[str, list[LinearSite]] = {}
        for site in sites.values():
            if ours and site.expert is not None:
                self._experts.setdefault(site.path, []).append(site)
        return found

    def _kinds(self) -> set[str]:
        """Last parts of the names of packed tensors."""
        layers = set(self._reader.layer_names())
        names = (name.rpartition(".") for name in TensorFiles(self._directory).names())
        return {kind for owner, _, kind in names if owner in layers}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without those that join experts, when we do."""
        return [conversion for conversion in super().update_weight_conversions(weight_conversions, model)
                if not (isinstance(conversion, WeightConverter) and self._joins_experts(conversion))]

    def _joins_experts(self, conversion: WeightConverter) -> bool:
        targets = conversion._original_target_patterns
        return any(re.search(f"{target}$", path) for target in targets for path in self._experts)

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Transformers would go on with random numbers, which are right for the new head of another task only
        needed = [part for part in (model.base_model, model.get_output_embeddings()) if part is not None]
        loaded = {id(parameter) for part in needed for parameter in part.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in loaded and name not in self._experts and not getattr(parameter, _INITIALIZED, False):
                raise CheckpointError(f"`{self._directory}` has no weights for `{name}`")
        # as it was written: the classes of Transformers forget what they do not know
        model.config.quantization_config = self._original_config["quantization_config"]
        experts: dict[str, torch.Tensor] = {}
        backends, wanted = self._wanted()
        for layer in self._reader.layers():
            site = self._sites.get(layer.name)
            if site is None:
                continue
            if (site.out_features, site.in_features) != layer.weight.shape:
                raise CheckpointError(f"layer `{layer.name}` is {layer.weight.shape} in `{self._directory}`, "
                                      f"{(site.out_features, site.in_features)} in the model")
            if site.expert is None:
                device = _device(model, site.module)
                chosen = select_backend(backends, spec_of(layer), device, model.dtype, wanted)
                module = chosen.build(layer, device, model.dtype)
                model.set_submodule(site.module, module.eval().requires_grad_(False))
            else:
                experts[site.name] = layer.weight.dequantize(model.dtype)
        self._fill_experts(model, experts)
        if wanted == AUTO:
            speed_up_dense(model, self._linears, backends, model.device)
            get_registry().adapter(self._original_config).serve(model, model.device)

    def _wanted(self) -> tuple[list[Backend], str]:
        """All backends, and the one that the configuration asks for; engines' own names there mean nothing here."""
        backends = list(get_registry().backends().values())
        wanted = str(getattr(self.quantization_config, "backend", None) or AUTO)
        return backends, wanted if wanted in {backend.name for backend in backends} else AUTO

    def _fill_experts(self, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
        kept = TensorFiles(self._directory) if self._experts else {}
        for path, sites in self._experts.items():
            parameter = model.get_parameter(path)
            known = {}
            for site in sites:
                stored = f"{site.name}.weight"
                if site.name in weights:
                    known[site.name] = weights[site.name]
                elif stored in kept:
                    known[site.name] = kept.get(stored).to(model.dtype)
                else:
                    raise CheckpointError(f"`{self._directory}` has no weights for the expert `{site.name}`")
            parent, _, attribute = path.rpartition(".")
            filled = fuse(sites, known).to(parameter.device if not parameter.is_meta else "cpu")
            model.get_submodule(parent).register_parameter(attribute, torch.nn.Parameter(filled, requires_grad=False))

    # --- saving ---------------------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the packed tensors as they were read, and the rest of the model."""
        if not (self._directory / "config.json").is_file():
            raise CheckpointError(f"the packed weights are read again from `{self._directory}`, which is gone")
        ours = tuple(f"{site.module}." for site in self._sites.values() if site.expert is None)
        state = {name: tensor for name, tensor in model.state_dict().items()
                 if not name.startswith(ours) and name not in self._experts}
        state.update(self._packed())
        return state, {}

    def _packed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Under the names that the model knows, which may lack a prefix."""
        files = TensorFiles(self._directory)
        fused = {site.name for sites in self._experts.values() for site in sites}
        owners = {name: site.name for name, site in self._sites.items()} | {name: name for name in fused}
        for name in files.names():
            owner = name.rpartition(".")[0]
            if owner in owners:
                # a copy, because the directory may be the one that is written to
                yield f"{owners[owner]}.{name.rpartition('.')[2]}", files.get(name).clone()


def _pattern(layer: str) -> str:
    """A regular expression for the tensors of a layer and of those that are called alike in other blocks."""
    return "^" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(layer)) + r"\."


def _device(model: torch.nn.Module, path: str) -> torch.device:
    """Where the nearest parameter around a layer is."""
    while path:
        path = path.rpartition(".")[0]
        for parameter in model.get_submodule(path).parameters():
            return parameter.device
    return torch.device("cpu")


def _without(attribute: str, stand_in: Any, check: Any, only: type = object) -> Any:
    """A `post_init` that does not see an attribute which would fail there, or ask for a package, for no reason."""

    def post_init(self: Any) -> None:
        value = getattr(self, attribute)
        if isinstance(value, only):
            setattr(self, attribute, stand_in)
        try:
            check(self)
        finally:
            setattr(self, attribute, value)

    return post_init


# in place: Transformers asks whether what a user passes is of these classes
AutoRoundConfig.post_init = _without("group_size", -1, AutoRoundConfig.post_init, only=list)  # blocks
GPTQConfig.post_init = _without("modules_in_block_to_quantize", None, GPTQConfig.post_init)  # asks for optimum
for _method in METHODS:
    auto.AUTO_QUANTIZER_MAPPING[_method] = AutoRoundLoader
