"""Format `auto_round`: what Transformers, vLLM and SGLang read as quant_method "auto-round".

Three packings of the same numbers (see docs/formats/auto_round.md):

    auto_round:auto_gptq   every layer symmetric                GPTQ layout, zero_point - 1
    auto_round:auto_awq    every layer 4-bit asymmetric         AWQ layout
    auto_round             any other mixture                    GPTQ layout, zero_point as it is

The first two are the ones that engines have kernels for, so they are chosen where the layers allow it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoround_core import (
    CheckpointContext,
    CheckpointError,
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    LinearSpec,
    QuantScheme,
    Target,
    TensorLayout,
    Verdict,
    unknown_name,
)
from autoround_export.awq_layout import AwqLayout
from autoround_export.engines import Rule, anything, each, judge, marlin, marlin_groups, vllm_cpu, with_humming
from autoround_export.gptq_layout import GptqLayout
from autoround_export.packed import (
    PROVIDER,
    SCHEME_KEYS,
    PackedReader,
    PackedWriter,
    quantization_of,
    read_quantization,
    scheme_from,
)

_METHOD = "auto-round"
_PACKINGS: dict[str, TensorLayout] = {
    "auto_gptq": GptqLayout(zero_offset=1),
    "auto_awq": AwqLayout(),
    "gptqmodel": GptqLayout(zero_offset=0),
}
_PLAIN = "gptqmodel"  # the packing whose name on disk is just `auto_round`




def _vllm_xpu(spec: LinearSpec) -> str | None:
    return None if spec.scheme.bits in (2, 4) else f"on XPU it runs 2 and 4 bits, got {spec.scheme}"


_ENGINES: dict[str, dict[str, Rule]] = {
    "auto_gptq": {
        "transformers": anything,
        "vllm:cuda": with_humming(marlin),
        "vllm:cpu": each(vllm_cpu),
        "vllm:xpu": each(_vllm_xpu),
        "sglang:cuda": each(marlin),
    },
    "auto_awq": {
        "transformers": anything,
        "vllm:cuda": each(marlin_groups),
        "vllm:cpu": each(vllm_cpu),
        "sglang:cuda": each(marlin_groups),
    },
    _PLAIN: {"transformers": anything},
}


def _packing_format(packing: str) -> str:
    return "auto_round" if packing == _PLAIN else f"auto_round:{packing}"


class AutoRoundFormat(CheckpointFormat):
    """packing: one of `_PACKINGS`, or None to choose by the layers."""

    summary = "Transformers, vLLM, SGLang (quant_method auto-round)"
    fused = True

    def __init__(self, packing: str | None = None) -> None:
        self.name = "auto_round" if packing is None else f"auto_round:{packing}"
        self._packing = packing

    def variant(self, text: str) -> AutoRoundFormat:
        if text not in _PACKINGS:
            raise unknown_name("packing of format auto_round", text, _PACKINGS)
        return AutoRoundFormat(text)

    def why_not(self, spec: LinearSpec) -> str | None:
        return _PACKINGS[self._packing or _PLAIN].why_not(spec)

    def packing(self, layers: Sequence[LinearSpec]) -> str:
        """The packing for these layers: the requested one, or the one with the most kernels that fits all."""
        if self._packing:
            return self._packing
        quantized = [spec for spec in layers if spec.scheme is not None]
        return next(
            packing for packing, layout in _PACKINGS.items()
            if packing == _PLAIN
            or (all(spec.scheme.sym == (packing == "auto_gptq") for spec in quantized)
                and all(layout.why_not(spec) is None for spec in quantized))
        )

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        return judge(_ENGINES[self.packing(specs)], target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        packing = self.packing(context.layers)
        quantization = quantization_config(context, _packing_format(packing))
        return PackedWriter(directory, context, lambda _: _PACKINGS[packing], quantization, "quantization_config.json")

    def recognizes(self, directory: Path) -> bool:
        return quantization_of(directory, _METHOD) is not None

    def read(self, directory: Path) -> CheckpointReader:
        quantization = read_quantization(directory, _METHOD)
        packing = str(quantization.get("packing_format", "auto_round")).partition(":")[2] or _PLAIN
        if packing not in _PACKINGS:
            raise CheckpointError(
                f"`{directory}` uses packing_format `{quantization['packing_format']}`; "
                f"known: {', '.join(map(_packing_format, _PACKINGS))}"
            )
        layout, schemes = _PACKINGS[packing], _Schemes(quantization)
        return PackedReader(directory, "qweight", lambda name: (layout, schemes.of(name)))


def quantization_config(context: CheckpointContext, packing_format: str) -> dict[str, Any]:
    """The `quantization_config` that engines read; every entry of extra_config is complete, as vLLM requires."""
    default = context.recipe.default
    settings = context.settings
    extra = {
        spec.name: _scheme_entry(spec.scheme, default)
        for spec in context.layers
        if spec.scheme != default or not any(spec.name.startswith(f"{block}.") for block in context.blocks)
    }
    extra |= {name: _scheme_entry(None, default) for name in context.kept}
    return {
        "quant_method": "auto-round",
        "packing_format": packing_format,
        **_scheme_entry(default, default),
        "block_name_to_quantize": ",".join(sorted({block.rpartition(".")[0] for block in context.blocks})),
        "autoround_version": PROVIDER,
        "iters": settings.iters,
        "nsamples": settings.nsamples,
        "seqlen": settings.seqlen,
        **({"extra_config": extra} if extra else {}),
    }


def _scheme_entry(scheme: QuantScheme | None, default: QuantScheme) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "group_size": default.group_size, "sym": default.sym, "data_type": "float"}
    return {key: getattr(scheme, key) for key in SCHEME_KEYS}


class _Schemes:
    """The scheme of each layer: its exact name, else the first regular expression that matches, as vLLM reads them."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self._default = quantization
        self._entries: Mapping[str, Any] = quantization.get("extra_config") or {}
        try:
            # a regular expression is a key with a character that no layer name has
            self._patterns = [re.compile(key) for key in self._entries if set(key) & set("*+?^$()[]{}|\\")]
        except re.error as error:
            raise CheckpointError(
                f"extra_config names `{error.pattern}`, which is no regular expression: {error}"
            ) from None

    def of(self, name: str) -> QuantScheme:
        key = name if name in self._entries else next((p.pattern for p in self._patterns if p.search(name)), None)
        entry = self._entries[key] if key is not None else {}
        return scheme_from(self._default, entry, f"`{name}`")
