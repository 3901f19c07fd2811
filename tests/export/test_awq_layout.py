"""The AWQ layout against its golden word and a reader that takes one nibble at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround_core import AffineWeight, CheckpointError, LinearSpec, QuantScheme
from autoround_export.awq_layout import AwqLayout

LAYOUT = AwqLayout()
SHIFT = [0, 4, 1, 5, 2, 6, 3, 7]  # column j of eight lies in nibble SHIFT[j]
CASES = st.tuples(
    st.sampled_from([-1, 4, 16, 32, 128]),
    st.booleans(),
    st.sampled_from([8, 16, 40]),
    st.sampled_from([32, 64, 96]),
    st.integers(0, 2**32 - 1),
)


def record(group_size, sym, out_features, in_features, seed=0):
    scheme = QuantScheme(4, group_size, sym)
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, scheme.groups(in_features))
    zeros = torch.full(grid, 8) if sym else torch.randint(0, 16, grid, generator=generator)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    scale = torch.randn(grid, generator=generator).to(torch.float16)
    return AffineWeight(scheme, codes.to(torch.uint8), scale, zeros.to(torch.uint8))


def nibble(words, row, column):
    return ((int(words[row, column // 8]) & 0xFFFFFFFF) >> (4 * SHIFT[column % 8])) & 15


def slow_dequantize(tensors, group_size, shape):
    """float64 [out, in] straight from the tensors of a file."""
    qweight, qzeros, scales = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales"))
    weight = np.empty(shape)
    for out in range(shape[0]):
        for i in range(shape[1]):
            group = 0 if group_size == -1 else i // group_size
            weight[out, i] = float(scales[group, out]) * (
                nibble(qweight, i, out) - nibble(qzeros, group, out)
            )
    return weight


def test_the_golden_word():
    """Codes 0..7 of eight neighbouring output columns make 0x75316420, in weights and in zero points."""
    column = torch.arange(8, dtype=torch.uint8).view(8, 1)
    weight = AffineWeight(
        QuantScheme(4, 1, False), column, torch.ones(8, 1, dtype=torch.float16), column.clone()
    )
    tensors = LAYOUT.pack(weight)
    assert [f"{int(tensors[name]):08x}" for name in ("qweight", "qzeros")] == ["75316420"] * 2


@given(CASES)
def test_what_is_packed_is_unpacked_bit_for_bit(case):
    weight = record(*case)
    tensors = LAYOUT.pack(weight)
    for shape in (None, weight.shape):
        assert LAYOUT.unpack(tensors, weight.scheme, shape).digest() == weight.digest()


@given(CASES)
def test_names_dtypes_and_shapes(case):
    group_size, sym, out_features, in_features, seed = case
    weight = record(group_size, sym, out_features, in_features, seed)
    before = weight.digest()
    tensors = LAYOUT.pack(weight)
    groups = weight.scheme.groups(in_features)
    assert tuple(tensors) == LAYOUT.tensor_names
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (groups, out_features // 8)),
        "scales": (torch.float16, (groups, out_features)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert weight.digest() == before


@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("sym", [True, False])
def test_a_reader_that_knows_only_the_description_sees_the_same_weights(group_size, sym):
    weight = record(group_size, sym, 24, 64, seed=3)
    read = slow_dequantize(LAYOUT.pack(weight), group_size, weight.shape)
    assert np.array_equal(read, weight.dequantize(torch.float32).numpy().astype(np.float64))


# --- refusals -----------------------------------------------------------------------------------------------


def why_not(scheme, in_features=64, out_features=32):
    return LAYOUT.why_not(
        LinearSpec("layer", in_features=in_features, out_features=out_features, scheme=scheme)
    )


def test_what_fits():
    for group_size in (-1, 16, 32, 64, 128):  # 128 is the whole row of 64
        for sym in (True, False):
            assert why_not(QuantScheme(4, group_size, sym)) is None
    assert why_not(QuantScheme(4, -1), in_features=7, out_features=8) is None


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_only_four_bits(bits):
    assert (
        why_not(QuantScheme(bits, 32, False)) == f"the AWQ layout stores 4-bit integers, not W{bits}G32-asym"
    )


def test_other_number_families_are_refused():
    assert "4-bit integers" in why_not(QuantScheme(4, 32, data_type="mxfp"))


@pytest.mark.parametrize("out_features", [1, 12, 100])
def test_output_features_fill_words(out_features):
    assert (
        why_not(QuantScheme(4, 32), out_features=out_features)
        == f"out_features must be divisible by 8, got {out_features}"
    )


@pytest.mark.parametrize(("in_features", "group_size"), [(96, 64), (100, 32), (130, 128)])
def test_groups_must_divide_the_row(in_features, group_size):
    reason = why_not(QuantScheme(4, group_size), in_features=in_features)
    assert reason == f"in_features ({in_features}) must be divisible by group_size ({group_size})"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, "qweight must be"),
        ({"qweight": torch.zeros(64, 3, dtype=torch.uint8)}, "int32"),
        ({"qweight": torch.zeros(32, 3, dtype=torch.int32)}, "scale"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, "cannot hold exactly 24 codes"),
        ({"qzeros": torch.zeros(1, 3, dtype=torch.int32)}, "zero_point"),
        ({"scales": torch.ones(2, 24, dtype=torch.float64)}, "float16"),
        ({"scales": torch.full((2, 24), float("inf"), dtype=torch.float16)}, "not finite"),
    ],
)
def test_tensors_that_contradict_the_scheme_are_refused(change, says):
    weight = record(32, False, 24, 64)
    with pytest.raises(CheckpointError, match=says):
        LAYOUT.unpack(LAYOUT.pack(weight) | change, weight.scheme)


def test_another_shape_than_expected_is_refused():
    weight = record(32, False, 24, 64)
    with pytest.raises(CheckpointError, match=r"\(24, 64\) weights, \(24, 32\) were expected"):
        LAYOUT.unpack(LAYOUT.pack(weight), weight.scheme, (24, 32))


def test_symmetric_weights_have_the_symmetric_zero_point():
    weight = record(32, False, 24, 64)
    with pytest.raises(CheckpointError, match="symmetric weights must be 8"):
        LAYOUT.unpack(LAYOUT.pack(weight), QuantScheme(4, 32, True))
