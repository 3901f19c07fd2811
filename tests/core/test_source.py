"""The source model: where it is looked for, what is refused, what is copied beside the result."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from autoround_core.errors import AutoRoundError, CheckpointError, ModelError
from autoround_core.source import check_source, copy_companions, find_model


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    save_file({"model.embed_tokens.weight": torch.zeros(2, 4)}, directory / "model.safetensors")
    return directory


def change(directory, **values):
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(monkeypatch):
    """The hub's downloader; tests set `answer` to a directory or an exception, and see what was asked."""

    class Hub:
        answer = None
        asked: list = []  # noqa: RUF012

    def download(repo, **options):
        Hub.asked = [repo, options]
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return str(Hub.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return Hub


# --- finding ------------------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(model, hub):
    assert find_model(model) == model and find_model(str(model)) == model
    assert hub.asked == []


def test_the_home_directory_may_be_abbreviated(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert find_model("~/model") == model


@pytest.mark.parametrize("text", ["./nowhere", "/nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c"])
def test_what_looks_like_a_path_is_not_looked_up(hub, text):
    with pytest.raises(ModelError, match=f"model `{text}` is no directory"):
        find_model(text)
    assert hub.asked == []


def test_a_file_is_no_model(model, hub):
    with pytest.raises(ModelError, match="is no directory"):
        find_model(model / "config.json")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_is_downloaded_without_pickles(model, hub, name):
    hub.answer = model
    assert find_model(name) == model
    repo, options = hub.asked
    assert repo == name and "*.bin" in options["ignore_patterns"] and "*.pth" in options["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("no route to host\nsecond line"), r"OSError: no route to host\)"),
        (ValueError("  "), "ValueError: ValueError"),
        (RuntimeError("404"), "RuntimeError: 404"),
    ],
)
def test_a_failed_download_is_one_line(hub, error, says):
    hub.answer = error
    with pytest.raises(ModelError, match=says) as caught:
        find_model("someone/something")
    assert "someone/something" in str(caught.value) and "\n" not in str(caught.value)


# --- checking -----------------------------------------------------------------------------------------------


def test_a_good_model_gives_its_config(model):
    assert check_source(model, trust_remote_code=False) == {"model_type": "llama", "hidden_size": 4}


def test_no_config(model):
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        check_source(model, trust_remote_code=False)


@pytest.mark.parametrize("text", ["{", "\x00", ""])
def test_a_config_that_is_no_json(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json` is no valid JSON"):
        check_source(model, trust_remote_code=False)


@pytest.mark.parametrize("config", [[], {}, {"model_type": ""}, {"model_type": None}, "llama", None])
def test_a_config_without_a_model_type(model, config):
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names no model_type"):
        check_source(model, trust_remote_code=False)


def test_code_of_its_own_needs_trust(model):
    change(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ModelError, match="--trust_remote_code"):
        check_source(model, trust_remote_code=False)
    assert check_source(model, trust_remote_code=True)["model_type"] == "llama"


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "already quantized .gptq."),
        ({"bits": 4}, "already quantized .an unknown method."),
        ("awq", "already quantized .awq."),
    ],
)
def test_a_quantized_model_is_refused(model, quantization, says):
    change(model, quantization_config=quantization)
    with pytest.raises(ModelError, match=says):
        check_source(model, trust_remote_code=False)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_quantization_config_is_none(model, nothing):
    change(model, quantization_config=nothing)
    assert check_source(model, trust_remote_code=False)["model_type"] == "llama"


def test_no_weights_truncated_weights_and_no_tensors(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        check_source(model, trust_remote_code=False)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        check_source(model, trust_remote_code=False)
    path.unlink()
    with pytest.raises(AutoRoundError, match=r"holds no model.safetensors"):
        check_source(model, trust_remote_code=False)


# --- copying ------------------------------------------------------------------------------------------------


def test_companions_are_copied_and_weights_config_and_reports_are_not(model, tmp_path):
    wanted = [
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]
    unwanted = [
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "report.json",
        "x.gguf",
        "README.md",
        "rope.npy",
        ".gitattributes",
    ]
    for name in (*wanted, *unwanted, "modeling.py"):
        (model / name).write_text(f"content of {name}")
    (model / "original.json").mkdir()
    target = tmp_path / "out"
    target.mkdir()
    assert copy_companions(model, target, with_code=False) == wanted
    assert sorted(path.name for path in target.iterdir()) == wanted
    assert all((target / name).read_text() == f"content of {name}" for name in wanted)


def test_code_goes_along_only_where_it_is_trusted(model, tmp_path):
    (model / "modeling.py").write_text("pass")
    for trusted in (False, True):
        target = tmp_path / str(trusted)
        target.mkdir()
        assert ("modeling.py" in copy_companions(model, target, with_code=trusted)) == trusted
