"""`autoround info`, `plugins`, `formats`, `backends`: what is there, and why."""

from __future__ import annotations

import click

from autoround_cli.display import table
from autoround_cli.options import parse_dtype
from autoround_core.registry import get_registry


@click.command()
@click.argument("checkpoint", type=click.Path())
def info(checkpoint: str) -> None:
    """Describe a checkpoint: format, schemes, bytes, and its report."""
    from autoround_core.loading import describe

    description = describe(checkpoint)
    rows = [[f"{count} layers", scheme, f"{size:,}"] for scheme, (count, size) in description.schemes.items()]
    rows.append([f"{description.rest_tensors} other tensors", "not quantized", f"{description.rest_bytes:,}"])
    click.echo(
        f"format {description.format}, {description.model_type}, {description.total_bytes:,} bytes in all, "
        f"{description.bits_per_weight:.3f} bits per quantized weight"
    )
    table(checkpoint, ["what", "scheme", "bytes"], rows)
    for line in description.report_lines:
        click.echo(line)


@click.command()
def plugins() -> None:
    """List plugins: what each contributes, and which failed and why."""
    rows = [
        [
            p.name,
            f"{p.distribution} {p.version}",
            p.module,
            ", ".join(p.hooks),
            f"failed: {p.error}" if p.error else "ok",
        ]
        for p in get_registry().plugins
    ]
    table("plugins", ["name", "package", "module", "hooks", "state"], rows)


@click.command()
def formats() -> None:
    """List checkpoint formats."""
    table("formats", ["format", "for"], [[name, fmt.summary] for name, fmt in sorted(get_registry().formats().items())])


@click.command()
@click.option(
    "--explain",
    "checkpoint",
    type=click.Path(),
    help="For each kind of layer of a checkpoint: which backend, and why no better one.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def backends(checkpoint: str | None, device: str, dtype: str) -> None:
    """List inference backends, or explain the choice for a checkpoint."""
    if checkpoint is None:
        found = sorted(get_registry().backends().values(), key=lambda backend: -backend.priority)
        rows = [[b.name, str(b.priority), ", ".join(b.support.devices) or "any"] for b in found]
        table("backends", ["backend", "priority", "devices"], rows)
        return
    from autoround_core.loading import explain

    rows = []
    for spec, count, replies in explain(checkpoint, device=device, dtype=parse_dtype(dtype)):
        what = f"{spec.scheme} {spec.out_features}x{spec.in_features} ({count} layers, such as {spec.name})"
        chosen = next((i for i, (_, reason) in enumerate(replies) if reason is None), len(replies))
        for i, (name, reason) in enumerate(replies):
            state = "chosen" if i == chosen else reason or "would run too, with lower priority"
            rows.append([what if i == 0 else "", name, state])
    table(checkpoint, ["layers", "backend", "answer"], rows)
