"""Safetensors files with an index: written as they fill, read by tensor name.

What an index or header says is not trusted: a shard's name must be a plain file name, and the safetensors
library checks every header against the file's size before a tensor is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoround_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


class ShardWriter:
    """Collects tensors and writes a file whenever `max_bytes` are together. Memory: one shard."""

    def __init__(self, directory: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor. Raises CheckpointError for a name that is already there."""
        if name in self._names:
            raise CheckpointError(f"tensor `{name}` would be stored twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._names.add(name)
        # a copy: a view would keep, and safetensors refuse to save, the whole block that it looks into
        self._pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the last shard, give all their final names, write the index where there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._directory / INDEX, index)

    def _part(self, i: int) -> Path:
        return self._directory / f"part-{i:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


class TensorFiles:
    """The tensors of a checkpoint directory, by name."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError for missing, truncated or contradictory files."""
        self._directory = directory
        self._file_of: dict[str, Path] = {}
        # opening a file reads its whole header, so each is opened once
        self._files = {path: _open(path) for path in weight_files(directory)}
        for path, file in self._files.items():
            for name in file.keys():
                if name in self._file_of:
                    raise CheckpointError(f"tensor `{name}` is in both {self._file_of[name].name} and {path.name}")
                self._file_of[name] = path
        absent = [name for name in _weight_map(directory) or () if name not in self._file_of]
        if absent:
            raise CheckpointError(f"`{directory / INDEX}` names tensor `{absent[0]}`, which no file holds")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def get(self, name: str) -> torch.Tensor:
        """One tensor. Raises CheckpointError when there is none of that name."""
        if name not in self._file_of:
            raise CheckpointError(f"`{self._directory}` holds no tensor `{name}`")
        return self._files[self._file_of[name]].get_tensor(name)

    def items(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, self.get(name)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        # read into memory of its own: mapped, the whole file would count as ours and stay as long as one tensor does
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"`{path}` is no complete safetensors file: {error}") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, from its index where there is one.

    Raises CheckpointError when there are none, or the index names a file that is missing or lies elsewhere.
    """
    index, weight_map = directory / INDEX, _weight_map(directory)
    if weight_map is None:
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
            raise CheckpointError(
                f"`{directory}` holds weights only as pickle files (.bin), which can run code when they are opened; "
                "convert them to safetensors first: load the model with Transformers and call save_pretrained"
            )
        raise CheckpointError(f"`{directory}` holds no {SINGLE} and no {INDEX}")
    names = sorted({name if isinstance(name, str) else json.dumps(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"`{index}` names the file `{name}`, which is not a plain file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"`{index}` names `{name}`, which is missing")
    return [directory / name for name in names]


def _weight_map(directory: Path) -> dict[str, Any] | None:
    """{tensor: file} as the index says, unchecked; None without an index."""
    index = directory / INDEX
    if not index.is_file():
        return None
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index}` has no weight_map")
    return weight_map


def read_json(path: Path) -> Any:
    """Raises CheckpointError when the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing") from None
    except ValueError as error:
        raise CheckpointError(f"`{path}` is no valid JSON: {error}") from None


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
