"""Which rows of the model a file holds, kept beside a file that llama.cpp's own converter laid out.

Our table says it for the architectures that it knows; for all others only the run that wrote the file knew. What the
file holds in a form that is no rows of the model (transposed, computed) is kept too, so that our reader is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from autoround_core import CheckpointError
from autoround_export.gguf.outline import FileTensor, Outline, Piece

NAME = "gguf-rows.safetensors"
_KEY = "tensors"
_ROWS, _ELSEWHERE = "rows.", "model."


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """shapes: of the model's tensors. tensors: of the file. elsewhere: tensors of the model that have no rows there."""

    shapes: Mapping[str, tuple[int, ...]]
    tensors: tuple[FileTensor, ...]
    elsewhere: Mapping[str, torch.Tensor]


def write(
    directory: Path, outline: Outline, shapes: Mapping[str, tuple[int, ...]], elsewhere: Mapping[str, torch.Tensor]
) -> None:
    """Keep the pieces of every tensor beside the file."""
    from safetensors.torch import save_file

    kept = {f"{_ELSEWHERE}{name}": tensor.contiguous() for name, tensor in elsewhere.items()}
    tensors = []
    for tensor in outline.tensors:
        pieces = []
        for piece in tensor.pieces:
            key = None if piece.rows is None else f"{_ROWS}{len(kept)}"
            if key is not None:
                kept[key] = piece.rows.clone()
            pieces.append([piece.source, key])
        tensors.append([tensor.name, tensor.shape, pieces, tensor.offset])
    content = {"tensors": tensors, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    # safetensors wants a tensor, whatever there is to keep
    save_file(kept or {f"{_ROWS}none": torch.zeros(1)}, directory / NAME, metadata={_KEY: json.dumps(content)})


def read(file: Path) -> RowMap | None:
    """What was kept beside `file`; None where nothing was. Raises CheckpointError where it is broken."""
    from safetensors import SafetensorError, safe_open

    path = file.parent / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as kept:
            content = json.loads((kept.metadata() or {})[_KEY])
            tensors = tuple(
                FileTensor(name, tuple(shape), tuple(
                    Piece(source, None if key is None else kept.get_tensor(key)) for source, key in pieces), offset)
                for name, shape, pieces, offset in content["tensors"]
            )
            elsewhere = {name.removeprefix(_ELSEWHERE): kept.get_tensor(name)
                         for name in kept.keys() if name.startswith(_ELSEWHERE)}
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            return RowMap(shapes, tensors, elsewhere)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{path}` is broken: {error}; write the checkpoint again") from None
