"""Reads a GGUF file back into records and tensors under the model's own names; of a vision-language model two files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autoround_core import CheckpointError, CheckpointReader, QuantizedLayer, read_json
from autoround_export.gguf import architectures, row_map, vision
from autoround_export.gguf.blocks import LAYOUTS
from autoround_export.gguf.composition import Destination, TypedTensor, destinations
from autoround_export.gguf.file import FLOAT_DTYPES, GgufFile
from autoround_export.gguf.mmproj import mmproj_beside, mmproj_contents, prefixes_of
from autoround_export.gguf.outline import FileTensor

_CONFIG = "config.json"


class FileContent:
    """The tensors of the model that lie in one file. Final."""

    def __init__(
        self, file: GgufFile, shapes: Mapping[str, tuple[int, ...]], tensors: tuple[FileTensor, ...],
        elsewhere: Mapping[str, torch.Tensor],
    ) -> None:
        """shapes: of the model's tensors. tensors: of the file. elsewhere: what it does not hold of the model."""
        self._file, self._shapes, self._elsewhere = file, shapes, elsewhere
        self._sources: dict[str, list[Destination]] = {}
        typed = [TypedTensor(tensor, self._type(tensor)) for tensor in tensors]
        for destination in destinations(typed, shapes):
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


class GgufReader(CheckpointReader):
    """The layers and tensors of one file, and of the tower and projector beside it."""

    def __init__(self, path: Path) -> None:
        file = GgufFile(path)
        shapes = _shapes_in(file)
        beside = config_beside(path)
        self.config: Mapping[str, Any] = beside or config_in(file)
        kept = row_map.read(path)
        if kept:
            self._contents = [FileContent(file, kept.shapes, kept.tensors, kept.elsewhere)]
        elif vision.is_family(self.config):
            self._contents = _two_contents(self.config, file)
        else:
            found = architectures.model_shapes(self.config, shapes)
            self._contents = [FileContent(file, found, architectures.outline(self.config, found).tensors, {})]

    def layer_names(self) -> list[str]:
        return [name for content in self._contents for name in content.layer_names()]

    def layers(self) -> Iterator[QuantizedLayer]:
        for content in self._contents:
            yield from content.layers()

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        for content in self._contents:
            yield from content.rest()


def config_beside(path: Path) -> dict[str, Any] | None:
    """The config.json beside a file, if it is that of what can be read.

    The language model of a vision-language model by itself, without the file of the tower, is an ordinary model, and
    its own metadata say which.
    """
    beside = path.parent / _CONFIG
    config = read_json(beside) if beside.is_file() else None
    alone = config is not None and vision.is_family(config) and mmproj_beside(path) is None
    return None if alone and row_map.read(path) is None else config


def config_in(file: GgufFile) -> dict[str, Any]:
    """config.json as the metadata of a file tells it."""
    shapes = _shapes_in(file)
    constants = {name: file.tensor(name) for name in shapes if name in architectures.CONSTANTS}
    return architectures.config_of(file.fields, shapes, constants)


def _two_contents(config: Mapping[str, Any], file: GgufFile) -> list[FileContent]:
    beside = mmproj_beside(file.path)
    assert beside is not None
    towers, model = GgufFile(beside), vision.taken_apart(config)
    prefixes = prefixes_of(model, towers)
    text = vision.text_contents(model, _shapes_in(file), prefixes)
    return [FileContent(file, *text, {}), FileContent(towers, *mmproj_contents(model, prefixes), {})]


def _shapes_in(file: GgufFile) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in file.tensors.items()}


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
