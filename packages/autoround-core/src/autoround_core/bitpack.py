"""Codes of 1 to 8 bits as one little-endian bitstream.

Value i of a row starts at bit i*bits of the row's stream, so 2, 4 and 8 bits are the familiar "low nibble
first" and 3, 5, 6, 7 bits straddle words. One rule serves every layout that packs densely (GPTQ,
compressed-tensors, MLX); a layout with another order permutes the codes first.

Eight codes always fill `bits` whole bytes, so both directions work on eight codes at a time in one int64:
a handful of passes over the data for any width, instead of one table per width.
"""

from __future__ import annotations

import torch

_CODES = 8  # the fewest codes of any width that end on a byte


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes, filled up with zero bits to whole 32-bit words."""
    return -(-count * bits // 32) * 4


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., n] along the last axis into int32 words [..., ceil(n * bits / 32)].

    Raises ValueError for a wrong dtype, and for a code that needs more than `bits` bits: it would
    overwrite its neighbour.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    *lead, count = codes.shape
    size = packed_bytes(count, bits)
    if bits == 8 and size == count:
        return _view(codes, torch.int32)
    octets = -(-count // _CODES)
    if octets * _CODES != count:
        codes = torch.nn.functional.pad(codes, (0, octets * _CODES - count))
    codes = codes.reshape(*lead, octets, _CODES)
    word = codes[..., 0].to(torch.int64)
    for i in range(1, _CODES):
        word |= codes[..., i].to(torch.int64) << (i * bits)
    stream = word.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(*lead, octets * bits)
    if octets * bits != size:
        stream = torch.nn.functional.pad(stream[..., :size], (0, max(0, size - octets * bits)))
    return _view(stream, torch.int32)


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`: int32 [..., words] to uint8 codes [..., count].

    Raises ValueError for a wrong dtype, and when the words are not just as many as `count` codes need.
    """
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"packed words must be int32, got {words.dtype}")
    *lead, length = words.shape
    if length * 4 != packed_bytes(count, bits):
        raise ValueError(f"{length} words cannot hold exactly {count} codes of {bits} bits")
    stream = _view(words, torch.uint8)
    if bits == 8:
        return stream[..., :count].contiguous()
    octets = -(-count // _CODES)
    if stream.shape[-1] != octets * bits:
        stream = torch.nn.functional.pad(stream, (0, octets * bits - stream.shape[-1]))
    padded = stream.new_zeros(*lead, octets, _CODES)
    padded[..., :bits] = stream.reshape(*lead, octets, bits)
    word = padded.view(torch.int64)
    codes = stream.new_empty(*lead, octets, _CODES)
    mask = (1 << bits) - 1
    for i in range(_CODES):
        codes[..., i] = ((word >> (i * bits)) & mask).squeeze(-1)
    return codes.reshape(*lead, octets * _CODES)[..., :count].contiguous()


def _view(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a tensor as another integer type, its last axis scaled accordingly."""
    # a transposed [1, n] counts as contiguous and keeps strides that torch refuses to view; flat ones are plain
    *lead, length = tensor.shape
    flat = tensor.contiguous().view(-1)
    if flat.stride(0) != 1 or flat.storage_offset() * flat.element_size() % dtype.itemsize:
        # a single element of something wider, or a slice that starts inside a word
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(dtype).view(*lead, length * tensor.element_size() // dtype.itemsize)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
