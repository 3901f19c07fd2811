"""The records in the waist of the hourglass: what algorithms produce and formats and backends consume.

Integers are born once. A record holds codes and scales exactly as they will be stored; whoever needs
numbers asks `dequantize`, the only copy of the record's formula.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from autoround_core.scheme import QuantScheme


class QuantizedWeight(ABC):
    """One quantized weight matrix. Frozen; subclasses are final and one per number family."""

    __slots__ = ()

    scheme: QuantScheme

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the record by field name, as stored."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that this record stands for, computed in float32 and rounded once to `dtype`."""

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same record with its tensors on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def digest(self) -> str:
        """SHA-256 over the scheme, names, shapes and bytes of the record: equal records, equal digests."""
        digest = hashlib.sha256(str(self.scheme).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class AffineWeight(QuantizedWeight):
    """w = scale * (code - zero_point), group by group along the input features.

    codes: uint8 [out, in], 0 <= code < 2**bits. scale: float16 [out, groups], any sign, finite and not zero.
    zero_point: uint8 [out, groups]. groups = ceil(in / group_size); the last group of a row may be shorter.
    Raises ValueError when the tensors contradict the scheme or each other.
    """

    scheme: QuantScheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise ValueError(f"codes must be [out, in], got {tuple(self.codes.shape)}")
        out_features, in_features = self.codes.shape
        expected = (out_features, self.scheme.groups(in_features))
        wanted = (
            ("codes", torch.uint8, (out_features, in_features)),
            ("scale", torch.float16, expected),
            ("zero_point", torch.uint8, expected),
        )
        for name, dtype, shape in wanted:
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of {self.scheme} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def check(self) -> AffineWeight:
        """The record itself. Raises ValueError when its scales or zero points cannot be; for what comes from a file."""
        if not torch.isfinite(self.scale).all():
            raise ValueError("a scale is not finite")
        bits = self.scheme.bits
        if self.scheme.sym and (self.zero_point != 2 ** (bits - 1)).any():
            raise ValueError(f"the zero points of symmetric weights must be {2 ** (bits - 1)}")
        if (self.zero_point > 2**bits - 1).any():
            raise ValueError(f"zero_point {int(self.zero_point.max())} does not fit into {bits} bits")
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        out_features, in_features = self.shape
        length = self.scheme.group_length(in_features)
        padding = self.scale.shape[1] * length - in_features
        # -128..255 and every difference of two codes are exact in float32
        values = self.codes.to(torch.float32)
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        values = values.view(out_features, -1, length)
        values -= self.zero_point.unsqueeze(-1)
        values *= self.scale.to(torch.float32).unsqueeze(-1)
        return values.view(out_features, -1)[:, :in_features].to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """A linear layer whose weight is quantized. name: as in the checkpoint, without `.weight`.

    bias: [out] in the model's dtype, or None.
    """

    name: str
    weight: QuantizedWeight
    bias: torch.Tensor | None = None


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor of any dtype, row-major."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
