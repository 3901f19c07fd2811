"""Where and how blocks run: device, precision, and how many samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from autoround_core.errors import UsageError

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


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, the CPU for None. Raises UsageError if torch does not know it or it is not there."""
    try:
        chosen = torch.device(device or "cpu")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device `{device}` cannot be used: {str(error).splitlines()[0]}") from None
    return chosen


def product_dtype(model_dtype: torch.dtype, device: torch.device, amp: bool | None) -> torch.dtype:
    """Of matrix products while tuning: 16 bits if `amp`, float32 if not; None = what the device is faster at.

    16 bits is bfloat16, and float16 for a float16 model on an accelerator.
    """
    if amp is None:
        amp = device.type != "cpu" or _cpu_prefers_bfloat16()
    if not amp:
        return torch.float32
    return torch.float16 if model_dtype == torch.float16 and device.type != "cpu" else torch.bfloat16


def _cpu_prefers_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones.

    A rule, not a measurement: two runs on one machine must make the same bytes. Intel's cores do so by AMX alone
    (without it, AVX-512 BF16 was measured at 0.55 times the speed of float32), AMD's by AVX-512 BF16 (1.9 times).
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    amd = "AMD" in str(capabilities.get("cpu_name"))
    return bool(capabilities.get("amx_bf16") or (amd and capabilities.get("avx512_bf16")))
