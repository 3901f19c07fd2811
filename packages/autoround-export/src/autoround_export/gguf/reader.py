"""Reads a GGUF file back into records and tensors under the model's own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autoround_core import CheckpointError, CheckpointReader, QuantizedLayer, read_json
from autoround_export.gguf import architectures, row_map
from autoround_export.gguf.blocks import LAYOUTS
from autoround_export.gguf.composition import Destination, TypedTensor, destinations
from autoround_export.gguf.file import FLOAT_DTYPES, GgufFile
from autoround_export.gguf.outline import FileTensor


class GgufReader(CheckpointReader):
    """The layers and tensors of one file."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        beside = path.parent / "config.json"
        self.config: Mapping[str, Any] = read_json(beside) if beside.is_file() else config_in(self._file)
        kept = row_map.read(path)
        self._elsewhere: Mapping[str, torch.Tensor] = kept.elsewhere if kept else {}
        shapes = {name: info.shape for name, info in self._file.tensors.items()}
        self._shapes, tensors = (kept.shapes, kept.tensors) if kept else _by_table(self.config, shapes)
        self._sources: dict[str, list[Destination]] = {}
        typed = [TypedTensor(tensor, self._type(tensor)) for tensor in tensors]
        for destination in destinations(typed, self._shapes):
            self._sources.setdefault(destination.piece.source, []).append(destination)

    def _type(self, tensor: FileTensor) -> str:
        info = self._file.tensors.get(tensor.name)
        # llama.cpp's converter leaves some vectors as matrices of one row
        if info is None or _without_ones(info.shape) != _without_ones(tensor.shape):
            raise CheckpointError(f"`{self._file.path}` should hold tensor `{tensor.name}` {tensor.shape}, "
                                  f"it holds {'nothing of that name' if info is None else info.shape}")
        if info.type not in LAYOUTS and info.type not in FLOAT_DTYPES:
            raise CheckpointError(f"`{self._file.path}` holds tensor `{tensor.name}` as {info.type}; "
                                  f"known types: {', '.join([*FLOAT_DTYPES, *LAYOUTS])}")
        return info.type

    def layer_names(self) -> list[str]:
        return [name.removesuffix(".weight") for name, places in self._sources.items()
                if places[0].typed.type in LAYOUTS]

    def layers(self) -> Iterator[QuantizedLayer]:
        for name in self.layer_names():
            places = self._sources[f"{name}.weight"]
            kinds = {place.typed.type for place in places}
            if len(kinds) > 1:
                raise CheckpointError(f"`{name}` lies in tensors of the types {', '.join(sorted(kinds))}, and a layer "
                                      "has one")
            layout = LAYOUTS[kinds.pop()]
            blocks = self._gather(f"{name}.weight", layout.block, layout.block_bytes)
            bias = f"{name}.bias"
            yield QuantizedLayer(
                name,
                layout.unpack({"blocks": blocks}, layout.scheme),
                self._float(bias) if bias in self._sources else self._elsewhere.get(bias),
            )

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        quantized = set(self.layer_names())
        for name, places in self._sources.items():
            layer, _, kind = name.rpartition(".")
            if places[0].typed.type not in LAYOUTS and not (kind == "bias" and layer in quantized):
                yield name, self._float(name)
        biases = {f"{name}.bias" for name in quantized}
        yield from ((name, tensor) for name, tensor in self._elsewhere.items() if name not in biases)

    def _float(self, name: str) -> torch.Tensor:
        place = self._sources[name][0].typed
        dtype = FLOAT_DTYPES[place.type]
        values = self._gather(name, 1, dtype.itemsize).view(dtype).view(self._shapes[name])
        return values - place.tensor.offset if place.tensor.offset else values

    def _gather(self, name: str, block: int, block_bytes: int) -> torch.Tensor:
        """The bytes of a tensor of the model, uint8 [rows, bytes of a row]."""
        shape = self._shapes[name]
        row = (shape[-1] if len(shape) > 1 else 1) // block * block_bytes
        places = self._sources[name]
        result = None
        for place in places:
            data = self._file.data(place.typed.tensor.name).reshape(-1, row)
            first = place.start // block * block_bytes // row
            if place.piece.rows is None:
                count = int(torch.Size(shape).numel()) // block * block_bytes // row
                return torch.from_numpy(data[first : first + count].copy())
            if result is None:
                result = torch.zeros(int(torch.Size(shape[:-1] or shape).numel()), row, dtype=torch.uint8)
            result[place.piece.rows] = torch.from_numpy(data[first : first + len(place.piece.rows)].copy())
        return result


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def config_in(file: GgufFile) -> dict[str, Any]:
    """config.json as the metadata of a file tells it."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    constants = {name: file.tensor(name) for name in shapes if name in architectures.CONSTANTS}
    return architectures.config_of(file.fields, shapes, constants)


def _by_table(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], tuple[FileTensor, ...]]:
    found = architectures.model_shapes(config, shapes)
    return found, architectures.outline(config, found).tensors
