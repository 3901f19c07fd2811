import pytest
import torch
from autoround_blas32.blas32 import Blas32

from autoround_core.testing import check_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conformance(dtype):
    assert check_backend(Blas32(), dtype=dtype).cells > 0
