"""Attention of a loaded model in 16 bits, on a CPU that multiplies float32 faster.

torch's fused attention for the CPU multiplies in the dtype of its inputs. On a processor without fast products of
bfloat16 that takes many times longer than float32: of a step of a small model after 500 tokens it is half the time.
Here queries, keys and values are converted first; for a single token two batched products take the place of the fused
kernel, which is made for many: measured on one core, 0.4 ms in place of 2.0 for 512 keys in 8 heads of 128.
"""

from __future__ import annotations

from typing import Any

import torch

from autoround_core.attention import use_attention

_NAME = "autoround_serving"


def serve_in_float32(model: Any) -> None:
    """Let a Transformers model that uses "sdpa" attention use this module's from now on."""
    use_attention(model, _NAME, _attention)


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """What Transformers calls an attention function: [batch, heads, seqlen, dim] to [batch, seqlen, heads, dim]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    if query.device.type == "cpu" and dtype.itemsize == 2:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if query.shape[2] == 1 and not dropout and "position_bias" not in kwargs:
            return one_token(query, key, value, attention_mask, scaling).to(dtype), None
    output, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output.to(dtype), weights


def one_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """softmax(scaling * query key^T + mask) value for the last token, which sees all keys that the mask lets through.

    query [batch, heads, 1, dim]; key, value [batch, key heads, keys, dim], each serving heads / key heads
    neighboring query heads; mask [batch, 1 or heads, 1, keys], true where a key is seen, or added to the scores.
    Returns [batch, 1, heads, dim].
    """
    batch, heads, _, dim = query.shape
    key_heads, keys = key.shape[1:3]
    scaling = dim**-0.5 if scaling is None else scaling
    stacked = (query * scaling).reshape(batch * key_heads, -1, dim)
    scores = torch.bmm(stacked, key.reshape(-1, keys, dim).transpose(1, 2))
    if mask is not None:
        mask = mask[..., :keys].expand(batch, heads, 1, keys).reshape(scores.shape)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    seen = torch.bmm(torch.softmax(scores, -1), value.reshape(-1, keys, value.shape[-1]))
    return seen.view(batch, 1, heads, -1)
