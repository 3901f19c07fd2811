"""The numbers that config.json and a file both state, in both directions.

llama.cpp reads some numbers and has others built in. The former are copied; a model that contradicts one of the
latter is refused, because llama.cpp would compute something else without a word. One limit is stated instead: where
llama.cpp has no sliding window and the model has one, both compute the same up to the length of the window, and
`context_length` says so.
"""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from autoround_core import CheckpointError, ModelError, UnsupportedError
from autoround_export.gguf.architecture_table import ALWAYS, OMITTED, REQUIRED, Architecture, Key, head_dim
from autoround_export.gguf.rope import CONSTANTS, rope_fields, rope_parameters

_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_MOST_EXPERTS = 4096
# (name, kind, least): what `model_config` and `rope_parameters` read besides the table
_MORE_KEYS = (
    ("attention.key_length", int, 1), ("attention.value_length", int, 1), ("rope.dimension_count", int, 1),
    ("rope.scaling.original_context_length", int, 1), ("rope.freq_base", float, 1.0),
    ("rope.freq_base_swa", float, 1.0), ("rope.scaling.factor", float, 0.0), ("rope.scale_linear", float, 0.0),
    ("rope.scaling.attn_factor", float, 0.0),
)  # fmt: skip


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of its class, and rotary parameters in the form of Transformers 5.

    Older files leave out what equals a default, and each model has its own. Raises ModelError.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = copy.deepcopy(dict(config))
    model_type = given.pop("model_type")
    given.pop("quantization_config", None)
    try:
        full = AutoConfig.for_model(model_type, **given).to_dict()
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"config.json of this `{model_type}` model cannot be read: {reason}") from None
    # some versions of Transformers write one name, some the other
    if full.get("num_experts") is None and full.get("num_local_experts") is not None:
        full["num_experts"] = full["num_local_experts"]
    if "layer_types" in full and "sliding_attention" not in (full["layer_types"] or ()):
        full["sliding_window"] = None
    return full


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """What the shapes in the table are made of; `vocabulary` is taken from the embedding."""
    head, ffn = head_dim(config), config["intermediate_size"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return {
        "hidden": config["hidden_size"], "ffn": ffn, "gate_up": 2 * ffn, "head": head, "queries": queries,
        "keys": keys, "qkv": queries + 2 * keys, "one": 1, "experts": experts(config),
        "expert": config.get("moe_intermediate_size") or 0,
        "shared": config.get("shared_expert_intermediate_size") or 0,
    }  # fmt: skip


def experts(config: Mapping[str, Any]) -> int:
    return config.get("num_experts") or config.get("num_local_experts") or 0


def check_built_in(row: Architecture, config: Mapping[str, Any], tied: bool) -> None:
    """Raises UnsupportedError where llama.cpp computes something else than the model."""
    for key, built_in in row.fixed.items():
        given, expected = config.get(key), built_in(config)
        if isinstance(given, list) and expected:
            # a list with an entry for each block may be longer than the model
            given = given[: len(expected)]
        # an unset option and an empty one are the same
        if given != expected and (given or expected):
            raise UnsupportedError(
                f"llama.cpp computes `{row.arch}` with {key} = {_short(expected)}, the model has {_short(given)}: "
                "it cannot be stored as GGUF"
            )
    if row.square and head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(
            f"llama.cpp computes `{row.arch}` with heads of hidden_size / num_attention_heads numbers, the model has "
            f"head_dim = {head_dim(config)}: it cannot be stored as GGUF"
        )
    if tied not in row.tied:
        wanted = "the embedding as lm_head" if row.tied[0] else "an lm_head of its own"
        raise UnsupportedError(f"llama.cpp computes `{row.arch}` with {wanted}, which this model does not have")


def _short(value: Any) -> str:
    text = str(value)
    return f"`{text}`" if len(text) < 80 else f"`{text[:76]}...`"


def model_fields(row: Architecture, config: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], dict]:
    """All keys of the file but those of the tokenizer and of the file itself, and the constant tensors."""
    fields: dict[str, Any] = {}
    for key in row.keys:
        given = config.get(key.hf)
        value = key.none if given is None else given
        if value == OMITTED:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedError(f"llama.cpp needs `{key.hf}` of `{row.arch}` as a number, not `{given}`")
        fields[key.gguf] = key.kind(value)
    context = config["max_position_embeddings"]
    if row.window and not row.windowed:
        context = min(context, config.get("sliding_window") or context)
    fields["context_length"] = int(context)
    fields["attention.key_length"] = fields["attention.value_length"] = int(head_dim(config))
    fields["vocab_size"] = vocabulary
    rope, constants = rope_fields(row, config)
    named = {f"{row.arch}.{key}": value for key, value in (fields | rope).items()}
    return {"general.architecture": row.arch, "general.type": "model", **named}, constants


def model_config(
    model_type: str,
    row: Architecture,
    fields: Mapping[str, Any],
    file_shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """config.json from a file. Raises CheckpointError for what is missing or cannot be said in it."""
    own = _own(row, fields)
    config: dict[str, Any] = {"model_type": model_type, "architectures": [row.model_class]}
    for key in row.keys:
        config[key.hf] = _read(row, key, own)
    vocabulary = vocabulary_of(file_shapes)
    # the lists of blocks and experts that follow must not be longer than the file deserves
    if config["num_hidden_layers"] > len(file_shapes) or experts(config) > _MOST_EXPERTS:
        raise CheckpointError(
            f"the file says that it holds {config['num_hidden_layers']} blocks of {experts(config)} experts, "
            f"and has {len(file_shapes)} tensors"
        )
    config["vocab_size"] = vocabulary
    config["tie_word_embeddings"] = "output.weight" not in file_shapes
    config["max_position_embeddings"] = _read(row, Key("", "context_length", int), own)
    config["head_dim"] = head = own.get("attention.key_length", head_dim(config))
    if own.get("attention.value_length", head) != head:
        raise CheckpointError(f"keys of {head} and values of {own['attention.value_length']} numbers are not supported")
    _window(row, own, config)
    config |= {key: built_in(config) for key, built_in in row.fixed.items()}
    if row.windowed and config["sliding_window"] is None:
        # Transformers wants a number even where no block uses it
        config["sliding_window"] = config["max_position_embeddings"]
    config |= _switches(row, file_shapes)
    given = {name: constants[name] for name in CONSTANTS if name in file_shapes and name in constants}
    if absent := [name for name in CONSTANTS if name in file_shapes and name not in constants]:
        raise CheckpointError(f"the numbers in `{absent[0]}` are needed to configure the model")
    rope = rope_parameters(row, own, given, head, config["max_position_embeddings"])
    config["rope_parameters"] = rope
    if rope.get("rope_type") == "longrope":
        # Phi-3 takes it from here
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    # ids that a file does not name must not become the defaults of the class, which may lie outside the vocabulary
    for hf, gguf in _SPECIAL_TOKENS.items():
        config[f"{hf}_token_id"] = fields.get(f"tokenizer.ggml.{gguf}_token_id")
    return config


def vocabulary_of(file_shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the embedding. Raises CheckpointError for a file without one."""
    shape = file_shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise CheckpointError("the file holds no matrix `token_embd.weight`")
    return shape[0]


def _window(row: Architecture, own: Mapping[str, Any], config: dict[str, Any]) -> None:
    """A window that llama.cpp does not apply, or that the file does not name, is none."""
    if row.window and not row.windowed:
        config["sliding_window"] = None
    pattern = own.get("attention.sliding_window_pattern")
    if not row.windowed or pattern is None:
        return
    local = [kind == "sliding_attention" for kind in row.fixed["layer_types"](config)]
    if isinstance(pattern, int):
        pattern = [bool((i + 1) % pattern) if pattern else True for i in range(len(local))]
    if not isinstance(pattern, list) or [bool(x) for x in pattern] != local:
        raise CheckpointError(f"the blocks of this `{row.arch}` file have windows in an unusual order")


def _switches(row: Architecture, file_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Options that give modules a bias, from the biases of the first block."""
    switches: dict[str, bool] = {}
    for slot in row.block:
        if slot.bias and slot.bias != ALWAYS:
            switches[slot.bias] = switches.get(slot.bias, False) or f"blk.0.{slot.gguf}.bias" in file_shapes
    return switches


def _read(row: Architecture, key: Key, own: Mapping[str, Any]) -> Any:
    value = own.get(key.gguf)
    if not value and key.none != REQUIRED:
        return None
    return _number(row, key.gguf, value, key.kind)


def _number(row: Architecture, name: str, value: Any, kind: type[int] | type[float], least: float = 0.0) -> Any:
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < (1 if kind is int else least):
        raise CheckpointError(f"the file does not say `{row.arch}.{name}` as one number that makes sense")
    return kind(value)


def _own(row: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the architecture, without its name. Those outside the table are checked here."""
    prefix = f"{row.arch}."
    own = {name.removeprefix(prefix): _value(name, x) for name, x in fields.items() if name.startswith(prefix)}
    own.setdefault("attention.head_count_kv", own.get("attention.head_count"))
    for name, kind, least in _MORE_KEYS:
        if name in own:
            own[name] = _number(row, name, own[name], kind, least)
    return own


def _value(name: str, value: Any) -> Any:
    """A list of equal numbers, one for each block, is that number; a float is as short as it can be."""
    if isinstance(value, list) and value and all(x == value[0] for x in value) and not name.endswith("_pattern"):
        value = value[0]
    if not isinstance(value, float) or not abs(value) < 1e38:
        return value
    # float32 is all that a file holds: 1e-6 comes back as 9.999999974752427e-07
    stored = struct.pack("<f", value)
    return next(x for x in (float(f"{value:.{n}g}") for n in range(6, 18)) if struct.pack("<f", x) == stored)
