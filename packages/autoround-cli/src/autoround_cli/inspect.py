"""`autoround info`, `plugins`, `formats`, `backends`: what is there, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from autoround_cli.display import table
from autoround_cli.options import parse_dtype
from autoround_core.registry import get_registry
from autoround_core.scheme import WHOLE_ROW

if TYPE_CHECKING:
    from autoround_core.backend import Backend


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


_COLUMNS = ["backend", "devices", "numbers", "bits", "sym", "groups", "dtypes", "state"]


def _limits(backend: Backend) -> list[str]:
    """The cells of what it takes; "any" where its data sets no limit, or where it has none."""
    support = backend.support
    if support == type(support)():
        return ["any"] * 6
    if support.dense:
        return [", ".join(support.devices) or "any", "not quantized", "", "", "", ", ".join(support.dtypes) or "any"]
    groups = ["row" if size == WHOLE_ROW else size for size in support.group_sizes]
    symmetry = ["sym" if sym else "asym" for sym in support.sym] if len(support.sym) < 2 else ["sym", "asym"]
    listed = (support.devices, support.data_types, support.bits, symmetry, groups, support.dtypes)
    return [", ".join(map(str, values)) or "any" for values in listed]


def _state(backend: Backend) -> str:
    try:
        return backend.missing() or "installed"
    except Exception as error:  # whatever a stranger's answer raises must not hide the others
        return f"failed: {type(error).__name__}: {error}"


@click.command()
@click.option(
    "--explain",
    "checkpoint",
    type=click.Path(),
    help="For each kind of layer of a checkpoint: which backend, and why no better one.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def backends(checkpoint: str | None, device: str, dtype: str, trust_remote_code: bool) -> None:
    """List inference backends and what they take, or explain the choice for a checkpoint."""
    if checkpoint is None:
        found = sorted(get_registry().backends().values(), key=lambda backend: (-backend.priority, backend.name))
        table("backends", _COLUMNS, [[backend.name, *_limits(backend), _state(backend)] for backend in found])
        return
    from autoround_core.loading import explain

    rows = []
    options = dict(device=device, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
    for spec, count, replies in explain(checkpoint, **options):
        what = f"{spec.scheme} {spec.out_features}x{spec.in_features} ({count} layers, such as {spec.name})"
        if replies is None:
            rows.append([what, "none", "dequantized when loaded: no module fits into the place of these weights"])
            continue
        chosen = next((i for i, (_, reason) in enumerate(replies) if reason is None), len(replies))
        for i, (name, reason) in enumerate(replies):
            state = "chosen" if i == chosen else reason or "would run too, with lower priority"
            rows.append([what if i == 0 else "", name, state])
    if not rows:
        click.echo(f"{checkpoint} holds no quantized layers, so no backend is asked")
        return
    table(checkpoint, ["layers", "backend", "answer"], rows)
