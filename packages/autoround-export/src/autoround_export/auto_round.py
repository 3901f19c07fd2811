"""Format `auto_round`: what Transformers, vLLM and SGLang read as quant_method "auto-round".

Six packings (see docs/formats/auto_round.md), one for a whole checkpoint:

    auto_round:auto_gptq        every layer symmetric integers        GPTQ layout, zero_point - 1
    auto_round:auto_awq         every layer 4-bit asymmetric          AWQ layout
    auto_round                  any other mixture of integers         GPTQ layout, zero_point as it is
    auto_round:fp8              FP8_BLOCK                             E4M3 with scales of blocks
    auto_round:fp8_static       FP8_STATIC                            E4M3 with a scale for each row
    auto_round:llm_compressor   MXFP4, MXFP8, NVFP4                   the layouts of compressed-tensors

The first two are the ones that engines have kernels for, so they are chosen where the layers allow it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoround_core import (
    ActivationScheme,
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
from autoround_core.scheme import PRESETS
from autoround_export.awq_layout import AwqLayout
from autoround_export.compressed_layouts import FloatQuantized, layout_of
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
_LAYOUTS: dict[str, TensorLayout] = {
    "auto_gptq": GptqLayout(zero_offset=1),
    "auto_awq": AwqLayout(),
    "gptqmodel": GptqLayout(zero_offset=0),
    "fp8": FloatQuantized("fp8", lambda scheme: scheme == PRESETS["FP8_BLOCK"], "weight_scale_inv"),
    "fp8_static": FloatQuantized("fp8_static", lambda scheme: scheme == PRESETS["FP8_STATIC"]),
}
_MX = "llm_compressor"  # its layouts differ by bits
_PACKINGS = (*_LAYOUTS, _MX)
_MARKS = {"fp8": "weight_scale_inv", "fp8_static": "weight_scale", _MX: "weight_scale"}  # "qweight" of all others
_KINDS = {"FP8_BLOCK": "fp8", "FP8_STATIC": "fp8_static", "MXFP4": _MX, "MXFP8": _MX, "NVFP4": _MX}
_NO_KIND = "none"
# what the public implementation calls the inputs of NVFP4
_ACTIVATION_TYPES = {"nv_fp": "nv_fp4_with_static_gs"}
_PLAIN = "gptqmodel"  # the packing whose name on disk is just `auto_round`




def _layout(packing: str, scheme: QuantScheme) -> TensorLayout:
    layout = _LAYOUTS.get(packing) or layout_of(scheme)
    assert layout is not None
    return layout


def _kind(scheme: QuantScheme) -> str:
    """The packing of schemes that have one of their own, "" for integers, _NO_KIND for what none can hold."""
    return "" if scheme.data_type == "int" else _KINDS.get(str(scheme), _NO_KIND)


def _vllm_xpu(spec: LinearSpec) -> str | None:
    return None if spec.scheme.bits in (2, 4) else f"on XPU it runs 2 and 4 bits, got {spec.scheme}"


def _vllm_mx(spec: LinearSpec) -> str | None:
    return "it knows no NVFP4 in this format" if spec.scheme.data_type == "nv_fp" else None


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
    "fp8": {"transformers": anything, "vllm:cuda": anything},
    "fp8_static": {"transformers": anything},
    _MX: {"transformers": anything, "vllm:cuda": each(_vllm_mx)},
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
        assert spec.scheme is not None
        kind = _kind(spec.scheme)
        packing = self._packing or kind or _PLAIN
        if kind == _NO_KIND:
            return f"of floats it holds {', '.join(_KINDS)}, not {spec.scheme}; the format llm_compressor holds more"
        if packing == _MX != kind:
            return f"this packing stores MXFP4, MXFP8 and NVFP4, not {spec.scheme}"
        return _layout(packing, spec.scheme).why_not(spec)

    def why_not_together(self, specs: Sequence[LinearSpec]) -> str | None:
        kinds = {_kind(spec.scheme): spec.scheme for spec in specs}
        schemes = " and ".join(map(str, kinds.values()))
        return None if len(kinds) < 2 else f"one packing serves all layers, got {schemes}"

    def packing(self, layers: Sequence[LinearSpec]) -> str:
        """The packing for these layers: the requested one, or the one with the most kernels that fits all."""
        if self._packing:
            return self._packing
        quantized = [spec for spec in layers if spec.scheme is not None]
        if kinds := {_kind(spec.scheme) for spec in quantized} - {""}:
            return kinds.pop()
        return next(
            packing for packing, layout in _LAYOUTS.items()
            if packing == _PLAIN
            or (all(spec.scheme.sym == (packing == "auto_gptq") for spec in quantized)
                and all(layout.why_not(spec) is None for spec in quantized))
        )

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        return judge(_ENGINES[self.packing(specs)], target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        packing = self.packing(context.layers)
        quantization = quantization_config(context, _packing_format(packing))
        return PackedWriter(directory, context, lambda scheme: _layout(packing, scheme), quantization,
                            "quantization_config.json")

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
        schemes = _Schemes(quantization)

        def lookup(name: str) -> tuple[TensorLayout, QuantScheme]:
            scheme = schemes.of(name)
            if (_kind(scheme) or packing) != packing or (packing in _KINDS.values() and not _kind(scheme)):
                raise CheckpointError(f"packing_format `{_packing_format(packing)}` does not hold {scheme}")
            return _layout(packing, scheme), scheme

        return PackedReader(directory, _MARKS.get(packing, "qweight"), lookup)


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
        **_FLOAT_KEYS.get(_kind(default), {}),
        "block_name_to_quantize": ",".join(sorted({block.rpartition(".")[0] for block in context.blocks})),
        "autoround_version": PROVIDER,
        "iters": settings.iters,
        "nsamples": settings.nsamples,
        "seqlen": settings.seqlen,
        **({"extra_config": extra} if extra else {}),
    }


# what else readers want to see beside E4M3 numbers
_FLOAT_KEYS = {
    "fp8": {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8_static": {"fmt": "e4m3", "activation_scheme": "static"},
}


def _scheme_entry(scheme: QuantScheme | None, default: QuantScheme) -> dict[str, Any]:
    if scheme is None:
        entry = {"bits": 16, "group_size": _group_size(default), "sym": default.sym, "data_type": "float"}
        return entry | ({"act_bits": 16} if default.activation else {})
    entry = {key: getattr(scheme, key) for key in SCHEME_KEYS} | {"group_size": _group_size(scheme)}
    if activation := scheme.activation:
        entry |= {
            "act_bits": activation.bits,
            "act_data_type": _ACTIVATION_TYPES.get(activation.data_type, activation.data_type),
            # 0: one scale for all tokens
            "act_group_size": activation.group_size if activation.dynamic else 0,
            "act_sym": True, "act_dynamic": activation.dynamic,
        }  # fmt: skip
    return entry


def _group_size(scheme: QuantScheme) -> int | list[int]:
    return scheme.group_size if scheme.group_rows == 1 else [scheme.group_rows, scheme.group_size]


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with the fields of QuantScheme: the inverse of `_scheme_entry`."""
    fields = dict(entry)
    if isinstance(fields.get("group_size"), list) and len(fields["group_size"]) == 2:
        fields["group_rows"], fields["group_size"] = fields["group_size"]
    if (fields.get("act_bits") or 16) < 16:
        data_type = fields.get("act_data_type", "int")
        data_type = next((ours for ours, theirs in _ACTIVATION_TYPES.items() if theirs == data_type), data_type)
        fields["activation"] = ActivationScheme(
            fields["act_bits"], data_type, fields.get("act_group_size") or -1, fields.get("act_dynamic", True)
        )
    return fields


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
        if not isinstance(entry, Mapping):
            return scheme_from({}, entry, f"`{name}`")
        return scheme_from(_fields({**self._default, **entry}), {}, f"`{name}`")
