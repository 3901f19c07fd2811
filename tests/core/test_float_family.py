"""The float families: what tuning sees is stored, gradients are those of autograd, the search never loses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_core.float_family import Fp, MxFp, NvFp, from_blocks
from autoround_core.int_family import IntFamily
from autoround_core.records import FloatWeight
from autoround_core.scheme import PRESETS, ActivationScheme, QuantScheme

FAMILIES = {family.data_type: family for family in (Fp(), MxFp(), NvFp())}
SCHEMES = {name: scheme for name, scheme in PRESETS.items() if scheme.data_type != "int"}
CASES = st.tuples(
    st.sampled_from(list(SCHEMES.values())), st.integers(1, 140), st.integers(1, 140), st.integers(0, 2**31)
)


def make_weight(out_features, in_features, seed):
    """float32 [out, in], heavy-tailed; with a dead row and an outlier where there is room."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    weight = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.05)
    weight[out_features // 2] = 0.0
    weight[-1, -1] = -300.0
    return weight * 0.05


def scale_of(weight, scheme):
    """Scales by the formulas, float64, element by element."""
    out_features, in_features = weight.shape
    rows = out_features if scheme.group_rows == -1 else scheme.group_rows
    length = in_features if scheme.group_size == -1 else min(scheme.group_size, in_features)
    result = torch.empty(out_features, in_features, dtype=torch.float64)
    top = {4: 6.0, 8: 448.0}[scheme.bits]
    whole = weight.abs().max().item()
    for i in range(0, out_features, rows):
        for j in range(0, in_features, length):
            m = weight[i : i + rows, j : j + length].abs().max().item()
            if scheme.data_type == "fp":
                scale = max(m / top, 1 / (448 * 512))
            elif scheme.data_type == "mx_fp":
                floor = torch.tensor(m).double().log2().floor().item() if m else -1
                scale = 2.0 ** (floor - (2 if scheme.bits == 4 else 8))
            else:
                g = 448 * 6 / whole if whole else 1.0
                scale = torch.tensor(max(g * m / 6, 2.0**-9)).to(torch.float8_e4m3fn).double().item() / g
            result[i : i + rows, j : j + length] = scale
    return result


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_round_to_nearest_by_the_formulas(case):
    scheme, out_features, in_features, seed = case
    weight = make_weight(out_features, in_features, seed)
    before = weight.clone()
    found = FAMILIES[scheme.data_type].round_to_nearest(weight, scheme).dequantize(torch.float32)
    assert torch.equal(weight, before)
    scale, top = scale_of(weight, scheme), {4: 6.0, 8: 448.0}[scheme.bits]
    # half a step of the grid at each number, or saturated; the scales agree to float32
    units = weight.double() / scale
    step = torch.exp2(units.abs().clamp(min=2.0 ** (-6 if scheme.bits == 8 else 0)).log2().floor())
    step /= 8 if scheme.bits == 8 else 2
    slack = torch.where(units.abs() > top, units.abs() - top, step / 2)
    assert ((found.double() / scale - units).abs() <= slack * (1 + 1e-5) + 1e-5 * units.abs() + 1e-9).all()
    assert (found[weight == 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_what_tuning_sees_is_stored(case):
    scheme, out_features, in_features, seed = case
    family = FAMILIES[scheme.data_type]
    weight = make_weight(out_features, in_features, seed)
    tunable = family.tunable(weight, scheme)
    assert tunable.finish().digest() == family.round_to_nearest(weight, scheme).digest()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tunable.rounding.uniform_(-0.6, 0.6, generator=generator)
        tunable.ranges[0].uniform_(0.0, 1.0, generator=generator)
        tunable.ranges[0][torch.rand(tunable.ranges[0].shape, generator=generator) < 0.2] = 0.0
    record = tunable.finish().check()
    assert torch.equal(record.dequantize(torch.float32), tunable.fake_quantize())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_gradients_are_those_of_the_smooth_formula(scheme):
    family = FAMILIES[scheme.data_type]
    weight = make_weight(40, 96, 5)
    tunable = family.tunable(weight, scheme)
    with torch.no_grad():
        tunable.rounding.uniform_(-0.4, 0.4)
        tunable.ranges[0].uniform_(0.6, 0.9)
    upstream = torch.randn(40, 96)
    (tunable.fake_quantize() * upstream).sum().backward()
    grid = family.grid(scheme.bits)
    _, value = tunable._scales()
    s = value.detach()[:, None, :, None].clone().requires_grad_()
    v = tunable.rounding.detach().clone().requires_grad_()
    units = tunable.blocks / s
    numbers = grid.round(units.detach(), v.detach())
    saturated = (numbers.abs() == grid.largest) & (units.abs() > grid.largest)
    smooth = torch.where(saturated, 0.0, units + v * grid.step(units.detach()))
    truth = (numbers + smooth - smooth.detach()) * s
    (from_blocks(truth, (40, 96)) * upstream).sum().backward()
    assert torch.allclose(tunable.rounding.grad, v.grad, rtol=1e-4, atol=1e-6)
    expected = s.grad.sum((1, 3)) * tunable._greatest / grid.largest
    assert torch.allclose(tunable.ranges[0].grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_the_search_never_loses(case):
    scheme, out_features, in_features, seed = case
    family = FAMILIES[scheme.data_type]
    weight = make_weight(out_features, in_features, seed)
    importance = torch.rand(in_features, generator=torch.Generator().manual_seed(seed)) + 0.01

    def error(record):
        return ((record.dequantize(torch.float64) - weight.double()) ** 2 * importance.double()).sum()

    found, nearest = family.search(weight, scheme, importance), family.round_to_nearest(weight, scheme)
    assert error(found) <= error(nearest) * (1 + 1e-6)


def test_layers_that_run_as_one_share_a_global_scale():
    weights = [make_weight(8, 32, seed) * factor for seed, factor in ((1, 1.0), (2, 3.0))]
    family, scheme = NvFp().for_group(weights), PRESETS["NVFP4"]
    (scale,) = {float(family.round_to_nearest(weight, scheme).global_scale) for weight in weights}
    assert scale == pytest.approx(448 * 6 / weights[1].abs().max().item())
    assert Fp().for_group(weights).data_type == "fp"


@pytest.mark.parametrize(
    ("family", "scheme", "says"),
    [
        ("fp", QuantScheme(4, -1, data_type="fp"), "8 bits"),
        ("fp", QuantScheme(8, 64, data_type="fp"), "a row, a matrix or a block"),
        ("fp", QuantScheme(8, -1, data_type="fp", activation=ActivationScheme()), "inputs are fp"),
        ("mx_fp", QuantScheme(4, 16, data_type="mx_fp"), "groups of 32"),
        ("mx_fp", QuantScheme(6, 32, data_type="mx_fp"), "4 or 8 bits"),
        ("mx_fp", QuantScheme(4, 32, data_type="mx_fp", activation=ActivationScheme(8, "mx_fp", 32)), "inputs are"),
        ("nv_fp", QuantScheme(4, 16, False, "nv_fp"), "groups of 16"),
    ],
)
def test_what_a_family_refuses(family, scheme, says):
    assert says in FAMILIES[family].why_not(scheme)


def test_the_presets_are_accepted():
    families = {**FAMILIES, "int": IntFamily()}
    assert {families[scheme.data_type].why_not(scheme) for scheme in PRESETS.values()} == {None}
    assert "all is INT8" in IntFamily().why_not(QuantScheme(4, -1, activation=ActivationScheme()))


# --- activations --------------------------------------------------------------------------------------------

INPUTS = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 15).view(3, 5, 1)


def test_int8_per_token():
    found = IntFamily().quantize_activation(INPUTS, ActivationScheme(), None)
    scale = INPUTS.double().abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(found.double(), (INPUTS.double() / scale).round() * scale, rtol=1e-5)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4"])
def test_an_input_is_quantized_like_a_weight_of_its_kind(name):
    scheme = PRESETS[name]
    family, activation = FAMILIES[scheme.data_type], scheme.activation
    rows = INPUTS.view(-1, 96)
    input_scale = family.input_scale(activation, INPUTS.abs().max()) if activation.calibrated else None
    found = family.quantize_activation(INPUTS, activation, input_scale)
    per_token = QuantScheme(scheme.bits, activation.group_size, data_type=scheme.data_type)
    truth = family.tunable(rows, per_token).finish().dequantize(torch.float32)
    assert torch.allclose(found.view(-1, 96), truth, rtol=1e-6)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4"])
@pytest.mark.parametrize("shape", [(96,), (15, 96), (3, 5, 96), (0, 96)])
def test_codes_and_scales_of_an_input_are_those_of_its_values(name, shape):
    scheme = PRESETS[name]
    family, activation = FAMILIES[scheme.data_type], scheme.activation
    input_scale = family.input_scale(activation, INPUTS.abs().max() / 2) if activation.calibrated else None
    inputs = INPUTS.reshape(-1)[: math.prod(shape)].view(shape)
    codes, stored = family.activation_codes(inputs, activation, input_scale)
    length = 96 if activation.group_size == -1 else min(activation.group_size, 96)
    assert codes.dtype == torch.uint8 and codes.shape == shape and stored.shape == (*shape[:-1], 96 // length)
    rows = QuantScheme(scheme.bits, length, data_type=scheme.data_type)
    found = FloatWeight(rows, codes.view(-1, 96), stored.reshape(-1, 96 // length).contiguous(),
                        input_scale if scheme.data_type == "nv_fp" else None).dequantize(torch.float32)
    assert torch.equal(found, family.quantize_activation(inputs, activation, input_scale).view(-1, 96))


def test_a_static_scale_saturates():
    activation = PRESETS["FP8_STATIC"].activation
    scale = Fp().input_scale(activation, torch.tensor(44.8))
    assert scale.shape == (1,) and scale.item() == pytest.approx(0.1)
    found = Fp().quantize_activation(torch.tensor([[100.0, -44.8, 0.1]]), activation, scale)
    assert found.tolist() == [[pytest.approx(44.8), pytest.approx(-44.8), pytest.approx(0.1, rel=0.07)]]


@pytest.mark.parametrize("name", ["INT8", "FP8_DYNAMIC", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through_and_the_value_is_exact(name, dtype):
    scheme = PRESETS[name]
    family = {**FAMILIES, "int": IntFamily()}[scheme.data_type]
    scale = family.input_scale(scheme.activation, INPUTS.abs().max()) if scheme.activation.calibrated else None
    inputs = INPUTS.clone().to(dtype).requires_grad_()
    found = family.quantize_activation(inputs, scheme.activation, scale)
    assert torch.equal(found, family.quantize_activation(inputs.detach(), scheme.activation, scale))
    assert found.dtype == dtype
    found.backward(torch.ones_like(found) * 3)
    assert torch.equal(inputs.grad, torch.full_like(inputs, 3))
    assert torch.equal(family.quantize_activation(torch.zeros(2, 96), scheme.activation, scale), torch.zeros(2, 96))
