"""What is timed, what is counted, and what a process of its own brings back."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from autoround_core import AutoRound, NonFiniteError, UnsupportedError, UsageError, load, speed
from autoround_core.compute import find_device
from autoround_core.loading import find_format, spec_of
from autoround_core.registry import get_registry
from autoround_core.shards import read_json
from autoround_core.speed import Trial, apart, best_and_spread, measure, read_bandwidth, run_once, step_bytes
from tiny_models import MODELS, VOCABULARY, WIDTH

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
SHORT = dict(prompt_tokens=8, new_tokens=2, repeats=2)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(model directory, **options of AutoRound) -> its checkpoint."""

    def make(model: Path, format: str = "auto_round", **options) -> Path:
        output = tmp_path_factory.mktemp("speed") / "out"
        AutoRound(model, recipe="rtn", **options).quantize_and_save(output, format=format)
        return output

    return make


def counted(path: Path) -> int:
    """`step_bytes` of a checkpoint."""
    found = find_format(path)
    with found.home(path) as home:
        adapter = get_registry().adapter(read_json(home / "config.json"))
        view = adapter.view(adapter.skeleton(home, trust_remote_code=False, dtype=found.dtype))
    return step_bytes(view, [spec_of(layer) for layer in found.read(path).layers()])


# --- the bytes of a step -----------------------------------------------------------------------------------


def test_a_tied_model_reads_all_that_it_stores():
    assert counted(TINY) == sum(tensor.nbytes for tensor in load_file(TINY / "model.safetensors").values())


def test_of_an_embedding_one_row_is_read(saved):
    path = saved("llama")
    tensors = load_file(path / "model.safetensors")
    assert counted(path) == sum(t.nbytes for name, t in tensors.items() if name != "model.embed_tokens.weight")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_are_looked_up_too(saved, name):
    path = saved(name)
    tensors = load_file(path / "model.safetensors")
    lookups = ("wpe.weight", "embed_positions.weight")
    assert counted(path) == sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(lookups))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_of_four_experts_a_token_needs_two(saved, name):
    path = saved(name)
    total = 0
    for tensor_name, tensor in load_file(path / "model.safetensors").items():
        if tensor_name != "model.embed_tokens.weight":
            # routers correct their choice by buffers, which are no weights
            size = 0 if "correction_bias" in tensor_name else tensor.nbytes
            total += size // (2 if ".experts." in tensor_name else 1)
    assert counted(path) == total


@pytest.mark.parametrize(("sym", "zero_point"), [(True, 0), (False, 4)])
def test_quantized_layers_count_codes_scales_and_zero_points(quantized, sym, zero_point):
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    bits = sum(out * width * 4 + out * (width // 128) * (16 + zero_point) for out, width in shapes)
    norms = 6 * (2 * 256 + 2 * 64) + 256
    assert counted(quantized(TINY, bits=4, sym=sym)) == 6 * bits // 8 + 2 * norms + 2 * 4096 * 256


def test_quantized_experts_count_by_their_share(quantized, saved):
    path = saved("qwen3_moe")
    dense, layers = counted(path), 2 * (4 * 3)
    # only the experts are quantized: three matrices of 32 x 64 each
    output = quantized(path, scheme="W4G32", layer_config={"self_attn": 16})
    each = 32 * 64
    assert counted(output) == dense - layers * each * 2 // 2 + layers * (each * 4 + each // 32 * 16) // 8 // 2


def test_a_quantized_embedding_counts_where_it_is_the_head(quantized):
    output = quantized(TINY, format="gguf:q8_0")
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    weights = 6 * sum(out * width for out, width in shapes) + 4096 * 256
    # a Q8_0 block: 32 codes and a scale; norms are read in the dtype of the model
    norms = 6 * (2 * 256 + 2 * 64) + 256
    width = (find_format(output).dtype or torch.bfloat16).itemsize
    assert counted(output) == weights // 32 * 34 + width * norms


# --- timing ------------------------------------------------------------------------------------------------


class Output(dict):
    """As Transformers gives it."""

    __getattr__ = dict.__getitem__


class Slow(torch.nn.Module):
    """Takes 60 ms for a prompt, 10 ms for a step, and says always the token after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], int]] = []

    def forward(self, input_ids, use_cache, logits_to_keep, past_key_values=0):
        time.sleep(0.06 if past_key_values == 0 else 0.01)
        self.calls.append((input_ids[0].tolist(), past_key_values))
        assert use_cache and logits_to_keep == 1
        logits = torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 100).float()
        return Output(logits=logits, past_key_values=past_key_values + input_ids.shape[1])


def test_the_prompt_and_the_steps_are_timed_apart():
    model = Slow()
    prefill, decode = run_once(model, torch.tensor([[3, 4, 5]]), 4)
    assert model.calls == [([3, 4, 5], 0), ([6], 3), ([7], 4), ([8], 5), ([9], 6)]
    assert 0.06 <= prefill < 0.2 and 0.04 <= decode < 0.2


@pytest.mark.parametrize(("damage", "error"), [
    (dict(logits=torch.full((1, 1, 9), math.nan)), NonFiniteError), (dict(past_key_values=None), UnsupportedError),
])  # fmt: skip
def test_a_model_that_cannot_be_timed(damage, error):
    def forward(input_ids, use_cache, past_key_values=None):
        return Output({"logits": torch.zeros(1, 1, 9), "past_key_values": 1} | damage)

    model = torch.nn.Module()
    model.forward = forward
    with pytest.raises(error):
        run_once(model, torch.tensor([[1]]), 1)


def test_best_and_spread():
    assert best_and_spread([8.0, 10.0, 9.0]) == (10.0, pytest.approx(0.2))
    assert best_and_spread(iter([4.0])) == (4.0, 0.0)


def test_bandwidth_is_that_of_the_fastest_pass(monkeypatch):
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr(speed, "_now", lambda device: next(times))
    monkeypatch.setattr(speed, "_PASSES", 3)
    monkeypatch.setattr(speed, "_BUFFER_BYTES", 4096)
    assert read_bandwidth("cpu") == 4096 / 2.0
    with pytest.raises(UsageError, match="cuba"):
        read_bandwidth("cuba")


# --- a whole measurement -----------------------------------------------------------------------------------


def test_measure_an_ordinary_model():
    result = measure(Trial(TINY, **SHORT))
    assert (result.used, result.dtype, len(result.prefill), len(result.decode)) == ((), "bfloat16", 2, 2)
    assert min(*result.prefill, *result.decode, result.load_s) > 0
    assert result.step_bytes == counted(TINY)
    assert result.threads == torch.get_num_threads() and result.peak_bytes > 100 * 2**20


def test_measure_names_the_backends_that_run(quantized, saved):
    path = quantized(TINY, scheme="W4G128", layer_config={"o_proj": "W3G128"})
    result = measure(Trial(path, **SHORT, dtype=torch.float32, backend="reference"))
    assert (result.used, result.dtype) == (("reference",), "float32")
    assert result.step_bytes > counted(path)  # the head in four bytes instead of two
    dense = {name for name, backend in get_registry().backends().items() if backend.support.dense}
    in_model = {*re.findall(r"backend=(\w+)", str(load(path, dtype=torch.bfloat16)))} - dense
    assert set(measure(Trial(path, **SHORT)).used) == in_model != set()
    # experts are dequantized when loaded, so nothing runs them
    experts = quantized(saved("qwen3_moe"), scheme="W4G32", layer_config={"self_attn": 16})
    assert measure(Trial(experts, **SHORT)).used == ()


def test_measure_refuses_with_the_reason(quantized):
    path = quantized(TINY, scheme="W4G128")
    with pytest.raises(UnsupportedError, match="needs bits 8, got 4"):
        measure(Trial(path, **SHORT, backend="cpu_int8"))
    with pytest.raises(UsageError, match="cuba"):
        measure(Trial(path, device="cuba"))


def test_more_tokens_than_the_model_takes(saved):
    for name in ("gpt2", "llama"):
        with pytest.raises(UnsupportedError, match="the model takes 64 tokens"):
            measure(Trial(saved(name), prompt_tokens=63, new_tokens=2))


def test_a_model_without_a_cache(saved):
    with pytest.raises(UnsupportedError, match="past_key_values"):
        measure(Trial(saved("openai-gpt"), **SHORT))


def test_the_prompt_is_random_and_always_the_same(monkeypatch):
    prompts = []
    monkeypatch.setattr(speed, "run_once", lambda model, prompt, steps: prompts.append((prompt, steps)) or (1.0, 0.5))
    model = MODELS["llama"].build()
    for _ in range(2):
        assert speed._time(model, Trial(TINY, prompt_tokens=40, new_tokens=3, repeats=2)) == ((40, 40), (6, 6))
    assert [steps for _, steps in prompts] == [2, 3, 3] * 2
    first = prompts[0][0]
    assert first.shape == (1, 40) and len(first.unique()) > WIDTH // 4 and int(first.max()) < VOCABULARY
    assert all(torch.equal(prompt, first) for prompt, _ in prompts)


# --- a process of its own ----------------------------------------------------------------------------------


def test_apart_is_another_process_with_a_peak_of_its_own():
    buffer = torch.ones(2**27)  # 512 MiB
    here = torch.device("cpu")
    assert apart(speed._peak_bytes, here) < speed._peak_bytes(here) - 2**28
    del buffer


def test_apart_brings_errors_back(capfd):
    with pytest.raises(UsageError, match="device `cuba` cannot be used"):
        apart(find_device, "cuba")
    assert capfd.readouterr().err == ""


def test_a_bug_becomes_a_sentence_and_keeps_its_traceback(capsys):
    with pytest.raises(UnsupportedError, match="^ValueError: invalid literal"):
        speed._answer(int, "x")
    assert "Traceback" in capsys.readouterr().err


def test_apart_survives_the_end_of_the_process():
    with pytest.raises(UnsupportedError, match="without an answer"):
        apart(os._exit, 3)


def test_files_are_read_to_their_end(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    speed.warm_files(tmp_path)
    speed.warm_files(tmp_path / "a")


def test_an_accelerator_reports_its_own_peak(monkeypatch):
    double = SimpleNamespace(max_memory_allocated=lambda device: 77 if device.type == "cuda" else 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: double)
    assert speed._peak_bytes(torch.device("cuda")) == 77
