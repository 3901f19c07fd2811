"""The long tail: a converter that we did not write runs apart from us, and its file is read back as an outline.

The checkout is a stand-in with a converter of ours, which permutes, stacks, transposes and pads as llama.cpp's does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from autoround_core import ShardWriter, TensorFiles, UnsupportedError, UsageError
from autoround_export.gguf.llama_cpp import checkout, outline_from_checkout
from autoround_export.gguf.outline import Outline

CONVERTER = '''
import argparse, json, os, sys
from pathlib import Path

import gguf, numpy
import known_only_to_the_checkout
from safetensors.numpy import load_file


class ModelBase:
    pass


class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "unknown":
            raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
        return "gpt-2"


def main():
    parser = argparse.ArgumentParser()
    for option in ("--outtype", "--outfile"):
        parser.add_argument(option)
    parser.add_argument("model", type=Path)
    given = parser.parse_args()
    config = json.loads((given.model / "config.json").read_text())
    print("INFO:loading", file=sys.stderr)
    if "fail" in config:
        print(config["fail"], file=sys.stderr)
        sys.exit(1)
    assert "reason" not in config
    writer = gguf.GGUFWriter(given.outfile, "strange")
    writer.add_string("test.outtype", given.outtype)
    writer.add_string("test.place", os.getcwd())
    writer.add_string("test.environment", json.dumps(dict(os.environ)))
    writer.add_array("test.sections", [1, 2])
    writer.add_float32("test.epsilon", 0.5)
    writer.add_bool("test.flag", True)
    writer.add_int32("general.sampling.mirostat", -1)
    writer.add_custom_alignment(64)
    writer.add_tokenizer_pre(TextModel().get_vocab_base_pre(config["tokenizer"]))
    writer.add_token_list(["a", "b"])
    if "charsmap" in config:
        writer.add_array("tokenizer.ggml.precompiled_charsmap", bytes(config["charsmap"]))
    t = load_file(given.model / "model.safetensors")
    q = t["model.layers.0.q.weight"]
    writer.add_tensor("token_embd.weight", t["model.embed_tokens.weight"])
    writer.add_tensor("blk.0.attn_q.weight", q.reshape(2, 2, -1, q.shape[1]).swapaxes(1, 2).reshape(q.shape))
    writer.add_tensor("blk.0.attn_qkv.weight", numpy.concatenate([q, t["model.layers.0.k.weight"]]))
    writer.add_tensor("blk.0.ffn_up_exps.weight", numpy.stack([t[f"model.layers.0.experts.{i}.up.weight"] for i in (0, 1)]))
    writer.add_tensor("blk.0.ffn_down.weight", numpy.ascontiguousarray(t["model.layers.0.down.weight"].T))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", t["model.layers.0.router.weight"].astype(numpy.float32))
    writer.add_tensor("blk.0.attn_norm.weight", t["model.layers.0.norm.weight"].astype(numpy.float32) + 1)
    writer.add_tensor("rope_freqs.weight", numpy.arange(4, dtype=numpy.float32))
    if "block" in config:
        packed = gguf.quants.quantize(numpy.ones((1, 32), numpy.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(gguf.__file__, "done")


if __name__ == "__main__":
    main()
'''  # noqa: E501
SHAPES = {
    "model.embed_tokens.weight": (10, 32), "model.layers.0.q.weight": (8, 32), "model.layers.0.k.weight": (4, 32),
    "model.layers.0.experts.0.up.weight": (6, 32), "model.layers.0.experts.1.up.weight": (6, 32),
    "model.layers.0.down.weight": (32, 96), "model.layers.0.router.weight": (2, 32),
    "model.layers.0.norm.weight": (32,),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    root: Path
    model: Path

    def outline(self, dtype: str = "float32", **options) -> Outline:
        return outline_from_checkout(self.root, self.model, dtype, TensorFiles(self.model), **options)

    def tensor(self, name: str) -> torch.Tensor:
        return TensorFiles(self.model).get(name)


@pytest.fixture
def case(tmp_path):
    """case(dtype, **configuration): a checkout and a model."""

    def build(dtype: torch.dtype = torch.float32, tokenizer: str = "known", **config) -> Case:
        root, model = tmp_path / "llama.cpp", tmp_path / "model"
        (root / "gguf-py").mkdir(parents=True)
        (root / "gguf-py" / "known_only_to_the_checkout.py").touch()
        (root / "convert_hf_to_gguf.py").write_text(CONVERTER)
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"tokenizer": tokenizer, **config}))
        generator = torch.Generator().manual_seed(0)
        writer = ShardWriter(model)
        for name, shape in SHAPES.items():
            writer.add(name, torch.randn(shape, generator=generator).to(dtype))
        writer.finish()
        return Case(root, model)

    return build


def test_the_checkout_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_ROOT", raising=False)
    assert checkout() is None
    monkeypatch.setenv("LLAMA_CPP_ROOT", "")
    assert checkout() is None
    monkeypatch.setenv("LLAMA_CPP_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match=r"LLAMA_CPP_ROOT .* holds no convert_hf_to_gguf\.py"):
        checkout()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert checkout() == tmp_path
    # the converter runs elsewhere, so a path must not depend on where we are
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("LLAMA_CPP_ROOT", tmp_path.name)
    assert checkout() == tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_traced_and_all_else_is_kept(case, monkeypatch, dtype):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("NO_LOCAL_GGUF", "1")
    work = case(getattr(torch, dtype))
    outline = work.outline(dtype)

    pieces = {
        tensor.name: (tensor.shape, [(p.source, None if p.rows is None else p.rows.tolist()) for p in tensor.pieces])
        for tensor in outline.tensors
    }
    layer = "model.layers.0"
    assert pieces == {
        "token_embd.weight": ((10, 32), [("model.embed_tokens.weight", None)]),
        "blk.0.attn_q.weight": ((8, 32), [(f"{layer}.q.weight", [0, 2, 1, 3, 4, 6, 5, 7])]),
        "blk.0.attn_qkv.weight": ((12, 32), [(f"{layer}.q.weight", None), (f"{layer}.k.weight", None)]),
        "blk.0.ffn_up_exps.weight": ((2, 6, 32), [(f"{layer}.experts.{i}.up.weight", None) for i in (0, 1)]),
        "blk.0.ffn_gate_inp.weight": ((2, 32), [(f"{layer}.router.weight", None)]),
    }
    assert all(tensor.offset == 0 for tensor in outline.tensors)

    constants = outline.constants
    assert {tensor.dtype for tensor in constants.values()} == {torch.float32}
    assert set(constants) == {"blk.0.ffn_down.weight", "blk.0.attn_norm.weight", "rope_freqs.weight"}
    assert torch.equal(constants["blk.0.ffn_down.weight"], work.tensor(f"{layer}.down.weight").T.float())
    assert torch.equal(constants["blk.0.attn_norm.weight"], work.tensor(f"{layer}.norm.weight").float() + 1)
    assert torch.equal(constants["rope_freqs.weight"], torch.arange(4.0))

    fields = dict(outline.fields)
    environment, place = json.loads(fields.pop("test.environment")), Path(fields.pop("test.place"))
    assert fields == {
        "general.architecture": "strange", "test.outtype": {"float32": "f32", "float16": "f16"}[dtype],
        "test.sections": [1, 2], "test.epsilon": 0.5, "test.flag": True,
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b"],
    }  # fmt: skip
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(work.root / "gguf-py"), str(work.root)]
    assert "NO_LOCAL_GGUF" not in environment
    # nothing stays behind: not in the checkout, not with the model, not where it ran
    assert not list(work.root.rglob("*.pyc")) and not list(work.model.glob("*.gguf"))
    assert place.is_absolute() and not place.exists()


def test_an_unknown_tokenizer_needs_a_name_and_takes_it(case):
    work = case(tokenizer="unknown")
    with pytest.raises(UnsupportedError, match="not recognized.*; name the pre-tokenizer"):
        work.outline()
    outline = work.outline(pre="qwen2")
    assert outline.fields["tokenizer.ggml.pre"] == "qwen2"
    assert len(outline.tensors) == 5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fail": "ERROR: Model \x1b[2JX is not supported\n\n"}, r"this model: ERROR: Model \\x1b\[2JX is"),
        ({"reason": 1}, r'assert "reason" not in config: AssertionError'),
        ({"fail": "ModuleNotFoundError: No module named 'x'"}, "named 'x'; install what"),
        ({"block": 1}, "`packed` as Q8_0"),
        ({"charsmap": [1, 2]}, "`tokenizer.ggml.precompiled_charsmap` as ARRAY UINT8"),
    ],
)  # fmt: skip
def test_what_the_converter_or_an_outline_cannot_express(case, config, says):
    with pytest.raises(UnsupportedError, match=says) as caught:
        case(**config).outline()
    assert str(caught.value).isprintable()


def test_a_dtype_that_would_be_rounded(case):
    with pytest.raises(UnsupportedError, match="not `float64`"):
        case().outline("float64")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_runs_only_when_it_is_trusted(case, file):
    work = case()
    path = work.model / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": "x.Y"}}))
    with pytest.raises(UnsupportedError, match=f"{file}.*trust_remote_code"):
        work.outline()
    assert work.outline(trust_remote_code=True).fields["test.flag"] is True
