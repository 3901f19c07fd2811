"""What this package contributes to AutoRound."""

from __future__ import annotations

from autoround_core.hookspecs import hookimpl


@hookimpl
def autoround_model_adapter(config):
    from autoround_core.transformers_adapter import takes_images
    from autoround_mllm.image_text_lm import ImageTextLM

    return ImageTextLM() if takes_images(config) else None
