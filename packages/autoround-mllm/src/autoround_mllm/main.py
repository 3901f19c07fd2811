"""`autoround-mllm`: the commands of autoround-cli, for models of images and text."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors as those of `autoround`."""
    if find_spec("autoround_cli") is None:
        print("autoround-mllm: error: its commands are in autoround-cli: pip install autoround-mllm[all]",
              file=sys.stderr)
        sys.exit(1)
    from autoround_cli.main import main as run

    run(argv, prog="autoround-mllm", face="autoround_mllm.AutoRoundMLLM")
