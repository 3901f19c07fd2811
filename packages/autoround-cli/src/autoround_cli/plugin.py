"""The commands of this package, as a plugin of autoround-core."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl(tryfirst=True)
def autoround_commands(cli):
    from autoround_cli.bench import bench
    from autoround_cli.convert import convert
    from autoround_cli.evaluate import evaluate
    from autoround_cli.inspect import backends, formats, info, plugins
    from autoround_cli.quantize import plan, quantize
    from autoround_cli.run import run

    for command in (quantize, plan, convert, run, bench, evaluate, info, plugins, formats, backends):
        cli.add_command(command)
