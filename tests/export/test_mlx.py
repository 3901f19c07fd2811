"""Format mlx: the layout against the formula that MLX computes, its configuration, and the way back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autoround_core import AffineWeight, CheckpointError, QuantScheme, Target
from autoround_export.dense import DenseFormat
from autoround_export.mlx import MlxFormat, MlxLayout
from checkpoint_cases import CONFIG, W3A, W4, W4A, context, digests, record, save, spec

FORMAT, LAYOUT = MlxFormat(), MlxLayout()
FIRST = "model.layers.0.fc"
W8 = QuantScheme(8, 64)
SCHEMES = [
    QuantScheme(bits, size, sym) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128) for sym in (True, False)
]


@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_lossless(scheme, out_features, groups, seed):
    weight = record(scheme, out_features, groups * 128, seed)
    assert LAYOUT.why_not(spec("fc", scheme, groups * 128, out_features)) is None
    back = LAYOUT.unpack(LAYOUT.pack(weight), scheme)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.zero_point, weight.zero_point)
    assert torch.equal(back.scale, weight.scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_mlx_computes(scheme):
    """scale * code + bias; element i of a row begins at bit i * bits of the row's bytes."""
    weight = record(scheme, 3, 256)
    tensors = LAYOUT.pack(weight)
    assert tensors["weight"].dtype == torch.uint32
    rows = tensors["weight"].view(torch.uint8).numpy()
    values = torch.empty(3, 256, dtype=torch.float64)
    for i, row in enumerate(rows):
        stream = int.from_bytes(row.tobytes(), "little")
        for j in range(256):
            code = stream >> (j * scheme.bits) & (2**scheme.bits - 1)
            group = j // scheme.group_size
            values[i, j] = float(tensors["scales"][i, group]) * code + float(tensors["biases"][i, group])
    exact = weight.dequantize(torch.float64)
    # the bias is rounded to float16: exact for symmetric weights, half a unit in the last place otherwise
    slack = 0 if scheme.sym else weight.scale.double().abs().max() * 2**scheme.bits * 2**-11
    assert (values - exact).abs().max() <= slack


def test_golden_words():
    codes = (7 * torch.arange(32) % 16).to(torch.uint8)[None]
    weight = AffineWeight(W4, codes, torch.full((1, 1), 0.5).half(), torch.full((1, 1), 8).byte())
    tensors = LAYOUT.pack(weight)
    assert [f"{word:08x}" for word in tensors["weight"][0].tolist()] == ["1a3c5e70", "92b4d6f8", "1a3c5e70", "92b4d6f8"]
    assert (tensors["scales"].item(), tensors["biases"].item()) == (0.5, -4.0)


def test_the_configuration_as_mlx_reads_it(tmp_path):
    layers = save(tmp_path, context([W4, None, W8], kept=["model.layers.0.mlp.gate"]), FORMAT)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization") == {
        "group_size": 32, "bits": 4, "mode": "affine", "sym": True,
        "model.layers.1.fc": False, "model.layers.2.fc": {"group_size": 64, "bits": 8},
    }  # fmt: skip
    assert config == CONFIG
    assert FORMAT.recognizes(tmp_path) and not DenseFormat().recognizes(tmp_path)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


@pytest.mark.parametrize("scheme", [W4A, W3A], ids=str)
def test_asymmetric_layers_come_back(tmp_path, scheme):
    layers = save(tmp_path, context([scheme, scheme], scheme), FORMAT)
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


def test_what_is_refused_before_the_run():
    assert FORMAT.why_not(spec("fc", W4A)) is None
    assert "integers of 2, 3, 4, 5, 6, 8 bits, not W7G32" in FORMAT.why_not(spec("fc", QuantScheme(7, 32)))
    assert "group sizes 32, 64, 128, not -1" in FORMAT.why_not(spec("fc", QuantScheme(4, -1)))
    assert "divisible by group_size (32)" in FORMAT.why_not(spec("fc", W4, 48))
    assert "experts" in FORMAT.why_not(spec("model.layers.0.mlp.experts.0.up_proj", W4))
    assert "not known to read" in FORMAT.verdict(Target.parse("vllm"), [spec("fc", W4)]).refusal


def test_a_bias_beyond_float16_is_refused():
    weight = record(W4, 1, 32)
    large = AffineWeight(W4, weight.codes, torch.full((1, 1), 6e4).half(), weight.zero_point)
    with pytest.raises(CheckpointError, match="more than torch.float16 can hold"):
        LAYOUT.pack(large)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"biases": torch.full((32, 2), 0.3).half()}, "no whole multiples"),
        ({"scales": torch.ones(32, 2, dtype=torch.float64)}, "contradict"),
        ({"weight": torch.zeros(32, 7, dtype=torch.int32).view(torch.uint32)}, "cannot hold exactly 64 codes"),
    ],
)
def test_tensors_that_contradict_are_refused(tmp_path, change, says):
    save(tmp_path, context([W4]), FORMAT)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {f"{FIRST}.{name}": tensor for name, tensor in change.items()}, path)
    with pytest.raises(CheckpointError, match=says):
        list(FORMAT.read(tmp_path).layers())


def test_another_mode_is_refused(tmp_path):
    save(tmp_path, context([W4]), FORMAT)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"]["mode"] = "mxfp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mode `mxfp4` of MLX; known: affine"):
        FORMAT.read(tmp_path)
