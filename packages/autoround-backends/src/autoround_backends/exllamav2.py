"""ExLlamaV2's CUDA kernel for 4 bits, symmetric or not, through GPTQModel's class.

The kernel dequantizes into a scratch buffer when it gets many rows; layers of one device share the largest so far.
It computes in float16, and values of a bfloat16 model may not fit into that, so it takes float16 only.
No GPU has run it; see `gptqmodel_layers`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from autoround_backends import gptqmodel_layers
from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support

_CAPABILITY = (6, 0)


class ExllamaV2(Backend):
    name = "exllamav2"
    priority = 60
    support = Support(
        devices=("cuda",), dtypes=("float16",), bits=(4,), group_sizes=(-1, 32, 64, 128), whole_groups=True,
        in_multiple=32, out_multiple=32, packages=(gptqmodel_layers.PACKAGE,), install=gptqmodel_layers.INSTALL,
    )

    def __init__(self) -> None:
        # goes when the last layer that holds it goes
        self._scratch: weakref.WeakValueDictionary[torch.device, Any] = weakref.WeakValueDictionary()

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        return gptqmodel_layers.why_not_gpu(device, dtype, _CAPABILITY)

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when GPTQModel refuses the layer, or its kernel cannot be compiled."""
        assert isinstance(layer.weight, AffineWeight)
        kind = gptqmodel_layers.class_named("nn_modules.qlinear.exllamav2", "ExllamaV2Linear")
        words = gptqmodel_layers.gptq_words(layer.weight)
        inner = gptqmodel_layers.make_inner(kind, layer, words, device, dtype)
        scratch = self._scratch_of(device, inner.temp_dq_size())
        gptqmodel_layers.finish(inner, scratch_space=scratch)
        module = gptqmodel_layers.GptqmodelLinear(inner, layer, dtype, self.name)
        module.scratch = scratch  # the kernel keeps a bare pointer into it
        return module

    def _scratch_of(self, device: torch.device, size: int) -> Any:
        found = self._scratch.get(device)
        if found is None or found.scratch_bytes < size:
            kind = gptqmodel_layers.class_named("utils.exllamav2", "ScratchSpace")
            self._scratch[device] = found = kind(scratch_bytes=size, dev=device)
        return found
