"""A double of `torch.nn.functional.scaled_mm`: it undoes the documented layouts and multiplies in float64.

torch's own check of the arguments runs first, on the meta device: dtypes, shapes and strides of matrices and scales,
and how recipes and swizzles go together, for CUDA. Where scales lie in their tiles is the formula of cuBLAS's
documentation, byte by byte, not the code under test.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import ScalingType, SwizzleType

from autoround_backends.reference import Reference
from autoround_core import get_registry

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
PLAIN, TILED = SwizzleType.NO_SWIZZLE, SwizzleType.SWIZZLE_32_4_4
LENGTHS = {ScalingType.BlockWise1x16: 16, ScalingType.BlockWise1x32: 32}


class ScaledMm:
    """Call it like the function. calls: the recipe of the first side and the shape of each product."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, int, int]]] = []

    def __call__(
        self, mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None,
        output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False,
    ):  # fmt: skip
        assert bias is None and contraction_dim == () and not use_fast_accum and len(mat_a)
        accepted_by_torch(mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a, swizzle_b)
        a = numbers(mat_a) * factors(scale_a, scale_recipe_a, swizzle_a, numbers(mat_a).shape)
        b = numbers(mat_b.T) * factors(scale_b, scale_recipe_b, swizzle_b, numbers(mat_b.T).shape)
        self.calls.append((scale_recipe_a[0].name, (len(a), a.shape[1], len(b))))
        return (a @ b.T).to(output_dtype)


def accepted_by_torch(mat_a, mat_b, scale_a, kinds_a, scale_b, kinds_b, swizzle_a, swizzle_b) -> None:
    """Raises what torch would raise on CUDA, but for what it asks of the GPU itself."""
    wide = mat_a.shape[1] * (2 if mat_a.dtype == torch.float4_e2m1fn_x2 else 1)
    if kinds_a[0] == ScalingType.BlockWise1x32 and mat_a.dtype == torch.float4_e2m1fn_x2 and wide > 128:
        # this check of torch 2.13 counts bytes and not numbers; the kernel's own counts numbers
        expected = [math.ceil(rows / 128) * 128 * math.ceil(wide / 128) * 4 for rows in (len(mat_a), mat_b.shape[1])]
        assert [scale_a[0].numel(), scale_b[0].numel()] == expected
        assert swizzle_a == swizzle_b == [TILED] and scale_a[0].is_contiguous() and scale_b[0].is_contiguous()
        return
    meta = [like(mat_a), like(mat_b)]
    values = [[kind.value for kind in kinds] for kinds in (kinds_a, swizzle_a, kinds_b, swizzle_b)]
    found = torch._scaled_mm_v2(
        *meta, [like(scale) for scale in scale_a], values[0], values[1], [like(scale) for scale in scale_b],
        values[2], values[3], None, torch.bfloat16,
    )  # fmt: skip
    assert found.shape == (len(mat_a), mat_b.shape[1])


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def numbers(matrix: torch.Tensor) -> torch.Tensor:
    """float64 [rows, in] of E4M3 numbers, or of pairs of E2M1 numbers with the first in the lower bits."""
    if matrix.dtype == torch.float8_e4m3fn:
        return matrix.to(torch.float64)
    assert matrix.dtype == torch.float4_e2m1fn_x2
    pairs = matrix.view(torch.uint8)
    result = torch.empty(pairs.shape[0], 2 * pairs.shape[1], dtype=torch.float64)
    result[:, 0::2], result[:, 1::2] = E2M1[(pairs % 16).long()], E2M1[(pairs // 16).long()]
    return result


def factors(scales, kinds, swizzles, shape) -> torch.Tensor:
    """float64 [rows, in], what each number is multiplied by."""
    rows, wide = shape
    (scale, *others), kind = scales, kinds[0]
    if kind in LENGTHS:
        assert swizzles == [TILED, PLAIN][: len(kinds)] and scale.dim() == 1
        groups = wide // LENGTHS[kind]
        raw = scale.view(torch.uint8)[tile_index(rows, groups)]
        result = 2.0 ** (raw.double() - 127) if scale.dtype == torch.float8_e8m0fnu else (
            raw.view(torch.float8_e4m3fn).double()
        )
        assert others == [] or kinds[1] == ScalingType.TensorWise
        return result.repeat_interleave(LENGTHS[kind], 1) * math.prod(float(other) for other in others)
    assert swizzles == [PLAIN] and others == [] and scale.dtype == torch.float32
    if kind == ScalingType.TensorWise:
        return scale.double().reshape(1, 1).expand(shape)
    if kind == ScalingType.RowWise:
        assert scale.is_contiguous()  # the kernel reads a plain vector
        return scale.double().reshape(rows, 1).expand(shape)
    if kind == ScalingType.BlockWise1x128:
        assert rows % 4 == 0  # a column of scales starts at a multiple of 16 bytes
        return scale.double().repeat_interleave(128, 1)
    assert kind == ScalingType.BlockWise128x128
    return scale.T[:, : wide // 128].double().repeat_interleave(128, 0).repeat_interleave(128, 1)


def tile_index(rows: int, groups: int) -> torch.Tensor:
    """[rows, groups], where the scale of a row and a group lies."""
    tiles = math.ceil(groups / 4)
    return torch.tensor([
        [512 * (r // 128 * tiles + g // 4) + r % 32 * 16 + r % 128 // 32 * 4 + g % 4 for g in range(groups)]
        for r in range(rows)
    ])


def assert_like_reference(backend, layer, dtype) -> None:
    """The module of `backend` gives what the reference gives, to the rounding of `dtype`, for all kinds of inputs."""
    cpu = torch.device("cpu")
    module, reference = backend.build(layer, cpu, dtype), Reference().build(layer, cpu, dtype)
    assert torch.equal(module.weight, reference.weight) and module.weight.dtype == dtype
    wide, generator = module.in_features, torch.Generator().manual_seed(1)
    matrix = layer.weight.dequantize(torch.float32).double()
    family = get_registry().number_family(layer.weight.scheme.data_type)
    for shape in ((wide,), (1, wide), (2, 3, wide), (300, wide), (0, wide), (2, 0, wide)):
        plain = torch.randn(shape, generator=generator).to(dtype)
        strided = torch.randn((*shape[:-1], 2 * wide), generator=generator).to(dtype)[..., ::2]
        with_zeros = plain.clone().mul_((torch.arange(plain.numel()) // wide % 2).view(shape))
        turned = torch.randn((wide, *shape[:-1]), generator=generator).to(dtype).movedim(0, -1)
        for inputs in (plain, strided, with_zeros, turned):
            before = inputs.clone()
            with torch.no_grad():
                found, emulated = module(inputs), reference(inputs)
            assert found.dtype == dtype and found.shape == emulated.shape == (*shape[:-1], module.out_features)
            assert torch.equal(inputs, before)
            # not the reference's own inputs, which are rounded to dtype once more
            x = family.quantize_activation(inputs.float(), layer.weight.scheme.activation, layer.input_scale).double()
            bias = torch.zeros(1).double() if layer.bias is None else layer.bias.to(dtype).double()
            exact, bound = x @ matrix.T + bias, x.abs() @ matrix.abs().T + bias.abs()
            step = max(torch.finfo(dtype).eps, 2.0**-20)  # a sum in float32 is rounded several times
            assert ((found.double() - exact).abs() <= step * bound).all()
            assert ((found.double() - emulated.double()).abs() <= 3 * step * bound).all()
