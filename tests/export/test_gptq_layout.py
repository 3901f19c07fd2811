"""The GPTQ layout against golden words and a reader that takes the bits out one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core import AffineWeight, CheckpointError, LinearSpec, QuantScheme
from autoround_export.gptq_layout import GptqLayout

V1, V2 = GptqLayout(zero_offset=1), GptqLayout(zero_offset=0)
CASES = st.tuples(
    st.builds(
        QuantScheme,
        bits=st.integers(2, 8),
        group_size=st.sampled_from([-1, 16, 32, 48, 128]),
        sym=st.booleans(),
    ),
    st.sampled_from([32, 64]),
    st.sampled_from([32, 64, 96, 160]),
    st.integers(0, 2**32 - 1),
)


def record(scheme, out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid, top = (out_features, scheme.groups(in_features)), 2**scheme.bits
    zeros = torch.full(grid, top // 2) if scheme.sym else torch.randint(0, top, grid, generator=generator)
    if not scheme.sym:
        zeros.view(-1)[0], zeros.view(-1)[-1] = 0, top - 1
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    scale = torch.randn(grid, generator=generator)
    return AffineWeight(scheme, codes.to(torch.uint8), scale.to(torch.float16), zeros.to(torch.uint8))


def column_bits(words, bits, count):
    """The values in a stream of int32 words: the first in the lowest bits, straddling words where it must."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) & (2**bits - 1) for i in range(count)]


def slow_dequantize(tensors, scheme, zero_offset, shape):
    """float64 [out, in] straight from the tensors of a file, by the layout's written description."""
    out_features, in_features = shape
    qweight, qzeros, scales = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales"))
    zeros = [column_bits(row, scheme.bits, out_features) for row in qzeros]
    size = in_features if scheme.group_size == -1 else scheme.group_size
    weight = np.empty(shape)
    for out in range(out_features):
        codes = column_bits(qweight[:, out], scheme.bits, in_features)
        for i, code in enumerate(codes):
            weight[out, i] = float(scales[i // size, out]) * (code - (zeros[i // size][out] + zero_offset))
    return weight


def same(left, right):
    return left.scheme == right.scheme and all(
        getattr(left, name).dtype == tensor.dtype and torch.equal(getattr(left, name), tensor)
        for name, tensor in right.tensors().items()
    )


@given(CASES)
def test_what_is_packed_is_unpacked_bit_for_bit(case):
    weight = record(*case)
    for layout in (V1, V2) if case[0].sym else (V2,):
        tensors = layout.pack(weight)
        assert same(layout.unpack(tensors, weight.scheme), weight)
        assert same(layout.unpack(tensors, weight.scheme, weight.shape), weight)


@given(CASES)
def test_names_dtypes_and_shapes(case):
    scheme, out_features, in_features, seed = case
    tensors = V2.pack(record(scheme, out_features, in_features, seed))
    groups = scheme.groups(in_features)
    assert tuple(tensors) == V2.tensor_names == ("qweight", "qzeros", "scales")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (in_features * scheme.bits // 32, out_features)),
        "qzeros": (torch.int32, (groups, out_features * scheme.bits // 32)),
        "scales": (torch.float16, (groups, out_features)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 16, 48])
def test_a_reader_that_knows_only_the_description_sees_the_same_weights(bits, group_size):
    for layout, zero_offset, sym in ((V1, 1, True), (V2, 0, True), (V2, 0, False)):
        weight = record(QuantScheme(bits, group_size, sym), 32, 64, seed=bits)
        read = slow_dequantize(layout.pack(weight), weight.scheme, zero_offset, weight.shape)
        assert np.array_equal(read, weight.dequantize(torch.float32).numpy().astype(np.float64))


GOLDEN = {
    2: "6c6c6c6c 6c6c6c6c",
    3: "b829cbb8 cbb829cb 29cbb829",
    4: "1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8",
    8: "150e0700 312a231c 4d463f38 69625b54 857e7770 a19a938c bdb6afa8 d9d2cbc4",
}
ZERO_WORDS = {
    2: ("55555555", "aaaaaaaa"),
    3: ("db6db6db", "24924924"),
    4: ("77777777", "88888888"),
    8: ("7f7f7f7f", "80808080"),
}


def hexadecimal(words):
    return " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in words)


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits):
    """Codes (7 * i) mod 2**bits down every column, symmetric zero points: what auto-round 0.16.1 writes."""
    codes = torch.tensor([[7 * i % 2**bits for i in range(32)]] * 32, dtype=torch.uint8)
    weight = AffineWeight(
        QuantScheme(bits, 32),
        codes,
        torch.ones(32, 1, dtype=torch.float16),
        torch.full((32, 1), 2 ** (bits - 1), dtype=torch.uint8),
    )
    for version, layout in enumerate((V1, V2)):
        tensors = layout.pack(weight)
        assert hexadecimal(tensors["qweight"][:, 0]) == hexadecimal(tensors["qweight"][:, 31]) == GOLDEN[bits]
        assert hexadecimal(tensors["qzeros"][0]).split()[0] == ZERO_WORDS[bits][version]
        if bits != 3:  # no zero point straddles a word
            assert set(hexadecimal(tensors["qzeros"][0]).split()) == {ZERO_WORDS[bits][version]}


def test_packing_and_unpacking_change_nothing():
    for scheme in (QuantScheme(8, 32), QuantScheme(3, 32)):
        weight = record(scheme, 32, 64)
        before = weight.digest()
        tensors = V1.pack(weight)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        V1.unpack(tensors, scheme)
        assert weight.digest() == before
        assert all(torch.equal(tensors[name], copies[name]) for name in copies)


# --- refusals -----------------------------------------------------------------------------------------------


def spec(scheme, in_features=64, out_features=32):
    return LinearSpec("layer", in_features=in_features, out_features=out_features, scheme=scheme)


def test_what_fits():
    for bits in range(2, 9):
        for group_size in (-1, 16, 48, 128):
            assert V1.why_not(spec(QuantScheme(bits, group_size))) is None
            assert V2.why_not(spec(QuantScheme(bits, group_size, False))) is None


@pytest.mark.parametrize("layout", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [1, 16, 33, 100])
def test_both_dimensions_must_be_multiples_of_32(layout, size):
    assert (
        layout.why_not(spec(QuantScheme(), in_features=size))
        == f"in_features must be divisible by 32, got {size}"
    )
    assert (
        layout.why_not(spec(QuantScheme(), out_features=size))
        == f"out_features must be divisible by 32, got {size}"
    )


def test_version_1_cannot_store_every_asymmetric_zero_point():
    assert "zero_point - 1" in V1.why_not(spec(QuantScheme(4, 32, False)))
    # and if it were asked all the same, it must not write into a neighbour
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        V1.pack(record(QuantScheme(4, 32, False), 32, 64))


def test_other_number_families_are_refused():
    assert "mxfp" in V2.why_not(spec(QuantScheme(4, 32, data_type="mxfp")))


SYM, ASYM = QuantScheme(4, 32), QuantScheme(4, 32, False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, "qweight must be"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int64)}, "int32"),
        (
            {"qweight": torch.zeros(16, 32, dtype=torch.int32)},
            "scale",
        ),  # twice the input features of the scales
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "cannot hold exactly 32 codes"),
        ({"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "zero_point"),
        ({"scales": torch.ones(2, 32, dtype=torch.float64)}, "float16"),
        ({"scales": torch.zeros(1, 32, dtype=torch.float16)}, "scale"),
        ({"scales": torch.full((2, 32), float("nan"), dtype=torch.float16)}, "not finite"),
    ],
)
def test_tensors_that_contradict_the_scheme_are_refused(change, says):
    tensors = V2.pack(record(ASYM, 32, 64)) | change
    with pytest.raises(CheckpointError, match=says):
        V2.unpack(tensors, ASYM)


def test_another_shape_than_expected_is_refused():
    tensors = V2.pack(record(ASYM, 32, 64))
    with pytest.raises(CheckpointError, match=r"\(32, 64\) weights, \(64, 32\) were expected"):
        V2.unpack(tensors, ASYM, (64, 32))


def test_zero_points_of_the_other_version_are_noticed():
    weight = record(SYM, 32, 64)
    for writer, reader in ((V1, V2), (V2, V1)):
        with pytest.raises(CheckpointError, match="symmetric weights must be 8"):
            reader.unpack(writer.pack(weight), SYM)


def test_a_zero_point_of_16_is_refused():
    # version 1 of an asymmetric layer: 15 + 1 is no 4-bit number
    weight = dataclasses.replace(record(ASYM, 32, 64), zero_point=torch.full((32, 2), 15, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="zero_point 16 does not fit into 4 bits"):
        V1.unpack(V2.pack(weight), ASYM)
