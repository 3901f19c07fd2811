"""GPTQModel on a CPU loads our checkpoints and computes what was meant. Run by `tox -e gptqmodel`."""

from __future__ import annotations

import pytest

from engine_cases import logprobs

gptqmodel = pytest.importorskip("gptqmodel", reason="tox -e gptqmodel")
MOST = 0.25  # nats, in bfloat16; a wrong zero point makes more than 0.5
CASES = [
    ("W4", "auto_gptq"), ("W4", "auto_awq"), ("W4", "llm_compressor"), ("W4-asym", "auto_awq"), ("mixed", "auto_gptq"),
    ("skipped", "auto_awq"), ("W2G64", "auto_gptq"), ("W3G128", "auto_gptq"), ("W8G128", "auto_gptq"),
    ("W4G128-asym", "auto_gptq"), ("W2G64-asym", "auto_gptq"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_gptqmodel_computes_what_was_meant(checkpoint, name, fmt):
    directory, expected = checkpoint(name, fmt)
    # the kernels that need no compiler
    backend = gptqmodel.BACKEND.TORCH_AWQ if fmt == "auto_awq" else gptqmodel.BACKEND.TORCH
    options = {} if fmt == "llm_compressor" else {"backend": backend}
    model = gptqmodel.GPTQModel.load(str(directory), device="cpu", **options)
    found = logprobs(model.model if hasattr(model, "model") else model)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= MOST
