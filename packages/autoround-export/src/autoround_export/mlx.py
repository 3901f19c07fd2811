"""Format `mlx`: what mlx-lm reads on Apple machines (and MLX elsewhere), see docs/formats/mlx.md.

MLX computes scale * code + bias, group by group, where bias = -scale * zero_point. The product is rounded to float16,
exactly for symmetric weights; zero points are read back by dividing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoround_core import (
    AffineWeight,
    CheckpointContext,
    CheckpointError,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    LinearSpec,
    QuantScheme,
    TensorLayout,
    pack_bits,
    read_json,
    unpack_bits,
)
from autoround_export.packed import PackedReader, PackedWriter, scheme_from

_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)
_SECTION = "quantization"
_MODE = "affine"


class MlxLayout(TensorLayout):
    """weight uint32 [out, in*bits/32], a dense little-endian bitstream; scales and biases float16 [out, groups]."""

    name = "mlx"
    tensor_names = ("weight", "scales", "biases")

    def why_not(self, spec: LinearSpec) -> str | None:
        scheme = spec.scheme
        assert scheme is not None
        if scheme.data_type != "int" or scheme.activation is not None or scheme.bits not in _BITS:
            return f"MLX stores integers of {', '.join(map(str, _BITS))} bits, not {scheme}"
        if scheme.group_size not in _GROUP_SIZES:
            return f"MLX knows the group sizes {', '.join(map(str, _GROUP_SIZES))}, not {scheme.group_size}"
        if spec.in_features % scheme.group_size:
            return f"in_features ({spec.in_features}) must be divisible by group_size ({scheme.group_size})"
        return None

    def pack(self, weight: AffineWeight) -> dict[str, torch.Tensor]:
        biases = -weight.scale.float() * weight.zero_point
        if not torch.isfinite(biases.to(weight.scale.dtype)).all():
            raise CheckpointError(f"scale * zero_point is more than {weight.scale.dtype} can hold")
        return {
            "weight": pack_bits(weight.codes, weight.scheme.bits).view(torch.uint32),
            "scales": weight.scale.contiguous(),
            "biases": biases.to(weight.scale.dtype),
        }

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> AffineWeight:
        """A weight is symmetric if the scheme allows it and all zero points are those of a symmetric one."""
        scale, biases = tensors["scales"], tensors["biases"]
        try:
            zeros = torch.round(-biases.float() / scale.float())
            if not torch.equal((-scale.float() * zeros).to(biases.dtype), biases):
                raise ValueError("the biases are no whole multiples of the scales")
            sym = scheme.sym and bool((zeros == 2 ** (scheme.bits - 1)).all())
            weight = AffineWeight(
                scheme=QuantScheme(scheme.bits, scheme.group_size, sym),
                codes=unpack_bits(tensors["weight"].view(torch.int32), scheme.bits, scale.shape[1] * scheme.group_size),
                scale=scale,
                zero_point=zeros.clamp(0, 255).to(torch.uint8),
            ).check()
            if (zeros < 0).any() or (zeros > 255).any():
                raise ValueError("the biases need zero points beyond the codes")
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"MLX tensors contradict {scheme}: {error}") from None
        if shape not in (None, weight.shape):
            raise CheckpointError(f"the tensors hold {weight.shape} weights, {shape} were expected")
        return weight


_LAYOUT = MlxLayout()


class MlxFormat(CheckpointFormat):
    """Checkpoints of mlx-lm."""

    name = "mlx"
    summary = "mlx-lm (Apple silicon)"

    def why_not(self, spec: LinearSpec) -> str | None:
        if ".experts." in spec.name:
            return "mlx-lm stacks the experts of a layer, which this format does not"
        return _LAYOUT.why_not(spec)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        default = context.recipe.default
        quantization: dict[str, Any] = {"group_size": default.group_size, "bits": default.bits, "mode": _MODE}
        quantization["sym"] = any(spec.scheme is not None and spec.scheme.sym for spec in context.layers)
        for spec in context.layers:
            if spec.scheme is None:
                quantization[spec.name] = False
            elif (spec.scheme.group_size, spec.scheme.bits) != (default.group_size, default.bits):
                quantization[spec.name] = {"group_size": spec.scheme.group_size, "bits": spec.scheme.bits}
        return PackedWriter(directory, context, lambda _: _LAYOUT, quantization, section=_SECTION)

    def recognizes(self, directory: Path) -> bool:
        return _quantization(directory) is not None

    def read(self, directory: Path) -> CheckpointReader:
        quantization = _quantization(directory)
        if quantization is None:
            raise CheckpointError(f"`{directory}` holds no checkpoint of MLX")
        if quantization.get("mode", _MODE) != _MODE:
            raise CheckpointError(f"`{directory}` uses mode `{quantization['mode']}` of MLX; known: {_MODE}")
        sizes = {key: quantization.get(key) for key in ("group_size", "bits")} | {"sym": quantization.get("sym", True)}
        return PackedReader(directory, "scales", lambda name: (
            _LAYOUT, scheme_from(sizes, quantization.get(name) or {}, f"`{name}`")
        ))  # fmt: skip


def _quantization(directory: Path) -> dict[str, Any] | None:
    config = directory / "config.json"
    content = read_json(config) if config.is_file() else None
    quantization = content.get(_SECTION) if isinstance(content, dict) else None
    return quantization if isinstance(quantization, dict) and "bits" in quantization else None
