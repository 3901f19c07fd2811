"""Format dense: an ordinary checkpoint with the weights that the records stand for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoround_core import (
    AffineWeight,
    CheckpointContext,
    LinearSpec,
    QuantizedLayer,
    QuantRecipe,
    QuantScheme,
    TuningSettings,
)
from autoround_export.dense import DenseFormat

FORMAT = DenseFormat()
CONFIG = {"model_type": "tiny", "hidden_size": 10}
SCHEME = QuantScheme(3, 4, False)


def record(out_features=6, in_features=10):
    generator = torch.Generator().manual_seed(2)
    grid = (out_features, SCHEME.groups(in_features))
    return AffineWeight(
        SCHEME,
        torch.randint(0, 8, (out_features, in_features), generator=generator).to(torch.uint8),
        torch.randn(grid, generator=generator).to(torch.float16),
        torch.randint(0, 8, grid, generator=generator).to(torch.uint8),
    )


def truth(weight):
    """float64 [out, in], group by group."""
    groups = [
        weight.scale[:, [i]].double().numpy()
        * (weight.codes[:, 4 * i : 4 * i + 4].numpy().astype(np.float64) - weight.zero_point[:, [i]].numpy())
        for i in range(weight.scale.shape[1])
    ]
    return torch.from_numpy(np.concatenate(groups, axis=1))


def save(directory, *, transposed=(), dtype=torch.bfloat16, bias=None):
    context = CheckpointContext(
        config=CONFIG,
        recipe=QuantRecipe(SCHEME),
        layers=[LinearSpec("h.0.fc", 10, 6, SCHEME)],
        blocks=["h.0"],
        kept=(),
        transposed=transposed,
        dtype=dtype,
        settings=TuningSettings(),
    )
    writer = FORMAT.open(directory, context)
    writer.add(QuantizedLayer("h.0.fc", record(), bias))
    writer.keep("wte.weight", torch.arange(6.0).view(2, 3))
    writer.finish()
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_weight_is_that_of_the_record_in_the_models_dtype(tmp_path, dtype):
    tensors = save(tmp_path, dtype=dtype)
    assert tensors.keys() == {"h.0.fc.weight", "wte.weight"}
    assert torch.equal(tensors["h.0.fc.weight"], truth(record()).to(dtype))
    assert torch.equal(tensors["wte.weight"], torch.arange(6.0).view(2, 3))


def test_a_layer_that_the_model_stores_transposed_is_stored_so(tmp_path):
    tensors = save(tmp_path, transposed=["h.0.fc"])
    assert torch.equal(tensors["h.0.fc.weight"], truth(record()).to(torch.bfloat16).T)


def test_the_bias_goes_along_as_it_is(tmp_path):
    bias = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(save(tmp_path, bias=bias)["h.0.fc.bias"], bias)


def test_it_is_an_ordinary_checkpoint(tmp_path):
    save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert FORMAT.recognizes(tmp_path) and not FORMAT.stores_records
    reader = FORMAT.read(tmp_path)
    assert list(reader.layers()) == [] and reader.config == CONFIG
    assert (
        {name for name, _ in reader.rest()}
        == {"h.0.fc.weight", "wte.weight"}
        == {name for name, _ in reader.rest()}
    )


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (CONFIG, True),
        ({**CONFIG, "quantization_config": None}, True),
        ([], False),
        (None, False),
        ({"quantization_config": {"quant_method": "auto-round"}}, False),
        ({"quantization_config": {"bits": 4}}, False),
    ],
)
def test_what_is_recognized(tmp_path, config, ours):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.recognizes(tmp_path) is ours


def test_every_layer_fits():
    for scheme in (QuantScheme(2, 7, False), QuantScheme(8, -1), QuantScheme(4, 32, data_type="mxfp")):
        assert FORMAT.why_not(LinearSpec("fc", in_features=13, out_features=3, scheme=scheme)) is None
