from autoround_npz.npz import NpzFormat

from autoround_core.testing import check_format


def test_conformance(tmp_path):
    assert check_format(NpzFormat(), tmp_path).cells > 0
