"""Finds plugins and answers by name.

Discovery is our own loop over the entry points of the group `autoround`: pluggy's loader would let one
broken plugin end the program. A plugin that fails to import or to register, or whose hook fails when it is
called, is recorded, shown by `autoround plugins`, and mentioned in every "unknown format" or "unknown backend"
error, because the name that is missing may have been its. AUTOROUND_PLUGINS=a,b limits discovery to those
entry points.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from autoround_core import hookspecs
from autoround_core.errors import PluginError, unknown_name


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One entry point. error: why it is not active, None if it is. hooks: the hooks it implements."""

    name: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...] = ()
    error: str | None = None


class Registry:
    """The plugins of one process, and what they contribute."""

    def __init__(self, points: Iterable[EntryPoint] | None = None, allowed: Iterable[str] | None = None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginRecord] = []
        names = None if allowed is None else set(allowed)
        for point in entry_points(group=hookspecs.PROJECT) if points is None else points:
            if names is None or point.name in names:
                self.plugins.append(self._load(point))

    def _load(self, point: EntryPoint) -> PluginRecord:
        dist = point.dist
        distribution = dist.name if dist else "?"
        # entry points of two distributions may be called alike, which is no reason to lose one of them
        taken = any(record.name == point.name for record in self.plugins)
        name = f"{distribution}:{point.name}" if taken else point.name
        about = dict(name=name, distribution=distribution, version=dist.version if dist else "?", module=point.value)
        try:
            plugin = point.load()
            misspelt = self._misspelt(plugin)
            if misspelt:
                return PluginRecord(**about, error=misspelt)
            self._manager.register(plugin, name=name)
        except (Exception, SystemExit) as error:  # whatever a stranger's import raises must not end the program
            return PluginRecord(**about, error=_one_line(error))
        hooks = tuple(sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or ()))
        return PluginRecord(**about, hooks=hooks)

    def _misspelt(self, plugin: object) -> str | None:
        known = [name for name in vars(hookspecs) if name.startswith("autoround_")]
        for name in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, name)
            hook = (options.get("specname") or name) if options else None
            if hook and hook not in known:
                close = difflib.get_close_matches(hook, known, n=1)
                return f"`{hook}` is no hook" + (f"; did you mean `{close[0]}`?" if close else "")
        return None

    @property
    def failures(self) -> list[PluginRecord]:
        return [record for record in self.plugins if record.error is not None]

    @property
    def failure_notes(self) -> str:
        """For the end of an error about a name that nobody knows: it may have been that of a plugin which failed."""
        return "".join(f"; plugin `{record.name}` failed: {record.error}" for record in self.failures)

    def _collect(self, hook: str, key: Callable[[Any], str]) -> dict[str, Any]:
        """Everything that the plugins return from `hook`, by name. Raises PluginError for a name claimed twice."""
        found: dict[str, Any] = {}
        owners: dict[str, str] = {}
        # called one by one, not through the manager, to know whose a name or a failure is
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                items = [(key(item), item) for item in implementation.function() or ()]
            except Exception as error:
                self._failed(implementation.plugin_name, hook, error)
                continue
            for name, item in items:
                if name in found:
                    raise PluginError(
                        f"`{name}` is registered twice ({hook}): by {owners[name]} and {implementation.plugin_name}"
                    )
                found[name], owners[name] = item, implementation.plugin_name
        return found

    def _failed(self, plugin: str, hook: str, error: Exception) -> None:
        """Record that a hook of an active plugin failed when it was called."""
        for i, record in enumerate(self.plugins):
            if record.name == plugin and record.error is None:
                self.plugins[i] = replace(record, error=f"{hook}: {_one_line(error)}")

    def formats(self) -> dict[str, Any]:
        return self._collect("autoround_formats", lambda item: item.name)

    def backends(self) -> dict[str, Any]:
        return self._collect("autoround_backends", lambda item: item.name)

    def algorithms(self) -> dict[str, Any]:
        return self._collect("autoround_algorithms", lambda item: item.name)

    def number_families(self) -> dict[str, Any]:
        return self._collect("autoround_number_families", lambda item: item.data_type)

    def format(self, spelling: str) -> Any:
        """The format of a spelling `name` or `name:variant`."""
        name, _, variant = spelling.partition(":")
        found = self._named("format", name, self.formats())
        return found.variant(variant) if variant else found

    def algorithm(self, name: str) -> Any:
        return self._named("algorithm", name, self.algorithms())

    def number_family(self, data_type: str) -> Any:
        return self._named("number family", data_type, self.number_families())

    def adapter(self, config: dict[str, Any]) -> Any:
        return self._manager.hook.autoround_model_adapter(config=config)

    def add_commands(self, cli: Any) -> None:
        for implementation in self._manager.hook.autoround_commands.get_hookimpls():
            try:
                implementation.function(*[cli for _ in implementation.argnames])
            except Exception as error:
                self._failed(implementation.plugin_name, "autoround_commands", error)

    def _named(self, kind: str, name: str, known: dict[str, Any]) -> Any:
        if name not in known:
            raise unknown_name(kind, name, known, self.failure_notes)
        return known[name]


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@lru_cache(maxsize=1)
def get_registry() -> Registry:
    """The registry of this process, built at first use."""
    allowed = os.environ.get("AUTOROUND_PLUGINS")
    return Registry(allowed=[name.strip() for name in allowed.split(",")] if allowed is not None else None)
