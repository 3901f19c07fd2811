"""Codes of 1 to 8 bits as one little-endian bitstream.

Value i of a row starts at bit i*bits of the row's stream, so 2, 4 and 8 bits are the familiar "low nibble
first" and 3, 5, 6, 7 bits straddle words. One rule serves every layout that packs densely (GPTQ,
compressed-tensors, MLX); a layout with another order permutes the codes first.

Eight codes always fill `bits` whole bytes, so both directions work on eight codes at a time in one int64, which
three steps spread to a byte each: into halves of four codes, quarters of two, bytes of one. A few passes over the
data for any width, on pieces that fit the caches.
"""

from __future__ import annotations

import torch

_CODES = 8  # the fewest codes of any width that end on a byte
_PIECE = 1 << 15  # octets of codes at a time: 256 KB
# an octet of codes of so many bits is a whole number of this type
_OCTETS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
    word = codes.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.int64).view(*lead, octets)
    for piece in word.view(-1).split(_PIECE):
        _gather(piece, bits)
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
    word = _octets(stream, bits)
    for piece in word.split(_PIECE):
        _spread(piece, bits)
    return word.view(torch.uint8).view(*lead, octets * _CODES)[..., :count].contiguous()


def _octets(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., octets * bits] as int64 [all octets], the codes of an octet in the lowest bits."""
    if bits in _OCTETS:
        whole = _view(stream, _OCTETS[bits]).reshape(-1)
        return whole.to(torch.int64)  # what the sign fills is masked by `_spread`
    padded = stream.new_zeros(stream.numel() // bits, _CODES)
    padded[:, :bits] = stream.reshape(-1, bits)
    return padded.view(-1).view(torch.int64)


# of the three steps: codes that stay together, and the bits of the field that they get
_STEPS = ((4, 32), (2, 16), (1, 8))


def _masks(codes: int, bits: int, width: int) -> tuple[int, int]:
    """Of the lower and of the upper of each two fields, the bits that `codes` codes fill; as signed numbers."""
    lower = sum(((1 << codes * bits) - 1) << start for start in range(0, 64, 2 * width))
    upper = lower << width
    return lower, upper - (1 << 64) if upper >> 63 else upper


def _spread(words: torch.Tensor, bits: int) -> None:
    """Eight codes in the lowest bits of each int64 to a byte each, in place."""
    for codes, width in _STEPS:
        lower, upper = _masks(codes, bits, width)
        moved = words << (width - codes * bits)
        words &= lower
        words |= moved.bitwise_and_(upper)


def _gather(words: torch.Tensor, bits: int) -> None:
    """The inverse of `_spread`, in place."""
    for codes, width in reversed(_STEPS):
        lower, upper = _masks(codes, bits, width)
        moved = (words & upper) >> (width - codes * bits)
        words &= lower
        words |= moved


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
