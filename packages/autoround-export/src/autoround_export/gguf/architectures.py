"""Which tensors of a model become which tensors of a GGUF file, for the models of the table, and back.

Both directions walk the same list of places, so what one writes the other reads. A tensor without a place, and a
place without a tensor, are errors: nothing is left out and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoround_core import CheckpointError, ModelError, UnsupportedError
from autoround_export.gguf.architecture_table import ALWAYS, TABLE, Architecture, Slot
from autoround_export.gguf.metadata import (
    check_built_in,
    complete,
    experts,
    model_config,
    model_fields,
    sizes,
    vocabulary_of,
)
from autoround_export.gguf.outline import FileTensor, Outline, Piece
from autoround_export.gguf.rope import CONSTANTS
from autoround_export.gguf.vision_table import TEXT_OF, VISION_ARCH

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class _Place:
    """One tensor of a file. sources: its tensors in the model. shape: of each of these. heads: 0 = rows stay."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    vector: bool
    gain: bool
    heads: int

    def file_shape(self) -> tuple[int, ...]:
        if self.stacked:
            return (len(self.sources), *self.shape)
        return self.shape[1:] if self.vector else self.shape


def supported() -> list[str]:
    """The model types of the table."""
    return sorted(TABLE)


def arch_of(model_type: str) -> str:
    """The architecture of the file, for a model type of the table."""
    return TABLE[model_type].arch


def outline(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: str = "") -> Outline:
    """The file that a model becomes. config: its config.json. shapes: of all tensors of its checkpoint, by name. arch:
    another name for the same architecture, where the file is to have one.

    An lm_head that is tied to the embedding may be there or not. Raises UnsupportedError for what llama.cpp does
    not compute, ModelError for a config.json that makes no sense.
    """
    row, config = _row(config), complete(config)
    row = replace(row, arch=arch or row.arch)
    tied = bool(config.get("tie_word_embeddings"))
    if not tied and _HEAD not in shapes:
        raise UnsupportedError("the model holds no `lm_head.weight`, and `tie_word_embeddings` is false")
    check_built_in(row, config, tied)
    if _EMBEDDING not in shapes:
        raise UnsupportedError(f"the model holds no `{_EMBEDDING}`")
    vocabulary = shapes[_EMBEDDING][0]
    fields, constants = model_fields(row, config, vocabulary)
    tensors, left = [], set(shapes) - ({_HEAD} if tied else set())
    orders: dict[tuple[int, int], torch.Tensor] = {}
    for place in _places(row, config, vocabulary, tied):
        for source in place.sources:
            if source not in shapes:
                raise UnsupportedError(f"the model holds no `{source}`, which `{place.name}` of the file is made of")
            if tuple(shapes[source]) != place.shape:
                raise UnsupportedError(
                    f"`{source}` is {tuple(shapes[source])}, config.json makes it {place.shape}: one of them is wrong"
                )
        left.difference_update(place.sources)
        rows = None
        if row.permuted and place.heads:
            rows = orders.setdefault((place.heads, place.shape[0]), _pairs(place.heads, place.shape[0]))
        pieces = tuple(Piece(source, rows) for source in place.sources)
        tensors.append(FileTensor(place.name, place.file_shape(), pieces, row.offset if place.gain else 0.0))
    if left:
        raise UnsupportedError(f"tensor `{min(left)}` has no place in a GGUF file of `{row.arch}`")
    return Outline(fields, tuple(tensors), constants)


def model_shapes(config: Mapping[str, Any], file_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, from those of a file: the inverse of `outline`. config: as `config_of` gives it.

    Constants that come from the configuration are passed over. Raises CheckpointError for a tensor that has no
    place in the model, is missing, or has another shape.
    """
    row = _row(config)
    try:
        config = complete(config)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    vocabulary = vocabulary_of(file_shapes)
    shapes: dict[str, tuple[int, ...]] = {}
    left = set(file_shapes) - set(CONSTANTS)
    for place in _places(row, config, vocabulary, bool(config.get("tie_word_embeddings"))):
        found = file_shapes.get(place.name)
        if found is None:
            raise CheckpointError(f"the file holds no `{place.name}`")
        # llama.cpp's converter leaves the vector as a matrix of one row
        if tuple(found) != place.file_shape() and not (place.vector and tuple(found) == place.shape):
            raise CheckpointError(f"`{place.name}` is {tuple(found)}, the file's own keys make it {place.file_shape()}")
        left.discard(place.name)
        shapes |= dict.fromkeys(place.sources, place.shape)
    if left:
        raise CheckpointError(f"tensor `{min(left)}` of the file has no place in a `{config['model_type']}` model")
    return shapes


def config_of(
    fields: Mapping[str, Any],
    file_shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """A config.json for a file: of a model that computes what llama.cpp computes.

    constants: the tensors `rope_freqs.weight`, `rope_factors_long.weight` and `rope_factors_short.weight`, where the
    file holds them. Raises CheckpointError for an architecture outside the table and for what config.json cannot say.
    """
    arch = fields.get("general.architecture")
    if arch == VISION_ARCH:
        raise CheckpointError("the file holds a vision tower; name the file of its language model")
    if isinstance(arch, str) and arch in TEXT_OF:
        # without images, all axes of a position are equal
        return model_config(TEXT_OF[arch], replace(TABLE[TEXT_OF[arch]], arch=arch), fields, file_shapes,
                            constants or {})
    known = [model_type for model_type, row in TABLE.items() if row.arch == arch]
    if not known:
        names = ", ".join(sorted({row.arch for row in TABLE.values()} | set(TEXT_OF)))
        raise CheckpointError(f"GGUF files of architecture `{arch}` cannot be read (known: {names})")
    model_type = known[0]
    if arch == "llama":
        model_type = _kind_of_llama(fields)
    return model_config(model_type, TABLE[model_type], fields, file_shapes, constants or {})


def _kind_of_llama(fields: Mapping[str, Any]) -> str:
    """Three models share the name. They differ in experts, and Llama wants its width divisible by its heads."""
    if fields.get("llama.expert_count"):
        return "mixtral"
    width, heads = fields.get("llama.embedding_length"), fields.get("llama.attention.head_count")
    return "mistral" if isinstance(width, int) and isinstance(heads, int) and heads and width % heads else "llama"


def _row(config: Mapping[str, Any]) -> Architecture:
    model_type = config.get("model_type")
    if model_type not in TABLE:
        raise UnsupportedError(
            f"models of type `{model_type}` cannot be stored as GGUF (known: {', '.join(supported())}); set "
            "LLAMA_CPP_ROOT to a checkout of llama.cpp to use its converter"
        )
    return TABLE[model_type]


def _places(row: Architecture, config: Mapping[str, Any], vocabulary: int, tied: bool) -> Iterator[_Place]:
    numbers = sizes(config) | {"vocabulary": vocabulary}
    for slot in row.outer:
        if not (tied and slot.hf == "lm_head"):
            yield from _slot_places(slot, config, numbers, "", "")
    for i in range(config["num_hidden_layers"]):
        for slot in row.block:
            yield from _slot_places(slot, config, numbers, f"model.layers.{i}.", f"blk.{i}.")


def _slot_places(
    slot: Slot, config: Mapping[str, Any], numbers: Mapping[str, int], hf: str, gguf: str
) -> Iterator[_Place]:
    stacked = "{x}" in slot.hf
    modules = [slot.hf.replace("{x}", str(x)) for x in range(experts(config))] if stacked else [slot.hf]
    shape = tuple(numbers[size] for size in slot.shape)
    heads = config[slot.heads] if slot.heads else 0

    def place(kind: str, shape: tuple[int, ...]) -> _Place:
        sources = tuple(f"{hf}{module}.{kind}" for module in modules)
        return _Place(f"{gguf}{slot.gguf}.{kind}", sources, shape, stacked, slot.vector, slot.gain, heads)

    yield place("weight", shape)
    if slot.bias == ALWAYS or (slot.bias and config.get(slot.bias)):
        yield place("bias", shape[:1])


def _pairs(heads: int, rows: int) -> torch.Tensor:
    """Transformers turns number i of a head together with number i + half; llama.cpp turns neighbours."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()
