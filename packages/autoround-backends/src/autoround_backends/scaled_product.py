"""What the backends on torch's scaled matrix product share.

`torch.nn.functional.scaled_mm` multiplies codes of 8 or 4 bits on the tensor cores of an NVIDIA GPU, and both sides
come with scales. So it serves layers whose inputs are rounded too; `activation_codes` of the number family rounds them,
to the very numbers that tuning saw. Everywhere else the backend `reference` emulates the same layer: it multiplies the
same rounded inputs by the dequantized weight.

No GPU has run this. Doubles of the function, and torch's own check of shapes and strides, saw the arguments. So a
small layer is tried on the GPU before the first of its kind is taken, and one that fails or comes out wrong is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch

from autoround_core import Backend, FloatWeight, LinearSpec, QuantizedLayer, QuantScheme
from autoround_core.float_family import FloatFamily

_TRIAL = (256, 512)  # two tiles of scales, and two blocks, each way
_TRIAL_ROWS = 130
_TOLERANCE = 2.0**-7


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product. matrix: codes [rows, in], or [rows, in / 2] of 4 bits. scales, recipes: of equal length,
    the second by their names in torch's ScalingType. tiled: whether the first scales lie as in `scale_layout`."""

    matrix: torch.Tensor
    scales: tuple[torch.Tensor, ...]
    recipes: tuple[str, ...]
    tiled: bool = False


def multiply(inputs: Operand, weight: Operand, dtype: torch.dtype) -> torch.Tensor:
    """inputs [rows, in] @ weight [out, in].T in `dtype`."""
    functional = torch.nn.functional
    kinds, layouts = functional.ScalingType, functional.SwizzleType

    def described(operand: Operand) -> tuple[list, list]:
        first = layouts.SWIZZLE_32_4_4 if operand.tiled else layouts.NO_SWIZZLE
        return [getattr(kinds, name) for name in operand.recipes], [first, layouts.NO_SWIZZLE][: len(operand.recipes)]

    (kinds_a, layouts_a), (kinds_b, layouts_b) = described(inputs), described(weight)
    return functional.scaled_mm(
        inputs.matrix, weight.matrix.T, list(inputs.scales), kinds_a, list(weight.scales), kinds_b,
        layouts_a, layouts_b, output_dtype=dtype,
    )  # fmt: skip


class ScaledLinear(torch.nn.Module, ABC):
    """A layer that rounds its inputs and multiplies. Subclasses are final and one per number family."""

    def __init__(
        self, backend: str, family: FloatFamily, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert isinstance(layer.weight, FloatWeight) and layer.weight.scheme.activation is not None
        self.out_features, self.in_features = layer.weight.shape
        self._backend, self._family, self._dtype = backend, family, dtype
        self._scheme, self._activation = layer.weight.scheme, layer.weight.scheme.activation
        self.register_buffer("input_scale", None if layer.input_scale is None else layer.input_scale.to(device))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(device, dtype))

    @abstractmethod
    def input_operand(self, codes: torch.Tensor, scale: torch.Tensor) -> Operand:
        """codes: uint8 [rows, in]. scale: [rows, groups], as stored. The operand may have more rows at the end."""

    @abstractmethod
    def weight_operand(self) -> Operand:
        """The weight as the product takes it."""

    @abstractmethod
    def record(self) -> FloatWeight:
        """The weight as it came."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        shape = (*inputs.shape[:-1], self.out_features)
        # what is computed from a transposed input would be transposed too, and the product refuses that
        rows = inputs.reshape(-1, self.in_features).contiguous()
        if not len(rows):
            return inputs.new_empty(shape)
        codes, scale = self._family.activation_codes(rows, self._activation, self.input_scale)
        output = multiply(self.input_operand(codes, scale), self.weight_operand(), self._dtype)[: len(rows)]
        # not every kernel adds it, and none in float32
        output = output if self.bias is None else output + self.bias
        return output.reshape(shape)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized [out, in], for models that read a layer's weight themselves."""
        return self.record().dequantize(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scheme}, backend={self._backend}"


class ScaledBackend(Backend):
    """What the backends have in common; a subclass is data, and says what its product needs of the GPU."""

    priority = 45
    family: FloatFamily
    linear: type[ScaledLinear]

    @abstractmethod
    def capability(self, scheme: QuantScheme) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The least compute capability and the greatest, None = any later one."""

    def why_not_scales(self, spec: LinearSpec) -> str | None:
        """None if the scales of the layer's weight lie as the product takes them."""
        return None

    def missing(self) -> str | None:
        if hasattr(torch.nn.functional, "scaled_mm"):
            return None
        return f"torch {torch.__version__} has no scaled_mm; pip install torch>=2.10"

    def why_not_layer(self, spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        assert spec.scheme is not None
        return (
            why_not_inputs(spec) or self.why_not_scales(spec) or why_not_gpu(device, *self.capability(spec.scheme))
            or why_not_tried(self, self.family, spec.scheme, device, dtype)
        )  # fmt: skip

    def build(self, layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        return self.linear(self.name, self.family, layer, device, dtype)


def why_not_inputs(spec: LinearSpec) -> str | None:
    """None if the inputs of the layer are rounded, to numbers and groups of the same kind as its weight."""
    scheme = spec.scheme
    assert scheme is not None
    if scheme.activation is None:
        return f"needs rounded inputs, and {scheme} leaves them in 16 bits; the backend `reference` runs it"
    wanted = (scheme.bits, scheme.data_type, scheme.group_size)
    if (scheme.activation.bits, scheme.activation.data_type, scheme.activation.group_size) != wanted:
        return f"needs inputs of the kind of the weight, got {scheme}"
    return None


def why_not_gpu(device: torch.device, least: tuple[int, int], most: tuple[int, int] | None = None) -> str | None:
    """None if `device` is an NVIDIA GPU whose compute capability is within the two, both included."""
    if torch.version.hip:
        return "needs CUDA, and this torch is built for ROCm"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"torch sees no CUDA device `{device}` here"
    try:
        found = torch.cuda.get_device_capability(device)
    except RuntimeError as error:
        return f"torch cannot use `{device}`: {_line(error)}"
    if least <= found and (most is None or found <= most):
        return None
    wanted = f"{least[0]}.{least[1]}" + ("" if most is None else f" to {most[0]}.{most[1]}")
    return f"needs compute capability {wanted}, {device} has {found[0]}.{found[1]}"


@cache
def why_not_tried(
    backend: Backend, family: FloatFamily, scheme: QuantScheme, device: torch.device, dtype: torch.dtype
) -> str | None:
    """None if a small layer comes out right on `device`, otherwise what went wrong. Tried once, then remembered."""
    generator = torch.Generator().manual_seed(0)

    def numbers(rows: int, columns: int) -> torch.Tensor:
        # magnitudes differ from group to group, so that a scale in the wrong place is seen
        sizes = 2.0 ** torch.randint(-3, 4, (rows, columns // 16), generator=generator)
        return torch.randn(rows, columns, generator=generator) * sizes.repeat_interleave(16, 1) / columns**0.5

    inputs, activation = numbers(_TRIAL_ROWS, _TRIAL[1]).to(dtype), scheme.activation
    assert activation is not None
    input_scale = family.input_scale(activation, inputs.abs().max()) if activation.calibrated else None
    layer = QuantizedLayer("trial", family.round_to_nearest(numbers(*_TRIAL), scheme), None, input_scale)
    try:
        with torch.no_grad():
            output = backend.build(layer, device, dtype)(inputs.to(device)).cpu().double()
    except (RuntimeError, ValueError) as error:  # what torch raises without a kernel for the GPU, or in its build
        return f"torch cannot multiply {scheme} on `{device}`: {_line(error)}"
    rounded = family.quantize_activation(inputs.float(), activation, input_scale).double()
    matrix = layer.weight.dequantize(torch.float32).double()
    # written so that NaN fails
    right = (output - rounded @ matrix.T).abs() <= _TOLERANCE * (rounded.abs() @ matrix.abs().T)
    return None if right.all() else f"torch's product of {scheme} is wrong on `{device}`, tried on a small layer"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
