"""What the tests of the backends on scaled products share."""

from __future__ import annotations

import pytest
import torch

from autoround_backends import scaled_product
from scaled_mm_double import ScaledMm


@pytest.fixture
def scaled_mm(monkeypatch) -> ScaledMm:
    double = ScaledMm()
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", double)
    return double


@pytest.fixture
def any_gpu(monkeypatch) -> None:
    """As if there were a GPU of every capability, on which small layers come out right."""
    monkeypatch.setattr(scaled_product, "why_not_gpu", lambda *_: None)
    monkeypatch.setattr(scaled_product, "why_not_tried", lambda *_: None)
