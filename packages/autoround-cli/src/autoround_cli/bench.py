"""`autoround bench`: how fast a checkpoint loads and runs, beside what the machine's memory allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoround_cli.display import table
from autoround_cli.options import parse_backends, parse_dtype
from autoround_core.errors import AutoRoundError

if TYPE_CHECKING:
    from autoround_core.speed import Speed, Trial

_NONE = "-"  # the backend of a checkpoint without quantized layers
_COLUMNS = ["backend", "load s", "prefill tokens/s", "spread", "decode tokens/s", "spread", "bound tokens/s", "reached",
            "peak MiB", "note"]


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--backend", default="auto", show_default=True, help="Backends of `autoround backends`, by commas.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32.")
@click.option("--prompt_tokens", type=click.IntRange(min=1), default=512, show_default=True,
              help="Random tokens to begin with.")
@click.option("--new_tokens", type=click.IntRange(min=1), default=32, show_default=True,
              help="Single steps after them.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="The fastest counts.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a CPU.  [default: as torch chooses]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def bench(checkpoint: str, backend: str, device: str, dtype: str, as_json: bool, **options: Any) -> None:
    """Load time, speed and peak memory of CHECKPOINT with each backend, beside the bound of the memory's bandwidth.

    Exits with 1 if no backend could run it.
    """
    from autoround_core.loading import find_format
    from autoround_core.source import find_model
    from autoround_core.speed import Trial, apart, measure, read_bandwidth, warm_files

    names = parse_backends(backend)
    kind = parse_dtype(dtype)
    path = Path(checkpoint) if Path(checkpoint).is_file() else find_model(checkpoint)
    trials = {name: Trial(path, name, device, kind, **options) for name in names}
    if not find_format(path).read(path).layer_names():
        trials = {_NONE: Trial(path, device=device, dtype=kind, **options)}
    bandwidth = apart(read_bandwidth, device, options["threads"])
    warm_files(path)
    results: dict[str, Speed | str] = {}
    for name, trial in trials.items():
        try:
            results[name] = apart(measure, trial)
        except AutoRoundError as error:
            results[name] = str(error)
    if as_json:
        click.echo(json.dumps(_content(checkpoint, next(iter(trials.values())), bandwidth, results)))
    else:
        _show(checkpoint, bandwidth, results)
    if all(isinstance(result, str) for result in results.values()):
        raise click.exceptions.Exit(1)


def _content(checkpoint: str, trial: Trial, bandwidth: float, results: dict[str, Speed | str]) -> dict[str, Any]:
    from dataclasses import asdict

    rows = {
        name: {"error": result} if isinstance(result, str)
        else asdict(result) | {"bound": bandwidth / result.step_bytes, "reached": _reached(bandwidth, result)}
        for name, result in results.items()
    }
    return {
        "checkpoint": checkpoint, "device": trial.device, "prompt_tokens": trial.prompt_tokens,
        "new_tokens": trial.new_tokens, "bytes_per_second": bandwidth, "backends": rows,
    }  # fmt: skip


def _reached(bandwidth: float, speed: Speed) -> float:
    return max(speed.decode) * speed.step_bytes / bandwidth


def _show(checkpoint: str, bandwidth: float, results: dict[str, Speed | str]) -> None:
    ran = next((result for result in results.values() if not isinstance(result, str)), None)
    if ran:
        click.echo(
            f"{ran.dtype}, {ran.threads} threads; a step reads {ran.step_bytes / 1e6:,.1f} MB of weights, "
            f"and memory gives {bandwidth / 1e9:,.1f} GB/s"
        )
    rows = []
    for name, result in results.items():
        cells = [""] * 8 + [" ".join(result.split())] if isinstance(result, str) else _cells(bandwidth, result)
        rows.append([name, *cells])
    table(checkpoint, _COLUMNS, rows)


def _cells(bandwidth: float, speed: Speed) -> list[str]:
    from autoround_core.speed import best_and_spread

    (prefill, prefill_spread), (decode, decode_spread) = map(best_and_spread, (speed.prefill, speed.decode))
    return [
        f"{speed.load_s:.2f}", f"{prefill:,.1f}", f"{prefill_spread:.1%}", f"{decode:,.1f}", f"{decode_spread:.1%}",
        f"{bandwidth / speed.step_bytes:,.1f}", f"{_reached(bandwidth, speed):.1%}",
        f"{speed.peak_bytes / 2**20:,.0f}", ", ".join(speed.used),
    ]  # fmt: skip
