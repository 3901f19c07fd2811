"""What all tests share: tiny saved models, and property tests that try the same cases everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

from tiny_models import MODELS

settings.register_profile("autoround", deadline=None, derandomize=True)
settings.load_profile("autoround")

# matrices this small are done before a second thread has woken up; on a busy machine it costs ten times more
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name, dtype, **changes of the configuration) -> directory of a tiny model; leave it as it is."""
    made: dict[str, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
        key = f"{name} {dtype} {changes}"
        if key not in made:
            transformers.logging.disable_progress_bar()
            made[key] = tmp_path_factory.mktemp(name)
            MODELS[name].build(dtype, **changes).save_pretrained(made[key])
        return made[key]

    return get
