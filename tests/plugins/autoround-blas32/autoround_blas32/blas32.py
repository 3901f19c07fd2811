"""Backend `blas32`: dequantize once, to float32, and let BLAS multiply. Eight times the bytes of 4 bits."""

import torch

from autoround_core import Backend, Support


class Blas32(Backend):
    name = "blas32"
    priority = -1  # below the reference: runs when it is asked for by name
    support = Support(devices=("cpu",), dtypes=("float32", "bfloat16", "float16"), data_types=())

    def build(self, layer, device, dtype):
        return Blas32Linear(layer, dtype)


class Blas32Linear(torch.nn.Module):
    def __init__(self, layer, dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", layer.weight.dequantize(torch.float32))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs.float(), self.weight, self.bias).to(self.dtype)
