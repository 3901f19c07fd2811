"""The two files of a vision-language model hold all of it, each tensor where llama.cpp looks for it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    LinearSpec,
    QuantRecipe,
    QuantScheme,
    TuningSettings,
)
from autoround_core.testing import random_layer
from autoround_export.gguf.format import GgufFormat
from autoround_export.gguf.mmproj_fields import tower_fields
from autoround_export.gguf.vision import taken_apart, text_outline
from autoround_export.gguf.vision_table import FAMILIES
from export.gguf.vision_models import MODELS, as_on_the_hub, files_in, outlined, written


def test_each_family_has_a_model():
    assert {MODELS[name].configuration().model_type for name in MODELS} == set(FAMILIES)
    towers = {(family, kind) for family, row in FAMILIES.items() for kind in row.towers}
    built = {(config.model_type, config.vision_config.model_type)
             for config in (tiny.configuration() for tiny in MODELS.values())}
    assert towers == built


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read(source, name, tmp_path):
    tensors = written(source(name), tmp_path / "out")
    reader = GgufFormat().read(tmp_path / "out")
    found = dict(reader.rest())
    assert reader.config == json.loads((source(name) / "config.json").read_text())
    assert found.keys() == tensors.keys() and not reader.layer_names()
    for key, tensor in tensors.items():
        # Gemma's gains are stored with 1 added, and lose a bit
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-7 if name == "gemma3" else 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_text_alone_is_an_ordinary_model(source, name, tmp_path):
    """Without the other file, or without the configuration, it is what its metadata say; and computes the same."""
    written(source(name), tmp_path / "out")
    text, _ = files_in(tmp_path / "out")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(text.path, alone)
    shutil.copy(tmp_path / "out" / "config.json", alone)  # of what is no longer there
    with GgufFormat().home(alone) as home:
        config = transformers.AutoConfig.from_pretrained(home)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reader = GgufFormat().read(alone)
    missing, strange = model.load_state_dict(dict(reader.rest()), strict=False)
    assert not strange and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    ids = torch.arange(20)[None] * 5 + 1
    with torch.no_grad():
        whole = MODELS[name].build()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=0, atol=1e-4 if name == "gemma3" else 1e-6)


def test_quantized_layers_keep_their_names(source, tmp_path):
    """Rows of q_proj are reordered on the way, and come back."""
    model, tensors = outlined(source("llava"))
    scheme, prefix = QuantScheme(bits=8, group_size=32), "language_model.model.layers.1."
    specs = [LinearSpec(f"{prefix}{name}", columns, rows, scheme)
             for name, rows, columns in (("self_attn.q_proj", 256, 256), ("mlp.down_proj", 256, 512))]
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(scheme, (spec.out_features, spec.in_features), generator, name=spec.name) for spec in specs]
    context = CheckpointContext(
        model.config, QuantRecipe(scheme), specs, [], [], [], torch.float32, TuningSettings(), model
    )
    writer = GgufFormat("q8_0").open(tmp_path, context)
    for layer in layers:
        writer.add(layer)
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in {spec.name for spec in specs}:
            writer.keep(name, tensor)
    writer.finish()
    reader = GgufFormat().read(tmp_path)
    assert {layer.name: layer.weight.digest() for layer in reader.layers()} == {
        layer.name: layer.weight.digest() for layer in layers
    }
    assert {name for name, _ in reader.rest()} | {f"{spec.name}.weight" for spec in specs} == tensors.keys()
    assert files_in(tmp_path)[0].tensors["blk.1.attn_q.weight"].type == "Q8_0"


def test_positions_with_several_axes(source, tmp_path):
    for name, arch, sections in (("qwen2_5_vl", "qwen2vl", [8, 12, 12, 0]), ("qwen3_vl", "qwen3vl", [11, 11, 10, 0])):
        written(source(name), tmp_path / name)
        fields = files_in(tmp_path / name)[0].fields
        assert fields["general.architecture"] == arch and fields[f"{arch}.rope.dimension_sections"] == sections
    assert fields["qwen3vl.n_deepstack_layers"] == 2
    written(source("llava"), tmp_path / "llava")
    assert not any("sections" in key or "deepstack" in key for key in files_in(tmp_path / "llava")[0].fields)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_names_of_older_checkpoints_come_back(source, name, tmp_path):
    tensors = written(as_on_the_hub(source(name), tmp_path / "model"), tmp_path / "out")
    assert "vision_tower.vision_model.post_layernorm.weight" in tensors
    assert dict(GgufFormat().read(tmp_path / "out").rest()).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_configurations_of_older_checkpoints(source, name):
    """The language model's at the top, another name for its positions, a wrong one for the tower."""
    model, _ = outlined(source(name))
    text, tower = dict(model.config["text_config"]), dict(model.config["vision_config"])
    rope = text.pop("rope_parameters")
    old = {**{key: value for key, value in model.config.items() if key != "text_config"}, **text,
           "model_type": name, "rope_theta": rope["rope_theta"], "in_chans": tower.pop("in_channels"),
           "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
           "vision_config": {**tower, "model_type": name}}
    parts = [taken_apart(config) for config in (old, model.config)]
    first, second = (text_outline(part, model.shapes).fields for part in parts)
    assert first == second and tower_fields(parts[0]) == tower_fields(parts[1])


def test_files_that_do_not_fit(source, tmp_path):
    written(source("llava"), tmp_path / "out", "f16")
    text, towers = files_in(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a vision tower; name the file of its language model"):
        shutil.copy(towers.path, tmp_path / "alone.gguf")
        GgufFormat().read(tmp_path / "alone.gguf")
    shutil.copy(towers.path, towers.path.with_name("mmproj-other.gguf"))
    with pytest.raises(CheckpointError, match=r"several vision towers, mmproj-model-F16\.gguf, mmproj-other\.gguf"):
        GgufFormat().read(text.path)
    towers.path.with_name("mmproj-other.gguf").unlink()
    written(source("gemma3"), tmp_path / "other", "f16")
    shutil.copy(files_in(tmp_path / "other")[1].path, towers.path)
    with pytest.raises(CheckpointError, match="should hold tensor"):
        GgufFormat().read(text.path)
