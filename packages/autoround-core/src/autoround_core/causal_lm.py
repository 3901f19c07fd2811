"""Decoder-only language models of Transformers."""

from __future__ import annotations

from typing import Any

import torch

from autoround_core.transformers_adapter import TransformersAdapter


class CausalLM(TransformersAdapter):
    """Whatever `AutoModelForCausalLM` builds."""

    def auto_class(self, config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def prepare(self, model: torch.nn.Module) -> None:
        super().prepare(model)
        # names as a fresh skeleton of this class has them, whatever prefix the source used
        model._weight_conversions = None
