"""Architectures that we have no table for, through the user's own checkout of llama.cpp.

Its converter runs on the model as it is, in its dtype, so that nothing is rounded. What a conversion does to a
matrix is then read off the result, row by row (`row_index`). A vision tower, of which nothing is quantized, it writes
itself. The converter runs in a process of its own, because it needs its own version of the gguf package, and because
it is not ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from autoround_core import TensorFiles, UnsupportedError, UsageError, read_json
from autoround_export.gguf.file import GgufFile, shown
from autoround_export.gguf.outline import FileTensor, Outline
from autoround_export.gguf.row_index import RowIndex

ROOT_VARIABLE = "LLAMA_CPP_ROOT"
_SCRIPT = "convert_hf_to_gguf.py"
_OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_FLOATS = ("F32", "F16", "BF16")
# what an outline can say of values: the writer derives their types from Python's
_KEPT_TYPES = {"BOOL", "UINT32", "INT32", "FLOAT32", "STRING"}
_KEPT_TYPES |= {f"ARRAY {name}" for name in _KEPT_TYPES}
# the converter knows a tokenizer by a hash of what it makes of a text, and fails for one that it has never met
_DRIVER = """
import sys
root, name = sys.argv[1:3]
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
sys.path.insert(0, root)
import convert_hf_to_gguf
base = convert_hf_to_gguf.ModelBase
owners = [c for c in (base, *base.__subclasses__()) if "get_vocab_base_pre" in vars(c)]
if not owners:
    sys.exit("this checkout has no get_vocab_base_pre that could be told the pre-tokenizer")
for owner in owners:
    owner.get_vocab_base_pre = lambda self, tokenizer: name
convert_hf_to_gguf.main()
"""


def checkout() -> Path | None:
    """The checkout of llama.cpp that LLAMA_CPP_ROOT names; None when it is not set.

    Raises UsageError when it names something else.
    """
    given = os.environ.get(ROOT_VARIABLE)
    if not given:
        return None
    root = Path(given).expanduser().absolute()
    if not (root / _SCRIPT).is_file():
        raise UsageError(
            f"{ROOT_VARIABLE} is `{shown(given)}`, which holds no {_SCRIPT}; set it to a checkout of llama.cpp"
        )
    return root


def outline_from_checkout(
    root: Path,
    model_dir: Path,
    dtype: str,
    tensors: TensorFiles,
    *,
    pre: str | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    """What the converter under `root` makes of a model, as rows of the model's own tensors.

    dtype: of the checkpoint, `bfloat16`. pre: the name of the pre-tokenizer, for a tokenizer that the converter does
    not know. All fields are the converter's, the tokenizer's among them. Vectors and matrices of short rows become
    constants, and so does every matrix that is not made of rows of the model, however large (transposed, computed,
    padded): it is then stored as it is, and not quantized. Needs room for a second copy of the model where
    temporary files go. Raises UnsupportedError for what the converter, or an outline, cannot express.
    """
    _without_code(model_dir, trust_remote_code)
    with TemporaryDirectory(prefix="autoround-gguf-") as work:
        path = Path(work) / "model.gguf"
        _run_converter(root, model_dir, path, dtype, pre)
        file = GgufFile(path)
        fields = _fields(file)
        index = RowIndex(tensors, getattr(torch, dtype))
        found, constants = [], {}
        for info in file.tensors.values():
            if info.type not in _FLOATS:
                raise UnsupportedError(
                    f"llama.cpp's converter stores tensor `{shown(info.name)}` as {info.type}, not as a float; "
                    "start from a checkpoint whose weights are 16 or 32 bit floats"
                )
            tensor = file.tensor(info.name)
            pieces = index.pieces(info.name, tensor) if len(info.shape) > 1 else None
            if pieces is None:
                constants[info.name] = tensor.float()
            else:
                found.append(FileTensor(info.name, info.shape, pieces))
    return Outline(fields, tuple(found), constants)


def mmproj_from_checkout(root: Path, model_dir: Path, path: Path) -> None:
    """Have the converter under `root` write the vision tower and projector of a model to `path`, in 16 bits.

    Raises UnsupportedError where it cannot.
    """
    _without_code(model_dir, False)
    _run_converter(root, model_dir, path.absolute(), "float16", None, "--mmproj")


def _without_code(model_dir: Path, trust_remote_code: bool) -> None:
    """The converter lets a tokenizer run its own code without being asked."""
    for name in ("config.json", "tokenizer_config.json"):
        path = model_dir / name
        content = read_json(path) if path.is_file() else None
        if not trust_remote_code and isinstance(content, dict) and "auto_map" in content:
            raise UnsupportedError(
                f"`{shown(path)}` brings code along (`auto_map`), which llama.cpp's converter would run; "
                "read the code, then give trust_remote_code"
            )


def _run_converter(root: Path, model_dir: Path, path: Path, dtype: str, pre: str | None, *more: str) -> None:
    if dtype not in _OUTTYPES:
        raise UnsupportedError(
            f"llama.cpp's converter writes {', '.join(_OUTTYPES)}, not `{shown(dtype)}`; save the model in one of them"
        )
    start = [str(root / _SCRIPT)] if pre is None else ["-c", _DRIVER, str(root), pre]
    options = [*more, "--outtype", _OUTTYPES[dtype], "--outfile", str(path), str(model_dir.absolute())]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "NO_LOCAL_GGUF"}
    # its own gguf comes before an installed one, which is older; nothing is looked up in or written to other places
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(root / "gguf-py"), str(root)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    result = subprocess.run(
        [sys.executable, *start, *options], env=environment, cwd=path.parent, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if result.returncode == 0 and path.is_file():
        return
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip("^~ \t")]
    # a bare `AssertionError` says something only with the line before it
    last = lines[-1:] if lines and " " in lines[-1] else lines[-2:]
    said = shown(": ".join(last)) or f"exit code {result.returncode}"
    hint = "; name the pre-tokenizer" if pre is None and "get_vocab_base_pre" in said else ""
    if said.startswith("ModuleNotFoundError"):
        hint = "; install what the requirements.txt there lists"
    raise UnsupportedError(f"llama.cpp's converter under `{shown(root)}` cannot convert this model: {said}{hint}")


def _fields(file: GgufFile) -> dict[str, Any]:
    """The converter's fields, but for the alignment, which is its own file's."""
    kept = {}
    for key, value in file.fields.items():
        numbers = value if isinstance(value, list) else [value]
        negative = file.types[key] == "INT32" and numbers[0] < 0
        if key == "general.alignment" or (negative and key.startswith("general.sampling.")):
            continue  # of the sampling advice only negative numbers, which say "none", are lost
        too_large = file.types[key] == "ARRAY UINT32" and max(numbers, default=0) >= 2**31
        if file.types[key] not in _KEPT_TYPES or negative or too_large:
            raise UnsupportedError(
                f"llama.cpp's converter writes `{shown(key)}` as {file.types[key]}, which we cannot repeat"
            )
        kept[key] = value
    return kept
