"""Which tensor of a file gets which type: the mixtures that llama.cpp makes for each of its file types.

A file type has a default, and rules that give more bits to what suffers most: the output matrix, the values of
attention, the second matrix of the feed-forward network, more of them in the first and last blocks. Rows that a type's
blocks do not divide fall back to a type of smaller blocks, and at last to float16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCK = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}
_K_BLOCK = 256
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class FileType:
    """number: `general.file_type`. type: of every tensor that no rule names."""

    number: int
    type: str


FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(0, "F32"), "f16": FileType(1, "F16"), "bf16": FileType(32, "BF16"),
    "q4_0": FileType(2, "Q4_0"), "q4_1": FileType(3, "Q4_1"), "q5_0": FileType(8, "Q5_0"), "q5_1": FileType(9, "Q5_1"),
    "q8_0": FileType(7, "Q8_0"), "q2_k": FileType(10, "Q2_K"), "q2_k_s": FileType(21, "Q2_K"),
    "q3_k_s": FileType(11, "Q3_K"), "q3_k_m": FileType(12, "Q3_K"), "q3_k_l": FileType(13, "Q3_K"),
    "q4_k_s": FileType(14, "Q4_K"), "q4_k_m": FileType(15, "Q4_K"), "q5_k_s": FileType(16, "Q5_K"),
    "q5_k_m": FileType(17, "Q5_K"), "q6_k": FileType(18, "Q6_K"),
}  # fmt: skip

# parts of names whose matrices decide much with little, and stay in float32
_PRECISE = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight", ".rel_pos", ".position_embd", ".patch_embd",
    ".patch_merger", "sam.pos_embd", "sam.neck.", "sam.net_", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "a.rvq.codebook", "mm.a.code_embd", "time_mix_first.weight", "time_mix_lerp_fused.weight", "time_mix_decay_w",
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
)
_PRECISE_NAMES = ("position_embd.weight", "token_types.weight")
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
_EMBEDDINGS = (EMBEDDING, "per_layer_token_embd.weight")
# models of 70 billion parameters, whose values are so few that more bits cost nothing: (architecture, blocks), and
# whether the heads must share their keys and values
_LARGE = {("llama", 80): True, ("qwen2", 80): False, ("olmo", 80): False, ("deci", 80): False, ("jais2", 68): False}
_KINDS = {
    "attn_qkv.weight": "value", "attn_kv_b.weight": "value", "attn_v.weight": "value", "attn_k.weight": "key",
    "attn_output.weight": "attention", "ffn_down": "down",
}  # fmt: skip
_VALUE_RULES = {"q3_k_l": "Q5_K"}
_ATTENTION_RULES = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
_EIGHT_EXPERTS = 8
_ATTENTION_OF_FALCON = {"q3_k_l": "Q4_K"}
_ATTENTION_OF_EIGHT = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"), "Q5_K")


@dataclass(frozen=True, slots=True)
class MixtureFacts:
    """What the rules ask about a model. importance: whether an importance of input channels is known."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0
    importance: bool = False


def choose_types(file_type: str, shapes: Mapping[str, tuple[int, ...]], facts: MixtureFacts) -> dict[str, str]:
    """{tensor: type} for tensors of a file by name, shapes outermost axis first. file_type: a key of FILE_TYPES."""
    return _Mixture(file_type, shapes, facts).types()


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp would quantize this tensor at all; all others are float32."""
    axes = len(shape) - next((i for i, size in enumerate(shape) if size != 1), len(shape))  # outer ones do not count
    precise = name in _PRECISE_NAMES or any(part in name for part in _PRECISE)
    return axes >= 2 and name.endswith("weight") and not precise


def fitting(kind: str, row: int) -> str:
    """`kind`, or what stands in for it where its blocks do not divide a row of this length."""
    if row % _block(kind):
        kind = _FALLBACK.get(kind, kind)
    return "F16" if row % _block(kind) else kind


def _block(kind: str) -> int:
    return 1 if kind in FLOATS else _BLOCK.get(kind, _K_BLOCK)


def _order(name: str) -> tuple[int, str]:
    """llama.cpp counts along the blocks, and by name within one."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


class _Mixture:
    def __init__(self, file_type: str, shapes: Mapping[str, tuple[int, ...]], facts: MixtureFacts) -> None:
        self._file_type, self._shapes, self._facts = file_type, shapes, facts
        self._default, self._falcon = FILE_TYPES[file_type].type, facts.architecture == "falcon"
        self._values = sum(self._kind(name) == "value" for name in shapes)

    def types(self) -> dict[str, str]:
        result, seen = {}, {"value": 0, "down": 0}
        for name in sorted(self._shapes, key=_order):
            shape, kind = self._shapes[name], self._kind(name)
            if not is_quantizable(name, shape):
                result[name] = "F32"
                continue
            result[name] = fitting(self._type(name, kind, seen.get(kind, 0)), shape[-1])
            if kind in seen:
                seen[kind] += 1
        return result

    def _kind(self, name: str) -> str:
        if name == OUTPUT or (name in _EMBEDDINGS and OUTPUT not in self._shapes):
            return "output"
        return next((kind for part, kind in _KINDS.items() if part in name), "other")

    def _type(self, name: str, kind: str, index: int) -> str:
        """The type before the row's length is looked at. index: how many of its kind came before."""
        default, file_type = self._default, self._file_type
        if default in FLOATS:
            return default
        eight = self._facts.experts == _EIGHT_EXPERTS
        if kind == "output":
            whole = self._shapes[name][-1] % _block(default) == 0
            return "Q6_K" if whole and default != "Q8_0" and not self._falcon else "Q8_0"
        if kind == "value":
            return "Q8_0" if eight else self._value(index)
        if kind == "key":
            return "Q8_0" if eight else default
        if kind == "down":
            block = re.match(r"blk\.(\d+)\.", name)
            index = int(block[1]) if block and self._facts.experts > 1 else index
            return self._down_of_falcon(index) if self._falcon else self._down(index)
        if kind == "attention":
            rules = _ATTENTION_OF_FALCON if self._falcon else _ATTENTION_OF_EIGHT if eight else _ATTENTION_RULES
            return rules.get(file_type, default)
        return default

    def _value(self, index: int) -> str:
        default, file_type, facts = self._default, self._file_type, self._facts
        shared = facts.heads // facts.kv_heads if facts.kv_heads else 1
        kind = _VALUE_RULES.get(file_type, default)
        if file_type == "q2_k":
            kind = "Q4_K" if shared >= 4 else "Q3_K"
        elif file_type == "q2_k_s" and shared >= 4:
            kind = "Q4_K"
        elif file_type == "q3_k_m":
            kind = "Q5_K" if index < 2 else "Q4_K"
        elif file_type in ("q4_k_m", "q5_k_m") and _more_bits(index, self._values):
            kind = "Q6_K"
        elif file_type == "q4_k_s" and index < 4:
            kind = "Q5_K"
        must_share = _LARGE.get((facts.architecture, facts.blocks))
        large = must_share is not None and (not must_share or facts.heads != facts.kv_heads)
        return "Q5_K" if large and kind in ("Q3_K", "Q4_K") else kind

    def _down(self, index: int) -> str:
        default, file_type, blocks = self._default, self._file_type, self._facts.blocks
        early = index < blocks // 8
        if file_type == "q2_k":
            return "Q3_K"
        if file_type == "q3_k_m":
            return "Q5_K" if index < blocks // 16 else "Q4_K"
        if file_type == "q3_k_l":
            return "Q5_K"
        if file_type in ("q4_k_m", "q5_k_m"):
            return "Q6_K" if _more_bits(index, blocks) else default
        if early and self._facts.importance:
            default = {"q4_0": "Q4_1", "q5_0": "Q5_1"}.get(file_type, default)
        return {"q2_k_s": "Q4_K", "q4_k_s": "Q5_K"}.get(file_type, default) if early else default

    def _down_of_falcon(self, index: int) -> str:
        """Falcon's feed-forward network suffers less in the middle blocks."""
        file_type, blocks, more = self._file_type, self._facts.blocks, _more_bits(index, self._facts.blocks)
        if file_type == "q3_k_m" and index >= blocks // 16:
            return "Q4_K" if more else "Q3_K"
        if file_type == "q4_k_m":
            return "Q6_K" if index < blocks // 16 else "Q5_K" if more else "Q4_K"
        return {"q3_k_l": "Q4_K", "q4_k_s": "Q4_K"}.get(file_type) or self._down(index)


def _more_bits(index: int, count: int) -> bool:
    """The first and last eighth, and every third between."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2
