"""How fast a checkpoint runs, beside how fast it could run: what `autoround bench` shows.

A decode step reads every weight once and computes little with each, so it cannot take less than

    bytes of the weights / bandwidth of the memory

seconds. The model is timed alone: random token ids, a plain loop over `model(...)`, the likeliest token each time.
`apart` runs a measurement in a fresh process, so that a peak of memory is that of one backend.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from autoround_core.adapter import LinearSite, ModelView
from autoround_core.backend import AUTO, select_backend
from autoround_core.compute import find_device
from autoround_core.errors import AutoRoundError, NonFiniteError, UnsupportedError
from autoround_core.format import CheckpointReader
from autoround_core.loading import assemble, dequantized_names, find_format, skeleton_of, spec_of
from autoround_core.recipe import LinearSpec
from autoround_core.records import QuantizedLayer
from autoround_core.registry import get_registry
from autoround_core.report import peak_memory_mb

T = TypeVar("T")
_SEED = 0
_BUFFER_BYTES = 512 * 2**20  # many times any cache
_PASSES = 10
_CHUNK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure. dtype, threads: None = as stored, as torch chooses. repeats: of prompt and steps together."""

    path: Path
    backend: str = AUTO
    device: str = "cpu"
    dtype: torch.dtype | None = None
    prompt_tokens: int = 512
    new_tokens: int = 32
    repeats: int = 3
    threads: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured.

    used: the backends that run layers, none for a checkpoint without quantized ones. load_s: from the first byte to
    a model that is ready. prefill, decode: tokens per second of each repeat. step_bytes: of weights that a decode step
    cannot do without. peak_bytes: of the process, or what torch took of an accelerator's memory.
    """

    used: tuple[str, ...]
    dtype: str
    threads: int
    load_s: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    step_bytes: int
    peak_bytes: int


def best_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """(the greatest, how far the least is below it as a share of it)."""
    values = tuple(values)
    return max(values), 1 - min(values) / max(values)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) in a fresh process. Raises the AutoRoundError that it raises, or UnsupportedError for
    anything else that goes wrong there, the end of the process included."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_answer, function, *arguments).result()
        except BrokenProcessPool:
            raise UnsupportedError("its process ended without an answer, as when memory runs out") from None


def _answer(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except AutoRoundError:
        raise
    except Exception as error:  # the kernels of others may raise anything, which need not survive the way back
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        raise UnsupportedError(f"{type(error).__name__}: {lines[0] if lines else 'no message'}") from None


def measure(trial: Trial) -> Speed:
    """Load a checkpoint and run it, in this process.

    Raises AutoRoundError: no such device, more tokens than the model takes, a layer that the backend does not take,
    logits that are NaN.
    """
    device = find_device(trial.device)
    if trial.threads:
        torch.set_num_threads(trial.threads)
    found = find_format(trial.path)
    skeleton = partial(
        skeleton_of, found, trial.path, dtype=trial.dtype, trust_remote_code=trial.trust_remote_code
    )
    skeleton()  # imports the model's code, which is no part of loading
    start = time.perf_counter()
    adapter, model = skeleton()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and trial.prompt_tokens + trial.new_tokens > limit:
        raise UnsupportedError(f"the model takes {limit} tokens, and --prompt_tokens with --new_tokens are more")
    view = adapter.view(model)
    reader = _Noting(found.read(trial.path))
    model = assemble(model, adapter, reader, device=device, backend=trial.backend)
    load_s = _now(device) - start
    prefill, decode = _time(model, trial)
    return Speed(
        used=_used(view, reader.specs, device, model.dtype, trial.backend),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load_s=load_s,
        prefill=prefill,
        decode=decode,
        step_bytes=step_bytes(view, reader.specs),
        peak_bytes=_peak_bytes(device),
    )


class _Noting(CheckpointReader):
    """A reader that notes what the layers are which it hands on."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader, self.config = reader, reader.config
        self.specs: list[LinearSpec] = []

    def layers(self) -> Iterator[QuantizedLayer]:
        for layer in self._reader.layers():
            self.specs.append(spec_of(layer))
            yield layer

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._reader.rest()


def _time(model: torch.nn.Module, trial: Trial) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Tokens per second of each repeat, (prefill, decode), after a short run that nobody times."""
    generator = torch.Generator().manual_seed(_SEED)
    words = len(model.get_input_embeddings().weight)
    prompt = torch.randint(words, (1, trial.prompt_tokens), generator=generator).to(trial.device)
    run_once(model, prompt, 2)
    seconds = [run_once(model, prompt, trial.new_tokens) for _ in range(trial.repeats)]
    return (
        tuple(trial.prompt_tokens / first for first, _ in seconds),
        tuple(trial.new_tokens / then for _, then in seconds),
    )


@torch.no_grad()
def run_once(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds for a prompt [1, tokens], seconds for `new_tokens` steps of one token after it).

    Raises UnsupportedError for a model without a cache of keys and values, NonFiniteError when it computes NaN.
    """
    device = prompt.device
    # as `generate` does: the head runs for the last token only
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(device)
    output = model(input_ids=prompt, use_cache=True, **last)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(device)
    if output.get("past_key_values") is None:
        raise UnsupportedError(f"{type(model).__name__} gives no past_key_values, so single steps cannot be timed")
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **last)
        token = output.logits[:, -1:].argmax(-1)
    end = _now(device)
    if not torch.isfinite(output.logits).all():
        raise NonFiniteError("the model computes NaN or infinite logits")
    return middle - start, end - middle


def _now(device: torch.device) -> float:
    """The time once the device has done all that it was given."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage's figure it does not begin with that of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 2**10
    return int(peak_memory_mb() * 2**20)


def step_bytes(view: ModelView, specs: Iterable[LinearSpec]) -> int:
    """Bytes of weights that one decode step of one sequence must read.

    Quantized layers count as their records do: codes, scales and zero points. The rest counts in the model's dtype. Of
    the embedding a step reads one row, unless it is the head too; of a layer's experts those that a token is sent to.
    view: of the skeleton, whose model may have been filled since. specs: of all quantized layers.
    """
    quantized = {spec.name: spec for spec in specs}
    experts: dict[str, list[LinearSite]] = {}
    for site in view.sites():
        if site.expert is not None:
            experts.setdefault(site.path, []).append(site)
    sites = {site.name: site for site in view.all_sites()}
    total = 0.0
    for name, spec in quantized.items():
        site = sites[name]
        if site is not view.embedding or view.tied_head:
            total += _record_bytes(spec) * _share(view, experts.get(site.path))
    replaced = {sites[name].module for name in quantized if sites[name].expert is None}
    lookups = {name for name, module in view.model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for path, parameter in view.model.named_parameters():  # one that is shared comes once
        module = path.rpartition(".")[0]
        if path in experts:
            dense = sum(site.out_features * site.in_features for site in experts[path] if site.name not in quantized)
            total += dense * parameter.element_size() * _share(view, experts[path])
        elif module in replaced:
            continue
        elif module not in lookups or (view.tied_head and view.embedding and path == view.embedding.path):
            total += parameter.numel() * parameter.element_size()
    return round(total)


def _record_bytes(spec: LinearSpec) -> float:
    scheme = spec.scheme
    assert scheme is not None
    bits = scheme.stored_bits(spec.out_features, spec.in_features)
    if scheme.data_type == "int" and scheme.sym:  # its zero points are all the same
        bits -= scheme.bits * scheme.groups(spec.in_features) * spec.out_features
    return bits / 8


def _share(view: ModelView, experts: list[LinearSite] | None) -> float:
    """Which share of a layer's experts a token needs; 1 where there are none, or the model does not say."""
    if not experts:
        return 1.0
    count = len({site.expert for site in experts})
    return min(1.0, getattr(view.model.config.get_text_config(), "num_experts_per_tok", count) / count)


def _used(
    view: ModelView, specs: Iterable[LinearSpec], device: torch.device, dtype: torch.dtype, wanted: str
) -> tuple[str, ...]:
    """Names of the backends whose modules are in the model."""
    backends = list(get_registry().backends().values())
    dense = dequantized_names(view)
    chosen = {select_backend(backends, spec, device, dtype, wanted).name for spec in specs if spec.name not in dense}
    return tuple(sorted(chosen))


def read_bandwidth(device: str = "cpu", threads: int | None = None) -> float:
    """Bytes per second at which the device's memory is read: the best of ten sums over 512 MiB of float32.

    Raises UsageError when the device cannot be used.
    """
    where = find_device(device)
    if threads:
        torch.set_num_threads(threads)
    buffer = torch.ones(_BUFFER_BYTES // 4, device=where)  # written, or the system would map one page of zeros
    times = []
    for _ in range(_PASSES):
        start = _now(where)
        buffer.sum()
        times.append(_now(where) - start)
    return _BUFFER_BYTES / min(times)


def warm_files(path: Path) -> None:
    """Read a checkpoint once, so that no backend pays for the disk and the next finds its files in memory."""
    buffer = bytearray(_CHUNK)
    for file in (path, *path.glob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
