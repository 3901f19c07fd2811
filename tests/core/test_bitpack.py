"""Bit packing against golden words and against a Python integer that is filled bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.bitpack import pack_bits, packed_bytes, unpack_bits


def hexadecimal(words):
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist())


def codes_of(values):
    return torch.tensor(values, dtype=torch.uint8)


def stream_words(values, bits):
    """The row as one integer, value i at bit i*bits, cut into signed 32-bit words."""
    number = sum(value << (i * bits) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    assert number >> (32 * count) == 0
    return [word - (1 << 32) if word >> 31 else word for word in words]


# codes (7 * i) mod 2**bits, i = 0..31; the same words as Intel's auto-round 0.16.1 writes (5 bits: its rule)
GOLDEN = {
    2: "6c6c6c6c 6c6c6c6c",
    3: "b829cbb8 cbb829cb 29cbb829",
    4: "1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8",
    5: "87cab8e0 469bf88a faf048b7 e80ea6c2 cc964ed9",
    8: "150e0700 312a231c 4d463f38 69625b54 857e7770 a19a938c bdb6afa8 d9d2cbc4",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits):
    codes = codes_of([7 * i % 2**bits for i in range(32)])
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert hexadecimal(words) == GOLDEN[bits]
    assert torch.equal(unpack_bits(words, bits, 32), codes)


@pytest.mark.parametrize(
    ("bits", "zero", "words"),
    [
        # symmetric zero points 2**(bits-1), one less as version 1 of GPTQ stores them, and as they are
        (2, 1, "55555555 55555555"),
        (2, 2, "aaaaaaaa aaaaaaaa"),
        (3, 3, "db6db6db b6db6db6 6db6db6d"),
        (4, 7, "77777777 77777777 77777777 77777777"),
        (4, 8, "88888888 88888888 88888888 88888888"),
        (8, 127, " ".join(["7f7f7f7f"] * 8)),
    ],
)
def test_golden_zero_words(bits, zero, words):
    assert hexadecimal(pack_bits(codes_of([zero] * 32), bits)) == words


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
def test_any_width_and_length_is_the_little_endian_bitstream(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))
    words = pack_bits(codes_of(values), bits)
    assert words.tolist() == stream_words(values, bits)
    assert packed_bytes(len(values), bits) == 4 * len(words)
    codes = unpack_bits(words, bits, len(values))
    assert codes.dtype == torch.uint8 and codes.tolist() == values


@given(
    bits=st.integers(1, 8),
    count=st.integers(0, 70),
    lead=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_packed_one_by_one(bits, count, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, count), generator=generator, dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert words.shape == (*lead, packed_bytes(count, bits) // 4)
    rows = [stream_words(row, bits) for row in codes.reshape(-1, count).tolist()] if codes.numel() else []
    assert words.reshape(-1, words.shape[-1]).tolist() == rows if rows else words.numel() == 0
    assert torch.equal(unpack_bits(words, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_of_any_stride_and_offset(bits):
    """A transposed, a sliced, a one-row and a misaligned tensor are packed like their copies, and stay."""
    base = torch.randint(
        0, 2**bits, (33, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    before = base.clone()
    for codes in (
        base.T,
        base[1:, ::2],
        base[:, 1:33],
        base[:1].T,
        base[:32, :1].T,
        base.flatten()[3:35],
        base[0, 1:5],
    ):
        words = pack_bits(codes, bits)
        assert words.tolist() == pack_bits(codes.clone(memory_format=torch.contiguous_format), bits).tolist()
        length = codes.shape[-1]
        assert torch.equal(unpack_bits(words, bits, length), codes)
        across = torch.stack([words, words], dim=-1)[..., 0]  # every second word of a wider tensor
        assert torch.equal(unpack_bits(across, bits, length), codes)
    assert torch.equal(base, before)


def test_words_are_read_as_unsigned():
    for bits in range(1, 9):
        count = 32 // bits
        assert (
            unpack_bits(torch.tensor([-1], dtype=torch.int32), bits, count).tolist() == [2**bits - 1] * count
        )


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("position", [0, 9, 31])
def test_a_code_that_is_too_large_is_refused(bits, position):
    values = [0] * 32
    for code in (2**bits, 2**bits + 1, 255):
        values[position] = code
        with pytest.raises(ValueError, match=f"code {code} does not fit into {bits} bits"):
            pack_bits(codes_of(values), bits)
    values[position] = 2**bits - 1
    assert unpack_bits(pack_bits(codes_of(values), bits), bits, 32).tolist() == values


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float32, torch.bool])
def test_codes_must_be_uint8(dtype):
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack_bits(torch.zeros(32, dtype=dtype), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_words_must_be_int32(dtype):
    with pytest.raises(ValueError, match="must be int32"):
        unpack_bits(torch.zeros(4, dtype=dtype), 4, 32)


@pytest.mark.parametrize("bits", [0, -1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        pack_bits(codes_of([0]), bits)
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        unpack_bits(torch.zeros(1, dtype=torch.int32), bits, 1)


@pytest.mark.parametrize(
    ("bits", "count", "length"), [(4, 32, 3), (4, 32, 5), (3, 32, 2), (3, 33, 3), (8, 5, 1), (2, 0, 1)]
)
def test_too_few_and_too_many_words_are_refused(bits, count, length):
    with pytest.raises(ValueError, match=f"{length} words cannot hold exactly {count} codes"):
        unpack_bits(torch.zeros(2, length, dtype=torch.int32), bits, count)


@pytest.mark.parametrize(
    ("count", "bits", "size"),
    [
        (0, 4, 0),
        (1, 1, 4),
        (32, 1, 4),
        (33, 1, 8),
        (32, 3, 12),
        (8, 4, 4),
        (9, 4, 8),
        (10, 3, 4),
        (11, 3, 8),
        (4, 8, 4),
        (5, 8, 8),
    ],
)
def test_packed_bytes_fill_whole_words(count, bits, size):
    assert packed_bytes(count, bits) == size
