"""Tiny models with random weights, at least one for each row of the table of architectures.

Widths are multiples of 256, so that every type of GGUF fits; the vocabulary is that of the tokenizer in
examples/tiny-qwen3. Gains and biases are not at their trivial start, so that a test notices when one is lost, and
weights are of a size at which attention and logits are spread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from autoround_export.gguf.architectures import outline
from autoround_export.gguf.outline import Outline

VOCABULARY = 4096
_USUAL = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    tie_word_embeddings=False,
)  # fmt: skip
_ROUTED = dict(_USUAL, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=256)
_GEMMA = dict(_USUAL, head_dim=64, query_pre_attn_scalar=64, sliding_window=16, tie_word_embeddings=True)
_SCALES = dict(attention_multiplier=0.1, embedding_multiplier=6.0, residual_multiplier=0.4, logits_scaling=2.0)
_FACTORS = dict(
    rope_type="longrope", rope_theta=10000.0,
    short_factor=[1 + i / 40 for i in range(32)], long_factor=[1 + i / 4 for i in range(32)],
)  # fmt: skip


def _rope(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)
_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_LONG = dict(_FACTORS, original_max_position_embeddings=32)
_SHORT = dict(_FACTORS, original_max_position_embeddings=384)


@dataclass(frozen=True)
class Tiny:
    """One model. config: its class in Transformers."""

    config: str
    options: dict[str, Any]

    def configuration(self) -> transformers.PretrainedConfig:
        return getattr(transformers, self.config)(**self.options)

    def build(self, seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        config = self.configuration()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shift = torch.randn(parameter.shape)
                if parameter.dim() < 2:
                    parameter.add_(0.2 * shift)
                else:
                    parameter.copy_((0.1 if "embed" in name or "lm_head" in name else 0.06) * shift)
        return model.eval()


def saved(model: torch.nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """Save the model and give its tensors by the names that a checkpoint has."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", _USUAL),
    "llama_tied": Tiny("LlamaConfig", dict(_USUAL, tie_word_embeddings=True)),
    "llama_biases": Tiny("LlamaConfig", dict(_USUAL, attention_bias=True, mlp_bias=True)),
    "llama_wide_heads": Tiny("LlamaConfig", dict(_USUAL, head_dim=128)),
    "llama_llama3": Tiny("LlamaConfig", dict(_USUAL, **_LLAMA3)),
    "llama_linear": Tiny("LlamaConfig", dict(_USUAL, **_rope("linear", factor=4.0))),
    "llama_yarn": Tiny("LlamaConfig", dict(_USUAL, **_YARN)),
    "llama_yarn_loud": Tiny("LlamaConfig", dict(_USUAL, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=1.25))),
    "llama_longrope": Tiny("LlamaConfig", dict(_USUAL, rope_parameters=_LONG)),
    "mistral": Tiny("MistralConfig", dict(_USUAL, sliding_window=None, head_dim=128)),
    "mixtral": Tiny("MixtralConfig", dict(_USUAL, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": Tiny("Qwen2Config", _USUAL),
    "qwen3": Tiny("Qwen3Config", dict(_USUAL, head_dim=128)),
    "qwen3_tied_yarn": Tiny("Qwen3Config", dict(_USUAL, head_dim=64, tie_word_embeddings=True, **_YARN)),
    "qwen2_moe": Tiny("Qwen2MoeConfig", dict(_ROUTED, shared_expert_intermediate_size=512, norm_topk_prob=False)),
    "qwen3_moe": Tiny("Qwen3MoeConfig", dict(_ROUTED, head_dim=64, norm_topk_prob=True)),
    "gemma2": Tiny("Gemma2Config", dict(_GEMMA, num_hidden_layers=3)),
    "gemma3": Tiny("Gemma3TextConfig", dict(_GEMMA, num_hidden_layers=7)),
    "gemma3_scaled": Tiny("Gemma3TextConfig", dict(
        _GEMMA, num_hidden_layers=7, final_logit_softcapping=30.0, tie_word_embeddings=False,
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}})),
    "gemma3_global": Tiny("Gemma3TextConfig", dict(_GEMMA, layer_types=["full_attention"] * 2)),
    "phi3": Tiny("Phi3Config", _USUAL),
    "phi3_partial": Tiny("Phi3Config", dict(_USUAL, tie_word_embeddings=True, **_rope(
        "default", partial_rotary_factor=0.75))),
    "phi3_long": Tiny("Phi3Config", dict(
        _USUAL, original_max_position_embeddings=32, rope_parameters=_LONG)),
    "phi3_short": Tiny("Phi3Config", dict(
        _USUAL, original_max_position_embeddings=384, rope_parameters=_SHORT)),
    "granite": Tiny("GraniteConfig", dict(_USUAL, **_SCALES)),
    "granite_biases": Tiny("GraniteConfig", dict(
        _USUAL, **_SCALES, attention_bias=True, mlp_bias=True, **_LLAMA3)),
    "olmo2": Tiny("Olmo2Config", _USUAL),
    "smollm3": Tiny("SmolLM3Config", dict(_USUAL, num_hidden_layers=4, tie_word_embeddings=True)),
    "starcoder2": Tiny("Starcoder2Config", _USUAL),
    "starcoder2_tied": Tiny("Starcoder2Config", dict(_USUAL, tie_word_embeddings=True)),
    "glm4": Tiny("Glm4Config", dict(_USUAL, head_dim=64, attention_bias=True)),
    "glm4_yarn": Tiny("Glm4Config", dict(_USUAL, head_dim=128, attention_bias=False, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=128, partial_rotary_factor=0.5))),
    "cohere2": Tiny("Cohere2Config", dict(
        _USUAL, num_hidden_layers=5, sliding_window=16, logit_scale=0.25, tie_word_embeddings=True)),
}  # fmt: skip


def meta(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(config.json, shapes of the tensors) of a model that is never filled. Experts are in one tensor here."""
    config = MODELS[name].configuration()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return config.to_dict(), shapes


def stored(name: str, directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The same of a checkpoint, where experts are one by one."""
    shapes = {key: tuple(x.shape) for key, x in saved(MODELS[name].build(), directory).items()}
    return json.loads((directory / "config.json").read_text()), shapes


def fields_after(name: str, **changes: Any) -> dict[str, Any]:
    """The fields of the file, after changes of config.json."""
    config, shapes = meta(name)
    return dict(outline({**config, **changes}, shapes).fields)


def stranger(name: str = "llama") -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(fields, shapes) of a file."""
    file = outline(*meta(name))
    return dict(file.fields), file_shapes(file)


def file_shapes(file: Outline) -> dict[str, tuple[int, ...]]:
    constants = {name: tuple(x.shape) for name, x in file.constants.items()}
    return {tensor.name: tensor.shape for tensor in file.tensors} | constants
