"""Showing a run: progress bars for people, JSON lines for batch jobs, or nothing. All on stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from autoround_core.progress import Progress


class Silent(Progress):
    """Warnings only."""

    def warn(self, message: str) -> None:
        print(f"autoround: warning: {message}", file=sys.stderr)


class JsonLog(Progress):
    """One JSON object per event and line."""

    def _log(self, event: str, **content: Any) -> None:
        print(json.dumps({"time": round(time.time(), 3), "event": event, **content}), file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        self._log("phase", name=name)

    def block_done(self, index: int, total: int, name: str, before: float | None, after: float | None) -> None:
        self._log("block", index=index, total=total, name=name, loss_before=before, loss_after=after)

    def warn(self, message: str) -> None:
        self._log("warning", message=message)


class Bars(Progress):
    """A bar over all steps of all blocks, with the present block, its loss and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[block]}"),
            TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bars.add_task("load", total=None, block="", loss="")
        self._done = 0

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def phase(self, name: str) -> None:
        self._bars.update(self._task, description=name, block="", loss="")

    def block(self, index: int, total: int, name: str) -> None:
        self._done = index
        self._bars.update(self._task, total=total, completed=index, block=f"{name} ({index + 1}/{total})")

    def step(self, step: int, steps: int, loss: float) -> None:
        self._bars.update(self._task, completed=self._done + step / steps, loss=f"loss {loss:.3e}")

    def block_done(self, index: int, total: int, name: str, before: float | None, after: float | None) -> None:
        self._bars.update(self._task, completed=index + 1)
        if before is not None and after is not None:
            self._console.print(f"{name}  loss {before:.3e} → {after:.3e}", highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(f"[yellow]warning:[/] {message}", highlight=False)


def make_progress(quiet: bool, log_json: bool) -> Progress:
    if log_json:
        return JsonLog()
    return Silent() if quiet or not sys.stderr.isatty() else Bars()


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout; plain tab-separated lines when nobody watches."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title)
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)
