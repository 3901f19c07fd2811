"""The backends of this package, as a plugin of autoround-core."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_backends():
    from autoround_backends.cpu_int4 import CpuInt4
    from autoround_backends.cpu_int8 import CpuInt8
    from autoround_backends.cpu_native import CpuNative
    from autoround_backends.reference import Reference

    return [Reference(), CpuInt4(), CpuInt8(), CpuNative()]
