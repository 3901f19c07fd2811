"""The conformance kit: what every layout, format, backend and algorithm must do, ours and yours.

Each check raises AssertionError with a sentence that names the case, and returns a `Checked` that counts the
cases. A check that found nothing to check fails: a plugin that refuses everything has not passed. The one
exception is a device that this machine does not have; then `check_backend` returns 0 cells and the reasons.

The kit needs no test runner:

    from autoround_core.testing import check_format

    def test_my_format(tmp_path):
        assert check_format(MyFormat(), tmp_path).cells > 0
"""

from __future__ import annotations

from autoround_core.testing.algorithms import ToyBlock, check_algorithm
from autoround_core.testing.backends import check_backend
from autoround_core.testing.cases import OTHER_SCHEMES, SCHEMES, Checked, random_layer, random_weight
from autoround_core.testing.formats import check_format
from autoround_core.testing.layouts import check_layout

__all__ = [
    "OTHER_SCHEMES", "SCHEMES", "Checked", "ToyBlock", "check_algorithm", "check_backend", "check_format",
    "check_layout", "random_layer", "random_weight",
]
