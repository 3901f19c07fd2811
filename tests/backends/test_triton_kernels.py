"""The Triton kernels: run by Triton's interpreter, compiled for two GPUs without one, and run where there is one.

The interpreter is chosen when Triton is imported and for good. So that part runs in a process of its own: this
file, as a script.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from autoround_backends import triton_int
from autoround_backends.triton_int import PLANES, STEPS, PackedWeight, TritonInt
from autoround_core import QuantizedLayer, QuantScheme
from autoround_core.testing import check_backend
from autoround_core.testing.backends import TOLERANCE, exact
from autoround_core.testing.cases import random_layer

CPU = torch.device("cpu")
INTERPRET = "TRITON_INTERPRET"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
compiles = pytest.mark.skipif(triton_int.interpreted(), reason=f"{INTERPRET} is set")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- interpreted -------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(("part", "cells"), [("conformance", 12), ("rows", 14), ("shapes", 23)])
def test_interpreted(part, cells):
    environment = os.environ | {INTERPRET: "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error", __file__, part], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert int(process.stdout) == cells


class _Sample(TritonInt):
    """Takes one cell of the kit for each bit width, others at each turn: the interpreter is slow."""

    def __init__(self, turn):
        self.turn = turn

    def why_not_layer(self, spec, device, dtype):
        at = list(PLANES).index(spec.scheme.bits) + self.turn
        shape = ((48, 256), (33, 96), (64, 384), (7, 40), (16, 128), (1, 32))[at]
        chosen = (shape, (32, 64, -1, 128)[at % 4], at % 2 == self.turn // 2)
        given = ((spec.out_features, spec.in_features), spec.scheme.group_size, spec.scheme.sym)
        return None if given == chosen else "not in the sample"


def conformance():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return sum(check_backend(_Sample(turn), dtype=dtype).cells for turn, dtype in enumerate(dtypes))


def check(layer, rows, dtype, device=CPU, module=None):
    """One product against float64, by the kit's bound."""
    module = module or TritonInt().build(layer, device, dtype)
    inputs = torch.randn(rows, layer.weight.shape[1], generator=generator(rows)).to(dtype)
    output, matrix = module(inputs.to(device)).cpu(), exact(layer.weight)
    expected, bound = inputs.double() @ matrix.T, inputs.double().abs() @ matrix.abs().T
    if layer.bias is not None:
        bias = layer.bias.to(dtype).double()
        expected, bound = expected + bias, bound + bias.abs()
    assert output.dtype == dtype and output.shape == expected.shape
    wrong = ~((output.double() - expected).abs() <= TOLERANCE[dtype] * bound)
    assert not wrong.any(), (str(layer.weight.scheme), layer.weight.shape, rows, dtype, wrong.nonzero()[0])
    return 1


def rows(device=CPU, dtype=torch.float16):
    """On both sides of each crossover and each size of tiles, one group in a tile of words, and several tiles."""
    layer = random_layer(QuantScheme(8, 64, False), (40, 512), generator(), bias=True)
    module = TritonInt().build(layer, device, dtype)
    return sum(check(layer, n, dtype, device, module) for n in (1, 2, 3, 4, 5, 16, 17, 32, 33, 64, 65, 256, 257, 300))


def shapes(device=CPU, dtypes=(torch.float16,)):
    """Whole tiles of one group (512 columns and more), groups that straddle planes, rows and columns left over."""
    cells = 0
    for index, (bits, group, out_features, in_features) in enumerate((
        (2, 32, 70, 512), (3, 32, 66, 1024), (4, 32, 70, 512), (4, 256, 65, 512), (2, 16, 5, 300), (3, 48, 5, 1030),
        (4, 7, 5, 129), (8, -1, 67, 131), (3, -1, 1, 1),
    )):  # fmt: skip
        layer = random_layer(QuantScheme(bits, group, index % 2 == 1), (out_features, in_features), generator(index),
                             bias=index % 3 == 0)
        for dtype in dtypes:
            cells += sum(check(layer, n, dtype, device) for n in (1, 6))
    layer = random_layer(QuantScheme(3, 64, False), (37, 200), generator(), bias=True)
    dense = TritonInt().build(layer, device, torch.float32)
    return cells + pieces(layer, dense, device) + zeros(device)


def pieces(layer, module, device):
    """The dense path in one piece and in several, and its matrix bit for bit."""
    from autoround_backends import triton_kernels

    matrix = triton_kernels.dequantize(module._packed, torch.float32)
    assert torch.equal(matrix.cpu(), layer.weight.dequantize(torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_int, "PIECE", 10 * layer.weight.shape[1])
        return check(layer, 300, torch.float32, device, module)


def zeros(device):
    """Zero points at both ends; scales in bfloat16 and float32, as files of others have them."""
    layer = random_layer(QuantScheme(4, 32, False), (9, 64), generator())
    weight = layer.weight
    for scale in (torch.bfloat16, torch.float32):
        for zero in (0, 15):
            changed = type(weight)(
                weight.scheme, weight.codes, weight.scale.to(scale), torch.full_like(weight.zero_point, zero)
            )
            check(QuantizedLayer("layer", changed), 3, torch.float32, device)
    return 4


# --- compiled ----------------------------------------------------------------------------------------------


def ptx(kernel, config, bits, arch, *, group=128, sym=True, tile=1, columns=4096):
    """Compile as a call with these arguments would. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.fn if hasattr(kernel, "configs") else kernel
    words = torch.empty(1, 1, -(-columns // PLANES[bits]), dtype=torch.int32)
    constants = PackedWeight(words, words, None, bits, group, columns).constants() | config.kwargs
    constants |= {"TILE_ROWS": tile, "SPLITS": 1, "TYPE": triton.language.bfloat16} | ({"zero": None} if sym else {})
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    kinds = {"words": "*i32", "scale": "*fp16", "zero": "*u8", "rows": "i32", "out_features": "i32"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind not in ("i32", "constexpr")
    }
    return triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from autoround_backends import triton_kernels

    return triton_kernels


@compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", PLANES)
def test_a_decode_step_compiles_and_reads_four_words_at_a_time(kernels, bits, arch):
    compiled = ptx(kernels.few_kernel, kernels.few_kernel.configs[0], bits, arch, sym=bits != 3)
    assert f".target sm_{arch}" in compiled.asm["ptx"] and "cubin" in compiled.asm
    assert compiled.asm["ptx"].count("ld.global") > 0
    # [BLOCK_N, BLOCK_W] words, of which each of 128 threads loads four in a row; 3 bits have three such tiles
    wide = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line and ".v4.b32" in line]
    assert len(wide) == (3 if bits == 3 else 1)


@compiles
@pytest.mark.parametrize(("bits", "arch", "tile"), [(2, 80, 64), (3, 90, 64), (4, 90, 16), (4, 80, 32), (8, 90, 64)])
def test_many_rows_compile_to_tensor_cores(kernels, bits, arch, tile):
    compiled = ptx(kernels.many_kernel, kernels.many_kernel.configs[0], bits, arch, tile=tile, sym=bits != 4)
    assert "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]  # the next words are on their way while these are multiplied


@compiles
def test_one_configuration_of_each_size_fits_any_gpu(kernels):
    """The worst case is 16 planes and the tallest tiles; 48 KiB are there without asking."""
    safe = [config for config in kernels.many_kernel.configs if config.num_stages == 1]
    assert {config.kwargs["BLOCK_W"] for config in safe} == {16, 32}
    for config in safe:
        compiled = ptx(kernels.many_kernel, config, 2, 80, tile=64)
        assert compiled.metadata.shared <= 48 * 1024


@compiles
def test_odd_shapes_and_the_dense_kernel_compile(kernels):
    config = next(c for c in kernels.many_kernel.configs if c.kwargs["BLOCK_W"] == 16)
    odd = ptx(kernels.many_kernel, config, 3, 90, group=48, columns=1030, tile=16, sym=False)
    assert "mma" in odd.asm["ptx"]
    import triton

    config = triton.Config({"BLOCK_N": 8, "BLOCK_W": 64}, num_warps=4, num_stages=1)
    for bits in (3, 4):
        assert "st.global" in ptx(kernels.dense_kernel, config, bits, 90, sym=False).asm["ptx"]


@compiles
@pytest.mark.parametrize(
    ("group", "width", "inputs", "tiles"),
    [(128, 512, 4096, {16, 32, 64, 128}), (32, 512, 4096, {16, 32}), (4096, 512, 4096, {16, 32, 64, 128}),
     (128, 43, 344, {16}), (7, 512, 4096, {16}), (128, 1376, 11008, {16, 32})],
)  # fmt: skip
def test_tiles_that_lie_in_one_group_are_tried(kernels, group, width, inputs, tiles):
    kept = kernels._prune(kernels.few_kernel.configs, {}, GROUP=group, WIDTH=width, IN=inputs)
    assert {config.kwargs["BLOCK_W"] for config in kept} == tiles
    assert kernels._prune(kernels.many_kernel.configs, {}, GROUP=group, WIDTH=width, IN=inputs)


@needs_triton
@pytest.mark.parametrize(
    ("tiles", "steps", "splits"), [(1, 1, 1), (1, 16, 8), (64, 16, 4), (64, 3, 2), (256, 16, 1), (200, 16, 2)]
)
def test_programs_share_a_tile_where_there_are_few(kernels, tiles, steps, splits):
    assert kernels._splits(tiles, steps) == splits


def test_steps_divide_planes():
    # the low bits of a run of planes must come from one word
    assert all(PLANES[bits] % STEPS[bits] == 0 and 16 % STEPS[bits] == 0 for bits in PLANES)


# --- on a GPU -----------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_on_a_gpu(kernels, kind):
    if not torch.get_device_module(kind).is_available():
        pytest.skip(f"no {kind} device")
    device = torch.device(kind)
    assert check_backend(TritonInt(), device=device).cells > 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert rows(device, dtype) > 0
    assert shapes(device, (torch.float16, torch.bfloat16)) > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print({"conformance": conformance, "rows": rows, "shapes": shapes}[sys.argv[1]]())
