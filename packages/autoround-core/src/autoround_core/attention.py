"""Causal attention for tuning on a CPU.

torch's fused attention for the CPU saves memory by recomputing probabilities, and its backward pass runs far below
the speed of a matrix product. For the short sequences of a tuning run the probabilities fit into memory, so here
they are kept and every product is one batched matrix product: measured on one core, 8 ms in place of 15 for four
samples of 256 tokens. Scores are rounded to the inputs' dtype, which the fused kernel avoids; so this answers only
where a gradient is wanted, of which tuning uses the sign. What is kept of a run (targets, states, errors) comes
from the model's own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "autoround_tuning"
_LONGEST = 1024  # tokens; beyond, the kept probabilities outweigh everything else in a block


def use_attention(model: Any, name: str, function: Callable[..., Any]) -> bool:
    """Let a Transformers model call `function`, under that name, where it uses "sdpa"; whether it does."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return True


@contextmanager
def tuning_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let a Transformers model that uses "sdpa" attention use this module's while the context lasts."""
    if not use_attention(model, _NAME, _attention):
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """What Transformers calls an attention function: [batch, heads, seqlen, dim] to [batch, seqlen, heads, dim]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = torch.is_grad_enabled() and attention_mask is None and causal and not dropout
    if not plain or query.shape[2] != key.shape[2] or query.shape[2] > _LONGEST or "position_bias" in kwargs:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return CausalAttention.apply(query, key, value, scaling).transpose(1, 2).contiguous(), None


class CausalAttention(torch.autograd.Function):
    """softmax(scaling * query key^T + causal mask) value, in the dtype of the inputs.

    query [batch, heads, seqlen, dim]; key, value [batch, key heads, seqlen, dim], each serving heads / key heads
    neighboring query heads. Those are laid end to end along seqlen: keys are not copied, products are larger.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        batch, heads, seqlen, dim = query.shape
        key_heads = key.shape[1]
        stacked = (query * scaling).reshape(batch, key_heads, -1, dim)
        scores = torch.matmul(stacked, key.transpose(-1, -2))
        future = scores.new_full((seqlen, seqlen), float("-inf")).triu_(1)
        scores.view(batch, key_heads, -1, seqlen, seqlen).add_(future)
        probabilities = torch.softmax(scores, -1, dtype=scores.dtype)
        output = torch.matmul(probabilities, value)
        ctx.save_for_backward(stacked, key, value, probabilities, output)
        ctx.scaling = scaling
        return output.view(batch, heads, seqlen, -1)

    @staticmethod
    def backward(ctx, gradient):
        stacked, key, value, probabilities, output = ctx.saved_tensors
        gradient = gradient.reshape(output.shape)
        d_value = torch.matmul(probabilities.transpose(-1, -2), gradient)
        # the softmax takes off each row's mean slope, which is the slope along the row's output
        slope = (gradient * output).sum(-1, keepdim=True)
        d_scores = torch.matmul(gradient, value.transpose(-1, -2)).sub_(slope).mul_(probabilities)
        d_query = torch.matmul(d_scores, key).mul_(ctx.scaling).view(gradient.shape[0], -1, key.shape[2], key.shape[3])
        return d_query, torch.matmul(d_scores.transpose(-1, -2), stacked), d_value, None
