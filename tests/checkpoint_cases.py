"""Small checkpoints for the tests of formats: layers, their contexts, and random records for them."""

from __future__ import annotations

import json

import torch

from autoround_core import (
    AffineWeight,
    CheckpointContext,
    FloatWeight,
    LinearSpec,
    QuantizedLayer,
    QuantRecipe,
    QuantScheme,
    TuningSettings,
)

W4, W4A, W3A, W8 = (
    QuantScheme(4, 32),
    QuantScheme(4, 32, False),
    QuantScheme(3, 32, False),
    QuantScheme(8, -1),
)
CONFIG = {"model_type": "tiny", "hidden_size": 64, "torch_dtype": "bfloat16"}


def spec(name, scheme, in_features=64, out_features=32):
    return LinearSpec(name, in_features=in_features, out_features=out_features, scheme=scheme)


def record(scheme, out_features=32, in_features=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid, top = (out_features, scheme.groups(in_features)), 2**scheme.bits
    zeros = torch.full(grid, top // 2) if scheme.sym else torch.randint(0, top, grid, generator=generator)
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    scale = torch.randn(grid, generator=generator).to(torch.float16)
    return AffineWeight(scheme, codes.to(torch.uint8), scale, zeros.to(torch.uint8))


def float_record(scheme, out_features=32, in_features=64, seed=0):
    """A random FloatWeight: any finite number, scales of every stored kind."""
    generator = torch.Generator().manual_seed(seed)
    grid = (scheme.row_groups(out_features), scheme.groups(in_features))
    codes = torch.randint(0, 2**scheme.bits, (out_features, in_features), generator=generator).to(torch.uint8)
    if scheme.bits == 8:
        codes[codes & 127 == 127] -= 1  # E4M3 has two codes that are no number
    scale = torch.rand(grid, generator=generator) + 0.01
    if scheme.data_type == "mx_fp":
        scale = torch.randint(110, 130, grid, generator=generator).to(torch.uint8)
    elif scheme.data_type == "nv_fp":
        return FloatWeight(scheme, codes, (400 * scale).to(torch.float8_e4m3fn), torch.tensor([737.5]))
    return FloatWeight(scheme, codes, scale)


def context(schemes, default=W4, *, kept=(), blocks=("model.layers.0", "model.layers.1"), head=None):
    """Layer `model.layers.<i>.fc` for each scheme, and lm_head where it is given."""
    layers = [spec(f"model.layers.{i}.fc", scheme) for i, scheme in enumerate(schemes)]
    if head:
        layers.append(spec("lm_head", head))
    return CheckpointContext(
        config=CONFIG,
        recipe=QuantRecipe(default),
        layers=layers,
        blocks=blocks,
        kept=kept,
        transposed=(),
        dtype=torch.bfloat16,
        settings=TuningSettings(iters=7, nsamples=3, seqlen=11),
    )


def needs_input_scale(activation):
    return activation is not None and (activation.data_type == "nv_fp" or not activation.dynamic)


def save(directory, given, fmt, rest=()):
    """Write random records for every layer; return them by name."""
    writer, layers = fmt.open(directory, given), {}
    for i, layer in enumerate(given.layers):
        if layer.scheme is None:
            writer.keep(f"{layer.name}.weight", torch.full((32, 64), float(i)).bfloat16())
            continue
        bias = torch.arange(32).bfloat16() if i == 0 else None
        weight = (record if layer.scheme.data_type == "int" else float_record)(
            layer.scheme, layer.out_features, layer.in_features, seed=i
        )
        input_scale = torch.tensor([0.25 + i]) if needs_input_scale(layer.scheme.activation) else None
        layers[layer.name] = QuantizedLayer(layer.name, weight, bias, input_scale)
        writer.add(layers[layer.name])
    for name, tensor in rest:
        writer.keep(name, tensor)
    writer.finish()
    return layers


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def rewrite(directory, **values):
    """Change the quantization_config; None takes a key away."""
    config = json.loads((directory / "config.json").read_text())
    changed = config["quantization_config"] | values
    config["quantization_config"] = {key: value for key, value in changed.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def digests(layers):
    return {layer.name: layer.weight.digest() for layer in layers}
