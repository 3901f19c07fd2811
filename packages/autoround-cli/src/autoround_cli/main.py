"""`autoround`: the command group, and how errors become one line and an exit code."""

from __future__ import annotations

import sys

import click

from autoround_cli.options import DEFAULT_FACE
from autoround_core.errors import AutoRoundError
from autoround_core.registry import get_registry


@click.group(context_settings={"token_normalize_func": lambda token: token.replace("-", "_"), "max_content_width": 120})
@click.version_option(package_name="autoround-cli", prog_name="autoround")
def cli() -> None:
    """Round the weights of large language models to 2, 3, 4 or 8 bits."""


def main(argv: list[str] | None = None, *, prog: str = "autoround", face: str = DEFAULT_FACE) -> None:
    """Run the command; errors that a user can act on are one line on stderr and exit code 2 (usage) or 1.

    prog: what the command is called. face: the class that `quantize` and `plan` make.
    """
    try:
        get_registry().add_commands(cli)
        # without standalone mode click returns the exit code of --help and raises everything else
        sys.exit(cli.main(argv, prog_name=prog, standalone_mode=False, obj=face) or 0)
    except AutoRoundError as error:
        _fail(prog, str(error), error.exit_code)
    except click.UsageError as error:
        _fail(prog, error.format_message(), 2)
    except click.ClickException as error:
        _fail(prog, error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail(prog, "interrupted; nothing was written", 130)


def _fail(prog: str, message: str, code: int) -> None:
    text = " ".join(message.split())
    click.echo(f"{prog}: error: {''.join(c if c.isprintable() else '?' for c in text)}", err=True)
    sys.exit(code)
