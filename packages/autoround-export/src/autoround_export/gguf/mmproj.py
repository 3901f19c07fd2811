"""The second file of a vision-language model: its tower and projector, in floats, under the names of llama.cpp.

Matrices are float16, as llama.cpp's own converter stores them; vectors and embeddings of positions are float32. A file
type f32 makes all of it float32. What llama.cpp does not read (norms after the last block that it uses, a pooling head)
lies in the file too, under names that it does not look at, so that our reader gives back the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoround_core import CheckpointError, CheckpointWriter, ModelOutline, QuantizedLayer, UnsupportedError
from autoround_export.gguf import vision
from autoround_export.gguf.composition import TypedTensor, file_metadata
from autoround_export.gguf.file import GgufFile
from autoround_export.gguf.mixture import FILE_TYPES
from autoround_export.gguf.mmproj_fields import check_tower, pixel_fields, tower_fields
from autoround_export.gguf.outline import FileTensor, Outline, Piece
from autoround_export.gguf.vision import Prefixes, VisionModel
from autoround_export.gguf.vision_table import VisionSlot

PREFIX = "mmproj-"
_PREFIXES = "autoround.checkpoint_prefixes"
_UNREAD = "unread."


@dataclass(frozen=True, slots=True, eq=False)
class Mmproj:
    """What the file will hold. file_type: a key of FILE_TYPES. sources: names of the model's tensors in it."""

    outline: Outline
    typed: list[TypedTensor]
    file_type: str
    sources: frozenset[str]

    def path(self, directory: Path, name: str) -> Path:
        return directory / f"{PREFIX}{name}-{self.file_type.upper()}.gguf"

    def fields(self, model: ModelOutline) -> dict[str, Any]:
        return file_metadata(model, self.outline, FILE_TYPES[self.file_type].number)


def compose_mmproj(model: ModelOutline, file_type: str | None) -> Mmproj | None:
    """The second file; None for a model without a vision tower of our table. file_type: of the first.

    Raises UnsupportedError where llama.cpp computes something else than tower and projector do.
    """
    if not vision.is_family(model.config) or not vision.in_table(model.config):
        return None
    found = vision.taken_apart(model.config)
    prefixes = vision.find_prefixes(found, model.shapes)
    check_tower(found)
    numbers = tower_fields(found)
    tensors, shapes, exact = _tensors(found, prefixes)
    given = vision.split(model.shapes, prefixes)[1]
    for name, shape in shapes.items():
        if tuple(given.get(name, ())) != shape:
            holds = tuple(given[name]) if name in given else "nothing of that name"
            raise UnsupportedError(f"`{name}` should be {shape} by config.json, the model holds {holds}")
    if left := given.keys() - shapes.keys():
        raise UnsupportedError(f"tensor `{min(left)}` has no place in a file of `{found.family.projector_type}`")
    if model.directory is None:
        raise UnsupportedError("llama.cpp needs the mean and deviation of pixels, and this model has no image "
                               "processor; save its processor into the model's directory")
    kind = "f32" if file_type == "f32" else "f16"
    fields = numbers | pixel_fields(model.directory) | {_PREFIXES: _listed(prefixes)}
    typed = [TypedTensor(tensor, "F32" if tensor.name in exact else kind.upper()) for tensor in tensors]
    return Mmproj(Outline(fields, tuple(tensors), {}), typed, kind, frozenset(shapes))


def is_vision_layer(name: str) -> bool:
    """Whether a layer of this checkpoint name belongs to a tower or projector of the table."""
    return any(part in name.split(".") for part in vision.PARTS)


def mmproj_beside(path: Path) -> Path | None:
    """The file of tower and projector in the directory of a file. Raises CheckpointError where there are several."""
    found = sorted(path.parent.glob(f"{PREFIX}*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"`{path.parent}` holds several vision towers, {names}; keep the one that belongs here")
    return found[0] if found else None


def prefixes_of(model: VisionModel, file: GgufFile) -> Prefixes:
    """How the checkpoint spelled the names of its parts; as Transformers does, in a file of another program."""
    given = file.fields.get(_PREFIXES)
    if not isinstance(given, list) or len(given) != 4 or not all(isinstance(prefix, str) for prefix in given):
        return vision.usual_prefixes(model)
    return Prefixes(*given)


def mmproj_contents(
    model: VisionModel, prefixes: Prefixes
) -> tuple[dict[str, tuple[int, ...]], tuple[FileTensor, ...]]:
    """The tensors of tower and projector under the checkpoint's names, and those of the file."""
    tensors, shapes, _ = _tensors(model, prefixes)
    return shapes, tuple(tensors)


def _listed(prefixes: Prefixes) -> list[str]:
    return [prefixes.text, prefixes.head, prefixes.tower, prefixes.projector]


def _tensors(
    model: VisionModel, prefixes: Prefixes
) -> tuple[list[FileTensor], dict[str, tuple[int, ...]], set[str]]:
    """The tensors of the file, shapes of those of the model, and names in the file of what is always float32."""
    sizes, tensors, shapes, exact = model.sizes(), [], {}, set()
    for prefix, slot, hf, names in _places(model, prefixes):
        source, shape = prefix + hf, tuple(sizes[size] for size in slot.shape)
        shapes[source] = shape
        for name, piece, part in _parts(source, shape, names or (_UNREAD + hf,)):
            tensors.append(FileTensor(name, part, (piece,), slot.offset))
            if slot.exact or len(shape) < 2:
                exact.add(name)
    return tensors, shapes, exact


def _places(model: VisionModel, prefixes: Prefixes) -> Iterator[tuple[str, VisionSlot, str, tuple[str, ...]]]:
    """(prefix, slot, name in the model, names in the file) of every tensor."""
    tower, blocks = model.tower, range(model.sizes()["blocks"])
    tapped = model.vision.get("deepstack_visual_indexes") or ()
    groups = [(tower.outer, [(0, 0)]), (tower.block, [(0, i) for i in blocks]), (tower.tapped, enumerate(tapped))]
    for slots, indices in groups:
        for j, i in indices:
            for slot in slots:
                if not slot.when or model.vision.get(slot.when):
                    names = tuple(name.format(i=i) for name in slot.gguf)
                    yield prefixes.tower, slot, slot.hf.format(i=i, j=j), names
    for slot in model.family.projector:
        yield prefixes.projector, slot, slot.hf, slot.gguf


def _parts(
    source: str, shape: tuple[int, ...], names: tuple[str, ...]
) -> Iterator[tuple[str, Piece, tuple[int, ...]]]:
    """(name, piece, shape) of the equal shares of a tensor: frames of a convolution over time, otherwise rows."""
    if len(names) == 1:
        yield names[0], Piece(source), shape
        return
    axis = 2 if len(shape) == 5 else 0
    # a piece is of rows: all but the last axis of a matrix and more, the numbers of a vector
    rows = torch.arange(math.prod(shape[:-1] or shape)).view(shape[:-1] or shape)
    for name, part in zip(names, rows.chunk(len(names), axis), strict=True):
        part_shape = (*part.shape, shape[-1]) if len(shape) > 1 else tuple(part.shape)
        yield name, Piece(source, part.flatten()), part_shape[:2] + part_shape[3:] if axis else part_shape


class TwoFiles(CheckpointWriter):
    """Writes a language model, and beside it the tower and projector that its images need."""

    def __init__(self, text: CheckpointWriter, towers: CheckpointWriter, sources: frozenset[str]) -> None:
        """sources: names of the tensors of `towers`."""
        self._text, self._towers, self._sources = text, towers, sources

    def add(self, layer: QuantizedLayer) -> None:
        self._text.add(layer)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        (self._towers if name in self._sources else self._text).keep(name, tensor)

    def finish(self) -> None:
        self._towers.finish()
        self._text.finish()
