"""What decides on a GPU that is not here: the question about it, the small layer that is tried, torch's version."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from autoround_backends import scaled_product
from autoround_backends.fp8 import Fp8
from autoround_backends.mx import Mxfp4, Mxfp8
from autoround_backends.nvfp4 import Nvfp4
from autoround_backends.scaled_product import why_not_gpu, why_not_tried
from autoround_core import LinearSpec
from autoround_core.float_family import Fp, MxFp, NvFp
from autoround_core.scheme import PRESETS
from scaled_mm_double import ScaledMm

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
CASES = [
    ("FP8_DYNAMIC", Fp8, Fp()), ("FP8_STATIC", Fp8, Fp()), ("FP8_BLOCK", Fp8, Fp()), ("MXFP4", Mxfp4, MxFp()),
    ("MXFP8", Mxfp8, MxFp()), ("NVFP4", Nvfp4, NvFp()),
]  # fmt: skip
NAMES = [name for name, *_ in CASES]


def tried(case, dtype=BF16):
    name, kind, family = case
    return why_not_tried(kind(), family, PRESETS[name], CPU, dtype)


def test_the_double_has_the_arguments_of_the_function():
    real, double = (list(inspect.signature(found).parameters) for found in (torch.nn.functional.scaled_mm, ScaledMm()))
    assert real == double


# --- a small layer is tried -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_layer_that_comes_out_right_is_taken(scaled_mm, case):
    assert tried(case) is None and len(scaled_mm.calls) == 1
    if case[1] is not Mxfp4:
        assert tried(case, torch.float16) is None and tried(case, torch.float32) is None


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("side", [0, 1])
def test_scales_in_other_places_are_seen(scaled_mm, monkeypatch, case, side):
    """Two neighbouring groups of a side change places."""

    def wrong(a, b, scale_a, kinds_a, scale_b, kinds_b, *layouts, **rest):
        scales = [scale_a, scale_b]
        first = scales[side][0].clone()
        flat = first.view(torch.uint8) if first.dtype != torch.float32 else first
        axis = int(flat.dim() == 2 and flat.shape[1] > 1)
        for start in range(0, flat.shape[axis] - 1, 2):
            one, two = flat.narrow(axis, start, 1), flat.narrow(axis, start + 1, 1)
            kept = one.clone()
            one.copy_(two)
            two.copy_(kept)
        scales[side] = [first, *scales[side][1:]]
        return scaled_mm(a, b, scales[0], kinds_a, scales[1], kinds_b, *layouts, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", wrong)
    if case[0] == "FP8_STATIC" and side == 0:
        assert tried(case) is None  # all are the same
    else:
        assert "is wrong on `cpu`" in tried(case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("output", [lambda found: found * 1.5, lambda found: found * float("nan"), torch.zeros_like])
def test_wrong_numbers_are_seen(scaled_mm, monkeypatch, case, output):
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *given, **rest: output(scaled_mm(*given, **rest)))
    assert tried(case) == f"torch's product of {case[0]} is wrong on `cpu`, tried on a small layer"


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, ValueError])
def test_what_torch_refuses_is_said(monkeypatch, error):
    def refuse(*_, **__):
        raise error("MXFP4 scaling is\n not supported")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuse)
    assert tried(CASES[3]) == "torch cannot multiply MXFP4 on `cpu`: MXFP4 scaling is not supported"


def test_torch_itself_refuses_blocks_on_a_cpu_and_multiplies_rows():
    assert tried(CASES[0]) is None and tried(CASES[1]) is None
    assert "torch cannot multiply MXFP8 on `cpu`" in tried(CASES[4])


def test_it_is_tried_once(scaled_mm):
    backend, family = Mxfp8(), MxFp()
    for dtype, calls in ((BF16, 1), (BF16, 1), (torch.float16, 2), (BF16, 2)):
        assert why_not_tried(backend, family, PRESETS["MXFP8"], CPU, dtype) is None
        assert len(scaled_mm.calls) == calls


# --- the GPU -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_machine_without_a_gpu(case):
    name, kind, _ = case
    spec = LinearSpec("layer", in_features=256, out_features=128, scheme=PRESETS[name])
    for device in ("cuda", "cuda:3"):
        assert kind().why_not(spec, torch.device(device), BF16) == f"torch sees no CUDA device `{device}` here"
    for device in ("cpu", "xpu", "hpu", "mps", "meta"):
        assert kind().why_not(spec, torch.device(device), BF16) == f"runs on cuda, not on {device}"


def test_gpus_that_cannot_be_used(monkeypatch):
    def broken(device):
        raise RuntimeError("driver\ntoo old")

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert why_not_gpu(CUDA, (8, 9)) == "torch cannot use `cuda`: driver too old"
    assert why_not_gpu(torch.device("cuda:1"), (8, 9)) == "torch sees no CUDA device `cuda:1` here"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in why_not_gpu(CUDA, (8, 9))


def test_a_torch_without_the_function(monkeypatch):
    old = SimpleNamespace(nn=SimpleNamespace(functional=SimpleNamespace()), __version__="2.9.1")
    monkeypatch.setattr(scaled_product, "torch", old)
    for kind in (Fp8, Mxfp4, Mxfp8, Nvfp4):
        assert kind().missing() == "torch 2.9.1 has no scaled_mm; pip install torch>=2.10"
