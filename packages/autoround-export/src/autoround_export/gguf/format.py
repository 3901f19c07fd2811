"""Format `gguf`: one file for llama.cpp and what is built on it, see docs/formats/gguf.md.

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
)
from autoround_export.gguf.file import GgufFile
from autoround_export.gguf.hf_tokenizer import write_tokenizer
from autoround_export.gguf.mixture import FILE_TYPES, FLOATS
from autoround_export.gguf.reader import GgufReader, config_in
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
        if self._file_type is None:
            return None
        types = mixture_types(self._file_type, outline, importance=model.calibrated and model.alone)
        matrices = [name for name, shape in model.shapes.items() if len(shape) > 1]
        return scheme_choices(self._file_type, outline, types, matrices)

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
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
        return GgufWriter(path, context, model, outline, typed, fields)

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
        if (file.parent / "config.json").is_file():
            yield file.parent
            return
        content = GgufFile(file)
        with TemporaryDirectory(prefix="autoround-") as directory:
            write_json(Path(directory) / "config.json", config_in(content))
            write_tokenizer(content.fields, Path(directory))
            yield Path(directory)


def _file_of(path: Path) -> Path:
    """The file itself, or the one in a directory. Raises CheckpointError where there is none, or more than one."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{_SUFFIX}"))
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
