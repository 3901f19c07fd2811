"""Format `auto_round`: what Transformers, vLLM and SGLang read as quant_method "auto-round".

Three packings of the same numbers (see docs/formats/auto_round.md):

    auto_round:auto_gptq   every layer symmetric                GPTQ layout, zero_point - 1
    auto_round:auto_awq    every layer 4-bit asymmetric         AWQ layout
    auto_round             any other mixture                    GPTQ layout, zero_point as it is

The first two are the ones that engines have kernels for, so they are chosen where the layers allow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    LinearSpec,
    QuantizedLayer,
    QuantScheme,
    ShardWriter,
    TensorFiles,
    TensorLayout,
    read_json,
    unknown_name,
    write_json,
)
from autoround_export.awq_layout import AwqLayout
from autoround_export.gptq_layout import GptqLayout

_PACKINGS: dict[str, TensorLayout] = {
    "auto_gptq": GptqLayout(zero_offset=1),
    "auto_awq": AwqLayout(),
    "gptqmodel": GptqLayout(zero_offset=0),
}
_PLAIN = "gptqmodel"  # the packing whose name on disk is just `auto_round`
_SCHEME_KEYS = ("bits", "group_size", "sym", "data_type")


def _packing_format(packing: str) -> str:
    return "auto_round" if packing == _PLAIN else f"auto_round:{packing}"


class AutoRoundFormat(CheckpointFormat):
    """packing: one of `_PACKINGS`, or None to choose by the layers."""

    summary = "Transformers, vLLM, SGLang (quant_method auto-round)"

    def __init__(self, packing: str | None = None) -> None:
        self.name = "auto_round" if packing is None else f"auto_round:{packing}"
        self._packing = packing

    def variant(self, text: str) -> AutoRoundFormat:
        if text not in _PACKINGS:
            raise unknown_name("packing of format auto_round", text, _PACKINGS)
        return AutoRoundFormat(text)

    def why_not(self, spec: LinearSpec) -> str | None:
        return _PACKINGS[self._packing or _PLAIN].why_not(spec)

    def packing(self, layers: Sequence[LinearSpec]) -> str:
        """The packing for these layers: the requested one, or the one with the most kernels that fits all."""
        if self._packing:
            return self._packing
        quantized = [spec for spec in layers if spec.scheme is not None]
        return next(
            packing for packing, layout in _PACKINGS.items()
            if packing == _PLAIN
            or (all(spec.scheme.sym == (packing == "auto_gptq") for spec in quantized)
                and all(layout.why_not(spec) is None for spec in quantized))
        )

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        return _AutoRoundWriter(directory, context, self.packing(context.layers))

    def recognizes(self, directory: Path) -> bool:
        config = directory / "config.json"
        if not config.is_file():
            return False
        content = read_json(config)
        quantization = content.get("quantization_config") if isinstance(content, dict) else None
        return isinstance(quantization, dict) and quantization.get("quant_method") == "auto-round"

    def read(self, directory: Path) -> CheckpointReader:
        return _AutoRoundReader(directory)


class _AutoRoundWriter(CheckpointWriter):
    def __init__(self, directory: Path, context: CheckpointContext, packing: str) -> None:
        self._directory, self._context, self._packing = directory, context, packing
        self._layout = _PACKINGS[packing]
        self._shards = ShardWriter(directory)

    def add(self, layer: QuantizedLayer) -> None:
        for name, tensor in self._layout.pack(layer.weight).items():
            self._shards.add(f"{layer.name}.{name}", tensor)
        if layer.bias is not None:
            self._shards.add(f"{layer.name}.bias", layer.bias)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self._shards.add(name, tensor)

    def finish(self) -> None:
        self._shards.finish()
        quantization = quantization_config(self._context, _packing_format(self._packing))
        write_json(self._directory / "config.json", {**self._context.config, "quantization_config": quantization})
        write_json(self._directory / "quantization_config.json", quantization)


def quantization_config(context: CheckpointContext, packing_format: str) -> dict[str, Any]:
    """The `quantization_config` that engines read; every entry of extra_config is complete, as vLLM requires."""
    default = context.recipe.default
    settings = context.settings
    extra = {
        spec.name: _scheme_entry(spec.scheme, default)
        for spec in context.layers
        if spec.scheme != default or not any(spec.name.startswith(f"{block}.") for block in context.blocks)
    }
    extra |= {name: _scheme_entry(None, default) for name in context.kept}
    return {
        "quant_method": "auto-round",
        "packing_format": packing_format,
        **_scheme_entry(default, default),
        "block_name_to_quantize": ",".join(sorted({block.rpartition(".")[0] for block in context.blocks})),
        "autoround_version": f"autoround-export {version('autoround-export')}",
        "iters": settings.iters,
        "nsamples": settings.nsamples,
        "seqlen": settings.seqlen,
        **({"extra_config": extra} if extra else {}),
    }


def _scheme_entry(scheme: QuantScheme | None, default: QuantScheme) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "group_size": default.group_size, "sym": default.sym, "data_type": "float"}
    return {key: getattr(scheme, key) for key in _SCHEME_KEYS}


class _AutoRoundReader(CheckpointReader):
    def __init__(self, directory: Path) -> None:
        self.config = read_json(directory / "config.json")
        quantization = self.config["quantization_config"]
        packing = str(quantization.get("packing_format", "auto_round")).partition(":")[2] or _PLAIN
        if packing not in _PACKINGS:
            raise CheckpointError(
                f"`{directory}` uses packing_format `{quantization['packing_format']}`; "
                f"known: {', '.join(map(_packing_format, _PACKINGS))}"
            )
        self._layout = _PACKINGS[packing]
        self._default = {key: quantization[key] for key in _SCHEME_KEYS if key in quantization}
        self._extra: Mapping[str, Any] = quantization.get("extra_config") or {}
        self._patterns = _patterns(self._extra)
        self._files = TensorFiles(directory)
        suffix = ".qweight"
        self._layers = [name.removesuffix(suffix) for name in self._files.names() if name.endswith(suffix)]

    def layers(self) -> Iterator[QuantizedLayer]:
        for name in self._layers:
            tensors = {part: self._files.get(f"{name}.{part}") for part in self._layout.tensor_names}
            weight = self._layout.unpack(tensors, QuantScheme(**(self._default | self._entry(name))))
            bias = self._files.get(f"{name}.bias") if f"{name}.bias" in self._files else None
            yield QuantizedLayer(name, weight, bias)

    def _entry(self, name: str) -> dict[str, Any]:
        """The layer's own keys: its exact name, else the first regular expression that matches, as vLLM reads them."""
        entry = self._extra.get(name)
        if entry is None:
            entry = next((self._extra[pattern.pattern] for pattern in self._patterns if pattern.search(name)), {})
        return {key: entry[key] for key in _SCHEME_KEYS if key in entry}

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        owned = {f"{name}.{part}" for name in self._layers for part in (*self._layout.tensor_names, "g_idx", "bias")}
        return self._files.items([name for name in self._files.names() if name not in owned])


def _patterns(keys: Iterable[str]) -> list[re.Pattern[str]]:
    """The keys of extra_config that are regular expressions: those with a character that no layer name has."""
    try:
        return [re.compile(key) for key in keys if set(key) & set("*+?^$()[]{}|\\")]
    except re.error as error:
        raise CheckpointError(
            f"extra_config names `{error.pattern}`, which is no regular expression: {error}"
        ) from None
