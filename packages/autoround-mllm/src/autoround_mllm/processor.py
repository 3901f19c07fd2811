"""The processor of a vision-language checkpoint: its tokenizer, image processor and chat template as one object.

Transformers builds a processor from all of its parts or not at all, and its video processors exist only beside
torchvision. Calibration needs images only, and those are read by Pillow. So where torchvision is missing, what needs
it is replaced while a processor is built. The stand-in for a video processor keeps the settings, so that a saved
processor has lost nothing, and refuses videos.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from autoround_core import ModelError, UnsupportedError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_FILES = ("preprocessor_config.json", "processor_config.json")
# what a processor insists on having, although only the text beside a video is made with it: (module, name)
_FOR_VIDEOS = (("transformers.models.smolvlm.processing_smolvlm", "num2words"),)
# processors that import from an image processor for torchvision what the one for Pillow has too: (package, class)
_FROM_PILLOW = (("transformers.models.pixtral", "PixtralProcessor"),)


def load_processor(path: Path, *, trust_remote_code: bool) -> ProcessorMixin | None:
    """The processor in a model directory; None if it has none. Raises ModelError if it cannot be built.

    Without torchvision it takes texts and images as usual, and videos raise UnsupportedError.
    """
    if not any((path / name).is_file() for name in _FILES):
        return None
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import is_torchvision_available

    from autoround_core.transformers_adapter import quiet

    with ExitStack() as stack:
        stack.enter_context(quiet())  # that an image processor of Pillow is taken where there is no torchvision
        if not is_torchvision_available():
            stack.enter_context(_without_torchvision())
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever it is: the tokenizers library raises nothing more precise
            raise ModelError(f"cannot load the processor of `{path}`: {_reason(error, path)}") from error
    if not isinstance(processor, ProcessorMixin):
        found = type(processor).__name__
        raise ModelError(f"`{path}` has no processor of texts and images together, only a {found}")
    return processor


def _reason(error: Exception, path: Path) -> str:
    """What Transformers says, without its advice."""
    text = " ".join(str(error).replace(str(path), "the directory").split())
    if "trust_remote_code" in text:
        return "it needs code of its own; read that code, then pass --trust_remote_code"
    if "torchvision" in text.lower():
        return "it needs torchvision, which is not installed or does not fit this torch; `pip install torchvision`"
    if isinstance(error, KeyError):
        return f"an entry {text} is missing"
    return re.split(r"(?<=\w)[.:] ", text)[0] or type(error).__name__


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let a processor be built for images, with the stand-in for its video processor."""
    from transformers import processing_utils

    loaders = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    # this table imports what it is asked for, one by one
    ours = {name: loaders[name] for name in loaders.keys()} | {"video_processor": _stand_in()}
    # the class that a video processor must have is not even a name in `transformers` without torchvision
    bases = {**processing_utils.MODALITY_TO_BASE_CLASS_MAPPING, "video_processor": "ImageProcessingMixin"}
    places = [
        (processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", ours),
        (processing_utils, "MODALITY_TO_BASE_CLASS_MAPPING", bases),
    ]
    for module, name in _FOR_VIDEOS:
        with suppress(ImportError, AttributeError):  # a Transformers that has not this, or not so
            holder = importlib.import_module(module)
            places.append((holder, name, getattr(holder, name) or _refuse))
    for package, name in _FROM_PILLOW:
        with suppress(ImportError, AttributeError):
            places.append((importlib.import_module(package), name, _from_pillow(package, name)))
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(_replaced(*place))
        yield


def _from_pillow(package: str, name: str) -> Any:
    model = package.rpartition(".")[2]
    missing = f"{package}.image_processing_{model}"
    sys.modules[missing] = importlib.import_module(f"{package}.image_processing_pil_{model}")
    try:
        return getattr(importlib.import_module(f"{package}.processing_{model}"), name)
    finally:
        del sys.modules[missing]


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedError("videos need torchvision, which is not installed; pass images, or `pip install torchvision`")


@cache
def _stand_in() -> type:
    from transformers.video_processing_utils import VideoProcessorMixin

    class VideosRefused(VideoProcessorMixin):
        """Holds the settings of a video processor as the checkpoint has them."""

        def __init__(self, **settings: Any) -> None:
            # as the real ones do: what is not set is there, and None
            super().__init__(**{**dict.fromkeys(self.valid_kwargs.__annotations__), **settings})
            self._settings = settings

        def to_dict(self) -> dict[str, Any]:
            return deepcopy(self._settings)

        __call__ = preprocess = fetch_videos = _refuse

    return VideosRefused
