"""`autoround convert`."""

from __future__ import annotations

import click


@click.command()
@click.argument("checkpoint")
@click.argument("output_dir", type=click.Path())
@click.option("--format", "format_", required=True, help="The format to write, see `autoround formats`.")
@click.option("--overwrite", is_flag=True, help="Replace what is there, once the new one is verified.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def convert(checkpoint: str, output_dir: str, format_: str, overwrite: bool, trust_remote_code: bool) -> None:
    """Write a quantized checkpoint in another format: the same integers, or a refusal.

    Example: autoround convert OUT OUT-gptq --format auto_gptq
    """
    from autoround_core import convert as run

    path = run(checkpoint, output_dir, format_, overwrite=overwrite, trust_remote_code=trust_remote_code)
    click.echo(f"converted and verified: {path}")
