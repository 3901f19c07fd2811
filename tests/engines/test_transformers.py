"""Transformers loads our checkpoints with nothing but our packages installed. Run by `tox -e transformers`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoround_core import load
from engine_cases import CHECKPOINTS, EMULATED, logprobs

OURS = [case for case in CHECKPOINTS if case[1] != "llm_compressor"]


def test_nobody_else_is_installed():
    assert not [name for name in ("auto_round", "optimum", "gptqmodel", "awq") if find_spec(name)]


@pytest.mark.parametrize(("name", "fmt"), OURS)
def test_transformers_computes_what_was_meant(checkpoint, name, fmt):
    directory, expected = checkpoint(name, fmt)
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.15)):
        found = logprobs(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= most


def test_without_an_import_of_ours(checkpoint):
    directory, _ = checkpoint("W4", "auto_gptq")
    code = ("from transformers import AutoModelForCausalLM; "
            f"print(type(AutoModelForCausalLM.from_pretrained({str(directory)!r}).hf_quantizer).__name__)")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "AutoRoundLoader"


@pytest.mark.parametrize(("name", "fmt"), [case for case in CHECKPOINTS if case[1] == "llm_compressor"])
def test_compressed_tensors_computes_what_was_meant(checkpoint, name, fmt):
    pytest.importorskip("compressed_tensors")
    if name in ("W4-asym", "skipped"):
        pytest.skip("compressed-tensors 0.20.0 fails on the zero points of asymmetric layers")
    directory, expected = checkpoint(name, fmt)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # its steps for INT8 inputs are those of greatest / 127.5; vLLM's and ours are greatest / 127
    most = 0.1 if name == "INT8" else 2e-3
    assert max(abs(a - b) for a, b in zip(logprobs(model), expected, strict=True)) <= most


@pytest.mark.parametrize("name", EMULATED)
def test_compressed_tensors_emulates_what_was_meant(checkpoint, name):
    pytest.importorskip("compressed_tensors")
    directory, _ = checkpoint(name, "llm_compressor")
    # it multiplies MX and NV numbers in bfloat16 alone
    dtype = torch.float32 if name.startswith("FP") else torch.bfloat16
    expected = logprobs(load(directory, dtype=dtype, backend="reference"))
    found = logprobs(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if name in ("MXFP4", "MXFP8", "NVFP4"):
        # inputs are rounded in bfloat16 there, to powers of two by another rule: as good, not the same
        assert sum(differences) / len(differences) <= 0.25
    else:
        assert max(differences) <= 2e-3
