"""The choice among backends: the best that answers yes, or every reason why none does."""

from __future__ import annotations

import pytest
import torch

from autoround_core.backend import AUTO, Backend, answers, select_backend
from autoround_core.errors import UnknownNameError, UnsupportedError
from autoround_core.recipe import LinearSpec
from autoround_core.scheme import QuantScheme

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SPEC = LinearSpec("model.layers.0.mlp.up_proj", in_features=64, out_features=32, scheme=QuantScheme(4, 32))


class Fake(Backend):
    def __init__(self, name, priority=0, reason=None):
        self.name, self.priority, self.reason, self.asked = name, priority, reason, []

    def why_not(self, spec, device, dtype):
        self.asked.append((spec, device, dtype))
        return self.reason

    def build(self, layer, device, dtype):
        raise AssertionError("choosing builds nothing")


def test_the_highest_priority_that_takes_the_layer_wins():
    slow, fast, faster = Fake("slow"), Fake("fast", 10), Fake("faster", 20, reason="needs a GPU")
    for order in ([slow, fast, faster], [faster, fast, slow], [fast, faster, slow]):
        assert select_backend(order, SPEC, CPU, BF16) is fast
    assert slow.asked[0] == (SPEC, CPU, BF16)


def test_among_equals_the_name_decides_and_not_the_order():
    a, b = Fake("a", 5), Fake("b", 5)
    assert select_backend([b, a], SPEC, CPU, BF16) is select_backend([a, b], SPEC, CPU, BF16) is a


def test_all_answers_best_first():
    first, second, last = Fake("z", 3, "no"), Fake("a", 2), Fake("b", -1, "never")
    assert answers(iter([last, second, first]), SPEC, CPU, BF16) == [
        (first, "no"),
        (second, None),
        (last, "never"),
    ]


def test_a_backend_can_be_asked_for_by_name():
    slow, fast = Fake("slow"), Fake("fast", 10)
    assert select_backend(iter([slow, fast]), SPEC, CPU, BF16, "slow") is slow
    assert select_backend(iter([slow, fast]), SPEC, CPU, BF16, AUTO) is fast


def test_the_one_asked_for_is_not_silently_replaced():
    with pytest.raises(UnsupportedError, match="fast: needs a GPU") as caught:
        select_backend([Fake("slow"), Fake("fast", 10, "needs a GPU")], SPEC, CPU, BF16, "fast")
    assert "slow" not in str(caught.value)


def test_if_none_takes_the_layer_every_reason_is_given():
    backends = [Fake("slow", 0, "needs bfloat16"), Fake("fast", 10, "needs group_size 128")]
    with pytest.raises(UnsupportedError) as caught:
        select_backend(backends, SPEC, CPU, torch.float16)
    for part in (
        SPEC.name,
        "W4G32",
        "cpu",
        "torch.float16",
        "fast: needs group_size 128; slow: needs bfloat16",
    ):
        assert part in str(caught.value)


def test_no_backend_at_all():
    with pytest.raises(UnsupportedError, match="no backend runs"):
        select_backend([], SPEC, CPU, BF16)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(
        UnknownNameError, match=r"unknown backend `cpu_int5`; did you mean `cpu_int4`\?.*auto"
    ):
        select_backend([Fake("reference"), Fake("cpu_int4")], SPEC, CPU, BF16, "cpu_int5")
