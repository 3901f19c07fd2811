"""The block layouts against ggml's own bytes and numbers, and against gguf's reader for random records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from autoround_core import AffineWeight, CheckpointError, LinearSpec, QuantScheme, SuperBlockWeight
from autoround_core.scheme import BLOCK_TYPES
from autoround_core.superblock import group_grid
from autoround_core.testing import check_layout
from autoround_export.gguf.blocks import LAYOUTS, layout_of

# of data/make_ggml_blocks.py
GOLDEN = load_file(Path(__file__).parents[2] / "data" / "ggml_blocks.safetensors")
CASES = [(name, which) for name in LAYOUTS for which in ("plain", "important") if f"{name}.{which}" in GOLDEN]
# greatest sub-scale; symmetric types have negative ones too, down to one less
TOPS = {"q2_k": 15, "q3_k": 31, "q4_k": 63, "q5_k": 63, "q6_k": 127}
DRAWN = st.tuples(st.sampled_from(list(LAYOUTS)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))


def halves(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """float16 of all finite bit patterns: both signs, subnormals, both zeros."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int64)
    bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000  # exponents of infinities and NaNs
    return bits.to(torch.int16).view(torch.float16)


def random_record(name: str, rows: int, blocks: int, seed: int) -> AffineWeight | SuperBlockWeight:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(seed)
    scheme, columns = layout.scheme, blocks * layout.block
    codes = torch.randint(0, 2**scheme.bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = halves(rows, blocks, generator=generator)
    if scheme.data_type == "int":
        zeros = torch.full((rows, blocks), 2 ** (scheme.bits - 1), dtype=torch.uint8)
        return AffineWeight(scheme, codes, scale, zeros)
    minimum = None if scheme.sym else halves(rows, blocks, generator=generator)
    kind = BLOCK_TYPES[scheme.data_type]
    if kind.block == kind.group_size:
        return SuperBlockWeight(scheme, codes, scale, minimum)
    groups, top = (rows, columns // kind.group_size), TOPS[scheme.data_type]
    sub_scale = torch.randint(-top - 1 if scheme.sym else 0, top + 1, groups, generator=generator).to(torch.int8)
    sub_minimum = None
    if not scheme.sym:
        sub_minimum = torch.randint(0, top + 1, groups, generator=generator).to(torch.uint8)
    return SuperBlockWeight(scheme, codes, scale, minimum, sub_scale, sub_minimum)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """So that zeros of different sign differ."""
    return values.contiguous().view(torch.int32)


def by_gguf(name: str, blocks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]).copy())


def unpacked(name: str, blocks: torch.Tensor, shape: tuple[int, int] | None = None):
    return LAYOUTS[name].unpack({"blocks": blocks}, LAYOUTS[name].scheme, shape)


def test_all_types_of_ggml_are_here():
    assert [name for name, _ in CASES] == [name for name in LAYOUTS for _ in range(1 if name == "Q8_0" else 2)]
    for name, layout in LAYOUTS.items():
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (layout.block, layout.block_bytes) == size and layout.name == name


@pytest.mark.parametrize(("name", "which"), CASES)
def test_the_bytes_of_ggml_mean_the_numbers_of_ggml(name, which):
    blocks, values = GOLDEN[f"{name}.{which}"], GOLDEN[f"{name}.{which}.values"]
    weight = unpacked(name, blocks, tuple(values.shape))
    assert torch.equal(bits_of(weight.dequantize(torch.float32)), bits_of(values))
    # and they are a quantization of that matrix at all, row by row: not transposed, not shifted
    original = GOLDEN["weight"]
    error = (values - original).square().sum(1) / original.square().sum(1).clamp(min=1e-30)
    # the row of scales near the least float16 is hopeless, and so is what an outlier leaves of its block
    usual = [i for i in range(len(error)) if i not in (6, 9)]
    assert error[usual].max() < {"Q2_K": 0.2, "Q3_K": 0.1}.get(name, 0.05)


@pytest.mark.parametrize(("name", "which"), CASES)
def test_packed_again_they_are_the_bytes_of_ggml(name, which):
    blocks = GOLDEN[f"{name}.{which}"]
    packed = LAYOUTS[name].pack(unpacked(name, blocks))
    assert list(packed) == ["blocks"] and packed["blocks"].is_contiguous()
    assert torch.equal(packed["blocks"], blocks)


@given(DRAWN)
def test_any_record_comes_back(drawn):
    name, rows, blocks, _ = drawn
    weight, layout = random_record(*drawn), LAYOUTS[drawn[0]]
    before = weight.digest()
    packed = layout.pack(weight)["blocks"]
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == (rows, blocks * layout.block_bytes)
    again = unpacked(name, packed, weight.shape)
    assert again.digest() == before == weight.digest()


@given(DRAWN)
def test_gguf_reads_the_same_numbers(drawn):
    weight = random_record(*drawn)
    packed = LAYOUTS[drawn[0]].pack(weight)["blocks"]
    found, expected = weight.dequantize(torch.float32), by_gguf(drawn[0], packed)
    # numpy and torch may differ in the sign of a zero, and in nothing else
    assert torch.equal(found, expected)
    different = bits_of(found) != bits_of(expected)
    assert (found[different] == 0).all()


@given(DRAWN)
def test_any_bytes_come_back(drawn):
    name, rows, blocks, seed = drawn
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * blocks, layout.block_bytes), generator=generator).to(torch.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2) if not layout.scheme.sym else (0,))
    for place in places:
        raw[:, place : place + 2] = halves(rows * blocks, 1, generator=generator).view(torch.uint8)
    raw = raw.view(rows, -1)
    assert torch.equal(layout.pack(unpacked(name, raw))["blocks"], raw)
    assert torch.equal(unpacked(name, raw).dequantize(torch.float32), by_gguf(name, raw))


def test_where_an_element_lies():
    """One element at a time is set to its greatest code; by hand, from the description of the layouts."""
    bits = {  # name -> (byte, value) pairs of element i, where all codes are 0 but this
        "Q4_0": lambda i: {(2 + i % 16, 15 << 4 * (i // 16))},
        "Q5_1": lambda i: {(4 + i // 8, 1 << i % 8), (8 + i % 16, 15 << 4 * (i // 16))},
        "Q4_K": lambda i: {(16 + i // 64 * 32 + i % 32, 15 << 4 * (i // 32 % 2))},
        "Q5_K": lambda i: {(16 + i % 32, 1 << i // 32), (48 + i // 64 * 32 + i % 32, 15 << 4 * (i // 32 % 2))},
        "Q2_K": lambda i: {(16 + i // 128 * 32 + i % 32, 3 << 2 * (i // 32 % 4))},
        "Q3_K": lambda i: {(i % 32, 1 << i // 32), (32 + i // 128 * 32 + i % 32, 3 << 2 * (i // 32 % 4))},
        "Q6_K": lambda i: {(i // 128 * 64 + i % 64, 15 << 4 * (i // 64 % 2)),
                           (128 + i // 128 * 32 + i % 32, 3 << 2 * (i // 32 % 4))},
    }  # fmt: skip
    for name, places in bits.items():
        layout = LAYOUTS[name]
        weight = random_record(name, layout.block, 1, 0)
        codes = torch.eye(layout.block, dtype=torch.uint8)
        nothing = layout.pack(dataclasses.replace(weight, codes=torch.zeros_like(codes)))["blocks"]
        packed = layout.pack(dataclasses.replace(weight, codes=codes * (2**layout.scheme.bits - 1)))["blocks"]
        for i, row in enumerate(packed ^ nothing):
            assert {(int(at), int(row[at])) for at in row.nonzero()} == places(i), (name, i)


def test_where_a_sub_scale_lies():
    """6 bits of eight scales and eight minima in 12 bytes, and of sixteen scales; by hand."""
    weight = random_record("Q4_K", 1, 1, 0)
    scales, minima = [1, 2, 3, 63, 17, 34, 51, 60], [4, 5, 6, 7, 62, 33, 20, 9]
    made = dataclasses.replace(weight, sub_scale=torch.tensor([scales], dtype=torch.int8),
                               sub_minimum=torch.tensor([minima], dtype=torch.uint8))
    high = [[number >> 4 << 6 for number in part[4:]] for part in (scales, minima)]
    expected = [a | b for a, b in zip(scales[:4], high[0], strict=True)]
    expected += [a | b for a, b in zip(minima[:4], high[1], strict=True)]
    expected += [(a & 15) | (b & 15) << 4 for a, b in zip(scales[4:], minima[4:], strict=True)]
    assert LAYOUTS["Q4_K"].pack(made)["blocks"][0, 4:16].tolist() == expected
    weight = random_record("Q3_K", 1, 1, 0)
    for j in range(16):
        for sub_scale in (-32, -1, 0, 31):
            scales = torch.full((1, 16), -32, dtype=torch.int8)
            scales[0, j] = sub_scale
            found = LAYOUTS["Q3_K"].pack(dataclasses.replace(weight, sub_scale=scales))["blocks"][0, 96:108].tolist()
            expected, stored = [0] * 12, sub_scale + 32
            expected[j % 8] = (stored & 15) << 4 * (j // 8)
            expected[8 + j % 4] = (stored >> 4) << 2 * (j // 4)
            assert found == expected


def test_the_minimum_of_a_file_is_added():
    blocks = GOLDEN["Q4_1.plain"]
    weight = unpacked("Q4_1", blocks)
    stored = blocks.view(16, -1, 20)[:, :, 2:4].contiguous().view(torch.float16)[..., 0]
    assert torch.equal(weight.minimum, -stored) and (stored < 0).any()
    assert torch.equal(group_grid(weight.scale, weight.minimum, None, None)[1], -stored.float())


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_types_of_ordinary_integers_pass_the_check_of_layouts(name):
    assert check_layout(LAYOUTS[name], schemes=[LAYOUTS[name].scheme]).cells > 4


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_no_tensor_of_blocks_is_refused(name):
    good = LAYOUTS[name].pack(random_record(name, 2, 2, 0))["blocks"]
    for wrong in (good.to(torch.int8), good.float(), good.view(-1), good[None], good[:, :-1], good[:, 1:]):
        with pytest.raises(CheckpointError, match=rf"{name} is uint8 \[out, blocks \* \d+\], got .*{wrong.shape[-1]}"):
            unpacked(name, wrong)
    assert unpacked(name, good[:, : LAYOUTS[name].block_bytes]).shape == (2, LAYOUTS[name].block)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scale_or_minimum_that_is_no_number_is_refused(name):
    weight = random_record(name, 2, 2, 0)
    for field in ("scale", "minimum") if weight.tensors().get("minimum") is not None else ("scale",):
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = getattr(weight, field).clone()
            broken[1, 1] = value
            blocks = LAYOUTS[name].pack(dataclasses.replace(weight, **{field: broken}))["blocks"]
            with pytest.raises(CheckpointError, match=f"{name}: .*not finite"):
                unpacked(name, blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_shape_than_expected_is_refused(name):
    weight = random_record(name, 2, 2, 0)
    blocks = LAYOUTS[name].pack(weight)["blocks"]
    with pytest.raises(CheckpointError, match=r"the tensor holds \(2, \d+\) weights, \(4, \d+\) were expected"):
        unpacked(name, blocks, (4, weight.shape[1] // 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_takes_its_own_scheme_and_whole_blocks(name):
    layout = LAYOUTS[name]
    assert layout_of(layout.scheme) is layout
    assert layout.why_not(LinearSpec("x", 512, 3, layout.scheme)) is None
    assert f"rows divisible by {layout.block}, got 500" in layout.why_not(LinearSpec("x", 500, 3, layout.scheme))
    other = dataclasses.replace(layout.scheme, bits=7)
    assert f"{name} stores {layout.scheme}, not {other}" in layout.why_not(LinearSpec("x", 512, 3, other))


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(4, 32, False), QuantScheme(5, 16), QuantScheme(8, -1)])
def test_ggml_has_no_type_for_other_schemes(scheme):
    assert layout_of(scheme) is None


def test_a_scale_that_is_no_float16_is_refused_and_not_rounded():
    weight = random_record("Q4_0", 2, 2, 0)
    exact = dataclasses.replace(weight, scale=weight.scale.float())
    layout = LAYOUTS["Q4_0"]
    assert torch.equal(layout.pack(exact)["blocks"], layout.pack(weight)["blocks"])
    for scale in (torch.full((2, 2), 1 + 2**-12), torch.full((2, 2), 2.0**-30), torch.full((2, 2), 1e5)):
        with pytest.raises(CheckpointError, match=r"torch\.float32 and no float16 number, as Q4_0 stores it"):
            layout.pack(dataclasses.replace(weight, scale=scale))
    with pytest.raises(CheckpointError, match="bfloat16"):
        layout.pack(dataclasses.replace(weight, scale=torch.full((2, 2), 1e-30, dtype=torch.bfloat16)))
