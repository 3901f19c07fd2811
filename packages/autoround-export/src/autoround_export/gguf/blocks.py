"""The byte layouts of ggml's blocks, one TensorLayout per type; every number little-endian, rows of whole blocks.

d, m (dmin): float16. A plane of few bits keeps elements that lie a stride apart in one byte, which is what the kernels
of llama.cpp unpack fastest:

    nibbles 32    byte j of 16: element j low, j + 16 high                              Q4_0 Q4_1 Q5_0 Q5_1
    nibbles 64    of each 64 elements, byte j of 32: element j low, j + 32 high         Q4_K Q5_K
    nibbles 128   of each 128 elements, byte j of 64: element j low, j + 64 high        Q6_K
    crumbs        of each 128 elements, byte j of 32: j, j + 32, j + 64, j + 96, two bits each     Q2_K Q3_K Q6_K
    bits          byte j of 32: bit k is element 32 k + j                               Q3_K Q5_K
    bits 32       bit i of 4 bytes is element i                                         Q5_0 Q5_1
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from autoround_core import (
    AffineWeight,
    CheckpointError,
    LinearSpec,
    QuantizedWeight,
    QuantScheme,
    SuperBlockWeight,
    TensorLayout,
)
from autoround_core.scheme import BLOCK_TYPES, GGUF_TYPES


class BlockLayout(TensorLayout):
    """blocks: uint8 [out, in / block * block_bytes]."""

    tensor_names = ("blocks",)
    block: int
    block_bytes: int
    scheme: QuantScheme

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.scheme != self.scheme:
            return f"{self.name} stores {self.scheme}, not {spec.scheme}"
        if spec.in_features % self.block:
            return f"{self.name} needs rows divisible by {self.block}, got {spec.in_features}"
        return None

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        codes = weight.codes.reshape(-1, self.block)
        blocks = torch.cat(self._fields(weight, codes), dim=1)
        return {"blocks": blocks.view(weight.shape[0], -1)}

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        blocks = tensors["blocks"]
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % self.block_bytes:
            raise CheckpointError(f"{self.name} is uint8 [out, blocks * {self.block_bytes}], "
                                  f"got {blocks.dtype} {tuple(blocks.shape)}")
        try:
            weight = self._record(blocks.reshape(-1, self.block_bytes), blocks.shape[0]).check()
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from None
        if shape not in (None, weight.shape):
            raise CheckpointError(f"the tensor holds {weight.shape} weights, {shape} were expected")
        return weight

    @abstractmethod
    def _fields(self, weight: QuantizedWeight, codes: torch.Tensor) -> list[torch.Tensor]:
        """The fields of all blocks in the order of the file, uint8 [blocks, bytes]. codes: [blocks, elements]."""

    @abstractmethod
    def _record(self, blocks: torch.Tensor, rows: int) -> QuantizedWeight:
        """The record of `rows` rows from uint8 [blocks, bytes]."""


class _Affine(BlockLayout):
    """Q4_0, Q5_0, Q8_0: d * (code - zero), the numbers of a symmetric integer scheme with groups of 32."""

    block = 32

    def __init__(self, name: str) -> None:
        self.name, self.scheme = name, GGUF_TYPES[f"GGUF:{name}"]
        self.block_bytes = 2 + 4 * self.scheme.bits

    def _fields(self, weight: AffineWeight, codes: torch.Tensor) -> list[torch.Tensor]:
        if weight.scale.dtype != torch.float16 and not torch.equal(weight.scale.half().to(weight.scale), weight.scale):
            raise CheckpointError(f"a scale is {weight.scale.dtype} and no float16 number, as {self.name} stores it")
        bits = self.scheme.bits
        planes = [codes ^ 128] if bits == 8 else [*_high_bits(codes, bits), pack_nibbles(codes & 15, 32)]
        return [to_bytes(weight.scale.half()), *planes]

    def _record(self, blocks: torch.Tensor, rows: int) -> AffineWeight:
        scale, fields, bits = from_bytes(blocks[:, :2]), blocks[:, 2:], self.scheme.bits
        codes = fields ^ 128 if bits == 8 else _five_or_four(fields, bits)
        zeros = torch.full((rows, len(blocks) // rows), 2 ** (bits - 1), dtype=torch.uint8)
        return AffineWeight(self.scheme, codes.view(rows, -1), scale.view(rows, -1), zeros)


class _SuperBlock(BlockLayout):
    """A type of BLOCK_TYPES."""

    type: ClassVar[str]

    def __init__(self) -> None:
        kind = BLOCK_TYPES[self.type]
        self.name = self.type.upper()
        self.scheme = QuantScheme(kind.bits, kind.group_size, kind.sym, self.type)
        self.block, self.block_bytes = kind.block, kind.block_bytes

    def _weight(self, rows: int, *parts: torch.Tensor | None) -> SuperBlockWeight:
        """The record of codes, scale, minimum, sub_scale, sub_minimum, each [blocks, n]."""
        return SuperBlockWeight(self.scheme, *(None if part is None else part.reshape(rows, -1) for part in parts))


class _FloatMinimum(_SuperBlock):
    """Q4_1, Q5_1: d * code + m."""

    def _fields(self, weight, codes):
        # a record subtracts its minimum, the file adds it
        return [to_bytes(weight.scale), to_bytes(-weight.minimum), *_high_bits(codes, self.scheme.bits),
                pack_nibbles(codes & 15, 32)]

    def _record(self, blocks, rows):
        codes = _five_or_four(blocks[:, 4:], self.scheme.bits)
        return self._weight(rows, codes, from_bytes(blocks[:, :2]), -from_bytes(blocks[:, 2:4]), None, None)


class Q4_1(_FloatMinimum):
    type = "q4_1"


class Q5_1(_FloatMinimum):
    type = "q5_1"


class Q2_K(_SuperBlock):
    """16 groups of 16: sub-scale and sub-minimum in a byte."""

    type = "q2_k"

    def _fields(self, weight, codes):
        scales = weight.sub_scale.view(torch.uint8).view(-1, 16) | (weight.sub_minimum.view(-1, 16) << 4)
        return [scales, pack_crumbs(codes), to_bytes(weight.scale), to_bytes(weight.minimum)]

    def _record(self, blocks, rows):
        scales = blocks[:, :16]
        return self._weight(rows, unpack_crumbs(blocks[:, 16:80]), from_bytes(blocks[:, 80:82]),
                            from_bytes(blocks[:, 82:84]), (scales & 15).view(torch.int8), scales >> 4)


class Q3_K(_SuperBlock):
    """16 groups of 16: sub-scales of 6 bits, 32 more than they stand for."""

    type = "q3_k"

    def _fields(self, weight, codes):
        stored = (weight.sub_scale.view(-1, 16) + 32).view(torch.uint8)
        low, high = stored & 15, (stored >> 4).view(-1, 4, 4)
        scales = torch.cat([low[:, :8] | (low[:, 8:] << 4), _joined(high, 2)], dim=1)
        return [pack_bits_plane(codes >> 2), pack_crumbs(codes & 3), scales, to_bytes(weight.scale)]

    def _record(self, blocks, rows):
        codes = unpack_crumbs(blocks[:, 32:96]) | (unpack_bits_plane(blocks[:, :32]) << 2)
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        stored = torch.cat([low & 15, low >> 4], dim=1) | (_parted(high, 2).reshape(-1, 16) << 4)
        return self._weight(rows, codes, from_bytes(blocks[:, 108:110]), None, stored.view(torch.int8) - 32, None)


class Q4_K(_SuperBlock):
    """8 groups of 32: sub-scales and sub-minima of 6 bits in 12 bytes."""

    type = "q4_k"

    def _fields(self, weight, codes):
        return [to_bytes(weight.scale), to_bytes(weight.minimum), _pack_six_bits(weight), pack_nibbles(codes, 64)]

    def _record(self, blocks, rows):
        return self._weight(rows, unpack_nibbles(blocks[:, 16:], 64), *_outer_and_inner(blocks))


class Q5_K(_SuperBlock):
    """As Q4_K, with a plane of fifth bits."""

    type = "q5_k"

    def _fields(self, weight, codes):
        return [to_bytes(weight.scale), to_bytes(weight.minimum), _pack_six_bits(weight),
                pack_bits_plane(codes >> 4), pack_nibbles(codes & 15, 64)]

    def _record(self, blocks, rows):
        codes = unpack_nibbles(blocks[:, 48:], 64) | (unpack_bits_plane(blocks[:, 16:48]) << 4)
        return self._weight(rows, codes, *_outer_and_inner(blocks))


class Q6_K(_SuperBlock):
    """16 groups of 16: sub-scales int8."""

    type = "q6_k"

    def _fields(self, weight, codes):
        return [pack_nibbles(codes & 15, 128), pack_crumbs(codes >> 4),
                weight.sub_scale.view(torch.uint8).view(-1, 16), to_bytes(weight.scale)]

    def _record(self, blocks, rows):
        codes = unpack_nibbles(blocks[:, :128], 128) | (unpack_crumbs(blocks[:, 128:192]) << 4)
        sub_scale = blocks[:, 192:208].contiguous().view(torch.int8)
        return self._weight(rows, codes, from_bytes(blocks[:, 208:210]), None, sub_scale, None)


LAYOUTS: dict[str, BlockLayout] = {layout.name: layout for layout in (
    _Affine("Q4_0"), Q4_1(), _Affine("Q5_0"), Q5_1(), _Affine("Q8_0"), Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K()
)}  # fmt: skip
_BY_SCHEME = {layout.scheme: layout for layout in LAYOUTS.values()}


def layout_of(scheme: QuantScheme) -> BlockLayout | None:
    """The layout that stores `scheme`, None if ggml has no such type."""
    return _BY_SCHEME.get(scheme)


def to_bytes(halves: torch.Tensor) -> torch.Tensor:
    """float16 of any shape to uint8 [numbers, 2]."""
    return halves.contiguous().view(-1, 1).view(torch.uint8)


def from_bytes(pairs: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2] to float16 [blocks, 1]."""
    return pairs.contiguous().view(torch.float16)


def _joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [blocks, k, n] of numbers below 2**bits to [blocks, n]: part k at bit k * bits."""
    result = parts[:, 0].clone()
    for k in range(1, parts.shape[1]):
        result |= parts[:, k] << (k * bits)
    return result


def _parted(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_joined`: uint8 [blocks, n] to [blocks, 8 / bits, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)


def _pack_plane(codes: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """Of each `length` elements of a block, 8 / bits runs side by side in the bits of a byte."""
    runs = codes.reshape(-1, 8 // bits, length * bits // 8)
    return _joined(runs, bits).view(codes.shape[0], -1)


def _unpack_plane(packed: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    return _parted(packed.reshape(-1, length * bits // 8), bits).reshape(packed.shape[0], -1)


def pack_nibbles(codes: torch.Tensor, length: int) -> torch.Tensor:
    """[blocks, elements] below 16 to [blocks, elements / 2]."""
    return _pack_plane(codes, length, 4)


def unpack_nibbles(packed: torch.Tensor, length: int) -> torch.Tensor:
    return _unpack_plane(packed, length, 4)


def pack_crumbs(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 256] below 4 to [blocks, 64]."""
    return _pack_plane(codes, 128, 2)


def unpack_crumbs(packed: torch.Tensor) -> torch.Tensor:
    return _unpack_plane(packed, 128, 2)


def pack_bits_plane(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 256] of 0 and 1 to [blocks, 32]."""
    return _pack_plane(codes, 256, 1)


def unpack_bits_plane(packed: torch.Tensor) -> torch.Tensor:
    return _unpack_plane(packed, 256, 1)


def _high_bits(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The plane of fifth bits [blocks, 4] of codes [blocks, 32] of 5 bits; nothing for codes of 4."""
    if bits == 4:
        return []
    return [_joined((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)]


def _five_or_four(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [blocks, 32] from what `_high_bits` and `pack_nibbles` made, side by side."""
    if bits == 4:
        return unpack_nibbles(fields, 32)
    high = _parted(fields[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return unpack_nibbles(fields[:, 4:], 32) | (high << 4)


def _pack_six_bits(weight: SuperBlockWeight) -> torch.Tensor:
    """12 bytes: 6 bits of the first four sub-scales and sub-minima, above them 2 of the last four, then 4 of those."""
    scale, least = weight.sub_scale.view(torch.uint8).view(-1, 8), weight.sub_minimum.view(-1, 8)
    first = [part[:, :4] | ((part[:, 4:] >> 4) << 6) for part in (scale, least)]
    return torch.cat([*first, (scale[:, 4:] & 15) | ((least[:, 4:] & 15) << 4)], dim=1)


def _outer_and_inner(blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(scale, minimum, sub_scale, sub_minimum) from the head of a Q4_K or Q5_K block."""
    scale, least, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sub_scale = torch.cat([scale & 63, (last & 15) | ((scale >> 6) << 4)], dim=1)
    sub_minimum = torch.cat([least & 63, (last >> 4) | ((least >> 6) << 4)], dim=1)
    return from_bytes(blocks[:, :2]), from_bytes(blocks[:, 2:4]), sub_scale.view(torch.int8), sub_minimum
