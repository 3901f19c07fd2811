"""How a configuration names layers: one of them exactly, and what engines run as one layer by the name of the whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from autoround_core import CheckpointContext, fused_layers

T = TypeVar("T")


def with_fused(entries: Mapping[str, T], context: CheckpointContext) -> dict[str, T]:
    """The entries of layers, and one more under the fused name wherever all parts have equal ones.

    vLLM and SGLang look up `qkv_proj`, of which the checkpoint knows nothing.
    """
    groups = fused_layers([spec.name for spec in context.layers], context.config.get("model_type"))
    result = dict(entries)
    for fused, parts in groups.items():
        if all(part in entries and entries[part] == entries[parts[0]] for part in parts):
            result[fused] = entries[parts[0]]
    return result


def exactly(name: str) -> str:
    """A regular expression for one layer, for consumers that search from the start of the name."""
    return f"^{re.escape(name)}$"
