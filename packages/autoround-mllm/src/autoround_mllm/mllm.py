"""The face of the library for models of images and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoround_core import AutoRound, UsageError
from autoround_core.transformers_adapter import takes_images


class AutoRoundMLLM(AutoRound):
    """Quantizes one vision-language model.

    processor: the Transformers processor, None = the one beside the model. dataset: conversations about images, see
    `autoround_mllm.image_text_samples`; None = the drawn set `synthetic`; one of text calibrates on text alone.
    quant_nontext_module: the vision tower and the projector too. skip_bad_samples: leave out what cannot be read. All
    else is as in `autoround_core.AutoRound`.

    Raises UsageError for a model that takes no images.
    """

    def __init__(self, model: str | Path | torch.nn.Module, processor: Any = None, **options: Any) -> None:
        if processor is not None and not hasattr(processor, "image_processor"):
            raise UsageError(f"processor is a {type(processor).__name__}; give the model's AutoProcessor, which has an "
                             "image processor and a tokenizer")
        super().__init__(model, processor, **options)
        if not takes_images(self._config):
            raise UsageError(f"a `{self._config.get('model_type')}` model takes no images; use AutoRound or "
                             "`autoround quantize`")
