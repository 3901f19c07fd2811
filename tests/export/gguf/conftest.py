"""Tiny vision-language models, made once for all tests of format gguf."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from export.gguf.vision_models import MODELS, saved


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """source(name) -> directory of a model of `vision_models`."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            transformers.logging.disable_progress_bar()
            made[name] = saved(MODELS[name].build(), tmp_path_factory.mktemp(name))
        return made[name]

    return get
