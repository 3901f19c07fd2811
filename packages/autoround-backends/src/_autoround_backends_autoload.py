"""Lets Transformers load our checkpoints without an import of ours, once autoround-backends is installed.

torch calls `autoload` at the end of `import torch` (entry-point group `torch.backends`). It imports nothing heavy: it
leaves a note for Python's import system to register the loader after Transformers' quantizers have been imported. This
is a module of its own, outside the package, because importing the package here would import torch again, half-made.

An exception in such an entry point would break `import torch`, so none may leave this module.
"""

import importlib.abc
import importlib.util
import os
import sys

_QUANTIZERS = "transformers.quantizers.auto"
_MODELS = "transformers.modeling_utils"


def autoload():
    """Called by torch. Yields to the package `auto_round`, which loads the same checkpoints, unless told otherwise."""
    try:
        if os.environ.get("AUTOROUND_BACKENDS_AUTOLOAD", "1") == "0":
            return
        override = os.environ.get("AUTOROUND_BACKENDS_OVERRIDE", "0") == "1"
        if override or importlib.util.find_spec("auto_round") is None:
            install()
    except Exception as error:
        _complain(error)


def install():
    """Register now if Transformers' quantizers are there, else as soon as they are."""
    quantizers = sys.modules.get(_QUANTIZERS)
    if quantizers is None:
        _wait_for(_QUANTIZERS)
    elif hasattr(quantizers, "get_hf_quantizer"):  # the last name that the module defines
        _register()
    else:
        # it is being imported at this moment, and imports torch; modeling_utils comes after it
        _wait_for(_MODELS)


def _register():
    try:
        # imported, it registers itself; not `from`: it may be what is importing Transformers at this moment
        import autoround_backends.transformers_loader  # noqa: F401
    except Exception as error:
        _complain(error)


def _complain(error):
    print(f"autoround-backends: not registered with Transformers: {error}", file=sys.stderr)


def _wait_for(name):
    if not any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _After(name))


class _After(importlib.abc.MetaPathFinder):
    """Finds one module as Python would have found it, and registers when its code has run."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        install()
