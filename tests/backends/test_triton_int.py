"""The Triton backend without its kernels: the layout of its words, its module, and each of its refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from autoround_backends import triton_int
from autoround_backends.triton_int import PLANES, TritonInt, pack, unpack
from autoround_core import LinearSpec, QuantScheme
from autoround_core.testing.cases import random_layer

BACKEND, CPU = TritonInt(), torch.device("cpu")
INTERPRET = "TRITON_INTERPRET"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("in_features", [1, 7, 32, 40, 96, 384, 1000])
def test_unpack_inverts_pack(bits, in_features):
    codes = torch.randint(0, 2**bits, (5, in_features), generator=generator(), dtype=torch.uint8)
    codes[0], codes[1] = 2**bits - 1, 0
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, in_features), codes)
    # nothing but the bits, and what fills the last column of words
    assert words[0].numel() * 32 < (in_features + PLANES[bits]) * bits


@pytest.mark.parametrize(("bits", "in_features"), [(2, 64), (4, 24), (8, 12)])
def test_a_word_holds_one_code_of_each_plane(bits, in_features):
    codes = torch.randint(0, 2**bits, (2, in_features), generator=generator(), dtype=torch.uint8)
    words = pack(codes, bits)
    width = in_features // PLANES[bits]
    assert words.shape == (2, 1, width)
    for j in range(PLANES[bits]):
        for w in range(width):
            assert (int(words[1, 0, w]) >> bits * j) % 2**bits == int(codes[1, j * width + w])


def test_three_bits_are_two_words_of_low_bits_and_one_of_high_bits():
    codes = torch.randint(0, 8, (2, 96), generator=generator(), dtype=torch.uint8)
    words = pack(codes, 3)
    assert words.shape == (2, 3, 3)
    for j in range(32):
        for w in range(3):
            low = int(words[1, j // 16, w]) >> 2 * (j % 16) & 3
            high = int(words[1, 2, w]) >> j & 1
            assert low + 4 * high == int(codes[1, 3 * j + w])


def test_a_code_that_does_not_fit():
    with pytest.raises(ValueError, match="code 9 does not fit into 3 bits"):
        pack(torch.tensor([[1, 9]], dtype=torch.uint8), 3)


# --- the module, without running it -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_the_weight_is_the_record(bits, sym, group_size):
    layer = random_layer(QuantScheme(bits, group_size, sym), (6, 200), generator(), bias=True)
    module = BACKEND.build(layer, CPU, torch.float16)
    assert torch.equal(module.weight, layer.weight.dequantize(torch.float16))
    assert (module.in_features, module.out_features) == (200, 6)
    kept = {"words", "scale", "bias"} | (set() if sym else {"zero_point"})
    assert set(module.state_dict()) == kept
    assert str(layer.weight.scheme) in repr(module) and "backend=triton" in repr(module)


def test_memory():
    layer = random_layer(QuantScheme(3, 128, False), (64, 1024), generator())
    module = BACKEND.build(layer, CPU, torch.float16)
    size = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert size == 64 * (1024 * 3 // 8 + 8 * (2 + 1))


# --- what it takes ------------------------------------------------------------------------------------------


def spec(scheme, in_features=256, out_features=48):
    return LinearSpec("layer", in_features=in_features, out_features=out_features, scheme=scheme)


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton, a compiler, and one GPU of compute capability 8.0."""
    monkeypatch.delenv(INTERPRET, raising=False)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(TritonInt, "missing", lambda self: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return monkeypatch


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "xpu"])
def test_what_it_takes(machine, device):
    for bits in PLANES:
        for size in (16, 32, 64, 128, 256, -1, 1000, 7):
            for sym in (True, False):
                for dtype in (torch.float16, torch.bfloat16, torch.float32):
                    given = spec(QuantScheme(bits, size, sym), 250, 7)
                    assert BACKEND.why_not(given, torch.device(device), dtype) is None


@pytest.mark.parametrize(
    ("given", "device", "dtype", "says"),
    [
        (spec(QuantScheme(4)), "cpu", torch.bfloat16, "runs on cuda or xpu, not on cpu"),
        (spec(QuantScheme(5)), "cuda", torch.bfloat16, "needs bits 2, 3, 4 or 8, got 5"),
        (spec(QuantScheme(4, 32, data_type="mx_fp")), "cuda", torch.bfloat16, "needs numbers of kind int, got mx_fp"),
        (spec(QuantScheme.parse("INT8")), "cuda", torch.bfloat16, "needs inputs in 16 bits"),
        (spec(QuantScheme(4)), "xpu", torch.float64, "needs bfloat16, float16 or float32, got float64"),
        (spec(None), "cuda", torch.bfloat16, "the layer is not quantized"),
    ],
)
def test_refusals(machine, given, device, dtype, says):
    assert says in BACKEND.why_not(given, torch.device(device), dtype)


def test_an_old_gpu(machine):
    machine.setattr(torch.version, "hip", None)
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    question = spec(QuantScheme(4)), torch.device("cuda"), torch.float16
    assert BACKEND.why_not(*question) == "needs a GPU of compute capability 8.0 or later, got 7.5"
    machine.setattr(torch.version, "hip", "6.4")  # AMD counts otherwise
    assert BACKEND.why_not(*question) is None


def test_no_compiler(machine):
    machine.delenv("CC")
    machine.setattr(sys, "platform", "linux")
    machine.setattr(triton_int.shutil, "which", lambda name: None)
    question = spec(QuantScheme(4)), torch.device("xpu"), torch.float16
    assert "install gcc, or name one in CC" in BACKEND.why_not(*question)
    machine.setattr(triton_int.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert BACKEND.why_not(*question) is None


def test_no_triton(monkeypatch):
    monkeypatch.delenv(INTERPRET, raising=False)
    monkeypatch.setattr("autoround_core.support.find_spec", lambda name: None)
    reason = BACKEND.why_not(spec(QuantScheme(4)), torch.device("cuda"), torch.float16)
    assert reason == "triton not installed; pip install autoround-backends[cuda]"


def test_the_interpreter_takes_a_cpu(machine):
    question = spec(QuantScheme(4)), CPU, torch.float32
    assert BACKEND.why_not(*question) is not None
    machine.setenv(INTERPRET, "1")
    assert BACKEND.why_not(*question) is None


def test_nothing_is_imported_to_answer():
    code = (
        "import sys, torch\n"
        "from autoround_backends.triton_int import TritonInt\n"
        "from autoround_core import LinearSpec, QuantScheme\n"
        "for device in ('cpu', 'cuda', 'xpu'):\n"
        "    spec = LinearSpec('layer', in_features=64, out_features=8, scheme=QuantScheme())\n"
        "    TritonInt().why_not(spec, torch.device(device), torch.float16)\n"
        "print('triton' in sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False"]
