"""AWQ's CUDA kernel for 4 bits, symmetric or not, through GPTQModel's class.

The kernel itself asks for more than the class says: groups in multiples of 32, out_features in multiples of 64 and
of the group size. No GPU has run it; see `gptqmodel_layers`.
"""

from __future__ import annotations

import torch

from autoround_backends import gptqmodel_layers
from autoround_core import AffineWeight, Backend, LinearSpec, QuantizedLayer, Support

_CAPABILITY = (7, 5)


class AwqGemm(Backend):
    name = "awq_gemm"
    priority = 55
    support = Support(
        devices=("cuda",), dtypes=("float16", "bfloat16"), bits=(4,), group_sizes=(-1, 32, 64, 128),
        whole_groups=True, in_multiple=32, out_multiple=64, packages=(gptqmodel_layers.PACKAGE,),
        install=gptqmodel_layers.INSTALL,
    )

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        length = gptqmodel_layers.length_of(spec)
        if spec.out_features % length:
            return f"needs out_features divisible by the group size {length}, got {spec.out_features}"
        return gptqmodel_layers.why_not_gpu(device, dtype, _CAPABILITY)

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Raises UnsupportedError when GPTQModel refuses the layer, or its kernel cannot be compiled."""
        assert isinstance(layer.weight, AffineWeight)
        kind = gptqmodel_layers.class_named("nn_modules.qlinear.gemm_awq", "AwqGEMMLinear")
        words = gptqmodel_layers.awq_words(layer.weight)
        return gptqmodel_layers.make_linear(kind, layer, words, device, dtype, self.name)
