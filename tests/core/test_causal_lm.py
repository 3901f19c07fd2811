"""The view of a model: blocks, layers and names, against what `save_pretrained` writes."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from autoround_core.adapter import ModelView
from autoround_core.causal_lm import CausalLM
from autoround_core.errors import ModelError, UnsupportedError
from tiny_models import MIXTURES, MODELS, WIDTH, token_ids

ADAPTER = CausalLM()
UNTIED = [name for name, tiny in MODELS.items() if not tiny.tied]


def load(path) -> torch.nn.Module:
    return ADAPTER.load(path, trust_remote_code=False)


def view_of(model: torch.nn.Module) -> ModelView:
    return ADAPTER.view(model)


def build(config_class: str, **options) -> torch.nn.Module:
    """A model that is not among `MODELS`, small enough to be built for one test."""
    defaults = {
        "vocab_size": 128, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None,
    }
    config = getattr(transformers, config_class)(**defaults | options)
    return transformers.AutoModelForCausalLM.from_config(config)


def contents(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


# --- names and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_the_matrices_that_save_pretrained_wrote(saved, name):
    truth, view = contents(saved(name)), view_of(load(saved(name)))
    sites = list(view.sites())
    assert len({site.name for site in sites}) == len(sites) == MODELS[name].layers
    for site in sites:
        stored = truth[f"{site.name}.weight"]
        stored = stored.T if site.transposed else stored
        assert stored.shape == (site.out_features, site.in_features)
        assert torch.equal(site.read(view.parameter(site)), stored)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_block_is_a_layer_or_kept_with_a_reason(saved, name):
    view = view_of(load(saved(name)))
    blocks = tuple(f"{block.name}." for block in view.blocks)
    matrices = {key.removesuffix(".weight") for key, tensor in contents(saved(name)).items()
                if key.startswith(blocks) and tensor.dim() > 1}
    layers = {site.name for site in view.sites()}
    kept = {key for key, reason in view.kept.items() if reason == "decides which experts run"}
    assert kept == set(MODELS[name].kept)
    if name != "olmo_hybrid":  # one convolution in the model, three tensors in the checkpoint
        assert layers | set(view.kept) == matrices
    assert not layers & set(view.kept)


@pytest.mark.parametrize("name", MODELS)
def test_a_skeleton_has_the_view_of_the_model(saved, name):
    skeleton = ADAPTER.skeleton(saved(name), trust_remote_code=False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    real, empty = view_of(load(saved(name))), view_of(skeleton)
    assert list(real.sites()) == list(empty.sites())
    assert (real.head, real.tied_head, real.kept) == (empty.head, empty.tied_head, empty.kept)
    assert [block.name for block in real.blocks] == [block.name for block in empty.blocks]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_quantized_is_stored_as_save_pretrained_stores_it(saved, name):
    rest = list(ADAPTER.rest(view_of(load(saved(name))), set()))
    truth = contents(saved(name))
    assert len(rest) == len(truth)
    assert {key for key, tensor in rest if torch.equal(tensor, truth[key])} == set(truth)


@pytest.mark.parametrize("name", MODELS)
def test_a_filled_skeleton_computes_what_the_model_does(saved, name):
    skeleton = ADAPTER.skeleton(saved(name), trust_remote_code=False)
    assert ADAPTER.fill(view_of(skeleton), contents(saved(name))) == []
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(name), experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(skeleton(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmo_hybrid"])
def test_what_a_checkpoint_lacks_is_named(saved, name):
    tensors = contents(saved(name))
    gone = {"llama": "model.norm.weight", "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
            "olmo_hybrid": "model.layers.0.linear_attn.k_conv1d.weight"}[name]
    del tensors[gone]
    missing = {"llama": gone, "mixtral": "model.layers.1.mlp.experts.gate_up_proj",
               "olmo_hybrid": "model.layers.0.linear_attn.conv1d.weight"}[name]
    assert ADAPTER.fill(view_of(ADAPTER.skeleton(saved(name), trust_remote_code=False)), tensors) == [missing]


def test_a_tensor_of_another_shape_is_an_error(saved):
    tensors = contents(saved("llama")) | {"model.norm.weight": torch.ones(7)}
    message = r"`model\.norm\.weight` must be \(64,\), the checkpoint holds \(7,\)"
    with pytest.raises(ModelError, match=message):
        ADAPTER.fill(view_of(ADAPTER.skeleton(saved("llama"), trust_remote_code=False)), tensors)


# --- lm_head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_a_layer_unless_it_is_the_embedding(saved, name):
    view = view_of(load(saved(name)))
    assert view.tied_head == MODELS[name].tied
    if view.tied_head:
        assert view.head is None
    else:
        assert torch.equal(view.parameter(view.head), contents(saved(name))[f"{view.head.name}.weight"])


# --- what stays in 16 bits ----------------------------------------------------------------------------------

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTERS = {
    "inside a module beside the experts": (
        "AfmoeConfig", MOE | {"num_dense_layers": 1, "num_shared_experts": 1},
        {"model.layers.1.mlp.router.gate"},
    ),
    "a module that holds only a linear": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2},
                                          {"model.layers.0.mlp.gate.wg", "model.layers.1.mlp.gate.wg"}),
    "with a gate of one number": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 32},
                                  {f"model.layers.{i}.mlp.{part}gate" for i in range(2)
                                   for part in ("", "shared_expert_")}),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_are_found_wherever_they_are(kind):
    config, options, expected = ROUTERS[kind]
    view = view_of(build(config, **options))
    assert {name for name, reason in view.kept.items() if reason == "decides which experts run"} == expected
    names = {site.name for site in view.sites()}
    assert not names & expected
    assert not [name for name in names if "shared" in name and name.endswith("gate")]


class ListOfExperts(torch.nn.Module):
    """A mixture as code outside of Transformers writes it."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(WIDTH, 3, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(WIDTH, 96), torch.nn.Linear(96, WIDTH)) for _ in range(3)
        )
        self.shared = torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.Linear(32, WIDTH))


def test_a_router_beside_a_list_of_experts_is_found():
    model = MODELS["llama"].build()
    model.model.layers[1].mlp = ListOfExperts()
    view = view_of(model)
    assert dict(view.kept) == {"model.layers.1.mlp.gate": "decides which experts run"}
    assert {site.name for site in view.blocks[1].sites if "mlp" in site.name} == {
        f"model.layers.1.mlp.{part}.{i}"
        for part in ("experts.0", "experts.1", "experts.2", "shared") for i in (0, 1)
    }


def test_a_weight_that_two_blocks_share_stays_as_it_is():
    model = MODELS["llama"].build()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    view = view_of(model)
    assert dict(view.kept) == {"model.layers.0.mlp.up_proj": "is used by more than one block"}
    assert [len(block.sites) for block in view.blocks] == [6, 6]


def test_what_transformers_keeps_in_float32_is_not_quantized():
    low_rank = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 32}
    view = view_of(build("DeepseekV32Config", num_key_value_heads=4, first_k_dense_replace=2, **low_rank))
    assert dict(view.kept) == {
        f"model.layers.{i}.self_attn.indexer.weights_proj": "is kept in float32 by Transformers"
        for i in range(2)
    }


def test_a_matrix_that_checkpoints_join_with_others_stays_as_it_is():
    view = view_of(build("HrmTextConfig", num_layers_per_stack=1))
    assert {site.name.rpartition(".")[2] for site in view.sites()} == {"o_proj", "down_proj"}
    assert set(view.kept.values()) == {"is stored as a part of another tensor"}


def test_matrices_that_no_linear_layer_holds_are_listed():
    view = view_of(build("MambaConfig", state_size=16, time_step_rank=4))
    reasons = {name.partition("mixer.")[2]: reason for name, reason in view.kept.items()}
    assert reasons == {"conv1d": "a Conv1d is no linear layer", "A_log": "a MambaMixer is no linear layer"}


# --- what is refused ----------------------------------------------------------------------------------------

REFUSED = {
    "no blocks": ("LlamaConfig", {"num_hidden_layers": 0}, "`LlamaForCausalLM` has no list of like blocks"),
    "experts stored as one tensor": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2},
                                     "experts of `model.layers.0.block_sparse_moe.experts` in one tensor"),
    "experts of another layout": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2},
                                  r"`model.layers.0.mlp.experts` are not stored as one \[out, in\] matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantized_is_refused_with_a_sentence(case):
    config, options, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        view_of(build(config, **options))


def test_a_directory_without_a_tokenizer_has_none(saved):
    assert ADAPTER.tokenizer(saved("llama"), trust_remote_code=False) is None


def test_the_experts_of_a_mixture_are_called_as_in_its_checkpoints(saved):
    names = {name: {site.name.rpartition("experts.0.")[2] for site in view_of(load(saved(name))).sites()
                    if "experts.0." in site.name} for name in MIXTURES}
    usual = {"gate_proj", "up_proj", "down_proj"}
    assert names == {"mixtral": {"w1", "w2", "w3"}, "qwen3_moe": usual, "deepseek_v3": usual}
