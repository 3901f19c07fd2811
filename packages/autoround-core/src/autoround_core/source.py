"""The model to be quantized: found, and checked before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from autoround_core.errors import CheckpointError, ModelError
from autoround_core.shards import TensorFiles, read_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_VOICES = "spk_dict.pt"  # read beside the weights of Qwen2.5-Omni
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


def find_model(model: str | Path) -> Path:
    """The local directory of a model given by path or hub id; downloads the latter.

    Raises ModelError when there is no such directory and the hub has no such model or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(
            f"model `{text}` is no directory; give a directory with config.json and safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(text, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to the user
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model `{text}` is no local directory and could not be downloaded from the hub "
            f"({type(error).__name__}: {first})"
        ) from None


def check_source(path: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """Check a model directory and return its config.json.

    Raises ModelError or CheckpointError: no config, no safetensors, a truncated file, weights that are already
    quantized, code of its own without `trust_remote_code`.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"`{path}` has no config.json, so it is no model directory")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ModelError(f"`{path / 'config.json'}` names no model_type")
    if config.get("auto_map") and not trust_remote_code:
        raise ModelError(f"`{path}` needs code of its own to load; read that code, then pass --trust_remote_code")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else str(quantization)
        method = method or "an unknown method"
        raise ModelError(f"`{path}` is already quantized ({method}); start from the original 16-bit model")
    if not TensorFiles(path).names():
        raise CheckpointError(f"`{path}` holds no tensors")
    return config


def copy_companions(source: Path, target: Path, *, with_code: bool) -> list[str]:
    """Copy tokenizer, chat template, generation config and the like; return the names.

    config.json is left to the format, weights and their index are not copied.
    """
    copied = []
    for file in sorted(source.iterdir()):
        skip = file.name == "config.json" or file.name.endswith(".index.json") or file.name in ("report.json",)
        known = file.suffix in _COPIED and file.suffix not in _WEIGHTS
        if not file.is_file() or skip or not (known or file.name == _VOICES):
            continue
        if file.suffix == ".py" and not with_code:
            continue
        shutil.copyfile(file, target / file.name)
        copied.append(file.name)
    return copied
