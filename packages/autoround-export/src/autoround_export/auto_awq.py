"""Format `auto_awq`: what Transformers, vLLM, SGLang and AutoAWQ read as quant_method "awq".

Four bits and one group size for all layers. Zero points are always stored, 8 for symmetric layers, because
engines have fast kernels for that form alone (see docs/formats/auto_awq.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    Target,
    Verdict,
)
from autoround_export.awq_layout import BITS, AwqLayout
from autoround_export.engines import Rule, anything, each, judge, marlin_groups, vllm_cpu
from autoround_export.fused import exactly, with_fused
from autoround_export.packed import (
    PROVIDER,
    PackedReader,
    PackedWriter,
    quantization_of,
    read_quantization,
    scheme_from,
)

_METHOD = "awq"
_VERSION = "gemm"
_ENGINES: dict[str, Rule] = {
    "transformers": anything,
    "gptqmodel": anything,
    "vllm:cuda": each(marlin_groups),
    "vllm:cpu": each(vllm_cpu),
    "sglang:cuda": each(marlin_groups),
}


class AutoAwqFormat(CheckpointFormat):
    """The "gemm" version of AWQ checkpoints."""

    name = "auto_awq"
    summary = "Transformers, vLLM, SGLang, AutoAWQ (quant_method awq); 4 bits only"
    fused = True

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.name.rpartition(".")[2] == "lm_head":
            return "readers of AWQ keep lm_head in 16 bits"
        return _LAYOUT.why_not(spec)

    def why_not_together(self, specs: Sequence[LinearSpec]) -> str | None:
        schemes = list(dict.fromkeys(str(spec.scheme) for spec in specs))
        return None if len(schemes) < 2 else f"all layers share one scheme, got {', '.join(schemes)}"

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        return judge(_ENGINES, target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        return PackedWriter(directory, context, lambda _: _LAYOUT, quantization_config(context), "quant_config.json")

    def recognizes(self, directory: Path) -> bool:
        return quantization_of(directory, _METHOD) is not None

    def read(self, directory: Path) -> CheckpointReader:
        quantization = read_quantization(directory, _METHOD)
        version = str(quantization.get("version") or quantization.get("format") or _VERSION).lower()
        if version != _VERSION:
            raise CheckpointError(f"`{directory}` uses version `{version}` of AWQ; known: {_VERSION}")
        sizes = {
            "bits": quantization.get("bits", quantization.get("w_bit")),
            "group_size": quantization.get("group_size", quantization.get("q_group_size")),
        }
        scheme = scheme_from(sizes, {"sym": bool(quantization.get("sym"))}, f"`{directory}`")
        if scheme.bits != BITS:
            raise CheckpointError(f"`{directory}` claims {scheme.bits} bits; version `{_VERSION}` of AWQ stores {BITS}")
        return PackedReader(directory, "qweight", lambda _: (_LAYOUT, scheme))


class _ZeroPointsDecide(AwqLayout):
    """Symmetric is what has the zero points for it: Transformers writes `sym` under any checkpoint that it saves."""

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int] | None = None
    ) -> AffineWeight:
        weight = super().unpack(tensors, replace(scheme, sym=False), shape)
        symmetric = scheme.sym and bool((weight.zero_point == 2 ** (BITS - 1)).all())
        return replace(weight, scheme=scheme) if symmetric else weight


_LAYOUT = _ZeroPointsDecide()


def quantization_config(context: CheckpointContext) -> dict[str, Any]:
    """What readers of AWQ look for. Skipped layers stand in two lists: GPTQModel reads only the second."""
    scheme = next((spec.scheme for spec in context.layers if spec.scheme is not None), context.recipe.default)
    skipped = [spec.name for spec in context.layers if spec.scheme is None]
    skipped = list(with_fused(dict.fromkeys([*skipped, *context.kept]), context))
    return {
        "quant_method": _METHOD,
        "version": _VERSION,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "sym": scheme.sym,
        "provider": PROVIDER,
        **({"modules_to_not_convert": skipped, "dynamic": {f"-:{exactly(name)}": {} for name in skipped}}
           if skipped else {}),
    }
