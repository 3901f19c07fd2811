"""Codes of few bits in the bytes of ggml's blocks.

A plane of few bits keeps elements that lie a stride apart in one byte, which is what the kernels
of llama.cpp unpack fastest:

    nibbles 32    byte j of 16: element j low, j + 16 high                              Q4_0 Q4_1 Q5_0 Q5_1
    nibbles 64    of each 64 elements, byte j of 32: element j low, j + 32 high         Q4_K Q5_K
    nibbles 128   of each 128 elements, byte j of 64: element j low, j + 64 high        Q6_K
    crumbs        of each 128 elements, byte j of 32: j, j + 32, j + 64, j + 96, two bits each     Q2_K Q3_K Q6_K
    bits          byte j of 32: bit k is element 32 k + j                               Q3_K Q5_K
    bits 32       bit i of 4 bytes is element i                                         Q5_0 Q5_1
"""

from __future__ import annotations

import torch


def to_bytes(halves: torch.Tensor) -> torch.Tensor:
    """float16 of any shape to uint8 [numbers, 2]."""
    return halves.contiguous().view(-1, 1).view(torch.uint8)


def from_bytes(pairs: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2] to float16 [blocks, 1]."""
    return pairs.contiguous().view(torch.float16)


def joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [blocks, k, n] of numbers below 2**bits to [blocks, n]: part k at bit k * bits."""
    result = parts[:, 0].clone()
    for k in range(1, parts.shape[1]):
        result |= parts[:, k] << (k * bits)
    return result


def parted(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `joined`: uint8 [blocks, n] to [blocks, 8 / bits, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)


def _pack_plane(codes: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """Of each `length` elements of a block, 8 / bits runs side by side in the bits of a byte."""
    runs = codes.reshape(-1, 8 // bits, length * bits // 8)
    return joined(runs, bits).view(codes.shape[0], -1)


def _unpack_plane(packed: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    return parted(packed.reshape(-1, length * bits // 8), bits).reshape(packed.shape[0], -1)


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


def high_bits(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The plane of fifth bits [blocks, 4] of codes [blocks, 32] of 5 bits; nothing for codes of 4."""
    if bits == 4:
        return []
    return [joined((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)]


def five_or_four(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [blocks, 32] from what `high_bits` and `pack_nibbles` made, side by side."""
    if bits == 4:
        return unpack_nibbles(fields, 32)
    high = parted(fields[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return unpack_nibbles(fields[:, 4:], 32) | (high << 4)
