"""Where each scheme applies: a default and ordered overrides by layer name.

An override names one layer exactly, or is a regular expression searched in the layer's name; the first
that matches wins. One that matches no layer is an error, because a misspelt pattern would otherwise
quantize a layer that the user meant to protect.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoround_core.errors import UsageError, unknown_name
from autoround_core.scheme import QuantScheme

_KEEP_BITS = 16
_KEYS = ("bits", "group_size", "sym", "data_type")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """How big a layer is: the question asked of formats and backends. scheme None = kept in 16 bits."""

    name: str
    in_features: int
    out_features: int
    scheme: QuantScheme | None
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class QuantRecipe:
    """default: the scheme of each layer that no override names. overrides: (pattern, scheme or None = 16 bits)."""

    default: QuantScheme
    overrides: tuple[tuple[str, QuantScheme | None], ...] = ()

    def __post_init__(self) -> None:
        for pattern, _ in self.overrides:
            if not isinstance(pattern, str):
                raise UsageError(f"layer_config: {pattern!r} is no layer name or pattern")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"layer_config: `{pattern}` is no regular expression: {error}") from None

    def resolve(
        self, names: Iterable[str], defaults: Mapping[str, QuantScheme | None] | None = None
    ) -> dict[str, QuantScheme | None]:
        """Give each layer its scheme. Raises UsageError for an override that matches no layer.

        defaults: of single layers, where they are not that of the recipe.
        """
        names = list(names)
        known, unused = set(names), {pattern for pattern, _ in self.overrides}
        schemes: dict[str, QuantScheme | None] = {}
        for name in names:
            schemes[name] = (defaults or {}).get(name, self.default)
            for pattern, scheme in self.overrides:
                # an exact name is not a pattern: its dots must not match a neighbour
                if pattern == name or (pattern not in known and re.search(pattern, name)):
                    unused.discard(pattern)
                    schemes[name] = scheme
                    break
        for pattern, _ in self.overrides:
            if pattern in unused and not any(pattern == n or re.search(pattern, n) for n in names):
                raise unknown_name("layer in layer_config", pattern, _examples(pattern, names))
        return schemes


def choose_scheme(
    scheme: str | QuantScheme | None, bits: int | None, group_size: int | None, sym: bool | None
) -> QuantScheme:
    """The scheme of the options: `scheme`, or bits, group_size and sym with the defaults 4, 128 and true.

    Raises UsageError when both are given and disagree.
    """
    parts = {"bits": bits, "group_size": group_size, "sym": sym}
    given = {name: value for name, value in parts.items() if value is not None}
    if scheme is None:
        return QuantScheme(**given)
    chosen = scheme if isinstance(scheme, QuantScheme) else QuantScheme.parse(scheme)
    for name, value in given.items():
        if getattr(chosen, name) != value:
            raise UsageError(
                f"scheme {chosen} has {name} {getattr(chosen, name)}, but {name}={value} is given too; use one"
            )
    return chosen


def _examples(pattern: str, names: list[str], limit: int = 4) -> list[str]:
    """The few layer names nearest to a pattern, so that the error fits on a screen."""
    tail = re.sub(r"[^a-z_]+", "", pattern.rsplit(".", 1)[-1].lower())
    alike = difflib.get_close_matches(pattern, names, n=limit, cutoff=0.5)
    near = alike or [name for name in names if tail and tail in name.lower()] or names
    return near[:limit]


def parse_layer_config(config: str | Path | Mapping[str, Any] | None, default: QuantScheme) -> QuantRecipe:
    """Read overrides from a mapping, a JSON text or a JSON file: {pattern: entry}.

    An entry is a scheme's spelling ("W8G128"), 16 or "fp16" (keep 16 bits), or a mapping with any of
    bits, group_size, sym; what it leaves out comes from `default`. Raises UsageError on anything else.
    """
    if config is None:
        return QuantRecipe(default)
    if isinstance(config, (str, Path)):
        config = _read_json(config)
    if not isinstance(config, Mapping):
        raise UsageError("layer_config must be an object of the form {layer name or pattern: scheme}")
    return QuantRecipe(default, tuple((pattern, _entry(pattern, entry, default)) for pattern, entry in config.items()))


def _read_json(config: str | Path) -> Any:
    text = str(config)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the name
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"layer_config `{text}` is neither JSON text nor a file that can be read: {why}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"layer_config is no valid JSON: {error}") from None


def _entry(pattern: str, entry: Any, default: QuantScheme) -> QuantScheme | None:
    if entry == _KEEP_BITS or (isinstance(entry, str) and entry.lower() in ("16", "fp16", "bf16")):
        return None
    if isinstance(entry, str):
        return QuantScheme.parse(entry)
    if not isinstance(entry, Mapping):
        raise UsageError(f"layer_config: the entry of `{pattern}` must be a scheme, 16 or an object, got {entry!r}")
    for key in entry:
        if key not in _KEYS:
            raise unknown_name(f"key in the layer_config entry of `{pattern}`", key, _KEYS)
    if entry.get("bits", default.bits) == _KEEP_BITS:
        return None
    if any(entry.get(key, getattr(default, key)) != getattr(default, key) for key in ("bits", "data_type")):
        # what belongs to other numbers: an 8-bit layer among MXFP4 ones is no MXFP8
        default = replace(default, activation=None, group_rows=1)
    return replace(default, **entry)
