"""Tensors of GGUF files, against the names of the gguf package and the models themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file

from autoround_core import CheckpointError, UnsupportedError
from autoround_export.gguf.architectures import config_of, model_shapes, outline, supported
from autoround_export.gguf.outline import FileTensor, Outline
from export.gguf.architecture_models import MODELS, VOCABULARY, file_shapes, meta, saved, stored, stranger


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory) -> tuple[torch.nn.Module, dict[str, Any], dict[str, torch.Tensor], Outline]:
    """(model, config.json, tensors of its checkpoint, outline)."""
    directory = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param].build()
    tensors = saved(model, directory)
    config = json.loads((directory / "config.json").read_text())
    return model, config, tensors, outline(config, {name: tuple(x.shape) for name, x in tensors.items()})


def _computed(tensor: FileTensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    pieces = [tensors[piece.source] if piece.rows is None else tensors[piece.source][piece.rows]
              for piece in tensor.pieces]  # fmt: skip
    return torch.cat(pieces).view(tensor.shape) + tensor.offset


def _taken_apart(tensor: FileTensor, data: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    parts, start = {}, 0
    rows = (data - tensor.offset).view(-1, *shapes[tensor.pieces[0].source][1:])
    for piece in tensor.pieces:
        count = shapes[piece.source][0]
        part = rows[start : start + count].clone()
        start += count
        if piece.rows is not None:
            part[piece.rows] = part.clone()
        parts[piece.source] = part
    return parts


def test_every_row_of_the_table_has_a_tiny_model():
    assert supported() == sorted({tiny.configuration().model_type for tiny in MODELS.values()})


def test_every_tensor_of_the_model_is_placed_once(case):
    _, _, tensors, file = case
    sources = Counter(piece.source for tensor in file.tensors for piece in tensor.pieces)
    assert sources == Counter(tensors.keys())
    assert len({tensor.name for tensor in file.tensors}) == len(file.tensors)
    for tensor in file.tensors:
        assert _computed(tensor, tensors).shape == tensor.shape


def test_names_are_those_of_the_gguf_package(case):
    _, config, _, file = case
    arch = next(x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == file.fields["general.architecture"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor in file.tensors:
        source = re.sub(r"experts\.\d+", "experts", tensor.pieces[0].source)
        source = re.sub(r"model\.(.*)block_sparse_moe\.experts", r"\1feed_forward.experts", source)
        assert names.get_name(source, try_suffixes=(".weight", ".bias")) == tensor.name
    for name in file.constants:
        assert name.removesuffix(".weight") in gguf.TENSOR_NAMES.values()


def test_a_model_made_from_the_file_alone_computes_the_same(case, tmp_path):
    model, _, tensors, file = case
    shapes_there = file_shapes(file)
    # floats as a file holds them
    fields = {k: torch.tensor(v).item() if isinstance(v, float) else v for k, v in file.fields.items()}
    config = config_of(fields, shapes_there, file.constants)
    shapes = model_shapes(config, shapes_there)
    again = outline(config, shapes)
    assert [(x.name, x.shape, x.offset) for x in again.tensors] == [(x.name, x.shape, x.offset) for x in file.tensors]
    assert again.fields == pytest.approx(dict(file.fields))
    for name, constant in file.constants.items():
        assert torch.equal(again.constants[name], constant)

    restored = {}
    for tensor in again.tensors:
        restored |= _taken_apart(tensor, _computed(tensor, tensors), shapes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(restored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_rows_of_a_head_become_pairs():
    """Two heads of 4: number 0 is turned with number 2, 1 with 3, and pairs stand together in the file."""
    config = dict(model_type="llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, attention_bias=True)  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config, vocab_size=16))
    file = outline(config, {name: tuple(x.shape) for name, x in model.state_dict().items()})
    rows = {tensor.name: tensor.pieces[0].rows for tensor in file.tensors}
    assert rows["blk.0.attn_q.weight"].tolist() == rows["blk.0.attn_q.bias"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rows["blk.0.attn_k.weight"].tolist() == rows["blk.0.attn_k.bias"].tolist() == [0, 2, 1, 3]
    assert [name for name, x in rows.items() if x is not None] == [
        "blk.0.attn_q.weight", "blk.0.attn_q.bias", "blk.0.attn_k.weight", "blk.0.attn_k.bias"]  # fmt: skip


def test_models_whose_heads_are_reordered():
    reordered = set()
    for name in MODELS:
        if name in ("mixtral", "qwen2_moe", "qwen3_moe"):
            continue
        config, shapes = meta(name)
        if any(piece.rows is not None for tensor in outline(config, shapes).tensors for piece in tensor.pieces):
            reordered.add(config["model_type"])
    assert reordered == {"llama", "mistral", "granite", "smollm3"}


def test_only_gains_of_gemma_are_stored_with_their_one(case):
    _, config, _, file = case
    shifted = {tensor.name for tensor in file.tensors if tensor.offset}
    norms = {tensor.name for tensor in file.tensors if tensor.name.endswith("norm.weight")}
    assert shifted == (norms if "gemma" in config["model_type"] else set())
    assert {tensor.offset for tensor in file.tensors} <= {0.0, 1.0}


def test_experts_are_stacked_in_order(tmp_path):
    tensors = saved(MODELS["qwen2_moe"].build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    file = {x.name: x for x in outline(config, {name: tuple(x.shape) for name, x in tensors.items()}).tensors}
    stack = _computed(file["blk.1.ffn_down_exps.weight"], tensors)
    assert stack.shape == (4, 256, 256)
    assert torch.equal(stack[3], tensors["model.layers.1.mlp.experts.3.down_proj.weight"])
    # [1, 256] in the model
    assert file["blk.1.ffn_gate_inp_shexp.weight"].shape == (256,)


def test_tensors_without_a_place_and_places_without_a_tensor():
    config, shapes = meta("qwen3")
    with pytest.raises(UnsupportedError, match="tensor `model.layers.0.mlp.gate_proj.bias` has no place .*`qwen3`"):
        outline(config, shapes | {"model.layers.0.mlp.gate_proj.bias": (512,)})
    del shapes["model.layers.1.self_attn.k_norm.weight"]
    with pytest.raises(UnsupportedError, match="holds no `model.layers.1.self_attn.k_norm.weight`, which `blk"):
        outline(config, shapes)
    config, shapes = meta("llama_biases")
    del shapes["model.layers.1.self_attn.o_proj.bias"]
    with pytest.raises(UnsupportedError, match="o_proj.bias"):
        outline(config, shapes)
    config, shapes = meta("llama")
    del shapes["lm_head.weight"]
    with pytest.raises(UnsupportedError, match="lm_head"):
        outline(config, shapes)


def test_rows_of_the_embedding_decide_about_the_vocabulary():
    config, shapes = meta("llama_tied")
    shapes["model.embed_tokens.weight"] = (VOCABULARY + 64, 256)
    file = outline(config, shapes)
    assert file.fields["llama.vocab_size"] == VOCABULARY + 64
    # a head of another size is no mistake that can be passed over
    config, shapes = meta("llama")
    shapes["lm_head.weight"] = (VOCABULARY + 64, 256)
    with pytest.raises(UnsupportedError, match="`lm_head.weight` is"):
        outline(config, shapes)


def test_a_head_stored_although_it_is_tied_is_passed_over():
    config, shapes = meta("llama_tied")
    file = outline(config, shapes | {"lm_head.weight": (VOCABULARY, 256)})
    assert "output.weight" not in {tensor.name for tensor in file.tensors}


def test_tensors_of_a_file_must_fit_its_keys():
    fields, shapes = stranger("llama_llama3")
    config = config_of(fields, shapes, {"rope_freqs.weight": outline(*meta("llama_llama3")).constants[
        "rope_freqs.weight"]})  # fmt: skip
    assert "rope_freqs.weight" not in model_shapes(config, shapes)
    with pytest.raises(CheckpointError, match="`blk.0.attn_sinks` .*no place in a `llama`"):
        model_shapes(config, shapes | {"blk.0.attn_sinks": (4,)})
    with pytest.raises(CheckpointError, match="`blk.1.ffn_up.weight` is .512, 128.*make it .512, 256."):
        model_shapes(config, shapes | {"blk.1.ffn_up.weight": (512, 128)})
    with pytest.raises(CheckpointError, match="no `blk.1.ffn_up.weight`"):
        model_shapes(config, {name: shape for name, shape in shapes.items() if name != "blk.1.ffn_up.weight"})
    with pytest.raises(CheckpointError, match="no matrix `token_embd.weight`"):
        model_shapes(config, {})


def test_a_vector_may_be_stored_as_a_matrix_of_one_row(tmp_path):
    file = outline(*stored("qwen2_moe", tmp_path))
    shapes = file_shapes(file)
    config = config_of(file.fields, shapes)
    name = "blk.0.ffn_gate_inp_shexp.weight"
    assert shapes[name] == (256,)
    assert model_shapes(config, shapes | {name: (1, 256)}) == model_shapes(config, shapes)
    with pytest.raises(CheckpointError, match=name):
        model_shapes(config, shapes | {name: (2, 256)})


def test_three_models_are_called_llama():
    fields, shapes = stranger()
    assert config_of(fields, shapes)["model_type"] == "llama"
    # Transformers refuses such a Llama; Mistral computes the same
    width = {"llama.embedding_length": 250, "llama.attention.head_count": 4}
    assert config_of(fields | width, shapes)["model_type"] == "mistral"
    mixture = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    assert config_of(fields | mixture, shapes)["architectures"] == ["MixtralForCausalLM"]
