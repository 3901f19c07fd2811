"""Does a format give back what was pushed into it, and know its own checkpoints from others?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from autoround_core.errors import AutoRoundError
from autoround_core.format import CheckpointContext, CheckpointFormat, CheckpointReader
from autoround_core.recipe import LinearSpec, QuantRecipe
from autoround_core.records import QuantizedLayer
from autoround_core.settings import TuningSettings
from autoround_core.shards import ShardWriter, write_json
from autoround_core.testing.cases import (
    SCHEMES,
    Checked,
    ask,
    conclude,
    doing,
    random_layer,
    require,
    same,
    spec_of,
)

_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}
_BLOCKS = ("model.layers.0", "model.layers.1")
# name in the block -> [out, in]; no other layer is fused with these two, so their schemes are free
_SHAPES = {"self_attn.o_proj": (128, 128), "mlp.down_proj": (128, 256)}
_KEPT = "model.layers.1.self_attn.o_proj"
_TRANSPOSED = "model.layers.1.mlp.down_proj"
_ROUTER = "model.layers.1.mlp.gate"


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What is pushed into a writer: its context, layers for `add`, tensors for `keep`."""

    context: CheckpointContext
    layers: Mapping[str, QuantizedLayer]
    rest: Mapping[str, torch.Tensor]


def check_format(fmt: CheckpointFormat, tmp_path: Path) -> Checked:
    """Write and read a small checkpoint in each scheme that the format accepts, and one with two if it takes both.

    tmp_path: an empty directory to write into.
    """
    what = f"format `{fmt.name}`"
    require(bool(fmt.name), f"{type(fmt).__name__} has no name")
    _check_strangers(fmt, tmp_path, what)
    accepted, refusals = [], set()
    for scheme in SCHEMES:
        answers = {ask(what, fmt.why_not, spec_of(scheme, shape, bias=True)) for shape in _SHAPES.values()}
        if answers == {None}:
            accepted.append(scheme)
        refusals |= {answer for answer in answers if answer is not None}
    recipes = [QuantRecipe(scheme) for scheme in accepted]
    if len(accepted) > 1:
        mixed = QuantRecipe(accepted[0], ((f"{_BLOCKS[0]}.mlp.down_proj", accepted[-1]),))
        quantized = [spec for spec in _make(mixed).context.layers if spec.scheme is not None]
        reason = ask(what, fmt.why_not_together, quantized)
        recipes += [] if reason else [mixed]
        refusals |= {reason} - {None}
    for number, recipe in enumerate(recipes):
        directory = tmp_path / f"case-{number}"
        directory.mkdir()
        case = f"{what}, {recipe.default}" + (f" with {recipe.overrides[0][1]}" if recipe.overrides else "")
        _check_checkpoint(fmt, directory, _make(recipe), case)
    return conclude(what, len(recipes), refusals)


def _make(recipe: QuantRecipe) -> _Checkpoint:
    generator = torch.Generator().manual_seed(0)
    recipe = QuantRecipe(recipe.default, (*recipe.overrides, (_KEPT, None)))
    shapes = {f"{block}.{name}": shape for block in _BLOCKS for name, shape in _SHAPES.items()}
    schemes = recipe.resolve(shapes)
    biased = f"{_BLOCKS[0]}.self_attn.o_proj"
    specs = [
        LinearSpec(name, shape[1], shape[0], schemes[name], name == biased) for name, shape in shapes.items()
    ]
    layers = {
        spec.name: random_layer(spec.scheme, shapes[spec.name], generator, name=spec.name, bias=spec.has_bias)
        for spec in specs if spec.scheme is not None
    }

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rest = {
        "model.embed_tokens.weight": tensor(64, 128), f"{_KEPT}.weight": tensor(128, 128),
        f"{_ROUTER}.weight": tensor(8, 128), "model.norm.weight": tensor(128, dtype=torch.float32),
        "lm_head.weight": tensor(128, 64).T,  # a view, as an adapter may hand out
    }
    context = CheckpointContext(
        config=_CONFIG, recipe=recipe, layers=specs, blocks=_BLOCKS, kept=(_ROUTER,),
        transposed=(_TRANSPOSED,), dtype=torch.bfloat16, settings=TuningSettings(),
    )
    return _Checkpoint(context, layers, rest)


def _check_checkpoint(fmt: CheckpointFormat, directory: Path, checkpoint: _Checkpoint, case: str) -> None:
    digests = {name: layer.weight.digest() for name, layer in checkpoint.layers.items()}
    with doing(f"{case}: writing"):
        writer = fmt.open(directory, checkpoint.context)
        for layer in checkpoint.layers.values():
            writer.add(layer)
        for name, tensor in checkpoint.rest.items():
            writer.keep(name, tensor)
        writer.finish()
    for name, layer in checkpoint.layers.items():
        require(layer.weight.digest() == digests[name], f"{case}: the writer changes the record of `{name}`")
    with doing(f"{case}: recognizes"):
        require(fmt.recognizes(directory), f"{case}: the format does not recognize what it wrote")
    with doing(f"{case}: reading"):
        reader = fmt.read(directory)
        model_type = reader.config.get("model_type")
        require(model_type == _CONFIG["model_type"],
                f"{case}: the config that is read has model_type {model_type}, not {_CONFIG['model_type']}")
        for _ in range(2):  # a reader may be asked more than once
            _check_layers(fmt, reader, checkpoint, case)
            _check_rest(fmt, reader, checkpoint, case)


def _check_layers(
    fmt: CheckpointFormat, reader: CheckpointReader, checkpoint: _Checkpoint, case: str,
) -> None:
    found = {layer.name: layer for layer in reader.layers()}
    expected = checkpoint.layers if fmt.stores_records else {}
    require(found.keys() == expected.keys(),
            f"{case}: the layers {sorted(expected)} were written, {sorted(found)} are read")
    for name, layer in expected.items():
        digest = found[name].weight.digest()
        require(digest == layer.weight.digest(), f"{case}: the record of `{name}` differs")
        bias = found[name].bias
        equal = bias is None if layer.bias is None else bias is not None and same(bias, layer.bias)
        require(equal, f"{case}: the bias of `{name}` differs")


def _check_rest(fmt: CheckpointFormat, reader: CheckpointReader, checkpoint: _Checkpoint, case: str) -> None:
    expected = dict(checkpoint.rest)
    if not fmt.stores_records:
        for name, layer in checkpoint.layers.items():
            weight = layer.weight.dequantize(checkpoint.context.dtype)
            expected[f"{name}.weight"] = weight.T if name in checkpoint.context.transposed else weight
            if layer.bias is not None:
                expected[f"{name}.bias"] = layer.bias
    found = dict(reader.rest())
    require(found.keys() == expected.keys(),
            f"{case}: the other tensors are {sorted(expected)}, {sorted(found)} are read")
    for name, tensor in expected.items():
        require(same(found[name], tensor), f"{case}: tensor `{name}` differs")


def _check_strangers(fmt: CheckpointFormat, tmp_path: Path, what: str) -> None:
    """Nothing, an ordinary model and another format's checkpoint are not ours, and no reason to raise."""
    empty, plain, foreign = (tmp_path / name for name in ("empty", "plain", "foreign"))
    for directory in (empty, plain, foreign):
        directory.mkdir()
    for directory, extra in ((plain, {}), (foreign, {"quantization_config": {"quant_method": "unheard-of"}})):
        shards = ShardWriter(directory)
        shards.add("model.norm.weight", torch.ones(128))
        shards.finish()
        write_json(directory / "config.json", {**_CONFIG, **extra})
    strangers = {"an empty directory": empty, "a checkpoint with an unheard-of quant_method": foreign}
    if fmt.stores_records:  # dequantized weights are an ordinary model
        strangers["a model that is not quantized"] = plain
    for description, directory in strangers.items():
        with doing(f"{what}: recognizes, asked about {description},"):
            require(not fmt.recognizes(directory), f"{what}: recognizes {description}")
    try:
        for _ in fmt.read(empty).layers():
            break
    except AutoRoundError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: reading an empty directory must raise CheckpointError, "
                             f"got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: reading an empty directory must raise CheckpointError")
