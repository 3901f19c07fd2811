"""The AWQ "gemm" tensor layout: four bits, codes packed along the output features in an interleaved order.

qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales float16 [groups, out]. Nibble j of a word, from
the lowest, holds output column ORDER[j] of the word's eight; zero points as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autoround_core import AffineWeight, CheckpointError, LinearSpec, QuantScheme, TensorLayout, pack_bits, unpack_bits

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(8))


def _reorder(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return codes.view(*codes.shape[:-1], -1, 8)[..., list(order)].reshape(codes.shape)


class AwqLayout(TensorLayout):
    """The layout of AutoAWQ's WQLinear_GEMM."""

    name = "awq"
    tensor_names = ("qweight", "qzeros", "scales")

    def why_not(self, spec: LinearSpec) -> str | None:
        scheme = spec.scheme
        assert scheme is not None
        if scheme.data_type != "int" or scheme.bits != BITS or scheme.activation:
            return f"the AWQ layout stores 4-bit integers, not {scheme}"
        if spec.out_features % 8:
            return f"out_features must be divisible by 8, got {spec.out_features}"
        if spec.in_features % scheme.group_length(spec.in_features):
            return f"in_features ({spec.in_features}) must be divisible by group_size ({scheme.group_size})"
        return None

    def pack(self, weight: AffineWeight) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack_bits(_reorder(weight.codes.T.contiguous(), ORDER), BITS),
            "qzeros": pack_bits(_reorder(weight.zero_point.T.contiguous(), ORDER), BITS),
            "scales": weight.scale.T.contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> AffineWeight:
        if tensors["qweight"].dim() != 2:
            raise CheckpointError(f"qweight must be [in, out/8], got {tuple(tensors['qweight'].shape)}")
        in_features, out_features = tensors["qweight"].shape[0], tensors["qweight"].shape[1] * 8
        if shape not in (None, (out_features, in_features)):
            raise CheckpointError(f"qweight holds {(out_features, in_features)} weights, {shape} were expected")
        try:
            return AffineWeight(
                scheme=scheme,
                codes=_reorder(unpack_bits(tensors["qweight"], BITS, out_features), _INVERSE).T.contiguous(),
                scale=tensors["scales"].T.contiguous(),
                zero_point=_reorder(unpack_bits(tensors["qzeros"], BITS, out_features), _INVERSE).T.contiguous(),
            ).check()
        except ValueError as error:
            raise CheckpointError(f"AWQ tensors contradict {scheme}: {error}") from None
