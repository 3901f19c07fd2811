"""Where and how blocks run: device, precision, and how many samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
# on a CPU what so many tokens leave behind stays near the caches; fewer cost time, more cost memory
_CPU_TOKENS = 512


class Compute:
    """device: of the tuned block. storage: of hidden states between blocks. dtype: of matrix products.

    batch_size: the most samples that run at once.
    """

    def __init__(self, device: torch.device, storage: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self.device, self.storage, self.dtype, self._batch_size = device, storage, dtype, batch_size

    def one_by_one(self) -> Compute:
        """The same place, one sample at a time: for outputs as wide as a vocabulary."""
        return Compute(self.device, self.storage, self.dtype, 1)

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; what the model computes in float32 stays so."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def fetch(self, hidden: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Samples of a chain on the compute device."""
        return hidden[rows.to(hidden.device)].to(self.device, dtype)

    def map(self, function: Callable[[torch.Tensor], T], rows: torch.Tensor, seqlen: int) -> list[T]:
        """[function(piece) for the pieces of `rows`], in order, under `autocast`."""
        size = self._batch_size
        if self.device.type == "cpu":
            size = min(size, max(1, _CPU_TOKENS // seqlen))
        with self.autocast():
            return [function(piece) for piece in rows.split(size)]
