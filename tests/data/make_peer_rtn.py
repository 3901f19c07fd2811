"""Make peer_rtn.safetensors: what Intel's auto-round 0.16.1 rounds one fixed weight to.

    pip install auto-round==0.16.1 && python tests/data/make_peer_rtn.py

One decoder layer with a known k_proj goes through the peer's own round-to-nearest and its own exporter, once
for each of 2, 3, 4, 8 bits x symmetric or not x group size 32, 64, 128, -1. What is stored is read back from
the files that it wrote, by the unpacker below, which shares no code with either project.

Symmetric cells come from a bfloat16 model, the peer's default. Asymmetric ones come from a float32 model:
without tuning the peer subtracts the ends of an asymmetric range in the dtype of the weight, which in
bfloat16 moves five of six scales, by up to 0.8 percent. (While it tunes it computes this range in float32.)
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

os.environ["AR_ALLOW_W8_ASYM"] = "1"  # the peer refuses this cell by default, because vLLM does not serve it

from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT_FEATURES, IN_FEATURES = 32, 256
LAYER = "model.layers.0.self_attn.k_proj"
CELLS = [
    (bits, group_size, sym)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128, -1)
    for sym in (True, False)
]
TARGET = Path(__file__).with_name("peer_rtn.safetensors")


def make_weight() -> torch.Tensor:
    """Heavy-tailed bfloat16 [out, in], with the rows that rounding gets wrong first."""
    generator = np.random.default_rng(20240906)
    weight = generator.standard_t(3, (OUT_FEATURES, IN_FEATURES)) * generator.uniform(
        0.005, 0.1, (OUT_FEATURES, 1)
    )
    weight[0] = 0.0  # a dead row
    weight[1, 32:64] = 0.0  # a dead group
    weight[2] = np.abs(weight[2])  # zero is at the edge of the range
    weight[3] = -np.abs(weight[3])
    weight[4, 77] = 30.0  # one outlier that swallows its group
    weight[5] *= 1e-4  # scales at the smallest that is kept
    weight[6] = 0.0625  # constant
    weight[7, ::2], weight[7, 1::2] = 0.5, -0.5  # both ends equally far out
    return torch.from_numpy(weight).to(torch.bfloat16)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [rows, words] to codes [rows, count]: the little-endian bits of each row, cut every `bits`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(len(words), count, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(axis=2).astype(np.uint8)


def unpack_awq(words: np.ndarray, count: int) -> np.ndarray:
    """int32 [rows, out/8] to codes [rows, out]; column j of 8 is in nibble (0, 4, 1, 5, 2, 6, 3, 7)[j]."""
    nibbles = unpack(words, 4, count).reshape(len(words), -1, 8)
    return nibbles[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), count)


def peer(weight: torch.Tensor, bits: int, group_size: int, sym: bool) -> dict[str, torch.Tensor]:
    """codes uint8 [out, in], scale float16 [out, groups], zero_point uint8 [out, groups] of one cell."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=IN_FEATURES,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=OUT_FEATURES,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if sym else torch.float32)
    model.get_submodule(LAYER).weight.data.copy_(weight)
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        run = AutoRound(
            model,
            tokenizer=tokenizer,
            bits=bits,
            group_size=group_size,
            sym=sym,
            iters=0,
            disable_opt_rtn=True,
            amp=sym,  # otherwise a float32 model is rounded to bfloat16 first
        )
        run.quantize_and_save(folder, format="auto_round")
        (file,) = Path(folder).rglob("*.safetensors")
        tensors = {name: t.numpy() for name, t in load_file(file).items() if name.startswith(LAYER)}
        packing = json.loads((file.parent / "config.json").read_text())["quantization_config"][
            "packing_format"
        ]
    qweight, qzeros, scales = (tensors[f"{LAYER}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if packing == "auto_round:auto_awq":
        codes, zeros = unpack_awq(qweight, OUT_FEATURES).T, unpack_awq(qzeros, OUT_FEATURES)
    else:
        codes, zeros = unpack(qweight.T, bits, IN_FEATURES), unpack(qzeros, bits, OUT_FEATURES)
        zeros = zeros + (packing == "auto_round:auto_gptq")
    return {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in (("codes", codes), ("scale", scales.T), ("zero_point", zeros.T.astype(np.uint8)))
    }


def main() -> None:
    weight = make_weight()
    tensors = {"weight": weight}
    for bits, group_size, sym in CELLS:
        cell = f"W{bits}G{group_size}" + ("" if sym else "-asym")
        tensors |= {f"{cell}.{name}": tensor for name, tensor in peer(weight, bits, group_size, sym).items()}
    save_file(tensors, TARGET, metadata={"peer": "auto-round 0.16.1, iters=0, disable_opt_rtn=True"})
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, {len(CELLS)} cells")


if __name__ == "__main__":
    main()
