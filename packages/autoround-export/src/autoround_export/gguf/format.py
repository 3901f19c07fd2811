"""Format `gguf`: one file for llama.cpp and what is built on it, two with a vision tower, see docs/formats/gguf.md.

`gguf:q4_k_m` and its like choose the type of every matrix, the embedding and the output among them; `gguf` alone
stores what the user's scheme says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    LinearSpec,
    ModelOutline,
    SchemeChoice,
    Target,
    UnsupportedError,
    Verdict,
    unknown_name,
    write_json,
)
from autoround_export.gguf.blocks import LAYOUTS, layout_of
from autoround_export.gguf.composition import (
    TypedTensor,
    compose,
    file_metadata,
    final_types,
    mixture_types,
    scheme_choices,
    towers_through_checkout,
)
from autoround_export.gguf.file import GgufFile
from autoround_export.gguf.hf_tokenizer import write_tokenizer
from autoround_export.gguf.mixture import FILE_TYPES, FLOATS
from autoround_export.gguf.mmproj import PREFIX, TwoFiles, compose_mmproj, is_vision_layer
from autoround_export.gguf.reader import GgufReader, config_beside, config_in
from autoround_export.gguf.writer import GgufWriter

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"


class GgufFormat(CheckpointFormat):
    """Files of llama.cpp. file_type: a key of FILE_TYPES, None where the user's scheme decides."""

    stores_outer = True
    option_names = ("gguf_pre",)
    dtype = torch.float32  # what llama.cpp computes with; anything less would round the numbers that a file holds

    def __init__(self, file_type: str | None = None) -> None:
        self._file_type = file_type
        self.name = "gguf" if file_type is None else f"gguf:{file_type}"
        self.summary = f"llama.cpp; gguf:{'|'.join(FILE_TYPES)}"

    def variant(self, text: str) -> CheckpointFormat:
        if text.lower() not in FILE_TYPES:
            raise unknown_name("file type of format gguf", text, FILE_TYPES)
        return GgufFormat(text.lower())

    def choose_schemes(self, model: ModelOutline) -> Mapping[str, SchemeChoice] | None:
        outline = compose(model)
        compose_mmproj(model, self._file_type)  # for what it may raise
        if self._file_type is None:
            return None
        types = mixture_types(self._file_type, outline, importance=model.calibrated and model.alone)
        # of a tower nothing is chosen: `why_not` answers for one that somebody wants quantized
        matrices = [name for name, shape in model.shapes.items() if len(shape) > 1 and not is_vision_layer(name)]
        return scheme_choices(self._file_type, outline, types, matrices)

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        if is_vision_layer(spec.name):
            return ("llama.cpp reads vision towers and projectors from a file of their own, which is written in 16 "
                    "bits; leave out --quant_nontext_module")
        layout = layout_of(spec.scheme)
        if layout is None:
            known = ", ".join(f"{name} = {layout.scheme}" for name, layout in LAYOUTS.items())
            hint = "" if self._file_type else "; or let a file type choose, --format gguf:q4_k_m"
            return f"llama.cpp has no block type for {spec.scheme}; it has {known}{hint}"
        return layout.why_not(spec)

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        if target.engine == "llamacpp":
            return Verdict()
        return super().verdict(target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        model = context.model
        if model is None:
            raise UnsupportedError("a GGUF file needs the shapes and the tokenizer of the model, which were not given")
        outline = compose(model)
        chosen = {}
        if self._file_type is not None:
            chosen = mixture_types(self._file_type, outline, importance=model.calibrated and model.alone)
        schemes = {spec.name: spec.scheme for spec in context.layers}
        typed = final_types(outline, schemes, chosen, context.dtype)
        file_type = self._file_type or _nearest_file_type(typed)
        _check_file_type(file_type, typed, chosen)
        path = directory / f"{model.name}-{file_type.upper()}{_SUFFIX}"
        fields = file_metadata(model, outline, FILE_TYPES[file_type].number)
        towers = compose_mmproj(model, self._file_type)
        writer = GgufWriter(path, context, model, outline, typed, fields)
        if towers is None:
            towers_through_checkout(model, directory)
            return writer
        path = towers.path(directory, model.name)
        second = GgufWriter(path, context, model, towers.outline, towers.typed, towers.fields(model))
        return TwoFiles(writer, second, towers.sources)

    def recognizes(self, directory: Path) -> bool:
        if directory.is_file():
            with directory.open("rb") as file:
                return file.read(len(_MAGIC)) == _MAGIC
        has_file = directory.is_dir() and any(directory.glob(f"*{_SUFFIX}"))
        # a model directory may hold both; what it is named after are its safetensors
        return has_file and not any(directory.glob("model*.safetensors"))

    def read(self, directory: Path) -> CheckpointReader:
        return GgufReader(_file_of(directory))

    @contextmanager
    def home(self, path: Path) -> Iterator[Path]:
        """The directory of the file; for a file alone one made from its metadata."""
        file = _file_of(path)
        if config_beside(file) is not None:
            yield file.parent
            return
        content = GgufFile(file)
        with TemporaryDirectory(prefix="autoround-") as directory:
            write_json(Path(directory) / "config.json", config_in(content))
            write_tokenizer(content.fields, Path(directory))
            yield Path(directory)


def _file_of(path: Path) -> Path:
    """The file itself, or the one in a directory, besides that of a vision tower. Raises CheckpointError where there is
    none, or more than one.
    """
    if not path.is_dir():
        return path
    found = sorted(file for file in path.glob(f"*{_SUFFIX}") if not file.name.startswith(PREFIX))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"`{path}` should hold one {_SUFFIX} file, it holds {names}; name the file itself")
    return found[0]


def _nearest_file_type(typed: Sequence[TypedTensor]) -> str:
    """The file type whose default most tensors have; of two with the same default the first, which has fewer rules."""
    counts = Counter(entry.type for entry in typed if entry.type != "F32")
    usual = counts.most_common(1)[0][0] if counts else "F32"
    plain = [name for name, found in FILE_TYPES.items() if found.type == usual and not name.endswith(("_m", "_l"))]
    return next(iter(sorted(plain, key=lambda name: not name.endswith("_s"))))


def _check_file_type(file_type: str, typed: Sequence[TypedTensor], chosen: Mapping[str, str]) -> None:
    """Raises UnsupportedError when a file has nothing of what its file type would choose."""
    quantized = [entry for entry in typed if entry.type not in FLOATS]
    if chosen and quantized and all(chosen[entry.tensor.name] != entry.type for entry in quantized):
        found = ", ".join(sorted({entry.type for entry in quantized}))
        raise UnsupportedError(f"file type {file_type} is made of {FILE_TYPES[file_type].type}, and the layers are "
                               f"{found}; choose the file type that they fit, or `gguf` alone")
