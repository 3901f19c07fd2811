"""`autoround quantize` and `autoround plan`."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import click

from autoround_cli.allocator import keep_freed_memory
from autoround_cli.display import make_progress, table
from autoround_cli.options import make_autoround, quantization_options


@click.command()
@quantization_options
@click.option(
    "--output_dir", required=True, type=click.Path(), help="Directory of the checkpoint; must not exist or be empty."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace what is in the output directory, once the new one is verified."
)
@click.option("--quiet", is_flag=True, help="No progress; warnings and errors only.")
@click.option("--log_json", is_flag=True, help="Progress as JSON lines on stderr, for batch jobs.")
def quantize(output_dir: str, overwrite: bool, quiet: bool, log_json: bool, format_: str, **options) -> None:
    """Quantize a model, write a checkpoint and verify it.

    Example: autoround quantize --model examples/tiny-qwen3 --bits 4 --dataset stdlib --output_dir OUT
    """
    keep_freed_memory()
    progress = make_progress(quiet, log_json)
    # bars must be closed before the error is printed
    with progress if hasattr(progress, "__enter__") else nullcontext():
        path = make_autoround(options, progress).quantize_and_save(output_dir, format_, overwrite=overwrite)
    if not quiet:
        click.echo(f"saved and verified: {path}")


@click.command()
@quantization_options
def plan(format_: str, **options) -> None:
    """Show what `quantize` would do to each layer; compute nothing."""
    result = make_autoround(options).plan(format_)
    rows = [
        [
            layer.spec.name,
            f"{layer.spec.out_features}x{layer.spec.in_features}",
            str(layer.spec.scheme) if layer.spec.scheme else "16 bit",
            f"{layer.stored_bytes:,}",
            layer.backend,
            layer.reason,
        ]
        for layer in result.layers
    ]
    rows += [[name, "", "16 bit", "", "torch", reason] for name, reason in result.kept.items()]
    table("plan", ["layer", "shape", "scheme", "bytes", "runs on", "why"], rows)
    click.echo(
        f"{len(result.quantized())} layers quantized at {result.linear_bits_per_weight:.3f} bits per weight; "
        f"model {result.original_bytes:,} -> {result.stored_bytes:,} bytes; "
        f"estimate {_duration(result.seconds)}, {result.memory_bytes / 2**30:.1f} GiB (rough)"
    )
    for note in result.notes:
        click.echo(f"note: {note}")
    sys.stdout.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
