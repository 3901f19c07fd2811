"""Make ggml_mixtures.json: the types that llama.cpp's own llama_model_quantize gives the tensors of synthetic files.

    pip install llama-cpp-python==0.3.36 gguf && python tests/data/make_ggml_mixtures.py

The rules ask for names, row lengths and a few numbers of the model, so a matrix has two rows of zeros. Each case holds

    fields     the metadata that the rules ask for, without the name of the architecture before them
    outer      {name: shape} of tensors outside the blocks
    kinds      [{name after blk.N.: shape}], one for each kind of block
    kind       the kind of each block, one digit each
    types      {file type, with "+" where an importance was given: types of all tensors, those outside first, then
               block by block, each in the order of its kind: one letter each (LETTERS), a number before it repeats it}
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

LETTERS = {"F32": "f", "F16": "h", "BF16": "b", "Q4_0": "r", "Q4_1": "s", "Q5_0": "t", "Q5_1": "u", "Q8_0": "v",
           "Q2_K": "A", "Q3_K": "B", "Q4_K": "C", "Q5_K": "D", "Q6_K": "E"}  # fmt: skip
# number of llama_ftype
FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "q2_k": 10, "q2_k_s": 21,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
ASKED = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
NEEDS_IMPORTANCE = ("q2_k_s",)
Shapes = dict[str, tuple[int, ...]]
TARGET = Path(__file__).with_name("ggml_mixtures.json")


@dataclass
class Case:
    """One synthetic model. fields: its metadata, after the name of the architecture."""

    architecture: str
    fields: dict[str, Any]
    outer: Shapes
    kinds: list[Shapes]
    kind: str

    def shapes(self) -> Shapes:
        inner = {f"blk.{i}.{name}": shape for i, kind in enumerate(self.kind) for name, shape in
                 self.kinds[int(kind)].items()}
        return {**self.outer, **inner}


def attention(width: int, heads_width: int = 0, *, fused: bool = False) -> Shapes:
    names = ["attn_qkv.weight"] if fused else ["attn_q.weight", "attn_k.weight", "attn_v.weight"]
    return {"attn_norm.weight": (width,), **dict.fromkeys(names, (2, width)),
            "attn_output.weight": (2, heads_width or width), "ffn_norm.weight": (width,)}


def dense(width: int, inner: int, *, gated: bool = True) -> Shapes:
    gate = {"ffn_gate.weight": (2, width)} if gated else {}
    return {**gate, "ffn_up.weight": (2, width), "ffn_down.weight": (2, inner)}


def routed(width: int, inner: int, experts: int, shared: int = 0) -> Shapes:
    sizes = {"ffn_gate_inp.weight": (experts, width), "ffn_gate_exps.weight": (experts, 2, width),
             "ffn_up_exps.weight": (experts, 2, width), "ffn_down_exps.weight": (experts, 2, inner)}  # fmt: skip
    if shared:
        sizes |= {"ffn_gate_inp_shexp.weight": (width,), "ffn_gate_shexp.weight": (2, width),
                  "ffn_up_shexp.weight": (2, width), "ffn_down_shexp.weight": (2, shared)}  # fmt: skip
    return sizes


def case(architecture: str, blocks: int, heads: int, kv_heads: int | list[int], *kinds: Shapes, kind: str = "",
         width: int = 256, tied: bool = False, experts: int = 0, outer: Shapes | None = None, **fields: Any) -> Case:
    """kind: of each block, all of the first by default. outer, fields: more of them."""
    around = {"token_embd.weight": (2, width), "output_norm.weight": (width,), **(outer or {})}
    if not tied:
        around["output.weight"] = (2, width)
    own: dict[str, Any] = {
        "block_count": blocks, "context_length": 64, "embedding_length": width, "feed_forward_length": 256,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": 64,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
        "attention.sliding_window": 64,
    }  # fmt: skip
    if experts:
        own |= {"expert_count": experts, "expert_used_count": 2}
    return Case(architecture, {**own, **fields}, around, list(kinds), kind or "0" * blocks)


def plain(width: int = 256, inner: int = 256, *, fused: bool = False, gated: bool = True,
          heads_width: int = 0) -> Shapes:
    return {**attention(width, heads_width, fused=fused), **dense(width, inner, gated=gated)}


_LATENT = {
    "attn_norm.weight": (256,), "attn_q_a.weight": (2, 256), "attn_q_a_norm.weight": (256,),
    "attn_q_b.weight": (2, 256), "attn_kv_a_mqa.weight": (2, 256), "attn_kv_a_norm.weight": (256,),
    "attn_kv_b.weight": (2, 256), "attn_output.weight": (2, 512), "ffn_norm.weight": (256,),
}  # fmt: skip
_DEEPSEEK = {
    "leading_dense_block_count": 2, "attention.q_lora_rank": 256, "attention.kv_lora_rank": 256,
    "expert_feed_forward_length": 256, "expert_shared_count": 1, "expert_weights_scale": 1.0, "expert_gating_func": 2,
    "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64,
}  # fmt: skip
_CONVOLUTION = {
    "attn_norm.weight": (256,), "shortconv.conv.weight": (256, 3), "shortconv.in_proj.weight": (2, 256),
    "shortconv.out_proj.weight": (2, 256), "ffn_norm.weight": (256,), **dense(256, 512),
}  # fmt: skip
_OF_GEMMA3N = {
    "altup_router.weight": (2, 256), "laurel_l.weight": (2, 256), "laurel_r.weight": (2, 256),
    "inp_gate.weight": (2, 256), "proj.weight": (2, 256), "post_norm.weight": (256,),
}  # fmt: skip
_RECURRENT = {
    "attn_norm.weight": (256,), "time_mix_w0.weight": (256,), "time_mix_lerp_fused.weight": (2, 1, 256),
    **{f"time_mix_{name}.weight": (2, 256) for name in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")},
    **{f"time_mix_{name}.weight": (2, 256) for name in ("key", "value", "receptance", "output")},
    "channel_mix_key.weight": (2, 256), "channel_mix_value.weight": (2, 512),
}  # fmt: skip
_RANKS = {"wkv.head_size": 64, **{f"attention.{name}_lora_rank": 64 for name in (
    "decay", "iclr", "value_residual_mix", "gate")}}  # fmt: skip
CASES: dict[str, Case] = {
    "qwen3 28 blocks, tied": case("qwen3", 28, 4, 2, plain(heads_width=512), tied=True),
    "llama 32 blocks, 4 heads share": case("llama", 32, 4, 1, plain()),
    "llama 80 blocks": case("llama", 80, 8, 1, plain()),
    "llama 80 blocks, no heads share": case("llama", 80, 8, 8, plain()),
    "qwen2 80 blocks": case("qwen2", 80, 8, 1, plain()),
    "llama 8 experts": case("llama", 32, 4, 1, {**attention(256), **routed(256, 256, 8)}, experts=8),
    "qwen3moe 16 experts": case("qwen3moe", 48, 8, 1, {**attention(256), **routed(256, 256, 16)}, experts=16),
    "qwen2moe shared, rows of 96": case("qwen2moe", 9, 4, 4, {**attention(256), **routed(256, 96, 4, 512)}, experts=4),
    "llama rows of 320 and 480": case("llama", 10, 4, 2, plain(320, 480), width=320),
    "llama rows of 100 and 96": case("llama", 6, 4, 2, plain(100, 96), width=100),
    "llama rows of 288, tied": case("llama", 7, 4, 4, plain(256, 288), tied=True),
    "qwen2 rows of 224 and 304, tied": case("qwen2", 24, 4, 2, plain(224, 304), width=224, tied=True),
    "phi3 fused": case("phi3", 32, 4, 4, plain(fused=True, gated=False)),
    "falcon": case("falcon", 32, 4, 1, plain(fused=True, gated=False)),
    "falcon 60 blocks, tied": case("falcon", 60, 4, 1, plain(fused=True, gated=False), tied=True),
    "gemma2": case("gemma2", 26, 8, 4, {**plain(), "post_attention_norm.weight": (256,)}, tied=True),
    "starcoder2 with biases": case("starcoder2", 5, 4, 2, {**plain(gated=False), "attn_q.bias": (256,)}),
    "deepseek2": case("deepseek2", 11, 4, 4, {**_LATENT, **dense(256, 512)}, {**_LATENT, **routed(256, 256, 16, 256)},
                      kind="00" + "1" * 9, experts=16, **_DEEPSEEK),
    "lfm2": case("lfm2", 6, 4, [0, 0, 1, 0, 0, 1], _CONVOLUTION, plain(256, 512), kind="001001", tied=True,
                 **{"shortconv.l_cache": 3}),
    "gemma3n": case("gemma3n", 5, 4, 2, {**plain(), **_OF_GEMMA3N}, tied=True,
                    outer={"per_layer_token_embd.weight": (2, 512), "per_layer_model_proj.weight": (2, 256),
                           "altup_proj.weight": (3, 2, 256), "altup_unembd_proj.weight": (3, 2, 256)}),
    "gpt2": case("gpt2", 3, 4, 4, plain(fused=True, gated=False), tied=True, outer={"position_embd.weight": (2, 256)}),
    "rwkv7": case("rwkv7", 3, 0, 0, _RECURRENT, outer={"token_embd_norm.weight": (256,)}, **_RANKS),
    "llama with a matrix of one row": case("llama", 2, 4, 4, {**plain(), "attn_gate.weight": (1, 256)}),
}  # fmt: skip


def write(path: str, made: Case) -> None:
    writer = gguf.GGUFWriter(path, made.architecture)
    for key, value in made.fields.items():
        add = {float: writer.add_float32, list: writer.add_array}.get(type(value), writer.add_uint32)
        add(f"{made.architecture}.{key}", value)
    for name, shape in made.shapes().items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, target: str, number: int, shapes: Shapes | None) -> None:
    """shapes: of the tensors, where all are given an importance."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = 1, number
    names = [name for name, shape in (shapes or {}).items() if len(shape) > 1]
    floats = [np.ones(shapes[name][-1] * (shapes[name][0] if len(shapes[name]) > 2 else 1), np.float32)
              for name in names]
    entries = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for entry, name, values in zip(entries, names, floats, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if names:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")


def spelled(letters: list[str]) -> str:
    runs = [(letter, len(list(same))) for letter, same in itertools.groupby(letters)]
    return "".join(f"{count}{letter}" if count > 1 else letter for letter, count in runs)


def decisions(made: Case, folder: str) -> dict[str, str]:
    source, target = os.path.join(folder, "source.gguf"), os.path.join(folder, "target.gguf")
    write(source, made)
    found = {}
    for name, number in FILE_TYPES.items():
        for important in (False, True):
            if name in NEEDS_IMPORTANCE and not important:
                continue
            quantize(source, target, number, made.shapes() if important else None)
            types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
            found[name + "+" * important] = spelled([LETTERS[types[tensor]] for tensor in made.shapes()])
    return found


def pretty(value: Any, depth: int, indent: str = "") -> str:
    """JSON with the items of the outer `depth` dictionaries on a line each."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    lines = [f"{indent} {json.dumps(key)}: {pretty(item, depth - 1, indent + ' ')}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def main() -> None:
    llama_cpp.llama_backend_init()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp tells a line for each tensor
    content: dict[str, Any] = {"made by": f"llama-cpp-python {llama_cpp.__version__}", "letters": LETTERS, "cases": {}}
    for title, made in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            types = decisions(made, folder)
        asked = {key: made.fields[key] for key in ASKED if key in made.fields}
        content["cases"][title] = {
            "architecture": made.architecture, "fields": asked, "outer": made.outer, "kinds": made.kinds,
            "kind": made.kind, "types": types,
        }  # fmt: skip
        print(f"{title}: {len(types)} file types, {len(made.shapes())} tensors", flush=True)
    TARGET.write_text(pretty(content, 4) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
