"""The plugin surface: every hook of AutoRound, on one page.

A plugin is a module (or object) named by an entry point of the group `autoround`; it implements any of these
functions, marked with `autoround_core.hookimpl`. Our own formats, algorithms, backends and commands are
registered through the same hooks. Import what is heavy inside the functions: a plugin is loaded even for
`autoround --help`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from autoround_core.adapter import ModelAdapter
    from autoround_core.algorithm import Algorithm
    from autoround_core.backend import Backend
    from autoround_core.family import NumberFamily
    from autoround_core.format import CheckpointFormat

PROJECT = "autoround"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def autoround_number_families() -> Iterable[NumberFamily]:
    """Number families by `data_type`: how weights of one kind are rounded and tuned."""


@hookspec
def autoround_algorithms() -> Iterable[Algorithm]:
    """Algorithms for `--algorithm`: they turn a block's float weights into records."""


@hookspec
def autoround_formats() -> Iterable[CheckpointFormat]:
    """Checkpoint formats for `--format`: they write and read records."""


@hookspec
def autoround_backends() -> Iterable[Backend]:
    """Inference backends: they build a module from a record."""


@hookspec(firstresult=True)
def autoround_model_adapter(config: dict[str, Any]) -> ModelAdapter | None:
    """The adapter for a model's config.json, or None; the built-in one for causal language models comes last."""


@hookspec
def autoround_commands(cli: click.Group) -> None:
    """Add commands to `autoround`."""
