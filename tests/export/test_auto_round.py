"""Format auto_round: which packing is chosen, what engines read in the configuration, and the way back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from autoround_core import (
    CheckpointError,
    QuantizedLayer,
    QuantScheme,
    UnknownNameError,
    UsageError,
)
from autoround_core.scheme import PRESETS
from autoround_export.auto_round import AutoRoundFormat
from checkpoint_cases import CONFIG, W3A, W4, W4A, W8, context, digests, quantization, record, rewrite, spec
from checkpoint_cases import save as save_as

FORMAT = AutoRoundFormat()


def save(directory, given, fmt=FORMAT, rest=()):
    return save_as(directory, given, fmt, rest)


# --- the packing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schemes", "on_disk"),
    [
        ([W4, W4], "auto_round:auto_gptq"),
        ([W4, None, W8], "auto_round:auto_gptq"),  # any bits, as long as all are symmetric
        ([QuantScheme(2, 64), QuantScheme(3, 48)], "auto_round:auto_gptq"),
        ([W4A, W4A], "auto_round:auto_awq"),
        ([W4A, None], "auto_round:auto_awq"),
        ([W4A, W4], "auto_round"),
        ([W4A, W3A], "auto_round"),
        ([W3A], "auto_round"),
        ([QuantScheme(4, 48, False)], "auto_round"),  # the AWQ layout has no shorter last group
        ([QuantScheme(8, 32, False), W8], "auto_round"),
    ],
)
def test_the_packing_follows_from_the_layers(tmp_path, schemes, on_disk):
    given = context(schemes)
    layers = save(tmp_path, given)
    assert quantization(tmp_path)["packing_format"] == on_disk
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        scheme, words = layer.weight.scheme, tensors[f"{name}.qweight"]
        assert tuple(words.shape) == ((64, 4) if on_disk.endswith("awq") else (2 * scheme.bits, 32))
        assert not any(key.startswith(f"{name}.weight") for key in tensors)
    back = {layer.name: layer for layer in FORMAT.read(tmp_path).layers()}
    assert {name: layer.weight.digest() for name, layer in back.items()} == {
        name: layer.weight.digest() for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("packing", "scheme", "on_disk", "zero_word"),
    [
        ("auto_gptq", W4, "auto_round:auto_gptq", 0x77777777),
        ("auto_awq", W4, "auto_round:auto_awq", 0x88888888),
        ("gptqmodel", W4, "auto_round", 0x88888888),
    ],
)
def test_a_packing_can_be_asked_for(tmp_path, packing, scheme, on_disk, zero_word):
    fmt = FORMAT.variant(packing)
    assert fmt.name == f"auto_round:{packing}" and FORMAT.name == "auto_round"
    layers = save(tmp_path, context([scheme, scheme]), fmt)
    assert quantization(tmp_path)["packing_format"] == on_disk
    words = load_file(tmp_path / "model.safetensors")["model.layers.0.fc.qzeros"]
    assert {int(word) & 0xFFFFFFFF for word in words.flatten()} == {zero_word}
    assert [layer.weight.digest() for layer in FORMAT.read(tmp_path).layers()] == [
        layer.weight.digest() for layer in layers.values()
    ]


def test_an_unknown_packing_offers_the_nearest():
    with pytest.raises(
        UnknownNameError, match="unknown packing of format auto_round `auto_gpqt`; did you mean `auto_gptq`"
    ):
        FORMAT.variant("auto_gpqt")


def test_the_default_takes_what_some_packing_takes():
    assert (
        FORMAT.why_not(spec("fc", W4)) is None
        and FORMAT.why_not(spec("fc", QuantScheme(7, 48, False))) is None
    )
    for size in (16, 100):
        assert (
            FORMAT.why_not(spec("fc", W4, in_features=size))
            == f"in_features must be divisible by 32, got {size}"
        )
        assert (
            FORMAT.why_not(spec("fc", W4A, out_features=size))
            == f"out_features must be divisible by 32, got {size}"
        )
    assert "mxfp" in FORMAT.why_not(spec("fc", QuantScheme(4, 32, data_type="mxfp")))


@pytest.mark.parametrize(
    ("packing", "scheme", "says"),
    [
        ("auto_gptq", W4A, "zero_point - 1"),
        ("auto_awq", W3A, "4-bit"),
        ("auto_awq", QuantScheme(4, 48), "divisible by group_size"),
    ],
)
def test_a_packing_that_was_asked_for_is_not_replaced(packing, scheme, says):
    assert says in FORMAT.variant(packing).why_not(spec("fc", scheme))
    assert FORMAT.why_not(spec("fc", scheme)) is None


# --- the configuration --------------------------------------------------------------------------------------


def test_the_configuration_as_engines_read_it(tmp_path):
    save(tmp_path, context([W4, W4]))
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == CONFIG
    version = quantized.pop("autoround_version")
    assert isinstance(version, str) and version
    assert quantized == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "iters": 7,
        "nsamples": 3,
        "seqlen": 11,
    }
    assert json.loads((tmp_path / "quantization_config.json").read_text()) == {
        **quantized,
        "autoround_version": version,
    }


def test_extra_config_names_every_other_layer_and_every_entry_is_complete(tmp_path):
    given = context(
        [W4, W8, None, W4],
        kept=["model.layers.0.mlp.gate"],
        head=W4,
        blocks=[f"model.layers.{i}" for i in range(4)],
    )
    save(tmp_path, given)
    assert quantization(tmp_path)["extra_config"] == {
        "model.layers.1.fc": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"},
        "model.layers.2.fc": {"bits": 16, "group_size": 32, "sym": True, "data_type": "float"},
        "model.layers.0.mlp.gate": {"bits": 16, "group_size": 32, "sym": True, "data_type": "float"},
        # of the default scheme, but outside the blocks
        "lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"},
    }


def test_a_layer_beside_a_block_of_a_similar_name_is_outside(tmp_path):
    # `model.layers.1` is not a prefix of `model.layers.10.fc` in the sense of modules
    given = context([W4], blocks=["model.layers.1"])
    given.layers.append(spec("model.layers.10.fc", W4))
    save(tmp_path, given)
    assert set(quantization(tmp_path)["extra_config"]) == {"model.layers.0.fc", "model.layers.10.fc"}


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        (["model.layers.0", "model.layers.1"], "model.layers"),
        (["transformer.h.0"], "transformer.h"),
        (["vision.blocks.0", "model.layers.0", "model.layers.1"], "model.layers,vision.blocks"),
    ],
)
def test_block_name_to_quantize(tmp_path, blocks, named):
    save(tmp_path, context([W4], blocks=blocks))
    assert quantization(tmp_path)["block_name_to_quantize"] == named


# --- the way back -------------------------------------------------------------------------------------------


def test_the_rest_and_biases_come_back_as_they_were(tmp_path):
    embedding = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    rest = [("model.embed_tokens.weight", embedding), ("model.norm.bias", torch.ones(4))]
    layers = save(tmp_path, context([W4, None]), rest=rest)
    assert FORMAT.recognizes(tmp_path)
    reader = FORMAT.read(tmp_path)
    for _ in range(2):  # both may be asked for more than once
        (layer,) = reader.layers()
        assert layer.name == "model.layers.0.fc" and torch.equal(layer.bias, layers[layer.name].bias)
        back = dict(reader.rest())
        assert back.keys() == {"model.embed_tokens.weight", "model.norm.bias", "model.layers.1.fc.weight"}
        assert (
            torch.equal(back["model.embed_tokens.weight"], embedding)
            and back["model.norm.bias"].dtype == torch.float32
        )
    assert reader.config["model_type"] == "tiny"


def test_entries_of_others_may_be_partial_and_may_be_regular_expressions(tmp_path):
    # as the other program writes them: only what differs, by name or by pattern; the exact name goes first
    layers = save(tmp_path, context([W4, W8, QuantScheme(2, 32)]))
    rewrite(
        tmp_path,
        extra_config={
            r".*layers\.[12]\.fc": {"bits": 8, "group_size": -1},
            "model.layers.2.fc": {"bits": 2},
            "layers.0": {"bits": 3},
        },
    )
    back = {layer.name: layer.weight.digest() for layer in FORMAT.read(tmp_path).layers()}
    assert back == {name: layer.weight.digest() for name, layer in layers.items()}


def test_a_broken_regular_expression_of_others_is_named(tmp_path):
    save(tmp_path, context([W4]))
    rewrite(tmp_path, extra_config={"layers.(0": {"bits": 8}})
    with pytest.raises(CheckpointError, match=r"`layers.\(0`, which is no regular expression"):
        FORMAT.read(tmp_path)


def test_g_idx_of_others_is_no_part_of_the_rest(tmp_path):
    given = context([W4])
    save(tmp_path, given, rest=[("model.layers.0.fc.g_idx", torch.arange(64, dtype=torch.int32) // 32)])
    assert list(FORMAT.read(tmp_path).rest()) == []


def test_a_packing_of_others_is_refused_by_name(tmp_path):
    save(tmp_path, context([W4]))
    rewrite(tmp_path, packing_format="auto_round:fake")
    with pytest.raises(
        CheckpointError, match=r"packing_format `auto_round:fake`.*known: auto_round:auto_gptq"
    ):
        FORMAT.read(tmp_path)


def test_a_missing_part_and_a_wrong_scheme_are_refused(tmp_path):
    save(tmp_path, context([W4]))
    rewrite(tmp_path, group_size=64)
    with pytest.raises(CheckpointError, match="GPTQ tensors contradict W4G64"):
        list(FORMAT.read(tmp_path).layers())
    rewrite(
        tmp_path, packing_format="auto_round", group_size=32
    )  # zero points of version 1 read as version 2
    with pytest.raises(CheckpointError, match="symmetric weights must be 8"):
        list(FORMAT.read(tmp_path).layers())
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.fc.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor `model.layers.0.fc.scales`"):
        list(FORMAT.read(tmp_path).layers())


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"quantization_config": {"quant_method": "auto-round"}}, True),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"quantization_config": {}}, False),
        ({"quantization_config": None}, False),
        ({"quantization_config": "auto-round"}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_what_is_recognized(tmp_path, config, ours):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert FORMAT.recognizes(tmp_path) is ours


def test_a_tensor_is_not_stored_twice(tmp_path):
    given = context([W4])
    writer = FORMAT.open(tmp_path, given)
    writer.add(QuantizedLayer("model.layers.0.fc", record(W4)))
    with pytest.raises(CheckpointError, match="stored twice"):
        writer.add(QuantizedLayer("model.layers.0.fc", record(W4)))


def test_a_format_without_variants_says_so():
    from autoround_export.dense import DenseFormat

    with pytest.raises(UsageError, match="format `dense` has no variant `x`"):
        DenseFormat().variant("x")


# --- floats -------------------------------------------------------------------------------------------------

BLOCK, MX4, MX8 = (PRESETS[name] for name in ("FP8_BLOCK", "MXFP4", "MXFP8"))


def float_context(*schemes, **options):
    given = context([], schemes[0], **options)
    given.layers.extend(spec(f"model.layers.{i}.fc", scheme, 256, 128) for i, scheme in enumerate(schemes))
    return given


@pytest.mark.parametrize(
    ("schemes", "packing", "names"),
    [
        ((BLOCK, BLOCK), "auto_round:fp8", {"weight", "weight_scale_inv"}),
        ((MX4, MX4), "auto_round:llm_compressor", {"weight_packed", "weight_scale"}),
        ((MX8, MX4), "auto_round:llm_compressor", {"weight", "weight_packed", "weight_scale"}),
        ((PRESETS["FP8_STATIC"],), "auto_round:fp8_static", {"weight", "weight_scale", "input_scale"}),
        ((PRESETS["NVFP4"],), "auto_round:llm_compressor",
         {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}),
    ],
)
def test_floats_have_packings_of_their_own(tmp_path, schemes, packing, names):
    layers = save_as(tmp_path, float_context(*schemes), FORMAT)
    assert quantization(tmp_path)["packing_format"] == packing
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == names | {"bias"}
    assert digests(FORMAT.read(tmp_path).layers()) == digests(layers.values())


def test_what_engines_read_about_floats(tmp_path):
    save_as(tmp_path, float_context(BLOCK, kept=["model.layers.0.gate"]), FORMAT)
    config = quantization(tmp_path)
    assert config.items() >= {
        "bits": 8, "group_size": [128, 128], "sym": True, "data_type": "fp", "act_bits": 8, "act_data_type": "fp",
        "act_group_size": 128, "act_sym": True, "act_dynamic": True, "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }.items()  # fmt: skip
    assert config["extra_config"]["model.layers.0.gate"] == {
        "bits": 16, "group_size": [128, 128], "sym": True, "data_type": "float", "act_bits": 16,
    }  # fmt: skip


def test_floats_that_are_refused_before_the_run():
    assert FORMAT.why_not(spec("fc", BLOCK, 200, 100)) is None
    for name in ("FP8_DYNAMIC", "FPW8A16", "NVFP4A16", "MXFP4A16"):
        assert "llm_compressor holds more" in FORMAT.why_not(spec("fc", PRESETS[name]))
    assert "inputs in 16 bits, not INT8" in FORMAT.why_not(spec("fc", PRESETS["INT8"]))
    assert "MXFP4, MXFP8 and NVFP4, not W4G32" in FORMAT.variant("llm_compressor").why_not(spec("fc", W4))
    assert FORMAT.why_not_together([spec("a", MX4), spec("b", MX8)]) is None
    assert "got MXFP4 and W4G32" in FORMAT.why_not_together([spec("a", MX4), spec("b", W4)])


@pytest.mark.parametrize(
    ("values", "says"),
    [({"data_type": "int"}, "does not hold W4G32"), ({"act_bits": 16}, "does not hold MXFP4A16"),
     ({"group_size": [128, 128]}, "contradict|does not hold")],
)
def test_floats_whose_configuration_cannot_be(tmp_path, values, says):
    save_as(tmp_path, float_context(MX4), FORMAT)
    rewrite(tmp_path, **values)
    with pytest.raises(CheckpointError, match=says):
        list(FORMAT.read(tmp_path).layers())
