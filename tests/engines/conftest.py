"""Checkpoints of the bundled trained model, for the engines that are asked to load them.

Not part of the default run: each engine wants an environment of its own, `tox -e vllm` or `tox -e transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoround_core import AutoRound, ShardWriter, TensorFiles, load, write_json
from engine_cases import CALIBRATION, CASES, TINY, logprobs


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    """The model with a head of its own."""
    directory = tmp_path_factory.mktemp("untied")
    shards = ShardWriter(directory)
    files = TensorFiles(TINY)
    for name in files.names():
        shards.add(name, files.get(name))
    shards.add("lm_head.weight", files.get("model.embed_tokens.weight").clone())
    shards.finish()
    config = json.loads((TINY / "config.json").read_text())
    write_json(directory / "config.json", config | {"tie_word_embeddings": False})
    for file in TINY.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, untied):
    """checkpoint(name, format) -> (directory, log-probabilities that our reference backend gives in float32)."""
    made: dict[str, Path] = {}

    def get(name: str, fmt: str) -> tuple[Path, list[float]]:
        scheme, formats, options = CASES.get(name, (name, fmt, CALIBRATION))
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            source = untied if name == "head" else TINY
            AutoRound(source, scheme=scheme, recipe="rtn", **options).quantize_and_save(made[name], formats)
        directory = made[name] / fmt if "," in formats else made[name]
        return directory, logprobs(load(directory, dtype=torch.float32, backend="reference"))

    return get
