"""Attention in float32 against float64 by the book, with and without masks, and where it is used."""

from __future__ import annotations

import pytest
import torch
import transformers

from autoround_core.serving_attention import _NAME, one_token, serve_in_float32

GENERATOR = torch.Generator().manual_seed(0)


def by_the_book(query, key, value, seen, scaling):
    """float64, head by head."""
    batch, heads, _, _ = query.shape
    shared = heads // key.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            scores = (query[b, h, 0].double() * key[b, h // shared].double()).sum(-1) * scaling
            weights = torch.softmax(scores.masked_fill(~seen[b], float("-inf")), -1)
            rows.append((weights[:, None] * value[b, h // shared].double()).sum(0))
    return torch.stack(rows).view(batch, 1, heads, -1)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_one_token(heads, key_heads, kind):
    batch, keys, dim = 3, 7, 16
    query = torch.randn(batch, heads, 1, dim, generator=GENERATOR)
    key, value = (torch.randn(batch, key_heads, keys, dim, generator=GENERATOR) for _ in range(2))
    seen = torch.ones(batch, keys, dtype=torch.bool)
    mask = None
    if kind != "none":
        seen[1, :3] = False  # padded on the left
        mask = seen[:, None, None]
        mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for scaling in (None, 0.1):
        output = one_token(query, key, value, mask, scaling)
        wanted = by_the_book(query, key, value, seen, dim**-0.5 if scaling is None else scaling)
        torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-6)


def make_model(dtype):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48,
    )
    return transformers.Qwen3ForCausalLM(config).to(dtype).eval()


def test_a_model_gives_what_float32_gives_and_not_what_bfloat16_does():
    """Prompt and single steps, a batch with padding."""
    plain, served = make_model(torch.bfloat16), make_model(torch.bfloat16)
    serve_in_float32(served)
    assert served.config._attn_implementation == _NAME
    ids = torch.randint(64, (2, 9), generator=GENERATOR)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    outputs = {}
    with torch.no_grad():
        for name, model in (("plain", plain), ("served", served)):
            first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
            logits = [first.logits[:, -1]]
            for i in (7, 8):
                step = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1],
                             past_key_values=first.past_key_values, use_cache=True)  # fmt: skip
                logits.append(step.logits[:, -1])
            outputs[name] = torch.stack(logits)
        whole = served(ids, attention_mask=mask).logits[:, 6:].transpose(0, 1)
    assert outputs["served"].dtype == torch.bfloat16
    torch.testing.assert_close(outputs["served"], outputs["plain"], rtol=0.05, atol=0.02)
    torch.testing.assert_close(outputs["served"], whole, rtol=0.05, atol=0.02)


def test_float32_models_are_left_alone():
    model = make_model(torch.float32)
    ids = torch.randint(64, (1, 5), generator=GENERATOR)
    with torch.no_grad():
        before = model(ids).logits
        serve_in_float32(model)
        assert torch.equal(model(ids).logits, before)


def test_a_model_with_other_attention_keeps_it():
    model = make_model(torch.bfloat16)
    model.set_attn_implementation("eager")
    serve_in_float32(model)
    assert model.config._attn_implementation == "eager"
