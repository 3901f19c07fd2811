"""The byte layouts of ggml's blocks, one TensorLayout per type; every number little-endian, rows of whole blocks.

The planes in which codes lie are those of `planes`; d, m and dmin are float16.
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
from autoround_export.gguf.planes import (
    five_or_four,
    from_bytes,
    high_bits,
    joined,
    pack_bits_plane,
    pack_crumbs,
    pack_nibbles,
    parted,
    to_bytes,
    unpack_bits_plane,
    unpack_crumbs,
    unpack_nibbles,
)


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
        planes = [codes ^ 128] if bits == 8 else [*high_bits(codes, bits), pack_nibbles(codes & 15, 32)]
        return [to_bytes(weight.scale.half()), *planes]

    def _record(self, blocks: torch.Tensor, rows: int) -> AffineWeight:
        scale, fields, bits = from_bytes(blocks[:, :2]), blocks[:, 2:], self.scheme.bits
        codes = fields ^ 128 if bits == 8 else five_or_four(fields, bits)
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
        return [to_bytes(weight.scale), to_bytes(-weight.minimum), *high_bits(codes, self.scheme.bits),
                pack_nibbles(codes & 15, 32)]

    def _record(self, blocks, rows):
        codes = five_or_four(blocks[:, 4:], self.scheme.bits)
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
        scales = torch.cat([low[:, :8] | (low[:, 8:] << 4), joined(high, 2)], dim=1)
        return [pack_bits_plane(codes >> 2), pack_crumbs(codes & 3), scales, to_bytes(weight.scale)]

    def _record(self, blocks, rows):
        codes = unpack_crumbs(blocks[:, 32:96]) | (unpack_bits_plane(blocks[:, :32]) << 2)
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        stored = torch.cat([low & 15, low >> 4], dim=1) | (parted(high, 2).reshape(-1, 16) << 4)
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
