"""What a format is told of a model before anything is computed, and what it chooses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoround_core.adapter import ModelAdapter, ModelView
from autoround_core.errors import UnsupportedError, UsageError, unknown_name
from autoround_core.format import CheckpointFormat, ModelOutline, SchemeChoice
from autoround_core.recipe import QuantRecipe


def stored_shapes(adapter: ModelAdapter, view: ModelView) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of the model holds, by name."""
    return {name: tuple(tensor.shape) for name, tensor in adapter.rest(view, set())}


def outline(
    adapter: ModelAdapter, view: ModelView, config: Mapping[str, Any], directory: Path | None, name: str, *,
    options: Mapping[str, Any], calibrated: bool, formats: Sequence[CheckpointFormat],
) -> ModelOutline:
    """Raises UsageError for an option that none of the formats has."""
    known = {name for fmt in formats for name in fmt.option_names}
    for option in options:
        if not known:
            raise UsageError(f"option `{option}` is for no format of this run ({', '.join(f.name for f in formats)})")
        if option not in known:
            raise unknown_name("format option", option, known)
    alone, name = len(formats) < 2, re.sub(r"[^\w.-]+", "-", Path(name).name) or "model"
    return ModelOutline(config, stored_shapes(adapter, view), directory, options, calibrated, alone, name)


def choose(formats: Sequence[CheckpointFormat], model: ModelOutline) -> dict[str, SchemeChoice]:
    """What the formats choose together. Raises UnsupportedError when two choose differently."""
    choices: dict[str, SchemeChoice] = {}
    owner: dict[str, str] = {}
    for fmt in formats:
        for name, choice in (fmt.choose_schemes(model) or {}).items():
            if choices.setdefault(name, choice) != choice:
                raise UnsupportedError(f"format {owner[name]} wants `{name}` as {choices[name].scheme or '16 bits'}, "
                                       f"format {fmt.name} as {choice.scheme or '16 bits'}; write them in two runs")
            owner.setdefault(name, fmt.name)
    return choices


def with_choices(recipe: QuantRecipe, choices: Mapping[str, SchemeChoice], *, given: bool) -> QuantRecipe:
    """The recipe whose default is what most matrices were chosen to be.

    given: whether the user asked for the recipe's default; raises UsageError where it is another then.
    """
    counts = Counter(choice.scheme for choice in choices.values() if choice.scheme is not None)
    if not counts:
        return recipe
    usual = counts.most_common(1)[0][0]
    if given and recipe.default != usual:
        raise UsageError(f"the format decides the scheme of each layer, {usual} of most, and {recipe.default} was "
                         "asked for; leave out --scheme, --bits, --group_size and --sym, and name exceptions in "
                         "--layer_config")
    return replace(recipe, default=usual)
