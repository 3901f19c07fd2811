"""After the save: is what lies on the disk what was meant?

Every layer is read back through its format's own reader and compared, byte for byte, with what tuning
returned; then the checkpoint is loaded and a short forward pass is compared with the fake-quantized model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from autoround_core.adapter import ModelAdapter
from autoround_core.errors import VerificationError
from autoround_core.flow import as_taken
from autoround_core.format import CheckpointFormat
from autoround_core.loading import assemble
from autoround_core.records import QuantizedLayer, tensor_bytes

PROBE_TOKENS = 32
_LOGIT_TOLERANCE = 2e-2  # of the largest logit: a few roundings to bfloat16


class Expectation:
    """Remembers a digest of each layer, not the layer: what was meant must not double the memory."""

    def __init__(self, dense_dtype: torch.dtype | None) -> None:
        """dense_dtype: also remember dequantized weights, for formats that store those."""
        self._dense_dtype = dense_dtype
        self._records: dict[str, str] = {}
        self._dense: dict[str, str] = {}

    def add(self, layer: QuantizedLayer) -> None:
        self._records[layer.name] = _layer_digest(layer)
        if self._dense_dtype is not None:
            self._dense[layer.name] = _digest(layer.weight.dequantize(self._dense_dtype))

    def check_layers(
        self, fmt: CheckpointFormat, directory: Path, transposed: set[str], absent: frozenset[str] = frozenset()
    ) -> int:
        """Compare every layer; return how many. Raises VerificationError naming the first that differs.

        absent: layers that this format was not given.
        """
        reader = fmt.read(directory)
        found: dict[str, str] = {}
        if fmt.stores_records:
            found = {layer.name: _layer_digest(layer) for layer in reader.layers()}
            expected = {name: digest for name, digest in self._records.items() if name not in absent}
        else:
            expected = {name: digest for name, digest in self._dense.items() if name not in absent}
            for name, tensor in reader.rest():
                layer = name.removesuffix(".weight")
                if layer in expected:
                    found[layer] = _digest(tensor.T if layer in transposed else tensor)
        for name, digest in expected.items():
            if name not in found:
                raise VerificationError(f"layer `{name}` is missing from the saved {fmt.name} checkpoint")
            if found[name] != digest:
                raise VerificationError(
                    f"layer `{name}` of the saved {fmt.name} checkpoint differs from what was tuned"
                )
        if unexpected := found.keys() - expected.keys():
            raise VerificationError(f"the saved {fmt.name} checkpoint holds an unexpected layer `{min(unexpected)}`")
        return len(found)


def _layer_digest(layer: QuantizedLayer) -> str:
    return layer.weight.digest() + ("" if layer.input_scale is None else _digest(layer.input_scale))


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor_bytes(tensor)).hexdigest()


@torch.no_grad()
def probe(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits float32 [tokens, vocabulary] of a short forward pass. inputs: keyword arguments, of one sample."""
    return model(**as_taken(model, inputs), use_cache=False).logits[0].float().cpu()


def check_forward(
    fmt: CheckpointFormat,
    directory: Path,
    adapter: ModelAdapter,
    inputs: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    *,
    trust_remote_code: bool,
) -> float:
    """Load the checkpoint and compare its logits; return the largest difference over the largest logit.

    Raises VerificationError when it is more than roundings explain.
    """
    model = adapter.skeleton(directory, trust_remote_code=trust_remote_code)
    model = assemble(model, adapter, fmt.read(directory), device=torch.device("cpu"), backend="reference")
    logits = probe(model, inputs)
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= _LOGIT_TOLERANCE:
        raise VerificationError(
            f"the saved {fmt.name} checkpoint computes other logits than the tuned model (difference {difference:.3g})"
        )
    return difference
