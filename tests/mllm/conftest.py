"""Tiny vision-language checkpoints, each built once."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tiny_vlms import FAMILIES


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name) -> directory of a tiny checkpoint; leave it as it is."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            transformers.logging.disable_progress_bar()
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name].build(made[name])
        return made[name]

    return get
