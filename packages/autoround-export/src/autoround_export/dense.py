"""Format `dense`: the dequantized 16-bit model, an ordinary checkpoint that anything can load for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from autoround_core import (
    CheckpointContext,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    LinearSpec,
    QuantizedLayer,
    ShardWriter,
    Target,
    TensorFiles,
    Verdict,
    read_json,
    write_json,
)


class DenseFormat(CheckpointFormat):
    """Every layer as the float weight that its record stands for."""

    name = "dense"
    summary = "the dequantized 16-bit model, for evaluation anywhere"
    stores_records = False
    stores_outer = True

    def why_not(self, spec: LinearSpec) -> str | None:
        return None

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        if target.engine == "llamacpp":
            return Verdict("it reads GGUF files only")
        return Verdict(notes=("the weights are written in 16 bits: nothing is saved by this format",))

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        return _DenseWriter(directory, context)

    def recognizes(self, directory: Path) -> bool:
        config = directory / "config.json"
        if not config.is_file():
            return False
        content = read_json(config)
        return isinstance(content, dict) and not (content.get("quantization_config") or content.get("quantization"))

    def read(self, directory: Path) -> CheckpointReader:
        return _DenseReader(directory)


class _DenseWriter(CheckpointWriter):
    def __init__(self, directory: Path, context: CheckpointContext) -> None:
        self._directory, self._context = directory, context
        self._shards = ShardWriter(directory)
        # Transformers stores this kind of layer transposed; everything else is [out, in]
        self._transposed = set(context.transposed)

    def add(self, layer: QuantizedLayer) -> None:
        weight = layer.weight.dequantize(self._context.dtype)
        self.keep(f"{layer.name}.weight", weight.T if layer.name in self._transposed else weight)
        if layer.bias is not None:
            self.keep(f"{layer.name}.bias", layer.bias)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self._shards.add(name, tensor)

    def finish(self) -> None:
        self._shards.finish()
        write_json(self._directory / "config.json", dict(self._context.config))


class _DenseReader(CheckpointReader):
    def __init__(self, directory: Path) -> None:
        self.config = read_json(directory / "config.json")
        self._files = TensorFiles(directory)

    def layers(self) -> Iterator[QuantizedLayer]:
        return iter(())

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._files.items(self._files.names())
