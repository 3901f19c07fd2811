"""The output directory: written under a temporary name, renamed when everything in it has been checked."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from autoround_core.errors import OutputError


class OutputDirectory:
    """`with OutputDirectory(final, model) as work:` fills `work`; on success it becomes `final`, on failure it goes.

    Raises OutputError before anything is written when `final` is the model's directory or contains it, or is not
    empty and `overwrite` is false.
    """

    def __init__(self, final: str | Path, model: Path | None = None, *, overwrite: bool = False) -> None:
        self.final = Path(final).expanduser().resolve()
        if model is not None and model.resolve().is_relative_to(self.final):
            raise OutputError(f"output_dir `{final}` is the model's own directory or contains it; choose another")
        if not self.final.name:
            raise OutputError(f"output_dir `{final}` is the root of the file system; choose another")
        if self.final.exists():
            if not self.final.is_dir():
                raise OutputError(f"output_dir `{final}` is a file")
            if any(self.final.iterdir()) and not overwrite:
                raise OutputError(
                    f"output_dir `{final}` is not empty; choose another, or pass --overwrite to replace it"
                )
        nearest = next(parent for parent in self.final.parents if parent.exists())
        if not nearest.is_dir():
            raise OutputError(f"output_dir `{final}` cannot be made: `{nearest}` is a file")
        if not os.access(nearest, os.W_OK):
            raise OutputError(f"output_dir `{final}` cannot be made: `{nearest}` is not writable")
        # outermost last; what a failed run made goes with it
        self._made = [parent for parent in self.final.parents if not parent.exists()]
        self._work = self.final.with_name(f".{self.final.name}.partial-{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        return self._work

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._clean_up()
            return
        old = self.final.with_name(f".{self.final.name}.replaced-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        try:
            if self.final.exists():
                self.final.rename(old)
            self._work.rename(self.final)
        except OSError as failure:
            if old.exists() and not self.final.exists():
                old.rename(self.final)
            self._clean_up()
            raise OutputError(f"output_dir `{self.final}` cannot be put in place: {failure.strerror}") from failure
        shutil.rmtree(old, ignore_errors=True)

    def _clean_up(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        with suppress(OSError):  # somebody else may have put something there
            for parent in self._made:
                parent.rmdir()
