"""Schemes: spelling both ways, refusals, and the arithmetic of groups."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.errors import UnknownNameError, UsageError
from autoround_core.scheme import PRESETS, ActivationScheme, QuantScheme

SCHEMES = st.builds(
    QuantScheme,
    bits=st.integers(2, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    sym=st.booleans(),
)


@given(SCHEMES)
def test_what_is_printed_can_be_read(scheme):
    assert QuantScheme.parse(str(scheme)) == scheme
    assert QuantScheme.parse(f"  {str(scheme).lower()}\n") == scheme


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "sym"),
    [
        ("W4", 4, 128, True),
        ("W4A16", 4, 128, True),
        ("W4G128", 4, 128, True),
        ("W2G64-asym", 2, 64, False),
        ("w3a16g32-ASYM", 3, 32, False),
        ("W8G-1", 8, -1, True),
        ("W5G7-sym", 5, 7, True),
    ],
)
def test_spellings(text, bits, group_size, sym):
    assert QuantScheme.parse(text) == QuantScheme(bits=bits, group_size=group_size, sym=sym)


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (QuantScheme(), "W4G128"),
        (QuantScheme(2, 64, False), "W2G64-asym"),
        (QuantScheme(8, -1), "W8G-1"),
    ],
)
def test_the_short_spelling(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "W",
        "4",
        "G128",
        "W4G",
        "W4-",
        "W4G128asym",
        "W4G128-both",
        "W4 G128",
        "W4.5",
        "W-4",
        "W4G+32",
        "INT4",
        "W4G128-asym-sym",
        "xW4",
        "W4x",
    ],
)
def test_what_is_no_scheme_is_refused_with_examples(text):
    with pytest.raises(UnknownNameError) as caught:
        QuantScheme.parse(text)
    assert f"`{text}`" in str(caught.value) and "W2G64-asym" in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_scheme_or_a_usage_error(text):
    try:
        scheme = QuantScheme.parse(text)
    except UsageError:
        return
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("text", ["W0", "W1", "W9", "W16", "W4G0", "W4G-2", "W4A8", "W4A4G32", "W4A016"])
def test_a_scheme_out_of_range_is_refused(text):
    with pytest.raises(UsageError):
        QuantScheme.parse(text)


def test_quantized_activations_are_named_in_the_refusal():
    with pytest.raises(UsageError, match=r"W4A8.*8-bit activations"):
        QuantScheme.parse("W4A8")


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4, 1.5, 4.0, True, "4", None])
def test_bits(bits):
    with pytest.raises(UsageError, match="bits must be a whole number from 2 to 8"):
        QuantScheme(bits=bits)


@pytest.mark.parametrize("group_size", [0, -2, -128, 7.5, 128.0, True, "128", None])
def test_group_size(group_size):
    with pytest.raises(UsageError, match=f"group_size must be .* got {group_size}"):
        QuantScheme(group_size=group_size)


@pytest.mark.parametrize("sym", [None, 0, 1, "true"])
def test_sym(sym):
    with pytest.raises(UsageError, match="sym must be true or false"):
        QuantScheme(sym=sym)


def test_a_scheme_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme().bits = 3


@given(SCHEMES, st.integers(1, 5000))
def test_groups_cover_the_row_and_none_is_empty(scheme, in_features):
    groups, length = scheme.groups(in_features), scheme.group_length(in_features)
    if scheme.group_size == -1:
        assert (groups, length) == (1, in_features)
    assert groups == math.ceil(in_features / length)
    assert (groups - 1) * length < in_features <= groups * length
    assert length <= in_features


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("W4G128", (1, 128), 128 * 4 + 16 + 4),
        ("W4G128", (10, 256), 10 * (256 * 4 + 2 * 20)),
        ("W3G100", (2, 250), 2 * (250 * 3 + 3 * 19)),  # the last group of a row is shorter
        ("W8G-1", (7, 33), 7 * (33 * 8 + 24)),
        ("W2G512", (5, 64), 5 * (64 * 2 + 18)),
    ],
)
def test_stored_bits_count_codes_scales_and_zero_points(text, shape, bits):
    assert QuantScheme.parse(text).stored_bits(*shape) == bits


# --- schemes that go by a name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_is_read_and_printed(name):
    assert str(PRESETS[name]) == name
    assert QuantScheme.parse(f" {name.lower()} ") == PRESETS[name]


def test_schemes_without_a_name_are_spelled_out():
    assert str(QuantScheme(8, 64, data_type="fp", group_rows=64)) == "W8G64x64-fp"
    odd = QuantScheme(4, 32, data_type="mx_fp", activation=ActivationScheme(8, "mx_fp", 32, False))
    assert str(odd) == "W4G32-mx_fp-A8mx_fpG32-static"


def test_only_fixed_scales_need_calibration():
    assert {name for name, scheme in PRESETS.items() if scheme.activation and scheme.activation.calibrated} == {
        "FP8_STATIC", "NVFP4"
    }


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [("FP8_DYNAMIC", (3, 64), 3 * (64 * 8 + 32)), ("FPW8A16", (3, 64), 3 * 64 * 8 + 32),
     ("FP8_BLOCK", (130, 200), 130 * 200 * 8 + 4 * 32), ("MXFP4", (3, 64), 3 * (64 * 4 + 2 * 8)),
     ("NVFP4", (3, 64), 3 * (64 * 4 + 4 * 8)), ("INT8", (3, 64), 3 * (64 * 8 + 24))],
)
def test_stored_bits_of_named_schemes(name, shape, bits):
    assert PRESETS[name].stored_bits(*shape) == bits


def test_other_activations_are_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match="8-bit activations.*INT8, FP8_DYNAMIC"):
        QuantScheme.parse("W4A8")
