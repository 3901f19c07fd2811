"""What a run tells whoever watches it. The base class is silent; the command line draws it or logs JSON."""

from __future__ import annotations


class Progress:
    """Override what you want to see. Calls come from one thread, in the order of the run."""

    def phase(self, name: str) -> None:
        """A phase begins: load, calibrate, quantize, save, verify."""

    def block(self, index: int, total: int, name: str) -> None:
        """Block `index` (from 0) of `total` begins."""

    def step(self, step: int, steps: int, loss: float) -> None:
        """`step` of `steps` of the present block is done; loss: least error so far on the validation slice."""

    def block_done(self, index: int, total: int, name: str, before: float | None, after: float | None) -> None:
        """A block is finished. before, after: mean square error of its output, None without calibration data."""

    def warn(self, message: str) -> None:
        """Something the user should know although the run goes on."""
