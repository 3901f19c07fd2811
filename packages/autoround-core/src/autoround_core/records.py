"""The records in the waist of the hourglass: what algorithms produce and formats and backends consume.

Integers are born once. A record holds codes and scales exactly as they will be stored; whoever needs
numbers asks `dequantize`, the only copy of the record's formula.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from autoround_core.scheme import WHOLE_ROW, QuantScheme


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


_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class AffineWeight(QuantizedWeight):
    """w = scale * (code - zero_point), group by group along the input features.

    codes: uint8 [out, in], 0 <= code < 2**bits. scale: [out, groups] of any sign, finite and not zero; tuning
    makes float16, and files of others hold bfloat16 or float32 too, which stay what they are. zero_point: uint8
    [out, groups]. groups = ceil(in / group_size); the last group of a row may be shorter.
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
            ("scale", self.scale.dtype if self.scale.dtype in _SCALE_DTYPES else torch.float16, expected),
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


# E2M1, the four-bit float: sign << 3 | index into these
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight(QuantizedWeight):
    """w = number(code) * scale, block by block; "nv_fp" divides the scale by global_scale first.

    codes: uint8 [out, in]. With 8 bits the byte of an E4M3 number (OCP OFP8), with 4 bits an E2M1 number (OCP MX).
    scale: [row groups, groups], positive. "fp": float32, or bfloat16 and float16 from files of others; "mx_fp":
    uint8, the E8M0 number 2**(byte - 127); "nv_fp": float8_e4m3fn. global_scale: float32 [1] of "nv_fp", else None.
    Raises ValueError when the tensors contradict the scheme or each other.
    """

    scheme: QuantScheme
    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8 [out, in], got {self.codes.dtype} {tuple(self.codes.shape)}")
        out_features, in_features = self.codes.shape
        shape = (self.scheme.row_groups(out_features), self.scheme.groups(in_features))
        dtypes = {"mx_fp": (torch.uint8,), "nv_fp": (torch.float8_e4m3fn,)}.get(self.scheme.data_type, _SCALE_DTYPES)
        if tuple(self.scale.shape) != shape or self.scale.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"scale of {self.scheme} must be {wanted} {shape}, "
                             f"got {self.scale.dtype} {tuple(self.scale.shape)}")
        if (self.global_scale is not None) != (self.scheme.data_type == "nv_fp"):
            raise ValueError(f"global_scale belongs to nv_fp and to nothing else, the scheme is {self.scheme}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def check(self) -> FloatWeight:
        """The record itself. Raises ValueError when its numbers cannot be; for what comes from a file."""
        if self.scheme.bits < 8 and (self.codes >> self.scheme.bits).any():
            raise ValueError(f"code {int(self.codes.max())} does not fit into {self.scheme.bits} bits")
        if not all(bool(torch.isfinite(part).all()) for part in (self._numbers(), self._scale())):
            raise ValueError("a code or a scale is not finite")
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"codes": self.codes, "scale": self.scale, "global_scale": self.global_scale}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        out_features, in_features = self.shape
        rows = out_features if self.scheme.group_rows == WHOLE_ROW else self.scheme.group_rows
        scale = self._scale().repeat_interleave(rows, 0)[:out_features]
        scale = scale.repeat_interleave(self.scheme.group_length(in_features), 1)[:, :in_features]
        return (self._numbers() * scale).to(dtype)

    def _numbers(self) -> torch.Tensor:
        if self.scheme.bits == 8:
            return self.codes.view(torch.float8_e4m3fn).to(torch.float32)
        values = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), device=self.codes.device)
        return values[self.codes.long()]

    def _scale(self) -> torch.Tensor:
        """float32 [row groups, groups], the global scale included."""
        if self.scheme.data_type == "mx_fp":
            ones = torch.ones(self.scale.shape, device=self.scale.device)
            return torch.ldexp(ones, self.scale.to(torch.int32) - E8M0_BIAS)
        scale = self.scale.to(torch.float32)
        return scale if self.global_scale is None else scale / self.global_scale


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """A linear layer whose weight is quantized. name: as in the checkpoint, without `.weight`.

    bias: [out] in the model's dtype, or None. input_scale: float32 [1], for schemes whose activations need a
    number from calibration: of a static "fp" activation the step, greatest input / 448; of "nv_fp" the global
    scale, 448 * 6 / greatest input.
    """

    name: str
    weight: QuantizedWeight
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor of any dtype, row-major."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
