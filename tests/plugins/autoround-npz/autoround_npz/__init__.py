from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_formats():
    from autoround_npz.npz import NpzFormat  # here, because it imports torch

    return [NpzFormat()]
