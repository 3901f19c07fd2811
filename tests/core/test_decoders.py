"""Every kind of decoder from directory to checkpoint and back, through the face of the library."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import autoround_core
from autoround_core import AutoRound
from autoround_core.errors import CalibrationError, NonFiniteError, UnsupportedError
from tiny_models import MIXTURES, MODELS, token_ids

IDS = token_ids(samples=4, length=16)
PACKED = (".qweight", ".qzeros", ".scales", ".g_idx")
UNTIED = "llama"


def autoround(model, **options) -> AutoRound:
    defaults = {"scheme": "W4G32", "iters": 2, "nsamples": 4, "seqlen": 16, "batch_size": 2}
    return AutoRound(model, **defaults | {"dataset": IDS.tolist()} | options)


def contents(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def load_dense(directory: Path) -> torch.nn.Module:
    """The dense checkpoint as anybody would load it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert {kind: names for kind, names in info.items() if names} == {}
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> bool:
    return bool((first - second).abs().max() <= tolerance * second.abs().max())


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """made(name) -> (directory of the model, directory with its checkpoints auto_round and dense)."""
    done: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in done:
            # rounding a dense weight to bfloat16 would send some tokens of a mixture to other experts
            source = saved(name, torch.float32 if name in MIXTURES else torch.bfloat16)
            output = tmp_path_factory.mktemp("out") / name
            autoround(source).quantize_and_save(output, "auto_round,dense")
            done[name] = source, output
        return done[name]

    return get


# --- the way there and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_was_verified_layer_by_layer(made, name):
    _, output = made(name)
    for folder in ("auto_round", "dense"):
        report = json.loads((output / folder / "report.json").read_text())
        for row in report["verification"].values():
            assert row["layers_equal"] == MODELS[name].layers


@pytest.mark.parametrize("name", MODELS)
def test_both_checkpoints_load_and_compute_the_same(made, name):
    _, output = made(name)
    quantized = autoround_core.load(output / "auto_round", dtype=torch.float32)
    dense = load_dense(output / "dense")
    assert close(logits(quantized), logits(dense), 1e-4 if name in MIXTURES else 0.03)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_called_as_save_pretrained_called_them(made, name):
    source, output = made(name)
    truth, dense, packed = contents(source), contents(output / "dense"), contents(output / "auto_round")
    assert dense.keys() == truth.keys()
    assert all(dense[key].shape == truth[key].shape for key in truth)
    # Transformers loads a few vectors in float32 whatever their file says
    assert all(dense[key].dtype == truth[key].dtype or dense[key].dim() == 1 for key in truth)
    plain = {key for key in packed if not key.endswith(PACKED)}
    layers = {key.removesuffix(".qweight") for key in packed if key.endswith(".qweight")}
    assert len(layers) == MODELS[name].layers
    assert plain == truth.keys() - {f"{layer}.weight" for layer in layers}
    for key in plain:
        assert torch.equal(packed[key].to(truth[key].dtype), truth[key])
        assert torch.equal(packed[key], dense[key])


# --- lm_head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.tied])
def test_a_tied_weight_is_stored_once(made, name):
    _, output = made(name)
    vocabularies = [key for key, tensor in contents(output / "dense").items() if tensor.shape[0] == 128
                    and tensor.dim() == 2 and re.search("embed|wte|lm_head", key) and "per_layer" not in key]
    assert len(vocabularies) == 1


@pytest.mark.parametrize("name", [UNTIED, "mixtral"])
def test_lm_head_is_quantized_when_asked(saved, tmp_path, name):
    autoround(saved(name, torch.float32), quant_lm_head=True).quantize_and_save(tmp_path / "out")
    names = set(contents(tmp_path / "out"))
    assert "lm_head.qweight" in names and "lm_head.weight" not in names
    autoround(saved(name, torch.float32), quant_lm_head=True).quantize_and_save(tmp_path / "dense", "dense")
    quantized = autoround_core.load(tmp_path / "out", dtype=torch.float32)
    assert close(logits(quantized), logits(load_dense(tmp_path / "dense")), 1e-4)


def test_a_tied_lm_head_is_refused(saved, tmp_path):
    run = autoround(saved("qwen3"), quant_lm_head=True)
    for attempt in (lambda: run.plan(), lambda: run.quantize_and_save(tmp_path / "out")):
        with pytest.raises(UnsupportedError, match="lm_head shares its weight with the embedding"):
            attempt()
    assert not list(tmp_path.iterdir())


# --- experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_one_expert_can_stay_in_16_bits(saved, tmp_path, name):
    source = saved(name, torch.float32)
    truth = contents(source)
    first = re.compile(r"experts\.2\.(w1|gate_proj)\.weight$")
    layer = max(key for key in truth if first.search(key)).removesuffix(".weight")
    autoround(source, layer_config={layer: 16}, fuse="off").quantize_and_save(tmp_path / "out", "auto_round,dense")
    packed = contents(tmp_path / "out" / "auto_round")
    assert torch.equal(packed[f"{layer}.weight"], truth[f"{layer}.weight"])
    assert sum(key.endswith(".qweight") for key in packed) == MODELS[name].layers - 1
    quantized = autoround_core.load(tmp_path / "out" / "auto_round", dtype=torch.float32)
    dense = load_dense(tmp_path / "out" / "dense")
    assert torch.equal(contents(tmp_path / "out" / "dense")[f"{layer}.weight"], truth[f"{layer}.weight"])
    assert close(logits(quantized), logits(dense), 1e-4)


# --- the same bytes -----------------------------------------------------------------------------------------


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "report.json"}


@pytest.mark.parametrize("name", ["llama", "bloom", "qwen3_moe"])
def test_two_runs_write_the_same_bytes(saved, tmp_path, name):
    outputs = []
    for run, options in enumerate(({}, {}, {"low_gpu_mem_usage": True})):
        autoround(saved(name), iters=4, **options).quantize_and_save(tmp_path / str(run))
        outputs.append(files(tmp_path / str(run)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert {"model.safetensors", "config.json"} <= outputs[0].keys()


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_loaded_model_gives_the_bytes_that_its_directory_gives(saved, tmp_path, name):
    autoround(saved(name)).quantize_and_save(tmp_path / "directory")
    model = AutoModelForCausalLM.from_pretrained(saved(name), dtype="auto")
    autoround(model).quantize_and_save(tmp_path / "loaded")
    loaded, directory = (files(tmp_path / name)["model.safetensors"] for name in ("loaded", "directory"))
    assert loaded == directory


# --- other roads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"recipe": "rtn"}, {"recipe": "opt_rtn"}, {"amp": False}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "deepseek_v3", "gemma4"])
def test_every_recipe_takes_every_kind_of_block(saved, tmp_path, name, options):
    iters = None if "recipe" in options else 2
    autoround(saved(name), **options, iters=iters).quantize_and_save(tmp_path / "out", "dense")
    assert torch.isfinite(logits(load_dense(tmp_path / "out"))).all()


def test_a_model_without_blocks_is_refused(saved, tmp_path):
    source = saved("llama", num_hidden_layers=0)
    run = autoround(source)
    for attempt in (lambda: run.plan(), lambda: run.quantize_and_save(tmp_path / "out")):
        with pytest.raises(UnsupportedError, match="`LlamaForCausalLM` has no list of like blocks"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, tensor", [
    ("llama", "model.layers.1.mlp.up_proj.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_named(saved, tmp_path, name, tensor, value):
    source = shutil.copytree(saved(name), tmp_path / "model")
    tensors = contents(source)
    tensors[tensor][3, 5] = float(value)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    named = tensor if name == "llama" else "experts.down_proj"
    with pytest.raises(NonFiniteError, match=f"{re.escape(named)}` holds {value}"):
        autoround(source).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_without_a_tokenizer_is_an_error(saved, tmp_path):
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        autoround(saved("llama"), dataset=["some text"]).quantize_and_save(tmp_path / "out")
