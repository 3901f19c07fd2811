"""Whole runs on vision-language models: two files, verified, loaded again with and without their images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoround_core import UnsupportedError, convert, load, read_json
from autoround_core.loading import find_format
from autoround_mllm import AutoRoundMLLM
from tiny_vlms import FAMILIES, TinyVLM

# what llama.cpp has built in, and the tiny models have smaller
_CHANGES = {
    "qwen2_5_vl": lambda options: options["vision_config"].update(window_size=112),
    "gemma3": lambda options: options["text_config"].pop("layer_types"),
}
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava")


def family(name: str) -> TinyVLM:
    tiny = FAMILIES[name]
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in tiny.options.items()}
    _CHANGES.get(name, lambda _: None)(options)
    return replace(tiny, options=options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(name) -> a checkpoint in bfloat16, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            made[name].mkdir()
            family(name).build(made[name], torch.bfloat16)
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_two_files_that_are_one_model(directory, name, tmp_path):
    out = AutoRoundMLLM(directory(name), recipe="rtn").quantize_and_save(tmp_path / "out", "gguf:q8_0")
    assert {file.name for file in out.glob("*.gguf")} == {"model-Q8_0.gguf", "mmproj-model-F16.gguf"}
    found = read_json(out / "report.json")["verification"]["gguf:q8_0"]
    assert found["layers_equal"] > 14 and found["forward_difference"] < 1e-3
    model = load(out, backend="reference")
    assert type(model).__name__ == json.loads((directory(name) / "config.json").read_text())["architectures"][0]
    # bfloat16 fits into float16 but for the smallest numbers
    original = type(model).from_pretrained(directory(name), dtype=torch.float32)
    for path in (*family(name).vision, *family(name).projector):
        for key, parameter in original.get_submodule(path).named_parameters():
            ours = model.get_submodule(path).get_parameter(key).float()
            torch.testing.assert_close(ours, parameter, rtol=0, atol=2**-24)
    # the language model by itself
    alone = tmp_path / "alone.gguf"
    shutil.copy(out / "model-Q8_0.gguf", alone)
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        expected, text = model(input_ids=ids).logits, load(alone, backend="reference")(input_ids=ids).logits
    torch.testing.assert_close(text.float(), expected.float(), rtol=0, atol=1e-3)


def test_a_tower_is_not_quantized(directory, tmp_path):
    rounder = AutoRoundMLLM(directory("llava"), recipe="rtn", quant_nontext_module=True)
    with pytest.raises(UnsupportedError, match="leave out --quant_nontext_module"):
        rounder.quantize_and_save(tmp_path / "out", "gguf:q8_0")
    assert not (tmp_path / "out").exists()


def test_conversion_there_and_back(directory, tmp_path):
    rounder = AutoRoundMLLM(directory("qwen3_vl"), recipe="rtn", scheme="W8G32")
    source = rounder.quantize_and_save(tmp_path / "in", "auto_round")
    out = convert(source, tmp_path / "out", "gguf:q8_0")
    assert len(list(out.glob("*.gguf"))) == 2
    back = convert(out, tmp_path / "back", "auto_round")
    first, second, third = ({layer.name: layer.weight.digest() for layer in find_format(path).read(path).layers()}
                            for path in (source, out, back))
    assert first == second == third
