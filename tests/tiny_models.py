"""Tiny decoders with random weights, one for each way in which Transformers builds a block.

Every width is a multiple of 32, so that formats can store each layer in groups of 32. Gains and biases are
not at their trivial start, so that a test notices when one is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 128
WIDTH = 64

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_USUAL = dict(
    _COMMON, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)
_GROUPED = dict(_USUAL, num_key_value_heads=2)
_SLIDING = dict(_GROUPED, num_hidden_layers=3, head_dim=16, sliding_window=4,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"])


@dataclass(frozen=True)
class Tiny:
    """One model. layers: linear layers in all blocks. kept: matrices in blocks that must stay in 16 bits."""

    config: str
    options: dict[str, Any]
    layers: int
    kept: tuple[str, ...] = ()
    tied: bool = False
    batchable: bool = True

    def build(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> torch.nn.Module:
        """The model. changes: of its configuration."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # of one size everywhere: with the usual 0.02 blocks of so small a model would change nothing
                shift = 0.2 * torch.randn(parameter.shape)
                parameter.add_(shift) if parameter.dim() < 2 else parameter.copy_(shift)
        return model.to(dtype).eval()


def _routers(blocks: range, name: str = "mlp.gate") -> tuple[str, ...]:
    return tuple(f"model.layers.{i}.{name}" for i in blocks)


_FALCON = dict(_COMMON, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=96)
_GPT = dict(_COMMON, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
_EXPERTS = dict(_GROUPED, num_experts_per_tok=2)

MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", _GROUPED, 14),
    "qwen2": Tiny("Qwen2Config", _GROUPED, 14),
    "qwen3": Tiny("Qwen3Config", dict(_GROUPED, head_dim=16, tie_word_embeddings=True), 14, tied=True),
    "mistral": Tiny("MistralConfig", dict(_GROUPED, sliding_window=8), 14),
    "gemma2": Tiny("Gemma2Config", dict(_SLIDING, query_pre_attn_scalar=16), 21, tied=True),
    "gemma3": Tiny("Gemma3TextConfig", dict(_SLIDING, query_pre_attn_scalar=16), 21, tied=True),
    "phi3": Tiny("Phi3Config", _GROUPED, 8),
    "opt": Tiny("OPTConfig", dict(_USUAL, word_embed_proj_dim=WIDTH, ffn_dim=96), 12, tied=True),
    "gpt_neox": Tiny("GPTNeoXConfig", _USUAL, 8),
    "falcon": Tiny("FalconConfig", _FALCON, 8, tied=True),
    "falcon_alibi": Tiny("FalconConfig", dict(_FALCON, alibi=True, multi_query=False, bias=True,
                                                  parallel_attn=False), 8, tied=True),
    # ALiBi as [batch * heads, 1, tokens], made for the batch that the model was given
    "bloom": Tiny("BloomConfig", dict(_COMMON, hidden_size=WIDTH, n_layer=2, n_head=4), 8,
                  tied=True, batchable=False),
    "olmo2": Tiny("Olmo2Config", _GROUPED, 14),
    "starcoder2": Tiny("Starcoder2Config", dict(_GROUPED, use_bias=True), 12, tied=True),
    "gpt2": Tiny("GPT2Config", dict(_GPT, n_inner=96), 8, tied=True),
    # returns its states in a list
    "openai-gpt": Tiny("OpenAIGPTConfig", _GPT, 8, tied=True),
    "mixtral": Tiny("MixtralConfig", dict(_EXPERTS, num_local_experts=4), 2 * (4 + 4 * 3),
                    _routers(range(2), "block_sparse_moe.gate")),
    "qwen3_moe": Tiny("Qwen3MoeConfig", dict(_EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=32),
                      2 * (4 + 4 * 3), _routers(range(2))),
    # a first block without experts; experts that all tokens share; attention through low-rank matrices
    "deepseek_v3": Tiny(
        "DeepseekV3Config",
        dict(_EXPERTS, num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=32,
             n_routed_experts=4, first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1,
             q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16),
        3 * 5 + 3 + 2 * (4 * 3 + 3), _routers(range(1, 3)),
    ),
    # later blocks use the keys and values of earlier ones, and each is given something of its own per token
    "gemma4": Tiny(
        "Gemma4TextConfig",
        dict(_SLIDING, num_hidden_layers=4, num_kv_shared_layers=2, global_head_dim=16,
             num_global_key_value_heads=2, layer_types=["sliding_attention", "full_attention"] * 2,
             hidden_size_per_layer_input=32, vocab_size_per_layer_input=VOCABULARY),
        32, tied=True,
    ),
    # linear attention, with a convolution that checkpoints store in three pieces
    "olmo_hybrid": Tiny(
        "OlmoHybridConfig",
        dict(_GROUPED, linear_num_key_heads=32, linear_num_value_heads=32, linear_key_head_dim=2,
             linear_value_head_dim=2, layer_types=["linear_attention", "full_attention"]),
        17,
    ),
}
# Transformers stores these experts in one tensor each and names them one by one in a checkpoint
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")


def token_ids(samples: int = 4, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Random token ids [samples, length]."""
    return torch.randint(2, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
