"""What the formats of packed integers share: a writer and a reader over tensor layouts, and their configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    QuantizedLayer,
    QuantScheme,
    ShardWriter,
    TensorFiles,
    TensorLayout,
    UsageError,
    read_json,
    write_json,
)

PROVIDER = f"autoround-export {version('autoround-export')}"
SCHEME_KEYS = ("bits", "group_size", "sym", "data_type")
_NEWEST = 1  # format_version, of which there is no second yet
_FIELDS = (*SCHEME_KEYS, "activation", "group_rows")


def quantization_of(directory: Path, method: str) -> dict[str, Any] | None:
    """The `quantization_config` in a directory's config.json if its quant_method is `method`."""
    config = directory / "config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    quantization = content.get("quantization_config") if isinstance(content, dict) else None
    return quantization if isinstance(quantization, dict) and quantization.get("quant_method") == method else None


def read_quantization(directory: Path, method: str) -> dict[str, Any]:
    """`quantization_of` a directory that must have one. Raises CheckpointError when it has not."""
    quantization = quantization_of(directory, method)
    if quantization is None:
        raise CheckpointError(f"`{directory}` holds no checkpoint of quant_method {method}")
    if quantization.get("format_version", _NEWEST) > _NEWEST:
        raise CheckpointError(f"`{directory}` has format_version {quantization['format_version']}; this version of "
                              f"autoround-export reads up to {_NEWEST}")
    return quantization


def scheme_from(default: Mapping[str, Any], entry: Any, whose: str) -> QuantScheme:
    """The scheme spelled out by a configuration: what `entry` says, else what `default` says.

    whose: for the message of the CheckpointError that is raised when together they spell no scheme.
    """
    try:
        if not isinstance(entry, Mapping):
            raise UsageError(f"expected an object of {', '.join(SCHEME_KEYS)}, got {entry!r}")
        merged = {**default, **entry}
        return QuantScheme(**{key: merged[key] for key in _FIELDS if key in merged})
    except UsageError as error:
        raise CheckpointError(f"the quantization_config of {whose} is not valid: {error}") from None


class PackedWriter(CheckpointWriter):
    """Stores `<layer>.<tensor of its layout>`; `quantization` goes into config.json, there called
    `section`, and into `own_file`, if any."""

    def __init__(
        self, directory: Path, context: CheckpointContext, layout_of: Callable[[QuantScheme], TensorLayout],
        quantization: Mapping[str, Any], own_file: str | None = None, section: str = "quantization_config",
    ) -> None:
        self._directory, self._context, self._layout_of = directory, context, layout_of
        self._quantization, self._own_file, self._section = dict(quantization), own_file, section
        self._shards = ShardWriter(directory)

    def add(self, layer: QuantizedLayer) -> None:
        layout = self._layout_of(layer.weight.scheme)
        for name, tensor in layout.pack(layer.weight).items():
            self._shards.add(f"{layer.name}.{name}", tensor)
        if layer.input_scale is not None:
            self._shards.add(f"{layer.name}.{layout.input_scale_name}", layer.input_scale)
        if layer.bias is not None:
            self._shards.add(f"{layer.name}.bias", layer.bias)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self._shards.add(name, tensor)

    def finish(self) -> None:
        self._shards.finish()
        config = {**self._context.config, self._section: self._quantization}
        write_json(self._directory / "config.json", config)
        if self._own_file:
            write_json(self._directory / self._own_file, self._quantization)


class PackedReader(CheckpointReader):
    """Reads every layer that has a tensor `<layer>.<mark>`; `lookup` knows its layout and its scheme."""

    def __init__(
        self, directory: Path, mark: str, lookup: Callable[[str], tuple[TensorLayout, QuantScheme]],
    ) -> None:
        self.config = read_json(directory / "config.json")
        self._directory, self._lookup = directory, lookup
        self._files = TensorFiles(directory)
        self._layers = [name.removesuffix(f".{mark}") for name in self._files.names() if name.endswith(f".{mark}")]

    def layer_names(self) -> list[str]:
        return list(self._layers)

    def layers(self) -> Iterator[QuantizedLayer]:
        for name in self._layers:
            layout, scheme = self._lookup(name)
            parts = self._parts(name, layout)
            missing = [part for part in layout.tensor_names if part not in parts]
            if missing:
                raise CheckpointError(f"`{self._directory}` has no tensor `{name}.{missing[0]}`, "
                                      f"which {scheme} in the layout {layout.name} needs")
            tensors = {part: self._files.get(f"{name}.{part}") for part in parts}
            try:
                weight = layout.unpack(tensors, scheme)
            except CheckpointError as error:
                raise CheckpointError(f"layer `{name}` of `{self._directory}`: {error}") from None
            bias, input_scale = (self._optional(f"{name}.{part}") for part in ("bias", layout.input_scale_name))
            yield QuantizedLayer(name, weight, bias, input_scale)

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        layouts = {name: self._lookup(name)[0] for name in self._layers}
        owned = {
            f"{name}.{part}" for name, layout in layouts.items()
            for part in (*self._parts(name, layout), "bias", layout.input_scale_name)
        }
        rest = [name for name in self._files.names() if name not in owned]
        for name in rest:
            if layout := layouts.get(name.rpartition(".")[0]):
                raise CheckpointError(f"`{self._directory}` holds `{name}`, which the layout {layout.name} has not")
        return self._files.items(rest)

    def _optional(self, name: str) -> torch.Tensor | None:
        return self._files.get(name) if name in self._files else None

    def _parts(self, name: str, layout: TensorLayout) -> list[str]:
        return [part for part in (*layout.tensor_names, *layout.optional_names) if f"{name}.{part}" in self._files]
