"""Targets: their spelling, and which of them fuse layers."""

from __future__ import annotations

import pytest

from autoround_core.errors import UnknownNameError
from autoround_core.target import ANY_ENGINE, ENGINES, Target


@pytest.mark.parametrize("engine", ENGINES)
def test_every_device_can_be_asked_for_and_the_first_is_the_usual(engine):
    for device in ENGINES[engine]:
        assert Target.parse(f"{engine}:{device}") == Target(engine, device)
    assert Target.parse(f" {engine.upper()} ") == Target(engine, ENGINES[engine][0])


def test_any():
    assert Target.parse("any") == ANY_ENGINE
    assert str(ANY_ENGINE) == "any" and str(Target.parse("vllm:cpu")) == "vllm on cpu"
    assert ANY_ENGINE.fuses and Target.parse("sglang").fuses and not Target.parse("gptqmodel").fuses


@pytest.mark.parametrize(
    ("text", "says"),
    [("vlm", "unknown target `vlm`.*`vllm`"), ("vllm:gpu", "device of target vllm `gpu`.*cuda, xpu|cpu, cuda"),
     ("any:cpu", "unknown target `any`"), ("", "unknown target")],
)
def test_others_are_refused(text, says):
    with pytest.raises(UnknownNameError, match=says):
        Target.parse(text)
