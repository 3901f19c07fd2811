"""The tensor layouts of compressed-tensors, one for each of its `format` strings.

Codes lie in the order of the weight itself, [out, in]; scales are [out, groups]. A weight of integers is stored
as code - 2**(bits-1), a signed number, and packed by adding that offset again: what lies in the file are the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from autoround_core import (
    AffineWeight,
    CheckpointError,
    FloatWeight,
    LinearSpec,
    QuantizedWeight,
    QuantScheme,
    TensorLayout,
    pack_bits,
    unpack_bits,
)

_SHIFT = 128  # int8 weights: code - 128


class _Layout(TensorLayout):
    """What the layouts have in common: which schemes they are for, and how contradictions are reported."""

    def __init__(self, name: str, takes: Callable[[QuantScheme], bool]) -> None:
        self.name, self._takes = name, takes

    def takes(self, scheme: QuantScheme) -> bool:
        """Whether this is the layout for weights of `scheme`."""
        return self._takes(scheme)

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        if not self._takes(spec.scheme):
            return f"{self.name} does not store {spec.scheme}"
        if spec.in_features % spec.scheme.group_length(spec.in_features) or spec.in_features < spec.scheme.group_size:
            return f"in_features ({spec.in_features}) must be divisible by group_size ({spec.scheme.group_size})"
        return None

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        try:
            weight = self._unpack(tensors, scheme)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"the tensors of {self.name} contradict {scheme}: {error}") from None
        if shape not in (None, weight.shape):
            raise CheckpointError(f"the tensors hold {weight.shape} weights, {shape} were expected")
        return weight

    def _unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedWeight:
        raise NotImplementedError


class PackQuantized(_Layout):
    """Integers of 2 to 8 bits: weight_packed int32 [out, ceil(in*bits/32)], weight_shape int64 [2].

    An asymmetric weight adds weight_zero_point int32 [ceil(out*bits/32), groups], packed along the rows.
    """

    tensor_names = ("weight_packed", "weight_scale", "weight_shape")
    optional_names = ("weight_zero_point",)

    def pack(self, weight: AffineWeight) -> dict[str, torch.Tensor]:
        bits = weight.scheme.bits
        tensors = {
            "weight_packed": pack_bits(weight.codes, bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if not weight.scheme.sym:
            tensors["weight_zero_point"] = pack_bits(weight.zero_point.T.contiguous(), bits).T.contiguous()
        return tensors

    def _unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> AffineWeight:
        out_features, in_features = (int(size) for size in tensors["weight_shape"])
        scale = tensors["weight_scale"]
        if scheme.sym:
            zeros = torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
        elif "weight_zero_point" in tensors:
            zeros = unpack_bits(tensors["weight_zero_point"].T.contiguous(), scheme.bits, out_features).T.contiguous()
        else:
            raise ValueError("there is no weight_zero_point")
        codes = unpack_bits(tensors["weight_packed"], scheme.bits, in_features)
        return AffineWeight(scheme, codes, scale, zeros).check()


class IntQuantized(_Layout):
    """Integers of 8 bits, one scale per row: weight int8 [out, in], weight_scale [out, 1]."""

    tensor_names = ("weight", "weight_scale")

    def pack(self, weight: AffineWeight) -> dict[str, torch.Tensor]:
        return {"weight": (weight.codes.to(torch.int16) - _SHIFT).to(torch.int8), "weight_scale": weight.scale}

    def _unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> AffineWeight:
        _require(tensors, "weight", torch.int8)
        codes = (tensors["weight"].to(torch.int16) + _SHIFT).to(torch.uint8)
        zeros = torch.full(tensors["weight_scale"].shape, _SHIFT, dtype=torch.uint8)
        return AffineWeight(scheme, codes, tensors["weight_scale"], zeros).check()


class FloatQuantized(_Layout):
    """E4M3 numbers: weight float8_e4m3fn [out, in].

    weight_scale is [out, 1] for rows, [1] for the whole matrix, [ceil(out/128), ceil(in/128)] for blocks, and uint8
    [out, in/32] (E8M0) in the format mxfp8-quantized.
    """

    def __init__(self, name: str, takes: Callable[[QuantScheme], bool], scale: str = "weight_scale") -> None:
        """scale: what the scales are called."""
        super().__init__(name, takes)
        self._scale = scale
        self.tensor_names = ("weight", scale)

    def why_not(self, spec: LinearSpec) -> str | None:
        # a block at the border may be smaller
        return None if spec.scheme and spec.scheme.group_rows > 1 and self.takes(spec.scheme) else super().why_not(spec)

    def pack(self, weight: FloatWeight) -> dict[str, torch.Tensor]:
        scale = weight.scale.reshape(1) if weight.scheme.group_rows < 0 else weight.scale
        return {"weight": weight.codes.view(torch.float8_e4m3fn), self._scale: scale}

    def _unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> FloatWeight:
        _require(tensors, "weight", torch.float8_e4m3fn)
        scale = tensors[self._scale]
        # some writers leave out the axis of the one group in a row
        scale = scale.reshape(1, 1) if scheme.group_rows < 0 else scale[:, None] if scale.dim() == 1 else scale
        return FloatWeight(scheme, tensors["weight"].view(torch.uint8), scale).check()


class Float4Packed(_Layout):
    """E2M1 numbers: weight_packed uint8 [out, in/2], the even element in the low nibble; weight_scale [out, groups].

    Scales are uint8 (E8M0) in mxfp4-pack-quantized, float8_e4m3fn in nvfp4-pack-quantized, which adds
    weight_global_scale float32 [1].
    """

    input_scale_name = "input_global_scale"

    def __init__(self, name: str, takes: Callable[[QuantScheme], bool], *, with_global: bool) -> None:
        super().__init__(name, takes)
        self.tensor_names = ("weight_packed", "weight_scale", *(["weight_global_scale"] if with_global else []))

    def pack(self, weight: FloatWeight) -> dict[str, torch.Tensor]:
        even, odd = weight.codes[:, ::2], weight.codes[:, 1::2]
        tensors = {"weight_packed": even | odd << 4, "weight_scale": weight.scale}
        return tensors if weight.global_scale is None else tensors | {"weight_global_scale": weight.global_scale}

    def _unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> FloatWeight:
        packed = _require(tensors, "weight_packed", torch.uint8)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], -1)
        return FloatWeight(scheme, codes, tensors["weight_scale"], tensors.get("weight_global_scale")).check()


def _require(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(f"{name} must be {dtype} with two axes, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


LAYOUTS: tuple[_Layout, ...] = (
    PackQuantized("pack-quantized", lambda scheme: scheme.data_type == "int" and scheme.activation is None),
    IntQuantized("int-quantized", lambda scheme: scheme.data_type == "int" and scheme.activation is not None),
    FloatQuantized("float-quantized", lambda scheme: scheme.data_type == "fp"),
    FloatQuantized("mxfp8-quantized", lambda scheme: scheme.data_type == "mx_fp" and scheme.bits == 8),
    Float4Packed("mxfp4-pack-quantized", lambda scheme: scheme.data_type == "mx_fp" and scheme.bits == 4,
                 with_global=False),
    Float4Packed("nvfp4-pack-quantized", lambda scheme: scheme.data_type == "nv_fp", with_global=True),
)  # fmt: skip


def layout_of(scheme: QuantScheme) -> TensorLayout | None:
    """The layout for weights of `scheme`, None if compressed-tensors has none."""
    return next((layout for layout in LAYOUTS if layout.takes(scheme)), None)
