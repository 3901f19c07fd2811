"""Checkpoints of the bundled trained model that engines are asked to load, and what they should compute."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

TINY = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
TEXT = "The function returns a list of the names that are defined in this module, sorted by length."
_MIXED = {"down_proj": "W4G32", "layers.1.self_attn.(q|k|v)_proj": 16, "layers.2.mlp.(gate|up)_proj": 16}
_SKIPPED = {"layers.1.self_attn.(q|k|v)_proj": 16, "layers.2.mlp.down_proj": 16}
# name -> (scheme, formats, other options)
CASES = {
    "W4": ("W4G128", "auto_round,auto_gptq,auto_awq,llm_compressor", {}),
    "W4-asym": ("W4G128-asym", "auto_round,auto_awq,llm_compressor", {}),
    "mixed": ("W4G128", "auto_round,auto_gptq,llm_compressor", {"layer_config": _MIXED}),
    "skipped": ("W4G128-asym", "auto_round,auto_awq,llm_compressor", {"layer_config": _SKIPPED}),
    "head": ("W4G128", "auto_round,llm_compressor", {"quant_lm_head": True}),
    "INT8": ("INT8", "llm_compressor", {}),
    "FP8": ("FP8_DYNAMIC", "llm_compressor", {}),
}
CALIBRATION = {"dataset": "stdlib", "nsamples": 8, "seqlen": 64}
# what no engine runs on a CPU, and Transformers emulates
EMULATED = ["FPW8A16", "FP8_STATIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4", "MXFP4A16", "NVFP4A16"]
CHECKPOINTS = [(name, fmt) for name, (_, formats, _) in CASES.items() for fmt in formats.split(",")]


def token_ids() -> list[int]:
    return AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"]


@torch.no_grad()
def logprobs(model) -> list[float]:
    """Of each next token of TEXT."""
    ids = token_ids()
    table = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [table[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
