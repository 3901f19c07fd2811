"""Format `auto_gptq`: what Transformers, vLLM, SGLang and GPTQModel read as quant_method "gptq".

    auto_gptq:gptq      every layer symmetric; zero_point - 1 is stored (version 1, which all of them read)
    auto_gptq:gptq_v2   zero_point as it is (for asymmetric layers; Transformers and GPTQModel)

Layers that differ from the default stand in `dynamic`, by their own name and by that of the fused layer
(see docs/formats/auto_gptq.md).
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
    Verdict,
    unknown_name,
)
from autoround_export.engines import Rule, anything, each, judge, marlin, vllm_cpu
from autoround_export.fused import exactly, with_fused
from autoround_export.gptq_layout import GptqLayout
from autoround_export.packed import (
    PROVIDER,
    PackedReader,
    PackedWriter,
    quantization_of,
    read_quantization,
    scheme_from,
)

_METHOD = "gptq"
_BITS = (2, 3, 4, 8)
_LAYOUTS = {
    "gptq": GptqLayout(zero_offset=1, with_g_idx=True),
    "gptq_v2": GptqLayout(zero_offset=0, with_g_idx=True),
}
_ENGINES: dict[str, Rule] = {
    "transformers": anything,
    "gptqmodel": anything,
    "vllm:cuda": each(marlin),
    "vllm:cpu": each(lambda spec: vllm_cpu(spec) or marlin(spec)),
    "sglang:cuda": each(marlin),
}


class AutoGptqFormat(CheckpointFormat):
    """version: one of `_LAYOUTS`, or None for version 1 where the layers allow it."""

    summary = "Transformers, vLLM, SGLang, GPTQModel (quant_method gptq)"
    fused = True

    def __init__(self, version: str | None = None) -> None:
        self.name = "auto_gptq" if version is None else f"auto_gptq:{version}"
        self._version = version

    def variant(self, text: str) -> AutoGptqFormat:
        if text not in _LAYOUTS:
            raise unknown_name("version of format auto_gptq", text, _LAYOUTS)
        return AutoGptqFormat(text)

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        if spec.scheme.data_type == "int" and spec.scheme.bits not in _BITS:
            return f"readers of GPTQ know 2, 3, 4 and 8 bits, not {spec.scheme.bits}"
        return _LAYOUTS[self._version or "gptq_v2"].why_not(spec)

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        return judge(_ENGINES, target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        quantized = [spec.scheme for spec in context.layers if spec.scheme is not None]
        version = self._version or ("gptq" if all(scheme.sym for scheme in quantized) else "gptq_v2")
        quantization = quantization_config(context, version)
        return PackedWriter(directory, context, lambda _: _LAYOUTS[version], quantization, "quantize_config.json")

    def recognizes(self, directory: Path) -> bool:
        return quantization_of(directory, _METHOD) is not None

    def read(self, directory: Path) -> CheckpointReader:
        quantization = read_quantization(directory, _METHOD)
        version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        if version not in _LAYOUTS:
            raise CheckpointError(f"`{directory}` uses checkpoint_format `{version}`; known: {', '.join(_LAYOUTS)}")
        layout, schemes = _LAYOUTS[version], _Schemes(quantization)
        return PackedReader(directory, "qweight", lambda name: (layout, schemes.of(name)))


def quantization_config(context: CheckpointContext, version: str) -> dict[str, Any]:
    """What readers of GPTQ look for; `modules_in_block_to_quantize` is left out, because vLLM misreads it."""
    default = context.recipe.default
    inside = tuple(f"{block}." for block in context.blocks)
    differing = {spec.name: spec.scheme for spec in context.layers if spec.scheme != default}
    dynamic = with_fused(differing | dict.fromkeys(context.kept), context)
    return {
        "quant_method": _METHOD,
        "checkpoint_format": version,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "desc_act": False,
        "lm_head": any(spec.scheme is not None and not spec.name.startswith(inside) for spec in context.layers),
        "provider": PROVIDER,
        **({"dynamic": dict(_dynamic(name, scheme) for name, scheme in dynamic.items())} if dynamic else {}),
    }


def _dynamic(name: str, scheme: QuantScheme | None) -> tuple[str, dict[str, Any]]:
    if scheme is None:
        return f"-:{exactly(name)}", {}
    return f"+:{exactly(name)}", {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}


class _Schemes:
    """The scheme of each layer: the first pattern of `dynamic` that matches, over the default."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self._default = quantization
        self._rules: list[tuple[bool, re.Pattern[str], Any]] = []
        for key, entry in (quantization.get("dynamic") or {}).items():
            skip, pattern = key.startswith("-:"), key.removeprefix("-:").removeprefix("+:")
            try:
                self._rules.append((skip, re.compile(pattern), entry))
            except re.error as error:
                raise CheckpointError(f"dynamic names `{key}`, which is no regular expression: {error}") from None

    def of(self, name: str) -> QuantScheme:
        for skip, pattern, entry in self._rules:
            if pattern.match(name):
                if skip:
                    raise CheckpointError(f"dynamic says that `{name}` is not quantized, but it is stored quantized")
                return scheme_from(self._default, entry, f"`{name}`")
        return scheme_from(self._default, {}, f"`{name}`")
