"""The reference backend: dequantize, then multiply. Slow, exact, runs everything everywhere."""

from __future__ import annotations

import torch

from autoround_core import Backend, QuantizedLayer, QuantizedWeight, Support, get_registry


class Reference(Backend):
    """The truth that other backends are compared with. Memory: one byte per weight."""

    name = "reference"
    priority = 0
    support = Support(data_types=(), activations=True)

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return _DequantizedLinear(layer, device, dtype)


class _DequantizedLinear(torch.nn.Module):
    def __init__(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight: QuantizedWeight = layer.weight.to(device)
        self._activation = layer.weight.scheme.activation
        self._input_scale = None if layer.input_scale is None else layer.input_scale.to(device)
        self._family = get_registry().number_families()[layer.weight.scheme.data_type] if self._activation else None
        self._dtype = dtype
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized, for models that read a layer's weight themselves."""
        return self._weight.dequantize(self._dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._activation:
            inputs = self._family.quantize_activation(inputs, self._activation, self._input_scale)
        return torch.nn.functional.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._weight.scheme}, backend=reference"
