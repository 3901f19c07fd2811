"""The face and the command: what a user gives, and what is said of mistakes."""

from __future__ import annotations

import pytest
import torch

from autoround_core import ModelError, TensorFiles, UsageError, load
from autoround_core.registry import Registry
from autoround_core.shards import read_json
from autoround_mllm import AutoRoundMLLM, load_processor
from autoround_mllm.drawings import drawings
from autoround_mllm.image_text_lm import ImageTextLM
from autoround_mllm.main import main

QUICK = dict(scheme="W4G32", iters=1, nsamples=2, seqlen=256)


@pytest.fixture
def command(capfd):
    """command(*arguments) -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        return (done.value.code or 0, *capfd.readouterr())

    return run


def test_the_command_quantizes(family, tmp_path, command):
    out = tmp_path / "out"
    options = ["--scheme", "W4G32", "--iters", 1, "--nsamples", 2, "--seqlen", 256, "--output_dir", out]
    code, shown, errors = command("quantize", "--model", family("gemma3"), *options)
    assert code == 0, errors
    assert f"saved and verified: {out}" in shown
    assert read_json(out / "report.json")["calibration"]["source"] == "synthetic"
    code, shown, _ = command("info", out)
    assert code == 0 and "gemma3" in shown


@pytest.mark.parametrize(("model", "options", "says"), [
    ("tiny", [], "a `llama` model takes no images; use AutoRound or `autoround quantize`"),
    ("gemma3", ["--dataset", "syntetic"], "did you mean `synthetic`?"),
    ("gemma3", ["--seqlen", 8], "pass --seqlen"),
    ("gemma3", ["--dataset", "nothing.jsonl"], "nothing.jsonl"),
])  # fmt: skip
def test_mistakes_are_one_line(family, saved, tmp_path, command, model, options, says):
    path = saved("llama") if model == "tiny" else family(model)
    required = ["--scheme", "W4G32", "--nsamples", 2, "--output_dir", tmp_path / "out"]
    code, _, errors = command("quantize", "--model", path, *required, "--quiet", *options)
    assert code in (1, 2) and says in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("autoround-mllm: error: ")
    assert not (tmp_path / "out").exists()


def test_a_model_without_towers_has_none_to_quantize(saved, tmp_path, capfd):
    from autoround_cli.main import main as autoround

    with pytest.raises(SystemExit):
        autoround(["quantize", "--model", str(saved("llama")), "--scheme", "W4G32", "--quant_nontext_module",
                   "--output_dir", str(tmp_path / "out")])
    assert "this model has no vision or audio tower; leave out --quant_nontext_module" in capfd.readouterr().err


def test_without_this_package_its_name_is_said(family):
    config = read_json(family("gemma3") / "config.json")
    with pytest.raises(ModelError, match="`gemma3` is a vision-language model; pip install autoround-mllm"):
        Registry(allowed=["core"]).adapter(config)
    assert isinstance(Registry(allowed=["core", "mllm"]).adapter(config), ImageTextLM)


def test_a_loaded_model_and_its_processor(family, tmp_path):
    source = family("llava")
    model = ImageTextLM().load(source, trust_remote_code=False)
    model.name_or_path = model.config._name_or_path = ""  # as if it came from nowhere
    processor = load_processor(source, trust_remote_code=False)
    AutoRoundMLLM(model, processor, **QUICK).quantize_and_save(tmp_path / "out")
    again = load_processor(tmp_path / "out", trust_remote_code=False)
    conversation = next(drawings())
    given = [p(text="<image> a", images=list(conversation.images), return_tensors="pt") for p in (processor, again)]
    assert torch.equal(given[0]["pixel_values"], given[1]["pixel_values"])
    assert torch.equal(given[0]["input_ids"], given[1]["input_ids"])
    load(tmp_path / "out")


def test_a_loaded_model_needs_a_processor(family):
    model = ImageTextLM().load(family("llava"), trust_remote_code=False)
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ModelError, match="no processor was given; calibration with images needs"):
        AutoRoundMLLM(model, **QUICK).quantize()
    tokenizer = load_processor(family("llava"), trust_remote_code=False).tokenizer
    with pytest.raises(UsageError, match="give the model's AutoProcessor"):
        AutoRoundMLLM(model, tokenizer, **QUICK)


def test_data_of_ones_own(family, tmp_path):
    """Conversations in Python, a broken image among those of a file."""
    own = [next(drawings()) for _ in range(2)]
    face = AutoRoundMLLM(family("llava"), dataset=own, **QUICK)
    face.quantize()
    (tmp_path / "a.png").write_bytes(b"no image")
    own[0].images[0].save(tmp_path / "b.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "text": "one"}\n{"image": "b.png", "text": "two"}\n'
                    '{"image": "b.png", "text": "three"}\n')
    options = {**QUICK, "dataset": str(rows)}
    with pytest.raises(Exception, match=r"a\.png"):
        AutoRoundMLLM(family("llava"), **options).quantize()
    AutoRoundMLLM(family("llava"), skip_bad_samples=True, **options).quantize_and_save(tmp_path / "out")
    calibration = read_json(tmp_path / "out" / "report.json")["calibration"]
    assert (calibration["images"], calibration["skipped"]) == (2, 1)


def test_experts_kept_in_one_tensor_stay_there_in_16_bits(family, tmp_path):
    source = family("qwen3_vl_moe")
    options = dict(scheme="W4G32", recipe="rtn", layer_config={"experts": 16})
    AutoRoundMLLM(source, **options).quantize_and_save(tmp_path / "out")
    before, after = TensorFiles(source), TensorFiles(tmp_path / "out")
    fused = [name for name in before.names() if name.endswith("experts.gate_up_proj")]
    assert fused and all(torch.equal(before.get(name), after.get(name)) for name in fused)
    # in the checkpoint they lie transposed, and are square here: only the numbers tell
    path = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    original = ImageTextLM().load(source, trust_remote_code=False).get_parameter(path)
    assert torch.equal(load(tmp_path / "out").get_parameter(path), original)


def test_an_unread_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("autoround_mllm.main.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 1 and "pip install autoround-mllm[all]" in capsys.readouterr().err
