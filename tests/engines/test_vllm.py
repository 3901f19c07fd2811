"""vLLM on a CPU loads our checkpoints and computes what was meant. Run by `tox -e vllm`."""

from __future__ import annotations

import gc
import os

import pytest

from engine_cases import CHECKPOINTS, token_ids

for _name, _value in {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

vllm = pytest.importorskip("vllm", reason="tox -e vllm")
# nats: bfloat16 against float32 makes 0.05, more where inputs are rounded too, a wrong zero point more than 0.5
MOST = {"FP8": 0.2, "INT8": 0.2}


@pytest.mark.parametrize(("name", "fmt"), CHECKPOINTS)
def test_vllm_computes_what_was_meant(checkpoint, name, fmt):
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    directory, expected = checkpoint(name, fmt)
    ids = token_ids()
    engine = vllm.LLM(model=str(directory), enforce_eager=True, max_model_len=128, max_num_seqs=2, dtype="bfloat16",
                      max_num_batched_tokens=128)
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
        output = engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0]
        found = [output.prompt_logprobs[i + 1][ids[i + 1]].logprob for i in range(len(ids) - 1)]
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= MOST.get(name, 0.08)
