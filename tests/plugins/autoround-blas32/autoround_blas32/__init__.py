from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_backends():
    from autoround_blas32.blas32 import Blas32  # here, because it imports torch

    return [Blas32()]
