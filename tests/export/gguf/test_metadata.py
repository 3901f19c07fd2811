"""Metadata of GGUF files: what is stated, what is refused, and what strangers may say."""

from __future__ import annotations

import math
import random

import pytest
import torch
import transformers

from autoround_core import CheckpointError, ModelError, UnsupportedError
from autoround_export.gguf.architectures import config_of, model_shapes, outline
from export.gguf.architecture_models import MODELS, VOCABULARY, fields_after, meta, stored, stranger

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {
            "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 256,
            "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.attention.key_length": 64,
            "llama.attention.value_length": 64, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 64,
            "llama.vocab_size": VOCABULARY, "general.architecture": "llama", "general.type": "model",
        }),
        ("llama_linear", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ("llama_yarn", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                        "llama.rope.scaling.original_context_length": 128}),
        # 1 + 0.1 ln(4) is what llama.cpp multiplies by in any case
        ("llama_yarn_loud", {"llama.rope.scaling.attn_factor": pytest.approx(1.25 / (1 + 0.1 * math.log(4)))}),
        ("qwen3", {"qwen3.attention.key_length": 128, "qwen3.rope.dimension_count": 128}),
        ("qwen2_moe", {"qwen2moe.expert_feed_forward_length": 256, "qwen2moe.expert_shared_feed_forward_length": 512,
                       "qwen2moe.expert_count": 4, "qwen2moe.expert_used_count": 2}),
        ("mixtral", {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.feed_forward_length": 512}),
        ("gemma2", {"gemma2.attention.sliding_window": 16, "gemma2.attn_logit_softcapping": 50.0,
                    "gemma2.final_logit_softcapping": 30.0}),
        ("gemma3_scaled", {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 5000.0,
                           "gemma3.rope.scaling.factor": 8.0, "gemma3.final_logit_softcapping": 30.0}),
        ("phi3", {"phi3.attention.sliding_window": 0, "phi3.rope.dimension_count": 64}),
        ("phi3_partial", {"phi3.rope.dimension_count": 48}),
        ("granite", {"granite.attention.scale": 0.1, "granite.embedding_scale": 6.0,
                     "granite.residual_scale": 0.4, "granite.logit_scale": 2.0}),
        ("starcoder2", {"starcoder2.attention.layer_norm_epsilon": 1e-5}),
        ("glm4", {"glm4.rope.dimension_count": 32}),
        ("cohere2", {"cohere2.logit_scale": 0.25, "cohere2.attention.sliding_window": 16}),
    ],
)  # fmt: skip
def test_fields(tmp_path, name, expected):
    fields = outline(*stored(name, tmp_path)).fields
    assert {key: fields.get(key) for key in expected} == expected
    for key, value in expected.items():
        assert isinstance(value, type(pytest.approx(1.0))) or type(fields[key]) is type(value)


def test_whole_numbers_become_floats_where_the_file_has_floats():
    fields = fields_after("granite", logits_scaling=8)
    assert type(fields["granite.logit_scale"]) is float and fields["granite.logit_scale"] == 8.0


def test_what_a_file_leaves_out_is_the_default_of_the_class():
    """config.json of Gemma 3 states five numbers."""
    config = dict(model_type="gemma3_text", hidden_size=256, intermediate_size=512, num_hidden_layers=1,
                  sliding_window=16, vocab_size=64)  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**config))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name != "lm_head.weight"}
    fields = outline(config, shapes).fields
    assert fields["gemma3.attention.head_count_kv"] == 4 and fields["gemma3.attention.key_length"] == 256


@pytest.mark.parametrize("name", ["mistral", "phi3", "starcoder2"])
def test_context_ends_where_a_window_that_llama_cpp_lacks_begins_to_matter(name):
    arch = fields_after(name)["general.architecture"]
    assert fields_after(name, sliding_window=48)[f"{arch}.context_length"] == 48
    assert fields_after(name, sliding_window=4096)[f"{arch}.context_length"] == 512
    assert fields_after(name, sliding_window=None)[f"{arch}.context_length"] == 512


def test_a_window_that_no_block_uses_does_not_limit_the_context():
    assert fields_after("qwen2", sliding_window=48)["qwen2.context_length"] == 512
    window = dict(sliding_window=48, use_sliding_window=True, layer_types=None)
    assert fields_after("qwen2", **window, max_window_layers=1)["qwen2.context_length"] == 48
    assert fields_after("qwen2", **window, max_window_layers=2)["qwen2.context_length"] == 512
    assert fields_after("gemma2")["gemma2.context_length"] == 512


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"model_type": "gpt2"}, "`gpt2` cannot be stored as GGUF .*LLAMA_CPP_ROOT"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = `silu`, the model has `gelu`"),
        ("llama", {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}},
         "`dynamic`.*possible: default"),
        ("qwen2", {"rope_parameters": MODELS["llama_llama3"].options["rope_parameters"]}, "`llama3` cannot"),
        ("llama", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}, "turns whole heads"),
        ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": "x"}}, "`factor` .*above 0, not `x`"),
        ("llama_yarn", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
         "`beta_fast` = 32, the model has 16"),
        ("llama_yarn", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "truncate": False}},
         "`truncate` = True"),
        ("llama_longrope", {"rope_parameters": {**_ROPE, "rope_type": "longrope", "short_factor": [1.0] * 3,
                                                "long_factor": [1.0] * 3}}, "`long_factor` .*list of 32 numbers"),
        ("qwen2", {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": _ROPE}}, "alike"),
        ("qwen3", {"attention_bias": True}, "attention_bias = `False`"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar = `64`, the model has `32`"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": None}, "needs `attn_logit_softcapping` .*not `None`"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"]}, "layer_types"),
        ("gemma3_scaled", {"rope_parameters": {
            "full_attention": _ROPE, "sliding_attention": {**_ROPE, "rope_type": "linear", "factor": 2.0}}},
         "`sliding_attention` says `linear`"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        ("cohere2", {"sliding_window": None}, "sliding_window"),
        ("starcoder2", {"use_bias": False}, "use_bias = `True`"),
        ("qwen2", {"head_dim": 32}, "head_dim = 32"),
        ("olmo2", {"tie_word_embeddings": True}, "an lm_head of its own"),
        ("gemma2", {"vocab_size": 8, "intermediate_size": 768}, "`model.layers.0.mlp.gate_proj.weight` is .512, 256."),
    ],
)  # fmt: skip
def test_refused(name, changes, words):
    config, shapes = meta(name)
    with pytest.raises(UnsupportedError, match=words) as error:
        outline({**config, **changes}, shapes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = `True`"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = `False`"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
)
def test_refused_mixtures(tmp_path, name, changes, words):
    config, shapes = stored(name, tmp_path)
    with pytest.raises(UnsupportedError, match=words):
        outline({**config, **changes}, shapes)


def test_a_configuration_that_makes_no_sense_is_an_error_of_the_model():
    config, shapes = meta("llama")
    with pytest.raises(ModelError, match="`llama` model cannot be read") as error:
        outline({**config, "num_attention_heads": 3}, shapes)
    assert "\n" not in str(error.value)


def test_files_of_strangers_say_less():
    fields, shapes = stranger()
    for key in ("attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count",
                "rope.freq_base", "attention.head_count_kv"):  # fmt: skip
        del fields[f"llama.{key}"]
    fields["llama.attention.head_count"] = [4, 4]
    config = config_of(fields, shapes)
    assert config["head_dim"] == 64 and config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["bos_token_id"] is None


def test_ids_of_special_tokens_come_along():
    fields, shapes = stranger()
    config = config_of(fields | {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 7}, shapes)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, None, 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "mamba"}, "`mamba` cannot be read .known: cohere2"),
        ({"general.architecture": None}, "cannot be read"),
        ({"llama.block_count": None}, "`llama.block_count` as one number"),
        ({"llama.block_count": 2**31}, "blocks of 0 experts, and has"),
        ({"llama.block_count": 0}, "one number that makes sense"),
        ({"llama.expert_count": 2**31, "llama.expert_used_count": 1}, "experts, and has"),
        ({"llama.attention.head_count": True}, "head_count"),
        ({"llama.attention.head_count": [4, 2]}, "`llama.attention.head_count` as one number"),
        ({"llama.embedding_length": 256.5}, "embedding_length"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon"),
        ({"llama.attention.key_length": "64"}, "key_length"),
        ({"llama.attention.value_length": 32}, "values of 32 numbers"),
        ({"llama.rope.dimension_count": 32}, "whole heads of 64"),
        ({"llama.rope.freq_base": -1.0}, "freq_base"),
        ({"llama.rope.scaling.type": "magic"}, "`magic` is unknown"),
        ({"llama.rope.scaling.type": "longrope"}, "holds no `rope_factors_long.weight`"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "cosines and sines by 2.0"),
    ],
)
def test_files_that_cannot_be_meant(changes, words):
    fields, shapes = stranger()
    fields |= changes
    with pytest.raises(CheckpointError, match=words) as error:
        config_of({key: value for key, value in fields.items() if value is not None}, shapes)
    assert "\n" not in str(error.value)


def test_windows_in_another_order_are_refused():
    fields, shapes = stranger("gemma3")
    usual = [True] * 5 + [False, True]
    assert config_of(fields | {"gemma3.attention.sliding_window_pattern": usual}, shapes)
    assert config_of(fields | {"gemma3.attention.sliding_window_pattern": 6}, shapes)
    for pattern in ([True] * 7, 2, "6"):
        with pytest.raises(CheckpointError, match="unusual order"):
            config_of(fields | {"gemma3.attention.sliding_window_pattern": pattern}, shapes)


def test_nothing_that_a_file_may_say_is_a_crash():
    """Keys taken away or filled with nonsense, tensors of other shapes: a configuration, or one line."""
    junk = [None, 0, 1, -1, 3, 64, 256, 2**31, 2**63, 0.0, 1.5, math.nan, math.inf, 1e300, "", "yarn", "none", True,
            [], [1], [1, 2], [0.5] * 4, ["a"]]  # fmt: skip
    more = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear",
            "rope.freq_base_swa", "attention.sliding_window_pattern", "expert_count", "expert_used_count")  # fmt: skip
    files = [stranger(name) for name in ("llama", "phi3_long", "gemma3", "glm4", "cohere2", "starcoder2")]
    generator, refused = random.Random(0), 0
    for _ in range(1000):
        fields, shapes = map(dict, generator.choice(files))
        constants = {name: torch.rand(shapes[name]) for name in shapes if name.startswith("rope_f")}
        keys = [*fields, *(f"{fields['general.architecture']}.{name}" for name in more)]
        for key in generator.sample(keys, 2):
            fields[key] = generator.choice(junk)
        if generator.random() < 0.3:
            shapes[generator.choice(list(shapes))] = generator.choice([(), (1,), (0, 0), (512, 256), (2, 3, 4)])
        try:
            model_shapes(config_of(fields, shapes, constants), shapes)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 500 < refused < 1000
