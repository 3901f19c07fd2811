"""How a run is tuned: the numbers behind `--recipe`, and their checks.

This module imports nothing heavy: the command line builds its options from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from autoround_core.errors import UsageError, unknown_name

DEFAULT_RECIPE = "base"


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """Numbers of a tuning run; lengths in tokens, learning rates in rounding steps.

    lr None = 1/iters (2/iters for at most 3 bits and at least 1000 iterations); minmax_lr None = lr.
    """

    algorithm: str = "signround"
    iters: int = 200
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    lr: float | None = None
    minmax_lr: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, got {value}")
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
                raise UsageError(f"{name} must be above 0 and at most 1, got {value}")

    def rates(self, bits: int) -> tuple[float, float]:
        """(lr, minmax_lr) at the first step for weights of `bits` bits; both fall linearly to zero."""
        lr = self.lr
        if lr is None:
            lr = (2.0 if bits <= 3 and self.iters >= 1000 else 1.0) / max(1, self.iters)
        return lr, lr if self.minmax_lr is None else self.minmax_lr

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


_LEAST = {"iters": 0, "nsamples": 1, "seqlen": 2, "batch_size": 1, "gradient_accumulate_steps": 1, "seed": 0}

RECIPES: dict[str, TuningSettings] = {
    "best": TuningSettings(iters=1000, nsamples=512),
    "base": TuningSettings(),
    "light": TuningSettings(iters=50, lr=5e-3),
    "opt_rtn": TuningSettings(algorithm="opt_rtn", iters=0),
    "rtn": TuningSettings(algorithm="rtn", iters=0),
}


def tuning_settings(recipe: str | None = None, **overrides: Any) -> TuningSettings:
    """The settings of a recipe with the overrides that are not None.

    iters=0 turns signround into opt_rtn, as users of AutoRound expect. Raises UsageError for an unknown recipe
    or keyword, or a number out of range.
    """
    recipe = recipe or DEFAULT_RECIPE
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    names = [field.name for field in fields(TuningSettings)]
    for name in overrides:
        if name not in names:
            raise unknown_name("option", name, names)
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = replace(RECIPES[recipe], **given)
    if settings.algorithm == "signround" and settings.iters == 0:
        if given.get("algorithm") == "signround":
            raise UsageError("iters is 0, which leaves signround nothing to do; use --algorithm opt_rtn or rtn")
        settings = replace(settings, algorithm="opt_rtn")
    return settings
