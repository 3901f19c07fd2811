"""The second file holds tower and projector as llama.cpp looks for them, or is refused before anything is computed."""

from __future__ import annotations

import json
import re
import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file

from autoround_core import CheckpointError, LinearSpec, ModelError, ModelOutline, QuantScheme, UnsupportedError
from autoround_export.gguf.composition import towers_through_checkout
from autoround_export.gguf.format import GgufFormat
from export.gguf.vision_models import MODELS, files_in, outlined, written


@pytest.mark.parametrize("name", MODELS)
def test_half_of_it_is_in_16_bits(source, name, tmp_path):
    tensors = written(source(name), tmp_path / "out", "bf16")
    _, towers = files_in(tmp_path / "out")
    assert towers.path.name == "mmproj-model-F16.gguf"
    assert towers.fields["general.architecture"] == "clip" and towers.fields["general.file_type"] == 1
    kinds = {key: (info.type, len(info.shape)) for key, info in towers.tensors.items()}
    exact = {"v.position_embd.weight"} | ({"v.patch_embd.weight"} if name == "gemma3" else set())
    for key, (kind, axes) in kinds.items():
        assert kind == ("F32" if axes == 1 or key in exact else "F16"), key
    found = dict(GgufFormat().read(tmp_path / "out").rest())
    ours = {key for key in tensors if re.match(r"(model\.)?(visual|vision_tower|multi_modal_projector)\.", key)}
    assert ours
    for key in ours:
        rounded = tensors[key] if tensors[key].dim() == 1 else tensors[key].half().float()
        assert torch.equal(found[key].float(), rounded) or torch.allclose(found[key], tensors[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "gemma3", "llava", "llava_siglip"])
def test_the_gguf_package_gives_the_same_names(source, name, tmp_path):
    written(source(name), tmp_path / "out")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
    config = json.loads((source(name) / "config.json").read_text())["vision_config"]
    towers, count = files_in(tmp_path / "out")[1], 0
    for key in outlined(source(name))[1]:
        hub = key.replace("vision_tower.", "vision_tower.vision_model.").replace("_weight", ".weight")
        parts = [hub] if "qkv" not in hub else [hub.replace("qkv", part) for part in "qkv"]
        for part in parts:
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if found is None or "language_model" in part or part.startswith(("model.", "lm_head")):
                continue
            if name.startswith("llava") and ("post_layernorm" in part or "linear_" in part):
                continue  # the first is not read; the others it knows from Pixtral, where llama.cpp counts from 1
            count += 1
            assert found in towers.tensors, (key, found)
    assert count > 8 * config.get("num_hidden_layers", config.get("depth"))


def test_a_layer_of_the_tower_is_not_quantized():
    scheme = QuantScheme(bits=8, group_size=32)
    for name in ("visual.blocks.0.attn.qkv", "model.visual.merger.linear_fc1", "multi_modal_projector.linear_1",
                 "vision_tower.vision_model.encoder.layers.0.mlp.fc1"):
        assert "leave out --quant_nontext_module" in GgufFormat("q8_0").why_not(LinearSpec(name, 64, 64, scheme))
    for name in ("model.language_model.layers.0.mlp.up_proj", "language_model.lm_head"):
        assert GgufFormat("q8_0").why_not(LinearSpec(name, 64, 64, scheme)) is None


def test_only_the_text_is_chosen_for(source):
    model, tensors = outlined(source("llava"))
    choices = GgufFormat("q8_0").choose_schemes(model)
    matrices = {key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dim() > 1}
    assert choices.keys() & matrices == {key for key in matrices if key.startswith("language_model.")}
    assert str(choices["language_model.lm_head"].scheme) == "W8G32"
    assert GgufFormat().choose_schemes(model) is None


CHANGES = {
    "qwen2_vl": [
        ({"vision_config": {"spatial_merge_size": 4}}, "spatial_merge_size = `2`, the model has `4`"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act `relu`"),
        ({"vision_config": {"mlp_ratio": 1}}, "swaps two of its matrices"),
        ({"text_config": {"rope_parameters": {"mrope_section": [16, 16]}}}, "must be three numbers, not `.16, 16.`"),
    ],
    "qwen2_5_vl": [
        ({"vision_config": {"window_size": 56}}, "window_size = `112`, the model has `56`"),
        ({"vision_config": {"fullatt_block_indexes": [0, 3]}}, "fullatt_block_indexes = \\[0, 3\\]"),
        ({"vision_config": {"fullatt_block_indexes": []}}, "fullatt_block_indexes = \\[\\]"),
    ],
    "qwen3_vl": [
        ({"vision_config": {"deepstack_visual_indexes": [2, 0]}}, "deepstack_visual_indexes = \\[2, 0\\]"),
        ({"vision_config": {"patch_size": [16, 16]}}, "every size of the tower as one number"),
    ],
    "gemma3": [
        ({"mm_tokens_per_image": 9}, "4 x 4 patches cannot be averaged to 9 tokens"),
        ({"mm_tokens_per_image": 3}, "to 3 tokens"),
        ({"vision_config": {"num_hidden_layers": 4}}, "`vision_tower.encoder.layers.3.* holds nothing of that name"),
        ({"vision_config": {"num_hidden_layers": 2}}, "`vision_tower.encoder.layers.2.*has no place in a file of"),
        ({"vision_config": {"intermediate_size": 128}}, "should be \\(128,.* the model holds \\(96,"),
    ],
    "llava": [
        ({"vision_feature_layer": -1}, "vision_feature_layer = -1"),
        ({"vision_feature_layer": [2, 1]}, "vision_feature_layer = \\[2, 1\\]"),
        ({"vision_feature_select_strategy": "full"}, "= `default`; the model has `full`"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = `gelu`, the model has `relu`"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision tower of type `pixtral`.*known: clip_vision_model"),
        ({"text_config": {"model_type": "gpt_neox"}}, "language model of type `gpt_neox`"),
    ],
    "llava_siglip": [({"vision_feature_select_strategy": "default"}, "= `full`; the model has `default`")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"), [(name, *change) for name, changes in CHANGES.items() for change in changes]
)
def test_what_llama_cpp_would_compute_otherwise(source, name, change, message, tmp_path):
    directory = shutil.copytree(source(name), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=message):
        GgufFormat("q8_0").choose_schemes(outlined(directory)[0])


def test_what_is_missing(source, tmp_path):
    directory = shutil.copytree(source("llava"), tmp_path / "model")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedError, match="needs `image_mean` of the image processor as three numbers"):
        GgufFormat("f16").choose_schemes(outlined(directory)[0])
    # Transformers 5 puts all processors of a model into one file
    nested = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}
    (directory / "processor_config.json").write_text(json.dumps(nested))
    written(directory, tmp_path / "out", "f16")
    assert files_in(tmp_path / "out")[1].fields["clip.vision.image_std"] == [0.25] * 3
    # settings that are not said are those of the class
    (directory / "processor_config.json").unlink()
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    written(directory, tmp_path / "usual", "f16")
    assert files_in(tmp_path / "usual")[1].fields["clip.vision.image_mean"] == [0.5] * 3
    model, _ = outlined(directory)
    shapes = {key: shape for key, shape in model.shapes.items() if "multi_modal" not in key}
    with pytest.raises(UnsupportedError, match="should hold one projector, that is one `linear_1.weight`; it holds 0"):
        GgufFormat("f16").choose_schemes(ModelOutline(model.config, shapes, directory, {}, calibrated=False))


def test_numbers_beyond_float16(source, tmp_path):
    directory = shutil.copytree(source("llava"), tmp_path / "model")
    tensors = outlined(directory)[1]
    tensors["multi_modal_projector.linear_2.weight"][3, 5] = 70000.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="linear_2.weight` holds numbers beyond 65504"):
        written(directory, tmp_path / "out", "bf16")
    assert written(directory, tmp_path / "exact").keys() == tensors.keys()


def test_a_config_that_makes_no_sense(source):
    model, _ = outlined(source("llava"))
    model = ModelOutline({**model.config, "vision_config": 3}, model.shapes, model.directory, {}, calibrated=False)
    with pytest.raises(ModelError, match="config.json of this `llava` model cannot be read"):
        GgufFormat("f16").choose_schemes(model)


def test_a_tower_outside_the_tables_is_written_by_the_checkout(tmp_path, monkeypatch):
    root, out = tmp_path / "llama.cpp", tmp_path / "out"
    for directory in (root, out, tmp_path / "model"):
        directory.mkdir()
    script = "import json, sys, pathlib\nassert 'bad' not in sys.argv[-1]\n"
    script += "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text(json.dumps(sys.argv[1:]))\n"
    (root / "convert_hf_to_gguf.py").write_text(script)

    def outline(config, name="model"):
        return ModelOutline({"model_type": "strange", **config}, {}, tmp_path / name, {}, calibrated=False)

    monkeypatch.delenv("LLAMA_CPP_ROOT", raising=False)
    towers_through_checkout(outline({"vision_config": {"depth": 1}}), out)
    monkeypatch.setenv("LLAMA_CPP_ROOT", str(root))
    towers_through_checkout(outline({}), out)
    towers_through_checkout(ModelOutline({"model_type": "llama"}, {}, None, {}, calibrated=False), out)
    assert not list(out.iterdir())
    towers_through_checkout(outline({"vision_config": {"depth": 1}}), out)
    (path,) = out.iterdir()
    assert path.name == "mmproj-model-F16.gguf"
    assert json.loads(path.read_text()) == [
        "--mmproj", "--outtype", "f16", "--outfile", str(path), str(tmp_path / "model")
    ]
    (tmp_path / "bad").mkdir()
    with pytest.raises(UnsupportedError, match="cannot convert this model: .*AssertionError"):
        towers_through_checkout(outline({"vision_config": {"depth": 1}}, "bad"), out)
