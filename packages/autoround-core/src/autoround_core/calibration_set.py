"""What a model is calibrated on, ready to be run: the form between data sets and the driver."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autoround_core.records import tensor_bytes


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """Rows of tokens and where they came from.

    input_ids: int64 [samples, seqlen]. source: the specification. documents: those read, without
    empty ones. unused_tokens: what stands in the last joined row of each data set, never filled.
    mask: bool [samples, seqlen], False where a row is padded; None if none is. extras: for each sample
    what a model is given besides its tokens (pixel values and the like); () = nothing. images: how many
    all samples hold together. skipped: samples that could not be read and were left out.
    """

    input_ids: torch.Tensor
    source: str
    documents: int
    unused_tokens: int
    mask: torch.Tensor | None = None
    extras: tuple[Mapping[str, torch.Tensor], ...] = ()
    images: int = 0
    skipped: int = 0

    @property
    def samples(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seqlen(self) -> int:
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def sha256(self) -> str:
        """Hex digest over shape, tokens and all else that the model is given: equal samples, equal digests."""
        digest = hashlib.sha256(f"{self.samples}x{self.seqlen}:".encode() + tensor_bytes(self.input_ids))
        if self.mask is not None:
            digest.update(b"mask" + tensor_bytes(self.mask))
        for extra in self.extras:
            for name, tensor in sorted(extra.items()):
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor_bytes(tensor))
        return digest.hexdigest()

    def inputs(self, sample: int) -> dict[str, torch.Tensor]:
        """The keyword arguments of the model for one sample: input_ids [1, seqlen] and what belongs to it."""
        inputs = {"input_ids": self.input_ids[sample : sample + 1]}
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[sample : sample + 1].long()
        return {**inputs, **(self.extras[sample] if self.extras else {})}
