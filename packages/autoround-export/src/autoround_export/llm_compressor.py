"""Format `llm_compressor`: what Transformers, vLLM and SGLang read as quant_method "compressed-tensors".

The most portable format for mixed bits: each scheme is a group of its own with the layers that have it, see
docs/formats/llm_compressor.md.
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
    UsageError,
    Verdict,
)
from autoround_export.compressed_layouts import layout_of
from autoround_export.engines import Rule, each, judge, marlin_groups, vllm_cpu, with_humming
from autoround_export.packed import PROVIDER, PackedReader, PackedWriter, quantization_of, read_quantization

_METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
_LINEAR = "Linear"  # the class: every linear layer that nothing else names
_TYPES = {"int": "int", "fp": "float", "mx_fp": "float", "nv_fp": "float"}
_SCALE_DTYPES = {"mx_fp": "torch.uint8", "nv_fp": "torch.float8_e4m3fn"}


def _only_integers(scheme: QuantScheme) -> bool:
    return scheme.data_type == "int" and scheme.activation is None


def _transformers(spec: LinearSpec) -> str | None:
    if _only_integers(spec.scheme) and not spec.scheme.sym:
        return f"compressed-tensors 0.20.0 fails there on the zero points of asymmetric layers, got {spec.scheme}"
    return None


def _gptqmodel(spec: LinearSpec) -> str | None:
    return None if _only_integers(spec.scheme) else f"it runs integers only, got {spec.scheme}"


def _vllm_cuda(specs: Sequence[LinearSpec]) -> Verdict:
    return with_humming(marlin_groups)([spec for spec in specs if _only_integers(spec.scheme)])


def _vllm_cpu(spec: LinearSpec) -> str | None:
    if _only_integers(spec.scheme):
        return vllm_cpu(spec)
    if ".experts." in spec.name or str(spec.scheme) not in ("INT8", "FP8_DYNAMIC"):
        return f"on a CPU it runs 4-bit integers, INT8 and FP8_DYNAMIC outside of experts, got {spec.scheme}"
    return None


def _sglang(spec: LinearSpec) -> str | None:
    if _only_integers(spec.scheme) and spec.scheme.bits not in (4, 8):
        return f"it runs 4 and 8 bits in this format, got {spec.scheme}"
    return None


_ENGINES: dict[str, Rule] = {
    "transformers": each(_transformers),
    "gptqmodel": each(_gptqmodel),
    "vllm:cuda": _vllm_cuda,
    "vllm:cpu": each(_vllm_cpu),
    "sglang:cuda": each(_sglang),
}


class LlmCompressorFormat(CheckpointFormat):
    """Compressed-tensors: integers of 2 to 8 bits, INT8, FP8, MXFP4, MXFP8 and NVFP4."""

    name = "llm_compressor"
    summary = "Transformers, vLLM, SGLang (quant_method compressed-tensors)"
    fused = True

    def why_not(self, spec: LinearSpec) -> str | None:
        assert spec.scheme is not None
        layout = layout_of(spec.scheme)
        return layout.why_not(spec) if layout else f"compressed-tensors has no format for {spec.scheme}"

    def verdict(self, target: Target, specs: Sequence[LinearSpec]) -> Verdict:
        return judge(_ENGINES, target, specs)

    def open(self, directory: Path, context: CheckpointContext) -> CheckpointWriter:
        return PackedWriter(directory, context, layout_of, quantization_config(context))

    def recognizes(self, directory: Path) -> bool:
        return quantization_of(directory, _METHOD) is not None

    def read(self, directory: Path) -> CheckpointReader:
        quantization = read_quantization(directory, _METHOD)
        schemes = _Schemes(quantization, directory)
        return PackedReader(directory, "weight_scale", schemes.lookup)


def quantization_config(context: CheckpointContext) -> dict[str, Any]:
    """What readers of compressed-tensors look for; lm_head and routers are always named in `ignore`."""
    default = context.recipe.default
    layers: dict[QuantScheme, list[str]] = {}
    for spec in context.layers:
        if spec.scheme is not None:
            layers.setdefault(spec.scheme, []).append(spec.name)
    # named layers first: the first group whose target matches counts, and "Linear" matches all
    groups = [(scheme, names) for scheme, names in layers.items() if scheme != default]
    if default in layers:
        inside = tuple(f"{block}." for block in context.blocks)
        # lm_head is named: in vLLM it is not of that class
        groups.append((default, [_LINEAR, *(name for name in layers[default] if not name.startswith(inside))]))
    formats = {layout_of(scheme).name for scheme in layers}
    quantized = {name for names in layers.values() for name in names}
    ignore = [spec.name for spec in context.layers if spec.scheme is None] + list(context.kept)
    return {
        "quant_method": _METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(groups)},
        "ignore": ignore if "lm_head" in quantized else [*ignore, "lm_head"],
        "kv_cache_scheme": None,
        "provider": PROVIDER,
    }


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": _arguments(scheme.bits, scheme.data_type, scheme.group_size, scheme.group_rows) | {
            "symmetric": scheme.sym, "dynamic": False,
        },
        "input_activations": scheme.activation and _activation(scheme.activation),
        "output_activations": None,
        "format": layout_of(scheme).name,
    }  # fmt: skip


def _arguments(bits: int, data_type: str, group_size: int, group_rows: int = 1) -> dict[str, Any]:
    result: dict[str, Any] = {"num_bits": bits, "type": _TYPES[data_type]}
    if group_rows > 1:
        result |= {"strategy": "block", "block_structure": [group_rows, group_size]}
    elif group_size > 0:
        result |= {"strategy": "tensor_group" if data_type == "nv_fp" else "group", "group_size": group_size}
    else:
        result["strategy"] = "tensor" if group_rows < 0 else "channel"
    if data_type in _SCALE_DTYPES:
        result |= {"scale_dtype": _SCALE_DTYPES[data_type], "zp_dtype": _SCALE_DTYPES[data_type]}
    return result


def _activation(scheme: ActivationScheme) -> dict[str, Any]:
    result = _arguments(scheme.bits, scheme.data_type, scheme.group_size, 1 if scheme.dynamic else -1)
    if result["strategy"] == "channel":
        result["strategy"] = "token"
    # "local": the scales of groups are found as the layer runs, the global one is stored
    return result | {"symmetric": True, "dynamic": "local" if scheme.data_type == "nv_fp" else scheme.dynamic}


class _Schemes:
    """The scheme of each layer: of the group that names it, else the first whose pattern matches, else of "Linear"."""

    def __init__(self, quantization: Mapping[str, Any], directory: Path) -> None:
        self._directory = directory
        self._named: dict[str, QuantScheme] = {}
        self._patterns: list[tuple[re.Pattern[str], QuantScheme]] = []
        self._default: QuantScheme | None = None
        groups = quantization.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"the quantization_config of `{directory}` has no config_groups")
        for name, group in groups.items():
            try:
                scheme = _scheme(group, group.get("format") or quantization.get("format"))
                for target in group["targets"]:
                    self._add(target, scheme)
            except (UsageError, KeyError, TypeError, AttributeError, re.error) as error:
                raise CheckpointError(f"config_groups of `{directory}`: {name} is not valid: {error}") from None

    def _add(self, target: str, scheme: QuantScheme) -> None:
        if target.startswith("re:"):
            self._patterns.append((re.compile(target.removeprefix("re:")), scheme))
        elif target == _LINEAR:
            self._default = self._default or scheme
        else:
            self._named.setdefault(target, scheme)

    def lookup(self, name: str) -> tuple[TensorLayout, QuantScheme]:
        found = self._named.get(name) or next((s for pattern, s in self._patterns if pattern.match(name)), None)
        scheme = found or self._default
        if scheme is None:
            raise CheckpointError(f"no group of config_groups names the quantized layer `{name}`")
        layout = layout_of(scheme)
        if layout is None:
            raise CheckpointError(f"`{self._directory}` stores `{name}` as {scheme}, for which there is no layout")
        return layout, scheme


def _scheme(group: Mapping[str, Any], layout: str) -> QuantScheme:
    """The inverse of `_group`. layout: the format string, which alone tells the MX formats from plain groups."""
    weights, inputs = group["weights"], group.get("input_activations")
    if weights.get("actorder") not in (None, "weight", "static"):
        raise UsageError(f"actorder {weights['actorder']!r} reorders features, which is not supported")
    data_type = {"mxfp4": "mx_fp", "mxfp8": "mx_fp", "nvfp4": "nv_fp"}.get(
        str(layout).partition("-")[0], "fp" if weights["type"] == "float" else "int")
    group_size, group_rows = -1, 1
    match weights["strategy"]:
        case "group" | "tensor_group":
            group_size = weights["group_size"]
        case "tensor":
            group_rows = -1
        case "block":
            group_rows, group_size = weights["block_structure"]
        case "channel":
            pass
        case other:
            raise UsageError(f"strategy {other!r} of weights is not known")
    activation = None if inputs is None else ActivationScheme(
        inputs["num_bits"], data_type, inputs.get("group_size") or -1, inputs["dynamic"] is not False
    )
    return QuantScheme(weights["num_bits"], group_size, weights["symmetric"], data_type, activation, group_rows)
