"""What llama.cpp calls the parts of each model, as data: one row for each model_type.

A row says four things. Where each tensor goes (`outer`, `block`), which numbers of the configuration the file states
(`keys`), what llama.cpp does not read but computes with regardless (`fixed`: a model that wants something else
cannot be stored), and which kinds of rotary embedding it knows. Everything is read in both directions: from a model
to a file, and from a stranger's file to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ALWAYS = "always"
REQUIRED = "required"
OMITTED = "omitted"


@dataclass(frozen=True, slots=True)
class Slot:
    """One module of the model and its name in the file.

    hf, gguf: names without `.weight`, below `model.layers.{i}.` and `blk.{i}.` for parts of a block; {x} = expert.
    shape: of the weight, in the sizes of `metadata.sizes`. bias: the switch of the configuration that gives the
    module a bias, or ALWAYS; empty = never. heads: the number of heads whose rows are reordered where the
    architecture does that. gain: a norm, whose weight some models store without the 1. vector: stored [1, n] by the
    model, [n] in the file.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    bias: str = ""
    heads: str = ""
    gain: bool = False
    vector: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """A number that config.json and file both state. none: what the file says where the model says None."""

    hf: str
    gguf: str
    kind: type[int] | type[float]
    none: int | str = REQUIRED


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table.

    arch: general.architecture. model_class: in Transformers. fixed: {key of config.json: what llama.cpp computes
    with, as a function of the configuration}. rope: kinds of scaling. permuted: rows of q and k are reordered, from
    halves of a head to pairs. offset: added to gains. square: llama.cpp expects heads * head_dim = hidden_size. tied:
    whether lm_head may be, or must be, the embedding. partial: rotary embeddings may turn a part of each head.
    window: which blocks use `sliding_window` in Transformers: none, "all", or as "layers" says. windowed: llama.cpp
    does the same. local_rope: blocks with a window have a rotary base of their own.
    """

    arch: str
    model_class: str
    outer: tuple[Slot, ...]
    block: tuple[Slot, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    permuted: bool = False
    offset: float = 0.0
    square: bool = False
    tied: tuple[bool, ...] = (True, False)
    partial: bool = False
    window: str = ""
    windowed: bool = False
    local_rope: bool = False


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _just(value: Any) -> Callable[[Mapping[str, Any]], Any]:
    return lambda _: value


def _every(step: int, others: Any, nth: Any) -> Callable[[Mapping[str, Any]], Any]:
    """A list over the blocks in which every `step`-th is `nth`."""
    return lambda config: [others if (i + 1) % step else nth for i in range(config["num_hidden_layers"])]


def _windows(step: int, needed: bool = True) -> Callable[[Mapping[str, Any]], Any]:
    """Every `step`-th block sees everything; where a window is not needed and there is none, all do."""
    return lambda config: _every(step if needed or config.get("sliding_window") else 1, _LOCAL, _GLOBAL)(config)


def _gemma_scale(layers_of_27b: int) -> Callable[[Mapping[str, Any]], Any]:
    """llama.cpp knows Gemma 27B, whose attention is scaled differently, by its number of blocks."""
    return lambda config: (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == layers_of_27b
        else head_dim(config)
    )


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_SILU = {"hidden_act": _just("silu")}
_LLAMA_ROPE = ("default", "linear", "yarn", "llama3", "longrope")

_EMBEDDING = Slot("model.embed_tokens", "token_embd", ("vocabulary", "hidden"))
_FINAL_NORM = Slot("model.norm", "output_norm", ("hidden",), gain=True)
_HEAD = Slot("lm_head", "output", ("vocabulary", "hidden"))
_OUTER = (_EMBEDDING, _FINAL_NORM, _HEAD)
_OUTER_TIED = (_EMBEDDING, _FINAL_NORM)

_NORMS = (
    Slot("input_layernorm", "attn_norm", ("hidden",), gain=True),
    Slot("post_attention_layernorm", "ffn_norm", ("hidden",), gain=True),
)
_HEAD_NORMS = (
    Slot("self_attn.q_norm", "attn_q_norm", ("head",), gain=True),
    Slot("self_attn.k_norm", "attn_k_norm", ("head",), gain=True),
)
_SANDWICH = (
    Slot("input_layernorm", "attn_norm", ("hidden",), gain=True),
    Slot("post_attention_layernorm", "post_attention_norm", ("hidden",), gain=True),
    Slot("pre_feedforward_layernorm", "ffn_norm", ("hidden",), gain=True),
    Slot("post_feedforward_layernorm", "post_ffw_norm", ("hidden",), gain=True),
)


def _attention(qkv_bias: str = "", output_bias: str = "") -> tuple[Slot, ...]:
    return (
        Slot("self_attn.q_proj", "attn_q", ("queries", "hidden"), qkv_bias, heads="num_attention_heads"),
        Slot("self_attn.k_proj", "attn_k", ("keys", "hidden"), qkv_bias, heads="num_key_value_heads"),
        Slot("self_attn.v_proj", "attn_v", ("keys", "hidden"), qkv_bias),
        Slot("self_attn.o_proj", "attn_output", ("hidden", "queries"), output_bias),
    )


def _mlp(bias: str = "", module: str = "mlp", suffix: str = "", width: str = "ffn") -> tuple[Slot, ...]:
    return (
        Slot(f"{module}.gate_proj", f"ffn_gate{suffix}", (width, "hidden"), bias),
        Slot(f"{module}.up_proj", f"ffn_up{suffix}", (width, "hidden"), bias),
        Slot(f"{module}.down_proj", f"ffn_down{suffix}", ("hidden", width), bias),
    )


_JOINED_MLP = (
    Slot("mlp.gate_up_proj", "ffn_up", ("gate_up", "hidden")),
    Slot("mlp.down_proj", "ffn_down", ("hidden", "ffn")),
)
_ROUTER = Slot("mlp.gate", "ffn_gate_inp", ("experts", "hidden"))
_QWEN_EXPERTS = (_ROUTER, *_mlp(module="mlp.experts.{x}", suffix="_exps", width="expert"))
_MIXTRAL_EXPERTS = (
    Slot("block_sparse_moe.gate", "ffn_gate_inp", ("experts", "hidden")),
    Slot("block_sparse_moe.experts.{x}.w1", "ffn_gate_exps", ("ffn", "hidden")),
    Slot("block_sparse_moe.experts.{x}.w2", "ffn_down_exps", ("hidden", "ffn")),
    Slot("block_sparse_moe.experts.{x}.w3", "ffn_up_exps", ("ffn", "hidden")),
)
_SHARED_EXPERT = (
    *_mlp(module="mlp.shared_expert", suffix="_shexp", width="shared"),
    Slot("mlp.shared_expert_gate", "ffn_gate_inp_shexp", ("one", "hidden"), vector=True),
)

_SIZES = (
    Key("num_hidden_layers", "block_count", int),
    Key("hidden_size", "embedding_length", int),
    Key("intermediate_size", "feed_forward_length", int),
    Key("num_attention_heads", "attention.head_count", int),
    Key("num_key_value_heads", "attention.head_count_kv", int),
)
_KEYS = (*_SIZES, Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float))
_ROUTED = (
    Key("num_experts", "expert_count", int),
    Key("num_experts_per_tok", "expert_used_count", int),
    Key("moe_intermediate_size", "expert_feed_forward_length", int),
)
_WINDOW = Key("sliding_window", "attention.sliding_window", int)

_BLOCK = (*_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp("mlp_bias"))
_PLAIN = (*_NORMS, *_attention(), *_mlp())
_SPARSE = {"decoder_sparse_step": _just(1), "mlp_only_layers": _just([])}
_GEMMA = {
    "hidden_activation": _just("gelu_pytorch_tanh"),
    "attention_bias": _just(False),
    "use_bidirectional_attention": _just(False),
}

TABLE: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _OUTER, _BLOCK, _KEYS, _SILU, rope=_LLAMA_ROPE, permuted=True
    ),
    "mistral": Architecture(
        "llama", "MistralForCausalLM", _OUTER, _PLAIN, _KEYS, _SILU, rope=_LLAMA_ROPE, permuted=True, window="all"
    ),
    "mixtral": Architecture(
        "llama", "MixtralForCausalLM", _OUTER, (*_NORMS, *_attention(), *_MIXTRAL_EXPERTS),
        (*_KEYS, Key("num_local_experts", "expert_count", int), _ROUTED[1]),
        _SILU, rope=_LLAMA_ROPE, permuted=True, window="all",
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", _OUTER, (*_NORMS, *_attention(ALWAYS), *_mlp()), _KEYS, _SILU,
        square=True, window="layers",
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", _OUTER, (*_PLAIN, *_HEAD_NORMS), _KEYS,
        {**_SILU, "attention_bias": _just(False)}, window="layers",
    ),
    "qwen2_moe": Architecture(
        "qwen2moe", "Qwen2MoeForCausalLM", _OUTER,
        (*_NORMS, *_attention("qkv_bias"), *_QWEN_EXPERTS, *_SHARED_EXPERT),
        (*_KEYS, *_ROUTED, Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length", int)),
        {**_SILU, **_SPARSE, "norm_topk_prob": _just(False)}, square=True, tied=(False,), window="layers",
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", "Qwen3MoeForCausalLM", _OUTER, (*_NORMS, *_attention(), *_HEAD_NORMS, *_QWEN_EXPERTS),
        (*_KEYS, *_ROUTED),
        {**_SILU, **_SPARSE, "norm_topk_prob": _just(True), "attention_bias": _just(False)}, window="all",
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _OUTER_TIED, (*_SANDWICH, *_attention(), *_mlp()),
        (*_KEYS, _WINDOW, Key("attn_logit_softcapping", "attn_logit_softcapping", float),
         Key("final_logit_softcapping", "final_logit_softcapping", float)),
        {**_GEMMA, "layer_types": _windows(2), "query_pre_attn_scalar": _gemma_scale(46)},
        rope=("default", "linear"), offset=1.0, tied=(True,), window="layers", windowed=True,
    ),
    "gemma3_text": Architecture(
        "gemma3", "Gemma3ForCausalLM", _OUTER, (*_SANDWICH, *_attention(), *_HEAD_NORMS, *_mlp()),
        (*_KEYS, Key("sliding_window", "attention.sliding_window", int, OMITTED),
         Key("final_logit_softcapping", "final_logit_softcapping", float, OMITTED)),
        {**_GEMMA, "layer_types": _windows(6, needed=False), "query_pre_attn_scalar": _gemma_scale(62),
         "attn_logit_softcapping": _just(None)},
        rope=("default", "linear"), offset=1.0, window="layers", windowed=True, local_rope=True,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", _OUTER,
        (*_NORMS, Slot("self_attn.qkv_proj", "attn_qkv", ("qkv", "hidden")), _attention()[3], *_JOINED_MLP),
        # old versions of llama.cpp insist on this key, new ones ignore the window
        (*_KEYS, Key("sliding_window", "attention.sliding_window", int, 0)),
        _SILU, rope=("default", "longrope"), square=True, partial=True, window="all",
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", _OUTER, _BLOCK,
        (*_KEYS, Key("attention_multiplier", "attention.scale", float),
         Key("embedding_multiplier", "embedding_scale", float),
         Key("residual_multiplier", "residual_scale", float), Key("logits_scaling", "logit_scale", float)),
        _SILU, rope=_LLAMA_ROPE, permuted=True,
    ),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM", _OUTER,
        (*_SANDWICH[1::2], *_attention(), Slot("self_attn.q_norm", "attn_q_norm", ("queries",), gain=True),
         Slot("self_attn.k_norm", "attn_k_norm", ("keys",), gain=True), *_mlp()),
        _KEYS, {**_SILU, "attention_bias": _just(False)}, square=True, tied=(False,),
    ),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", _OUTER, _PLAIN, _KEYS,
        {**_SILU, "attention_bias": _just(False), "mlp_bias": _just(False), "no_rope_layers": _every(4, 1, 0)},
        permuted=True, window="layers",
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM",
        (_EMBEDDING, Slot("model.norm", "output_norm", ("hidden",), ALWAYS, gain=True), _HEAD),
        (*(Slot(norm.hf, norm.gguf, norm.shape, ALWAYS, gain=True) for norm in _NORMS),
         *_attention("use_bias", "use_bias"), Slot("mlp.c_fc", "ffn_up", ("ffn", "hidden"), "use_bias"),
         Slot("mlp.c_proj", "ffn_down", ("hidden", "ffn"), "use_bias")),
        (*_SIZES, Key("norm_epsilon", "attention.layer_norm_epsilon", float)),
        {"hidden_act": _just("gelu_pytorch_tanh"), "use_bias": _just(True)}, square=True, window="all",
    ),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM", _OUTER,
        (*_NORMS, *_attention("attention_bias"), *_JOINED_MLP,
         Slot("post_self_attn_layernorm", "post_attention_norm", ("hidden",), gain=True),
         Slot("post_mlp_layernorm", "post_ffw_norm", ("hidden",), gain=True)),
        _KEYS, _SILU, partial=True,
    ),
    "cohere2": Architecture(
        "cohere2", "Cohere2ForCausalLM", _OUTER_TIED,
        (_NORMS[0], *_attention(), *_mlp()),
        (*_SIZES, Key("layer_norm_eps", "attention.layer_norm_epsilon", float), _WINDOW,
         Key("logit_scale", "logit_scale", float)),
        {**_SILU, "attention_bias": _just(False), "layer_types": _windows(4)},
        rope=("default",), square=True, tied=(True,), window="layers", windowed=True,
    ),
}  # fmt: skip
