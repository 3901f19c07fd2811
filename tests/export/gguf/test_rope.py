"""Rotary embeddings in GGUF files, against the formulas of Transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoround_core import CheckpointError
from autoround_export.gguf.architectures import config_of, outline
from export.gguf.architecture_models import MODELS, fields_after, meta, stranger


def test_llama3_divides_frequencies_as_transformers_does():
    config = MODELS["llama_llama3"].configuration()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = outline(*meta("llama_llama3")).constants["rope_freqs.weight"]
    torch.testing.assert_close(divisors, plain / scaled, rtol=1e-5, atol=0)
    assert divisors[0] == 1 and divisors[-1] == 8 and ((divisors > 1) & (divisors < 8)).any()


def test_lists_of_longrope_are_tensors():
    options = MODELS["phi3_long"].options["rope_parameters"]
    file = outline(*meta("phi3_long"))
    assert torch.equal(file.constants["rope_factors_long.weight"], torch.tensor(options["long_factor"]))
    assert torch.equal(file.constants["rope_factors_short.weight"], torch.tensor(options["short_factor"]))
    # 512 positions instead of 32
    assert file.fields["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(16) / math.log(32)))


def test_models_without_scaling_say_nothing_about_it():
    assert not [key for key in fields_after("llama") if "scaling" in key]
    assert "llama.rope.scaling.attn_factor" not in fields_after("llama_yarn")
    assert "gemma3.attention.sliding_window" not in fields_after("gemma3_global")


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("llama", {"rope_theta": 500000.0, "rope_scaling": None}),
        ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_theta": 10000.0, "rope_scaling": MODELS["llama_llama3"].options["rope_parameters"]}),
    ],
)
def test_older_files_keep_rotary_parameters_elsewhere(name, old):
    config, shapes = meta(name)
    del config["rope_parameters"]
    scaling = old["rope_scaling"] or {"rope_type": "default"}
    new = dict(scaling, rope_theta=old["rope_theta"], rope_type=scaling.get("rope_type") or scaling["type"])
    new.pop("type", None)
    one, other = outline({**config, **old}, shapes), outline({**config, "rope_parameters": new}, shapes)
    assert one.fields == other.fields and one.fields["llama.rope.freq_base"] == old["rope_theta"]
    assert {k: x.tolist() for k, x in one.constants.items()} == {k: x.tolist() for k, x in other.constants.items()}


def test_older_gemma3_file():
    config, shapes = meta("gemma3_scaled")
    for key in ("rope_parameters", "layer_types", "attn_logit_softcapping"):
        del config[key]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 6,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    assert outline(config, shapes).fields == fields_after("gemma3_scaled")


def test_older_phi3_file():
    config, shapes = meta("phi3_short")
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": 10000.0, "rope_scaling": {
        "type": "longrope", "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]}}  # fmt: skip
    assert outline(config, shapes).fields == fields_after("phi3_short")


def test_divisors_of_frequencies_that_are_no_llama3_become_lists():
    fields, shapes = stranger("llama_llama3")
    divisors = torch.linspace(1, 3, 32)
    rope = config_of(fields, shapes, {"rope_freqs.weight": divisors})["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1.0
    assert rope["long_factor"] == rope["short_factor"] == divisors.tolist()
    with pytest.raises(CheckpointError, match="`rope_freqs.weight` are needed"):
        config_of(fields, shapes)
