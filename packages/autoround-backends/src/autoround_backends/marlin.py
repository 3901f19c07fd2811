"""Marlin, the fast CUDA kernel for symmetric 4 and 8 bits, through GPTQModel's class.

GPTQModel pads layers whose shape no tile of the kernel divides, at a cost in every call. Like its own automatic
choice, this backend leaves those to the next one. No GPU has run it; see `gptqmodel_layers`.
"""

from __future__ import annotations

import torch

from autoround_backends import gptqmodel_layers
from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support

_CAPABILITY = (7, 5)
_TILES = ((64, 128), (128, 64))  # (out, in)


class Marlin(Backend):
    name = "marlin"
    priority = 70
    support = Support(
        devices=("cuda",), dtypes=("float16", "bfloat16"), bits=(4, 8), sym=(True,), group_sizes=(-1, 32, 64, 128),
        whole_groups=True, in_multiple=64, out_multiple=64, packages=(gptqmodel_layers.PACKAGE,),
        install=gptqmodel_layers.INSTALL,
    )

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        if not any(spec.out_features % out == spec.in_features % wide == 0 for out, wide in _TILES):
            return f"needs 64 to divide one side and 128 the other, got {spec.out_features} x {spec.in_features}"
        return gptqmodel_layers.why_not_gpu(device, dtype, _CAPABILITY)

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when GPTQModel refuses the layer, or its kernel cannot be compiled."""
        assert isinstance(layer.weight, AffineWeight)
        kind = gptqmodel_layers.class_named("nn_modules.qlinear.marlin", "MarlinLinear")
        words = gptqmodel_layers.gptq_words(layer.weight)
        return gptqmodel_layers.make_linear(kind, layer, words, device, dtype, self.name)
