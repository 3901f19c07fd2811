"""Devices by name, and the precision of matrix products."""

from __future__ import annotations

import pytest
import torch

from autoround_core.compute import find_device, product_dtype
from autoround_core.errors import UsageError

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")
CPUS = {
    "Sapphire Rapids": ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
    "a guest without AMX": ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
    "Zen 4": ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
    "Zen 3": ({"cpu_name": "AMD EPYC", "avx2": True}, torch.float32),
    "unknown": ({}, torch.float32),
}


@pytest.mark.parametrize("name", CPUS)
def test_a_cpu_takes_the_dtype_that_it_multiplies_faster(monkeypatch, name):
    capabilities, expected = CPUS[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert product_dtype(torch.bfloat16, CPU, None) == expected


def test_a_torch_that_does_not_tell_is_taken_for_a_plain_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert product_dtype(torch.bfloat16, CPU, None) == torch.float32


@pytest.mark.parametrize(
    ("model", "device", "amp", "expected"),
    [
        (torch.float16, CPU, True, torch.bfloat16),
        (torch.float32, CPU, False, torch.float32),
        (torch.float32, ACCELERATOR, None, torch.bfloat16),
        (torch.float16, ACCELERATOR, None, torch.float16),
        (torch.float16, ACCELERATOR, False, torch.float32),
    ],
)
def test_what_the_user_says_and_what_accelerators_do(model, device, amp, expected):
    assert product_dtype(model, device, amp) == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"device `{name}` cannot be used"):
        find_device(name)


def test_no_device_is_the_cpu():
    assert find_device(None) == find_device("cpu") == CPU
