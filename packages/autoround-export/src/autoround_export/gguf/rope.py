"""Rotary embeddings: `rope_parameters` of config.json as keys and tensors of a file, and back.

Transformers turns pair i of a head by position * theta^(-2i/n) and scales that in five ways. llama.cpp has keys for
two of them (linear, yarn). For the others it divides each frequency by a number of its own, from a tensor: llama3 is
`rope_freqs`, longrope one tensor for contexts up to the original length and one beyond. So every list of divisors can
be stored, and a `rope_freqs` that no llama3 parameters explain is read back as a longrope with one list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from autoround_core import CheckpointError, UnsupportedError
from autoround_export.gguf.architecture_table import Architecture, head_dim

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
CONSTANTS = (FREQUENCIES, LONG, SHORT)

# keys and constant tensors
_Stated = tuple[dict[str, Any], dict[str, torch.Tensor]]
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FILE_SCALINGS = ("none", "linear", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_fields(row: Architecture, config: Mapping[str, Any]) -> _Stated:
    """The keys below the architecture's name, and the constant tensors. Raises UnsupportedError."""
    rope, fields = config.get("rope_parameters") or {}, {}
    if any(name in rope for name in _LAYER_TYPES):
        if not row.local_rope:
            raise UnsupportedError(f"llama.cpp turns all blocks of `{row.arch}` alike; `rope_parameters` has several")
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise UnsupportedError(
                f"llama.cpp does not scale the blocks of `{row.arch}` that have a window; `rope_parameters` of "
                f"`sliding_attention` says `{local['rope_type']}`"
            )
        fields["rope.freq_base_swa"] = _number(local, "rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in row.rope:
        possible = ", ".join(row.rope)
        raise UnsupportedError(f"rope_type `{kind}` cannot be stored for `{row.arch}` (possible: {possible})")
    turned = _turned(row, config, rope)
    fields |= {"rope.freq_base": _number(rope, "rope_theta"), "rope.dimension_count": turned}
    more, constants = _SCALINGS[kind](rope, config, turned)
    return fields | more, constants


def _turned(row: Architecture, config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """How many numbers of a head are turned."""
    part = rope.get("partial_rotary_factor")
    if part not in (None, 1.0) and not row.partial:
        raise UnsupportedError(f"llama.cpp turns whole heads of `{row.arch}`; `partial_rotary_factor` is {part}")
    return int(head_dim(config) * (1.0 if part is None else part))


def _number(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UnsupportedError(f"`{key}` of `rope_parameters` must be a number above 0, not `{value}`")
    return float(value)


def _none(rope: Mapping[str, Any], config: Mapping[str, Any], turned: int) -> _Stated:
    return {}, {}


def _linear(rope: Mapping[str, Any], config: Mapping[str, Any], turned: int) -> _Stated:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": _number(rope, "factor")}, {}


def _original(rope: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any], turned: int) -> _Stated:
    """llama.cpp has 32 and 1 built in for these architectures, and multiplies by 1 + ln(factor) / 10 by itself."""
    for key, built_in in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) not in (None, built_in):
            raise UnsupportedError(f"llama.cpp computes yarn with `{key}` = {built_in}, the model has {rope[key]}")
    original = _original(rope, config)
    ratio = config["max_position_embeddings"] / original
    factor = _number({"factor": ratio if rope.get("factor") is None else rope["factor"]}, "factor")
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    magnitude = rope.get("attention_factor")
    if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        magnitude = _magnitude(factor, rope["mscale"]) / _magnitude(factor, rope["mscale_all_dim"])
    if magnitude is not None:
        fields["rope.scaling.attn_factor"] = magnitude / _magnitude(factor)
    return fields, {}


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any], turned: int) -> _Stated:
    limits = {key: _number(rope, key) for key in ("low_freq_factor", "high_freq_factor")}
    limits["original_max_position_embeddings"] = _original(rope, config)
    return {}, {FREQUENCIES: _divisors(_number(rope, "rope_theta"), turned, _number(rope, "factor"), limits)}


def _divisors(theta: float, turned: int, factor: float, limits: Mapping[str, Any]) -> torch.Tensor:
    """1 for short waves, `factor` for long ones, and in between a mean of the frequencies with and without it."""
    pairs = torch.arange(0, turned, 2, dtype=torch.float64)
    turns = limits["original_max_position_embeddings"] * theta ** (-pairs / turned) / (2 * math.pi)
    low, high = limits["low_freq_factor"], limits["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any], turned: int) -> _Stated:
    constants = {}
    for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
        divisors = rope.get(key)
        if not isinstance(divisors, (list, tuple)) or len(divisors) != turned // 2:
            raise UnsupportedError(f"`{key}` of `rope_parameters` must be a list of {turned // 2} numbers")
        constants[name] = torch.tensor(divisors, dtype=torch.float32)
    original = _original(rope, config)
    magnitude, factor = rope.get("attention_factor"), rope.get("factor")
    factor = config["max_position_embeddings"] / original if factor is None else factor
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(magnitude),
    }, constants


_SCALINGS = {"default": _none, "linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}


def rope_parameters(
    row: Architecture, fields: Mapping[str, Any], constants: Mapping[str, torch.Tensor], head: int, context: int
) -> dict[str, Any]:
    """`rope_parameters` from a file's keys, without the architecture's name, and its constant tensors.

    Raises CheckpointError for what Transformers cannot compute.
    """
    turned = fields.get("rope.dimension_count", head)
    rope: dict[str, Any] = {"rope_theta": fields.get("rope.freq_base", 10000.0)}
    if row.partial:
        rope["partial_rotary_factor"] = turned / head
    elif turned != head:
        raise CheckpointError(f"`{row.arch}` turns whole heads of {head}, the file says {turned}")
    rope |= _scaling(fields, constants, rope["rope_theta"], turned, context)
    if rope["rope_type"] not in row.rope:
        raise CheckpointError(f"rope scaling `{rope['rope_type']}` is not known for `{row.arch}`")
    if not row.local_rope:
        return rope
    local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": local}


def _scaling(
    fields: Mapping[str, Any], constants: Mapping[str, torch.Tensor], theta: float, turned: int, context: int
) -> dict[str, Any]:
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in _FILE_SCALINGS:
        raise CheckpointError(f"rope scaling `{kind}` is unknown (known: {', '.join(_FILE_SCALINGS)})")
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if kind == "none" else factor
    original = fields.get("rope.scaling.original_context_length", context)
    magnitude = fields.get("rope.scaling.attn_factor", 1.0)
    if constants:
        if factor != 1.0:
            raise CheckpointError(f"the file scales rotary embeddings twice: by {factor} and by a tensor")
        return _from_constants(constants, theta, turned, original, magnitude)
    if kind == "longrope":
        raise CheckpointError(f"the file says rope scaling `longrope` and holds no `{LONG}`")
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return yarn if magnitude == 1.0 else yarn | {"attention_factor": magnitude * _magnitude(factor)}
    if magnitude != 1.0:
        raise CheckpointError(f"the file scales cosines and sines by {magnitude}, which only yarn and longrope do")
    return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _from_constants(
    constants: Mapping[str, torch.Tensor], theta: float, turned: int, original: int, magnitude: float
) -> dict[str, Any]:
    for name, tensor in constants.items():
        if tensor.shape != (turned // 2,):
            raise CheckpointError(f"`{name}` holds {tuple(tensor.shape)} numbers, ({turned // 2},) were expected")
    if FREQUENCIES in constants:
        divisors = constants[FREQUENCIES].float()
        factor = round(float(divisors.max()), 4)
        if torch.allclose(divisors, _divisors(theta, turned, factor, _LLAMA3), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
        constants = {LONG: divisors, SHORT: divisors}
    if LONG not in constants or SHORT not in constants:
        raise CheckpointError(f"a file holds both `{LONG}` and `{SHORT}` or neither")
    return {
        "rope_type": "longrope",
        "long_factor": constants[LONG].tolist(),
        "short_factor": constants[SHORT].tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": float(magnitude),
    }
