"""Packing and unpacking a matrix of 4.2 million codes."""

import pytest
import torch

from autoround_core import pack_bits, unpack_bits

SIZE = 2048


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def bench_pack(benchmark, bits):
    codes = torch.randint(0, 2**bits, (SIZE, SIZE), dtype=torch.uint8)
    benchmark(pack_bits, codes, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def bench_unpack(benchmark, bits):
    words = pack_bits(torch.randint(0, 2**bits, (SIZE, SIZE), dtype=torch.uint8), bits)
    benchmark(unpack_bits, words, bits, SIZE)
