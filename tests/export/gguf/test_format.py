"""Format gguf, end to end: what the file holds is what the fake-quantized model computes with, for every type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from autoround_core import (
    AutoRound,
    CheckpointError,
    Target,
    UnknownNameError,
    UnsupportedError,
    UsageError,
    convert,
    load,
)
from autoround_core.loading import describe, find_format
from autoround_export.gguf.architectures import outline
from autoround_export.gguf.format import GgufFormat
from autoround_export.gguf.mixture import FILE_TYPES, MixtureFacts, choose_types
from export.gguf.architecture_models import MODELS

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
QUANTIZED = [name for name, found in FILE_TYPES.items() if found.type not in ("F32", "F16", "BF16")]
ROWS = [[(7 * i + j) % 4000 for j in range(32)] for i in range(4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(name) -> a saved tiny model of another architecture, with the tokenizer of tiny-qwen3."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            transformers.logging.disable_progress_bar()
            made[name] = tmp_path_factory.mktemp(name)
            MODELS[name].build().save_pretrained(made[name])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(TINY / file, made[name] / file)
        return made[name]

    return get


def float_model(path: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def file_of(directory: Path) -> gguf.GGUFReader:
    (found,) = directory.glob("*.gguf")
    return gguf.GGUFReader(found)


def options(dataset: str, **more):
    return {"dataset": dataset, "nsamples": 4, "seqlen": 32, "batch_size": 4, **more}


def check_same_numbers(path: Path, model: torch.nn.Module) -> None:
    """gguf's own dequantization of every tensor, row for row, against the weights of the model."""
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    placed = outline(model.config.to_dict(), {n: tuple(t.shape) for n, t in own.items() if n != "lm_head.weight"})
    tensors = {tensor.name: tensor for tensor in file_of(path).tensors}
    for expected in placed.tensors:
        (piece,) = expected.pieces
        stored = tensors[expected.name]
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        weight = own[piece.source] if piece.rows is None else own[piece.source][piece.rows]
        assert torch.equal(values.view(weight.shape), weight), expected.name


@pytest.mark.parametrize(("recipe", "file_type"), [
    *(("rtn", name) for name in QUANTIZED),
    *(("light", name) for name in ("q2_k", "q3_k_l", "q4_k_m", "q5_k_s", "q6_k", "q4_1", "q5_0", "q8_0")),
    ("opt_rtn", "q2_k_s"), ("opt_rtn", "q5_1"),
])  # fmt: skip
def test_the_file_holds_the_fake_quantized_model(file_type, recipe, dataset, tmp_path):
    model = float_model(TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    more = {"iters": 2} if recipe == "light" else {}
    rounder = AutoRound(model, tokenizer, recipe=recipe, **options(dataset, **more))
    out = rounder.quantize_and_save(tmp_path / "out", f"gguf:{file_type}")
    check_same_numbers(out, model)
    loaded = load(out, backend="reference")  # whose layers hold no tensors of their own
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    content = file_of(out)
    assert content.fields["general.file_type"].contents() == FILE_TYPES[file_type].number
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in content.tensors}
    facts = MixtureFacts("qwen3", 6, 4, 2, importance=recipe != "rtn")
    assert {t.name: t.tensor_type.name for t in content.tensors} == choose_types(file_type, shapes, facts)


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16"])
def test_float_files_need_no_calibration(file_type, tmp_path):
    out = AutoRound(str(TINY)).quantize_and_save(tmp_path / "out", f"gguf:{file_type}")
    original = float_model(TINY).state_dict()
    found = load(out).state_dict()
    for name, tensor in original.items():
        wanted = tensor.half().float() if file_type == "f16" and tensor.dim() > 1 else tensor
        assert torch.equal(found[name], wanted), name
    assert "calibration" not in {k for k, v in json.loads((out / "report.json").read_text()).items() if v}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back(name, directory, tmp_path):
    out = AutoRound(str(directory(name)), recipe="rtn").quantize_and_save(tmp_path / "out", "gguf:q4_k_m")
    report = json.loads((out / "report.json").read_text())
    assert report["verification"]["gguf:q4_k_m"]["layers_equal"] > 4
    # and without anything beside it, as a file of a stranger
    (file,) = out.glob("*.gguf")
    alone = tmp_path / "alone" / "model.gguf"
    alone.parent.mkdir()
    shutil.copyfile(file, alone)
    tokens = torch.tensor([ROWS[0]])
    with torch.no_grad():
        expected, found = (load(path)(tokens).logits for path in (out, alone))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    with find_format(alone).home(alone) as home:
        tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    text = "def f(x):\n    return x ** 2  # done"
    assert tokenizer(text)["input_ids"] == transformers.AutoTokenizer.from_pretrained(TINY)(text)["input_ids"]


def test_experts_are_stacked(directory, tmp_path):
    out = AutoRound(str(directory("mixtral")), recipe="rtn").quantize_and_save(tmp_path / "out", "gguf:q4_0")
    tensors = {tensor.name: tensor for tensor in file_of(out).tensors}
    experts = tensors["blk.0.ffn_down_exps.weight"]
    assert len(experts.shape) == 3 and experts.tensor_type.name == "Q4_0"
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_several_formats_in_one_run(dataset, tmp_path):
    rounder = AutoRound(str(TINY), recipe="opt_rtn", **options(dataset))
    out = rounder.quantize_and_save(tmp_path / "out", "auto_round,gguf:q4_0,dense")
    ours, theirs = ({layer.name: layer for layer in find_format(out / name).read(out / name).layers()}
                    for name in ("auto_round", "gguf-q4_0"))
    assert theirs.keys() - ours.keys() == {"model.embed_tokens"}
    assert all(theirs[name].weight.digest() == layer.weight.digest() for name, layer in ours.items())
    # the embedding is quantized for the file alone
    embeddings = [load(out / name, dtype=torch.float32).get_input_embeddings().weight
                  for name in ("auto_round", "gguf-q4_0", "dense")]
    original = float_model(TINY).get_input_embeddings().weight
    assert torch.equal(embeddings[0], original) and not torch.equal(embeddings[1], original)
    assert torch.equal(embeddings[2], embeddings[1].to(torch.bfloat16).float())


def test_an_untied_head_is_searched_and_kept_for_others(directory, dataset, tmp_path):
    rounder = AutoRound(str(directory("llama")), recipe="opt_rtn", **options(dataset))
    out = rounder.quantize_and_save(tmp_path / "out", "gguf:q4_0,auto_round")
    types = {tensor.name: tensor.tensor_type.name for tensor in file_of(out / "gguf-q4_0").tensors}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_0"
    original = load(directory("llama")).get_output_embeddings().weight
    assert torch.equal(load(out / "auto_round").get_output_embeddings().weight, original)


def test_formats_that_do_not_fit_together(dataset, tmp_path):
    rounder = AutoRound(str(TINY), recipe="rtn")
    with pytest.raises(UnsupportedError, match="format auto_round: "):
        rounder.quantize_and_save(tmp_path / "out", "auto_round,gguf:q4_k_m")
    with pytest.raises(UnsupportedError, match="write them in two runs"):
        rounder.quantize_and_save(tmp_path / "out", "gguf:q8_0,gguf:q4_k_m")
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_the_users_own(dataset, tmp_path):
    config = {"down_proj": "GGUF:Q2_K", "v_proj": "GGUF:Q8_0", "embed_tokens": "GGUF:Q5_0", "layers.0.*o_proj": 16}
    rounder = AutoRound(str(TINY), recipe="rtn", layer_config=config)
    plan = rounder.plan("gguf:q4_k_s")
    assert "model.embed_tokens" in plan.outer
    out = rounder.quantize_and_save(tmp_path / "out", "gguf:q4_k_s")
    types = {tensor.name: tensor.tensor_type.name for tensor in file_of(out).tensors}
    assert types["token_embd.weight"] == "Q5_0" and types["blk.5.ffn_down.weight"] == "Q2_K"
    assert types["blk.1.attn_v.weight"] == "Q8_0" and types["blk.0.attn_output.weight"] == "BF16"
    assert types["blk.1.attn_output.weight"] == "Q4_K"


def test_the_users_scheme_without_a_file_type(tmp_path):
    out = AutoRound(str(TINY), recipe="rtn", scheme="GGUF:Q5_1").quantize_and_save(tmp_path / "out", "gguf")
    content = file_of(out)
    assert content.fields["general.file_type"].contents() == FILE_TYPES["q5_1"].number
    types = {tensor.name: tensor.tensor_type.name for tensor in content.tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_1" and types["token_embd.weight"] == "BF16"


def test_odd_rows_fall_back_in_the_plan(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=4096, hidden_size=224, intermediate_size=304, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, tmp_path / "model" / file)
    rounder = AutoRound(str(tmp_path / "model"), recipe="rtn")
    layers = {layer.spec.name: layer for layer in rounder.plan("gguf:q4_k_m").layers}
    assert str(layers["model.layers.0.self_attn.q_proj"].spec.scheme) == "W5G32"
    down = layers["model.layers.0.mlp.down_proj"]
    assert down.spec.scheme is None and down.reason == "as F16: no block type divides rows of 304"
    out = rounder.quantize_and_save(tmp_path / "out", "gguf:q4_k_m")
    types = {tensor.name: tensor.tensor_type.name for tensor in file_of(out).tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_0" and types["blk.0.ffn_down.weight"] == "F16"
    assert describe(out).format == "gguf"


def test_bad_input(directory, saved, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean `q4_k_m`"):
        AutoRound(str(TINY)).plan("gguf:q4_km")
    with pytest.raises(UsageError, match="leave out --scheme"):
        AutoRound(str(TINY), bits=4).plan("gguf:q4_k_m")
    with pytest.raises(UnsupportedError, match="--format gguf:q4_k_m"):
        AutoRound(str(TINY)).plan("gguf")
    with pytest.raises(UsageError, match="`gguf_pre` is for no format of this run"):
        AutoRound(str(TINY), format_options={"gguf_pre": "qwen2"}).plan("auto_round")
    with pytest.raises(UnknownNameError, match="did you mean `gguf_pre`"):
        AutoRound(str(TINY), format_options={"gguf_per": "qwen2"}).plan("gguf:q8_0")
    with pytest.raises(UnknownNameError, match="qwen2"):
        AutoRound(str(TINY), format_options={"gguf_pre": "qwen"}).plan("gguf:q8_0")
    with pytest.raises(UnsupportedError, match="LLAMA_CPP_ROOT"):
        AutoRound(str(saved("gpt_neox"))).plan("gguf:q8_0")
    with pytest.raises(UnsupportedError, match="tokenizer"):
        AutoRound(MODELS["qwen3"].build()).plan("gguf:q8_0")
    rounder = AutoRound(float_model(TINY), transformers.AutoTokenizer.from_pretrained(TINY), recipe="rtn")
    rounder.quantize()
    with pytest.raises(UsageError, match="use quantize_and_save with this format"):
        rounder.save_quantized(tmp_path / "out", "gguf:q4_k_m")
    assert not (tmp_path / "out").exists()


def test_experts_of_one_tensor_share_a_scheme(directory, tmp_path):
    rounder = AutoRound(str(directory("mixtral")), recipe="rtn", layer_config={"experts.1.w2": "GGUF:Q8_0"})
    with pytest.raises(UnsupportedError, match="one --layer_config pattern for all of them"):
        rounder.quantize_and_save(tmp_path / "out", "gguf:q4_0")
    assert not (tmp_path / "out").exists()


def test_recognizes_and_answers(tmp_path):
    fmt = GgufFormat()
    assert not fmt.recognizes(tmp_path) and not fmt.recognizes(TINY) and not fmt.recognizes(tmp_path / "no.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert fmt.recognizes(tmp_path) and fmt.recognizes(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="it has 4 bytes"):
        fmt.read(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"one \.gguf file, it holds a\.gguf, b\.gguf"):
        fmt.read(tmp_path)
    assert fmt.verdict(Target.parse("llamacpp"), []).refusal is None
    assert fmt.verdict(Target.parse("vllm"), []).refusal


@pytest.mark.parametrize(("scheme", "file_type"), [("W4G32", "q4_0"), ("W5G32", "q5_0"), ("W8G32", "q8_0")])
def test_conversion_there_and_back(scheme, file_type, tmp_path):
    source = AutoRound(str(TINY), recipe="rtn", scheme=scheme).quantize_and_save(tmp_path / "in", "auto_round")
    out = convert(source, tmp_path / "out", f"gguf:{file_type}")
    back = convert(next(out.glob("*.gguf")), tmp_path / "back", "auto_round")
    first, second, third = ({layer.name: layer.weight.digest() for layer in find_format(path).read(path).layers()}
                            for path in (source, out, back))
    assert first == second == third
    # what was in 16 bits stays so
    tensors = {tensor.name: tensor.tensor_type.name for tensor in file_of(out).tensors}
    assert tensors["token_embd.weight"] == "BF16"
    original, again = (load(path, dtype=torch.float32, backend="reference").state_dict() for path in (source, back))
    assert all(torch.equal(again[name], tensor) for name, tensor in original.items())


def test_conversions_that_would_round_are_refused(tmp_path):
    source = AutoRound(str(TINY), recipe="rtn", scheme="W4G32").quantize_and_save(tmp_path / "in", "auto_round")
    with pytest.raises(UnsupportedError, match="file type q4_k_m is made of Q4_K, and the layers are Q4_0"):
        convert(source, tmp_path / "out", "gguf:q4_k_m")
    out = AutoRound(str(TINY), recipe="rtn").quantize_and_save(tmp_path / "q4", "gguf:q4_k_m")
    with pytest.raises(UnsupportedError, match="cannot be stored in auto_gptq"):
        convert(out, tmp_path / "out", "auto_gptq")
    assert not (tmp_path / "out").exists()
    # the dequantized weights of any file are an ordinary model
    dense = convert(out, tmp_path / "dense", "dense")
    expected, found = (load(path, dtype=torch.float32).state_dict() for path in (out, dense))
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in expected.items())
