"""Vision-language models for AutoRound: `AutoRoundMLLM(model, bits=4).quantize_and_save(directory)`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME_OF = {
    "AutoRoundMLLM": "mllm", "Conversation": "conversation", "drawings": "drawings", "image_text_samples": "samples",
    "load_processor": "processor",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module `autoround_mllm` has no attribute `{name}`")
    return getattr(import_module(f"autoround_mllm.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
