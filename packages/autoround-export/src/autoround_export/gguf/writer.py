"""Writes a GGUF file: header first, then every row to the place that the header promises it.

All types and sizes are known before the first tensor comes, so tensors may come in any order and nothing is kept:
memory is that of one tensor, and of one expert where experts are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    CheckpointWriter,
    ModelOutline,
    QuantizedLayer,
    write_json,
)
from autoround_core.records import tensor_bytes
from autoround_export.gguf import row_map
from autoround_export.gguf.blocks import LAYOUTS
from autoround_export.gguf.composition import Destination, TypedTensor, destinations, in_table
from autoround_export.gguf.file import FLOAT_DTYPES
from autoround_export.gguf.outline import Outline, Piece


class GgufWriter(CheckpointWriter):
    """One file. Every tensor of the model must come, as a layer or as it is."""

    def __init__(
        self, path: Path, context: CheckpointContext, model: ModelOutline, outline: Outline,
        typed: list[TypedTensor], fields: Mapping[str, Any],
    ) -> None:
        self._context, self._model, self._outline = context, model, outline
        self._path = path
        self._elsewhere: dict[str, torch.Tensor] = {}
        constants = {name: tensor.to(torch.float32) for name, tensor in outline.constants.items()}
        self._offsets = _write_header(path, fields, typed, constants)
        self._waiting: dict[str, list[Destination]] = {}
        for destination in destinations(typed, model.shapes):
            self._waiting.setdefault(destination.piece.source, []).append(destination)
        self._placed = frozenset(self._waiting)
        for name, tensor in constants.items():
            self._put(self._offsets[name], tensor)

    def add(self, layer: QuantizedLayer) -> None:
        blocks = None
        for destination in self._take(f"{layer.name}.weight"):
            layout = LAYOUTS[destination.typed.type]
            blocks = layout.pack(layer.weight)["blocks"] if blocks is None else blocks
            offset = destination.start // layout.block * layout.block_bytes
            self._put(self._offsets[destination.typed.tensor.name] + offset, _rows(blocks, destination.piece))
        if layer.bias is not None:
            self.keep(f"{layer.name}.bias", layer.bias)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._placed and not in_table(self._model.config):
            # in the file, but in a form that only llama.cpp's converter knows; our reader needs it as it was
            self._elsewhere[name] = tensor.detach().cpu().clone()
            return
        for destination in self._take(name):
            dtype = FLOAT_DTYPES.get(destination.typed.type)
            if dtype is None:
                raise CheckpointError(f"tensor `{name}` was planned as {destination.typed.type} and came unquantized")
            values = _rows(tensor.detach().cpu(), destination.piece)
            if destination.typed.tensor.offset:
                values = values.to(torch.float32) + destination.typed.tensor.offset
            stored = values.to(dtype)
            if dtype == torch.float16 and stored.isinf().any():
                raise CheckpointError(f"tensor `{name}` holds numbers beyond 65504, where float16 ends; use gguf:f32")
            self._put(self._offsets[destination.typed.tensor.name] + destination.start * dtype.itemsize, stored)

    def finish(self) -> None:
        if self._waiting:
            raise CheckpointError(f"tensor `{min(self._waiting)}` never came, so `{self._path.name}` has a hole")
        if not in_table(self._model.config):
            row_map.write(self._path.parent, self._outline, self._model.shapes, self._elsewhere)
        write_json(self._path.parent / "config.json", dict(self._context.config))

    def _take(self, name: str) -> list[Destination]:
        if name not in self._waiting:
            raise CheckpointError(f"tensor `{name}` has no place in the file, or came twice")
        return self._waiting.pop(name)

    def _put(self, offset: int, tensor: torch.Tensor) -> None:
        # not kept open: a run that fails closes nothing
        with self._path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor_bytes(tensor))


def _rows(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of a piece; of a vector its numbers."""
    if piece.rows is None:
        return tensor
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
    return matrix[piece.rows]


def _write_header(
    path: Path, fields: Mapping[str, Any], typed: list[TypedTensor], constants: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Write all but the numbers; return where those of each tensor begin. The file then has its full size."""
    import gguf

    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        if key != "general.architecture" and value != []:
            writer.add_key_value(key, value, *_value_type(value, gguf.GGUFValueType))
    shapes = {entry.tensor.name: (entry.tensor.shape, entry.type) for entry in typed}
    shapes |= {name: (tuple(tensor.shape), "F32") for name, tensor in constants.items()}
    sizes = {}
    for name, (shape, kind) in shapes.items():
        raw = gguf.GGMLQuantizationType[kind]
        row = gguf.quant_shape_to_byte_shape(shape, raw)
        sizes[name] = int(torch.tensor(row, dtype=torch.int64).prod())
        # any dtype but uint8: the shape is that of numbers
        writer.add_tensor_info(name, shape, float, sizes[name], raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = offset
        offset += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(offset)
    return offsets


def _value_type(value: Any, types: Any) -> tuple[Any, Any]:
    """(type, type of the items) of a field's value."""
    if isinstance(value, list):
        kinds = {bool: types.BOOL, int: types.INT32, float: types.FLOAT32, str: types.STRING}
        return types.ARRAY, kinds[type(value[0])]
    if isinstance(value, bool):
        return types.BOOL, None
    if isinstance(value, int):
        return types.UINT32 if 0 <= value < 2**32 else types.INT64, None
    return (types.FLOAT32 if isinstance(value, float) else types.STRING), None
