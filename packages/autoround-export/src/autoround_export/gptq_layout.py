"""The GPTQ tensor layout: codes packed along the input features.

qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales float16 [groups, out]; dense
little-endian bitstreams. Version 1 of the layout stores zero_point - 1, version 2 stores zero_point. Files of
quant_method "gptq" add g_idx int32 [in], the group of each input feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autoround_core import AffineWeight, CheckpointError, LinearSpec, QuantScheme, TensorLayout, pack_bits, unpack_bits

_WORD = 32


class GptqLayout(TensorLayout):
    """zero_offset: 1 for version 1 of the layout, 0 for version 2. A g_idx that reorders features is refused."""

    tensor_names = ("qweight", "qzeros", "scales")
    optional_names = ("g_idx",)

    def __init__(self, zero_offset: int, *, with_g_idx: bool = False) -> None:
        self.name = "gptq" if zero_offset else "gptq_v2"
        self._zero_offset, self._with_g_idx = zero_offset, with_g_idx

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        if spec.scheme.data_type != "int" or spec.scheme.activation:
            return f"the GPTQ layout stores integers for inputs in 16 bits, not {spec.scheme}"
        if self._zero_offset and not spec.scheme.sym:
            return "this packing stores zero_point - 1, which an asymmetric zero_point of 0 does not survive"
        for what, size in (("in_features", spec.in_features), ("out_features", spec.out_features)):
            if size % _WORD:
                return f"{what} must be divisible by {_WORD}, got {size}"
        return None

    def pack(self, weight: AffineWeight) -> dict[str, torch.Tensor]:
        bits = weight.scheme.bits
        zeros = weight.zero_point.T.contiguous() - self._zero_offset
        tensors = {
            "qweight": pack_bits(weight.codes, bits).T.contiguous(),
            "qzeros": pack_bits(zeros, bits),
            "scales": weight.scale.T.contiguous(),
        }
        if self._with_g_idx:
            tensors["g_idx"] = _g_idx(weight.scheme, weight.shape[1])
        return tensors

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> AffineWeight:
        if tensors["qweight"].dim() != 2:
            raise CheckpointError(f"qweight must be [in*bits/32, out], got {tuple(tensors['qweight'].shape)}")
        words, out_features = tensors["qweight"].shape
        in_features = words * _WORD // scheme.bits
        if shape not in (None, (out_features, in_features)):
            raise CheckpointError(f"qweight holds {(out_features, in_features)} weights, {shape} were expected")
        try:
            zeros = unpack_bits(tensors["qzeros"], scheme.bits, out_features) + self._zero_offset
            weight = AffineWeight(
                scheme=scheme,
                codes=unpack_bits(tensors["qweight"].T, scheme.bits, in_features),
                scale=tensors["scales"].T.contiguous(),
                zero_point=zeros.T.contiguous(),
            ).check()
        except ValueError as error:
            raise CheckpointError(f"GPTQ tensors contradict {scheme}: {error}") from None
        if "g_idx" in tensors and not torch.equal(tensors["g_idx"].int(), _g_idx(scheme, in_features)):
            raise CheckpointError("g_idx assigns features to groups out of order (act order), which is not supported")
        return weight


def _g_idx(scheme: QuantScheme, in_features: int) -> torch.Tensor:
    return torch.arange(in_features, dtype=torch.int32) // scheme.group_length(in_features)
