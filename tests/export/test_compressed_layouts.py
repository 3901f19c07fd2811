"""The layouts of compressed-tensors: lossless, golden bytes, and equal to what its own package decompresses."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from autoround_core import AffineWeight, CheckpointError, FloatWeight, QuantScheme
from autoround_core.scheme import PRESETS
from autoround_core.testing import check_layout
from autoround_export.compressed_layouts import LAYOUTS, layout_of
from autoround_export.llm_compressor import _group
from checkpoint_cases import W4, W4A, float_record, record, spec

FLOATS = [scheme for scheme in PRESETS.values() if scheme.data_type != "int"]
INTEGERS = [QuantScheme(bits, size, sym) for bits in range(2, 9) for size in (32, 128, -1) for sym in (True, False)]


def make(scheme, out_features=256, in_features=384):
    maker = record if scheme.data_type == "int" else float_record
    return maker(scheme, out_features, in_features)


@pytest.mark.parametrize("scheme", [*INTEGERS, *PRESETS.values()], ids=str)
def test_compressed_tensors_reads_the_same_numbers(scheme):
    weight = make(scheme)
    layout = layout_of(scheme)
    theirs = BaseCompressor.get_value_from_registry(layout.name)
    description = QuantizationScheme.model_validate(_group(scheme, ["Linear"]))
    if scheme.data_type == "int":
        # in the scale's own dtype they multiply; in float32 the product is exact
        weight = type(weight)(scheme, weight.codes, weight.scale.float(), weight.zero_point)
    back = theirs.decompress(layout.pack(weight), description)["weight"].float()
    exact = weight.dequantize(torch.float32)
    # theirs multiplies four-bit and MX numbers in bfloat16
    rounded = exact.to(torch.bfloat16).float()
    assert torch.equal(back, exact) or torch.allclose(back, rounded, rtol=2**-7, atol=0)
    assert torch.equal(back, exact) or scheme.data_type in ("mx_fp", "nv_fp")


def test_all_layouts_of_integers_are_lossless_and_pure():
    for layout in LAYOUTS[:2]:
        schemes = INTEGERS if layout.name == "pack-quantized" else [PRESETS["INT8"]]
        assert check_layout(layout, schemes=schemes).cells > 0


@given(st.sampled_from([*INTEGERS, PRESETS["INT8"]]), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_integers_come_back(scheme, out_features, groups, seed):
    weight, layout = record(scheme, out_features, groups * 128, seed), layout_of(scheme)
    assert layout.unpack(layout.pack(weight), scheme).digest() == weight.digest()


@given(st.sampled_from(FLOATS), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_floats_come_back(scheme, out_features, groups, seed):
    weight = float_record(scheme, out_features, groups * 128, seed)
    layout = layout_of(scheme)
    assert layout.why_not(spec("fc", scheme, groups * 128, out_features)) is None
    packed = layout.pack(weight)
    assert set(packed) == set(layout.tensor_names)
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert layout.unpack(packed, scheme).digest() == weight.digest()


def test_golden_bytes():
    codes = torch.arange(32).view(1, 32)
    four = record(W4, 1, 32)
    four = type(four)(W4, (7 * codes % 16).to(torch.uint8), torch.ones(1, 1).half(), torch.full((1, 1), 8).byte())
    words = layout_of(W4).pack(four)["weight_packed"][0]
    assert [f"{int(word) & 0xFFFFFFFF:08x}" for word in words] == ["1a3c5e70", "92b4d6f8", "1a3c5e70", "92b4d6f8"]
    mx = PRESETS["MXFP4"]
    weight = float_record(mx, 1, 32)
    weight = type(weight)(mx, (codes % 16).to(torch.uint8), torch.full((1, 1), 127).byte())
    packed = layout_of(mx).pack(weight)
    assert packed["weight_packed"][0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert weight.dequantize(torch.float32)[0, :16].tolist() == [
        0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6
    ]  # fmt: skip


def test_golden_bytes_of_eight_bits():
    codes = torch.tensor([[0, 1, 127, 128, 200, 255]], dtype=torch.uint8)
    int8 = AffineWeight(PRESETS["INT8"], codes, torch.ones(1, 1).half(), torch.full((1, 1), 128).byte())
    assert layout_of(int8.scheme).pack(int8)["weight"].tolist() == [[-128, -127, -1, 0, 72, 127]]
    # E4M3: sign, four bits of exponent with bias 7, three of mantissa
    bits = torch.tensor([[0x00, 0x01, 0x08, 0x38, 0x7E, 0xB8]], dtype=torch.uint8)
    fp8 = FloatWeight(PRESETS["FPW8A16"], bits, torch.ones(1, 1))
    stored = layout_of(fp8.scheme).pack(fp8)
    assert stored["weight"].float().tolist() == [[0.0, 2.0**-9, 2.0**-6, 1.0, 448.0, -1.0]]
    assert stored["weight_scale"].shape == (1,)
    mx8 = FloatWeight(PRESETS["MXFP8"], bits.repeat(1, 6)[:, :32], torch.tensor([[130]]).byte())
    assert layout_of(mx8.scheme).pack(mx8)["weight_scale"].tolist() == [[130]]
    assert mx8.dequantize(torch.float32)[0, 3].item() == 8.0
    nv = FloatWeight(PRESETS["NVFP4"], torch.arange(16).byte()[None], torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
                     torch.tensor([4.0]))
    packed = layout_of(nv.scheme).pack(nv)
    assert packed["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert nv.dequantize(torch.float32)[0, :8].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3]


def test_zero_points_of_an_odd_number_of_rows():
    weight = record(W4A, 7, 64)
    packed = layout_of(W4A).pack(weight)
    assert packed["weight_zero_point"].shape == (1, 2)
    assert layout_of(W4A).unpack(packed, W4A).digest() == weight.digest()


@pytest.mark.parametrize(
    ("scheme", "change", "says"),
    [
        (W4, {"weight_shape": torch.tensor([32, 96])}, "contradict W4G32"),
        (W4, {"weight_packed": torch.zeros(32, 8, dtype=torch.int64)}, "must be int32"),
        (W4, {"weight_scale": torch.full((32, 2), float("nan")).half()}, "not finite"),
        (W4A, {"weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)}, "contradict"),
        (PRESETS["INT8"], {"weight": torch.zeros(32, 64, dtype=torch.uint8)}, "must be torch.int8"),
        (PRESETS["FP8_DYNAMIC"], {"weight": torch.zeros(32, 64)}, "must be torch.float8_e4m3fn"),
        (PRESETS["FP8_DYNAMIC"], {"weight_scale": torch.ones(31, 1)}, "contradict FP8_DYNAMIC"),
        (PRESETS["MXFP8"], {"weight_scale": torch.ones(32, 2)}, "contradict MXFP8"),
        (PRESETS["NVFP4"], {"weight_packed": torch.zeros(32, 16, dtype=torch.uint8)}, "contradict NVFP4"),
    ],
)
def test_tensors_that_contradict_the_scheme_are_refused(scheme, change, says):
    layout = layout_of(scheme)
    with pytest.raises(CheckpointError, match=says):
        layout.unpack(layout.pack(make(scheme, 32, 64)) | change, scheme)


def test_what_is_refused_before_the_run():
    assert "divisible by group_size (32)" in layout_of(W4).why_not(spec("fc", W4, 48))
    assert "divisible by group_size (128)" in layout_of(W4).why_not(spec("fc", QuantScheme(4, 128), 64))
    assert layout_of(PRESETS["FP8_BLOCK"]).why_not(spec("fc", PRESETS["FP8_BLOCK"], 200, 100)) is None
    assert layout_of(QuantScheme(4, 32, data_type="log")) is None
