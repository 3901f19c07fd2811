"""From a model to the tensors of its file: the outline, the type of each tensor, and where each row of it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from autoround_core import ModelOutline, QuantScheme, SchemeChoice, TensorFiles, UnsupportedError
from autoround_export.gguf import architectures, vision
from autoround_export.gguf.blocks import LAYOUTS, layout_of
from autoround_export.gguf.file import FLOAT_DTYPES
from autoround_export.gguf.llama_cpp import checkout, mmproj_from_checkout, outline_from_checkout
from autoround_export.gguf.mixture import EMBEDDING, FLOATS, MixtureFacts, choose_types, is_quantizable
from autoround_export.gguf.outline import FileTensor, Outline, Piece
from autoround_export.gguf.tokenizer import tokenizer_fields

_FLOAT_TYPES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_WEIGHT = ".weight"


def compose(model: ModelOutline) -> Outline:
    """What the file will hold, tokenizer included; of a vision-language model that of its language model. Raises when
    the model cannot be written.

    A model type outside our table goes through the llama.cpp checkout that LLAMA_CPP_ROOT names, if any.
    """
    pre = model.options.get("gguf_pre")
    if not in_table(model.config) and (root := checkout()) is not None:
        return _through_checkout(model, root, pre)
    config: Mapping[str, Any] = model.config
    if vision.is_family(config):
        parts = vision.taken_apart(config)
        found, config = vision.text_outline(parts, model.shapes), parts.tokenizer_config()
    else:
        found = architectures.outline(config, model.shapes)
    if model.directory is None:
        raise UnsupportedError("a GGUF file holds the tokenizer, and this model has none; give AutoRound its "
                               "tokenizer, or copy tokenizer.json and tokenizer_config.json into the model's directory")
    rows = next(tensor.shape[0] for tensor in found.tensors if tensor.name == EMBEDDING)
    tokens = tokenizer_fields(model.directory, config, rows, pre)
    return Outline({**found.fields, **tokens}, found.tensors, found.constants)


def in_table(config: Mapping[str, Any]) -> bool:
    """Whether our own tables know the architecture."""
    if vision.is_family(config):
        return vision.in_table(config)
    return config.get("model_type") in architectures.supported()


def _through_checkout(model: ModelOutline, root: Path, pre: str | None) -> Outline:
    if model.directory is None or not (model.directory / "config.json").is_file():
        raise UnsupportedError("llama.cpp's converter reads a model directory; save the model first and name that")
    dtype = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
    return _converted(root, model.directory, dtype, pre)


def towers_through_checkout(model: ModelOutline, directory: Path) -> None:
    """Write what an image needs of a model outside our tables into `directory`, if it has a vision tower.

    Raises UnsupportedError where the converter of llama.cpp cannot.
    """
    root = checkout()
    if in_table(model.config) or root is None or not model.config.get("vision_config"):
        return
    assert model.directory is not None
    mmproj_from_checkout(root, model.directory, directory / f"mmproj-{model.name}-F16.gguf")


@lru_cache(maxsize=1)
def _converted(root: Path, directory: Path, dtype: str, pre: str | None) -> Outline:
    """The plan and the writer ask for the same; the converter takes minutes."""
    return outline_from_checkout(root, directory, dtype, TensorFiles(directory), pre=pre)


def mixture_types(file_type: str, outline: Outline, *, importance: bool) -> dict[str, str]:
    """The type of every tensor of the file as llama.cpp would mix them."""
    fields = outline.fields
    name = fields["general.architecture"]
    facts = MixtureFacts(
        name,
        blocks=fields[f"{name}.block_count"],
        heads=_of_first_block(fields.get(f"{name}.attention.head_count", 0)),
        kv_heads=_of_first_block(fields.get(f"{name}.attention.head_count_kv", 0)),
        experts=fields.get(f"{name}.expert_count", 0),
        importance=importance,
    )
    return choose_types(file_type, {tensor.name: tensor.shape for tensor in outline.tensors}, facts)


def _of_first_block(count: int | list[int]) -> int:
    """Some models have another number of heads in each block; llama.cpp asks the first."""
    return count[0] if isinstance(count, list) else count


def scheme_choices(file_type: str, outline: Outline, types: Mapping[str, str], matrices: Iterable[str]
                   ) -> dict[str, SchemeChoice]:
    """{layer name: choice} of every matrix of the model. matrices: their names."""
    choices: dict[str, SchemeChoice] = {}
    for tensor in outline.tensors:
        choice = _choice(file_type, tensor, types[tensor.name])
        for piece in tensor.pieces:
            name = piece.source.removesuffix(_WEIGHT)
            if choices.setdefault(name, choice) != choice:
                raise UnsupportedError(f"`{name}` is part of two tensors of the file, to which file type {file_type} "
                                       f"gives different types; use a file type of one type, such as q8_0")
    elsewhere = SchemeChoice(None, "llama.cpp's converter stores it in a form of its own")
    return {**{name.removesuffix(_WEIGHT): elsewhere for name in matrices}, **choices}


def _choice(file_type: str, tensor: FileTensor, kind: str) -> SchemeChoice:
    if not is_quantizable(tensor.name, tensor.shape):
        return SchemeChoice(None, "as F32, for precision")
    if kind not in FLOATS:
        return SchemeChoice(LAYOUTS[kind].scheme)
    fits = kind.lower() == file_type
    return SchemeChoice(None, f"as {kind}" + ("" if fits else f": no block type divides rows of {tensor.shape[-1]}"))


@dataclass(frozen=True, slots=True, eq=False)
class TypedTensor:
    """A tensor of the file and its type."""

    tensor: FileTensor
    type: str


def final_types(
    outline: Outline, schemes: Mapping[str, QuantScheme | None], chosen: Mapping[str, str], dtype: torch.dtype
) -> list[TypedTensor]:
    """The tensors with the types of the layers' schemes. chosen: what the mixture said, for what is not quantized.

    Raises UnsupportedError when the parts of one tensor (experts) have different schemes.
    """
    typed = []
    for tensor in outline.tensors:
        names = [piece.source.removesuffix(_WEIGHT) for piece in tensor.pieces]
        found = {schemes.get(name) for name in names}
        if len(found) > 1:
            spelled = ", ".join(sorted(str(scheme or "16 bits") for scheme in found))
            raise UnsupportedError(f"`{names[0]}` and its like are one tensor of the file, so they must share a "
                                   f"scheme, got {spelled}; write one --layer_config pattern for all of them")
        scheme = found.pop()
        typed.append(TypedTensor(tensor, layout_of(scheme).name if scheme else _float_type(tensor, chosen, dtype)))
    return typed


def _float_type(tensor: FileTensor, chosen: Mapping[str, str], dtype: torch.dtype) -> str:
    if not is_quantizable(tensor.name, tensor.shape):
        return "F32"
    kind = chosen.get(tensor.name)
    return kind if kind in FLOATS else _FLOAT_TYPES.get(dtype, "F32")


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """Where a piece goes. start: its first number within the tensor."""

    typed: TypedTensor
    piece: Piece
    start: int


def destinations(
    typed: list[TypedTensor], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Destination]:
    """All pieces of all tensors. shapes: of the model's tensors."""
    for entry in typed:
        start = 0
        for piece in entry.tensor.pieces:
            yield Destination(entry, piece, start)
            start += numbers_of(piece, shapes[piece.source])


def numbers_of(piece: Piece, shape: tuple[int, ...]) -> int:
    """How many numbers a piece has; a row of a vector is one number."""
    if piece.rows is None:
        return math.prod(shape)
    return len(piece.rows) * (shape[-1] if len(shape) > 1 else 1)


def file_metadata(model: ModelOutline, outline: Outline, number: int) -> dict[str, Any]:
    """All fields of the file. number: of its file type."""
    import gguf

    about = {"general.quantization_version": gguf.GGML_QUANT_VERSION, "general.file_type": number}
    # llama.cpp takes this name for a sign that the tokenizer is Phi-3's own, and fails where it is not
    if "phi-3" not in model.name.lower() and "phi3" not in model.name.lower():
        about["general.name"] = model.name
    return {**outline.fields, **about}
