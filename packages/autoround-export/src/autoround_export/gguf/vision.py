"""A vision-language model taken apart: its configuration, the names of its tensors, its language model.

The checkpoint has up to four parts, each with a prefix of its own: the language model, its head, the tower, the
projector. Which prefixes these are depends on the family and on who wrote the checkpoint, so they are found by a tensor
that each part always has. Without its prefix the language model is an ordinary one, and is written as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoround_core import UnsupportedError
from autoround_export.gguf import architectures
from autoround_export.gguf.metadata import complete
from autoround_export.gguf.outline import FileTensor, Outline, Piece
from autoround_export.gguf.vision_table import FAMILIES, Family, Tower

_SECTIONS = ("mrope_section", "mrope_interleaved")  # of an ordinary model there is nothing to be said about them
_TEXT, _HEAD = "model.", "lm_head."
_TEXT_ANCHOR, _HEAD_ANCHOR = "embed_tokens.weight", "lm_head.weight"
# what a module of the tower or projector has in its name, wherever a checkpoint puts it
PARTS = frozenset(
    prefix.rstrip(".").rpartition(".")[2]
    for family in FAMILIES.values()
    for prefix in (*(tower.prefix for tower in family.towers.values()), family.projector_prefix)
)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What stands before the names of each part; a head directly before `lm_head`. projector: where it has one."""

    text: str
    head: str
    tower: str
    projector: str = ""

    def spelled(self, plain: str) -> str:
        """The checkpoint's name for a tensor of the language model."""
        return self.head + plain if plain.startswith(_HEAD) else self.text + plain.removeprefix(_TEXT)


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A configuration, taken apart. family, tower: rows of the table. full: config.json with the defaults of its
    classes. text: of the language model as an ordinary one. vision: of the tower. arch: of the language model's file.
    """

    family: Family
    tower: Tower
    full: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    arch: str

    def sizes(self) -> dict[str, int]:
        """What the shapes of tower and projector are made of. Raises UnsupportedError for what is no number."""
        try:
            sizes = self.tower.sizes(self.vision) | {"text": self.text["hidden_size"]}
        except (KeyError, TypeError, ZeroDivisionError):
            sizes = {}
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
            raise UnsupportedError("vision_config of config.json does not give every size of the tower as one number "
                                   "above 0, as llama.cpp wants them")
        return sizes | {"features": sizes["hidden"] * len(self.feature_layers(sizes["blocks"]) or (0,))}

    def tokenizer_config(self) -> dict[str, Any]:
        """What a tokenizer is asked about: the numbers of special tokens, which may be said at either place."""
        said = {key: value for key, value in self.full.items() if value is not None}
        return {**self.text, **said, "model_type": self.text["model_type"]}

    def feature_layers(self, blocks: int) -> list[int]:
        """After how many blocks the projector takes its numbers; empty where it is after the last."""
        given = self.full.get("vision_feature_layer")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        return [layer if layer >= 0 else blocks + 1 + layer for layer in listed]


def is_family(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a vision-language model of the table."""
    return config.get("model_type") in FAMILIES


def in_table(config: Mapping[str, Any]) -> bool:
    """Whether both its parts can be written: the tower, and the language model."""
    try:
        taken_apart(config)
    except UnsupportedError:
        return False
    return True


def taken_apart(config: Mapping[str, Any]) -> VisionModel:
    """Raises UnsupportedError for a tower or language model outside the tables, ModelError where config.json makes no
    sense.
    """
    family, full = FAMILIES[config["model_type"]], complete(config)
    text, vision = dict(full["text_config"]), dict(full["vision_config"])
    tower = family.towers.get(vision.get("model_type"))
    if tower is None:
        raise UnsupportedError(
            f"`{config['model_type']}` with a vision tower of type `{vision.get('model_type')}` cannot be stored as "
            f"GGUF (known: {', '.join(family.towers)})"
        )
    text["model_type"] = family.text or text.get("model_type")
    if text["model_type"] not in architectures.supported():
        raise UnsupportedError(
            f"`{config['model_type']}` with a language model of type `{text['model_type']}` cannot be stored as GGUF "
            f"(known: {', '.join(architectures.supported())})"
        )
    text["tie_word_embeddings"] = bool(full.get("tie_word_embeddings"))
    rope = text.get("rope_parameters") or {}
    text["rope_parameters"] = {key: value for key, value in rope.items() if key not in _SECTIONS}
    return VisionModel(family, tower, full, text, vision, family.arch or architectures.arch_of(text["model_type"]))


def usual_prefixes(model: VisionModel) -> Prefixes:
    """Those of Transformers."""
    family = model.family
    projector = family.projector_prefix if family.projector else ""
    return Prefixes(family.text_prefix, family.head_prefix, model.tower.prefix, projector)


def find_prefixes(model: VisionModel, names: Iterable[str]) -> Prefixes:
    """Those of a checkpoint with these tensors. Raises UnsupportedError where a part is missing."""
    names, usual = list(names), usual_prefixes(model)
    projector = model.family.projector_anchor
    return Prefixes(
        _before(names, _TEXT_ANCHOR, "language model"),
        # a head that is the embedding is stored nowhere
        next((name.removesuffix(_HEAD_ANCHOR) for name in names if _is(name, _HEAD_ANCHOR)), usual.head),
        _before(names, model.tower.anchor, "vision tower"),
        _before(names, projector, "projector") if projector else "",
    )


def _is(name: str, anchor: str) -> bool:
    return f".{name}".endswith(f".{anchor}")


def _before(names: Iterable[str], anchor: str, part: str) -> str:
    found = [name.removesuffix(anchor) for name in names if _is(name, anchor)]
    if len(found) != 1:
        raise UnsupportedError(f"the model should hold one {part}, that is one `{anchor}`; it holds {len(found)}")
    return found[0]


def split(shapes: Shapes, prefixes: Prefixes) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The tensors of the language model under their ordinary names, and those of tower and projector as they are."""
    text, vision = {}, {}
    for name, shape in shapes.items():
        if name.startswith(tuple(prefix for prefix in (prefixes.tower, prefixes.projector) if prefix)):
            vision[name] = shape
        elif name == prefixes.head + _HEAD_ANCHOR:
            text[_HEAD_ANCHOR] = shape
        elif name.startswith(prefixes.text):
            text[_TEXT + name.removeprefix(prefixes.text)] = shape
        else:
            text[name] = shape  # has no place, and an error will say so
    return text, vision


def text_outline(model: VisionModel, shapes: Shapes) -> Outline:
    """The file of the language model. shapes: of all tensors of the checkpoint. Raises as `architectures.outline`."""
    prefixes = find_prefixes(model, shapes)
    found = architectures.outline(model.text, split(shapes, prefixes)[0], model.arch)
    more = {f"{model.arch}.{key}": value for key, value in _text_fields(model).items()}
    return Outline(found.fields | more, tuple(_spelled(found.tensors, prefixes)), found.constants)


def text_contents(
    model: VisionModel, file_shapes: Shapes, prefixes: Prefixes
) -> tuple[dict[str, tuple[int, ...]], tuple[FileTensor, ...]]:
    """The tensors of the language model under the checkpoint's names, and those of its file. Raises CheckpointError."""
    plain = architectures.model_shapes(model.text, file_shapes)
    tensors = architectures.outline(model.text, plain, model.arch).tensors
    shapes = {prefixes.spelled(name): shape for name, shape in plain.items()}
    return shapes, tuple(_spelled(tensors, prefixes))


def _spelled(tensors: Iterable[FileTensor], prefixes: Prefixes) -> Iterator[FileTensor]:
    for tensor in tensors:
        pieces = tuple(Piece(prefixes.spelled(piece.source), piece.rows) for piece in tensor.pieces)
        yield replace(tensor, pieces=pieces)


def _text_fields(model: VisionModel) -> dict[str, Any]:
    """What llama.cpp wants to know besides: how many pairs of a head turn with each axis of a position, and for how
    many blocks an image brings numbers along."""
    fields: dict[str, Any] = {}
    if model.family.sections:
        rope = model.full["text_config"].get("rope_parameters") or {}
        sections = rope.get("mrope_section", model.family.sections)
        if not isinstance(sections, (list, tuple)) or len(sections) != 3:
            raise UnsupportedError(f"`mrope_section` of `rope_parameters` must be three numbers, not `{sections}`")
        fields["rope.dimension_sections"] = [*sections, 0]
    if "deepstack_visual_indexes" in model.vision:
        fields["n_deepstack_layers"] = len(model.vision["deepstack_visual_indexes"])
    return fields
