"""The formats of this package, as a plugin of autoround-core."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_formats():
    from autoround_export.auto_round import AutoRoundFormat
    from autoround_export.dense import DenseFormat

    return [AutoRoundFormat(), DenseFormat()]
