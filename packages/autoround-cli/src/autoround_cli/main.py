"""`autoround`: the command group, and how errors become one line and an exit code."""

from __future__ import annotations

import sys

import click

from autoround_core.errors import AutoRoundError
from autoround_core.registry import get_registry


@click.group(context_settings={"token_normalize_func": lambda token: token.replace("-", "_"), "max_content_width": 120})
@click.version_option(package_name="autoround-cli", prog_name="autoround")
def cli() -> None:
    """Round the weights of large language models to 2, 3, 4 or 8 bits."""


def main(argv: list[str] | None = None) -> None:
    """Run the command; errors that a user can act on are one line on stderr and exit code 2 (usage) or 1."""
    try:
        get_registry().add_commands(cli)
        # without standalone mode click returns the exit code of --help and raises everything else
        sys.exit(cli.main(argv, prog_name="autoround", standalone_mode=False) or 0)
    except AutoRoundError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written", 130)


def _fail(message: str, code: int) -> None:
    text = " ".join(message.split())
    click.echo(f"autoround: error: {''.join(c if c.isprintable() else '?' for c in text)}", err=True)
    sys.exit(code)
