"""The options that `quantize` and `plan` share, and what they build.

Option names use underscores, as AutoRound's users know them; hyphens work everywhere (`--group-size`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from autoround_core.errors import UsageError, unknown_name
from autoround_core.fusing import CHECK, FUSE_MODES
from autoround_core.scheme import GGUF_TYPES, MAX_BITS, MIN_BITS, PRESETS, SCALE_SIGNS
from autoround_core.settings import DEFAULT_RECIPE, RECIPES
from autoround_core.target import ANY, ENGINES

DEFAULT_FACE = "autoround_core.AutoRound"

_MODEL = [
    click.option("--model", required=True, help="Model directory, or an id on the hub."),
    click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first."),
]
_SCHEME = [
    click.option("--scheme", help="Bits, group size and symmetry in one word: W4G128, W2G64-asym, W4A16; or one of "
                                  f"{', '.join([*PRESETS, *GGUF_TYPES])}."),
    click.option("--bits", type=click.IntRange(MIN_BITS, MAX_BITS), help="Bits of a weight.  [default: 4]"),
    click.option("--group_size", type=int, help="Weights that share a scale; -1 = a whole row.  [default: 128]"),
    click.option("--sym/--asym", default=None, help="Fixed or free zero point.  [default: sym]"),
    click.option(
        "--layer_config",
        help="Other schemes for some layers: JSON or a JSON file, "
        '{"name or regular expression": "W8G128" | 16 | {"bits": 8}}.',
    ),
    click.option("--quant_lm_head", is_flag=True, help="Quantize lm_head too."),
    click.option("--quant_nontext_module", is_flag=True,
                 help="Quantize the vision or audio tower and the projector too, of models that have them."),
    click.option(
        "--strict/--no_strict",
        default=True,
        help="Refuse, or keep in 16 bits, layers that the format cannot store.  [default: strict]",
    ),
]
_ENGINE = [
    click.option("--fuse", type=click.Choice(FUSE_MODES), default=CHECK, show_default=True,
                 help="Different schemes in layers that engines run as one: refuse, raise to the widest, or allow."),
    click.option("--scale_sign", type=click.Choice(SCALE_SIGNS), default=SCALE_SIGNS[0], show_default=True,
                 help="Symmetric scales of integers: of either sign, or positive for kernels that want them so."),
    click.option("--target", default=ANY, show_default=True, metavar="ENGINE[:DEVICE]",
                 help=f"Refuse what this engine cannot run: {', '.join(ENGINES)}, or any."),
]
_TUNING = [
    click.option("--recipe", default=DEFAULT_RECIPE, show_default=True, help=f"One of {', '.join(RECIPES)}."),
    click.option("--algorithm", help="rtn, opt_rtn, signround, or a plugin's; the recipe chooses otherwise."),
    click.option("--iters", type=int, help="Tuning steps per block."),
    click.option("--nsamples", type=int, help="Calibration samples."),
    click.option("--seqlen", type=int, help="Tokens per sample."),
    click.option("--batch_size", type=int, help="Samples per forward pass."),
    click.option("--gradient_accumulate_steps", type=int, help="Forward passes per tuning step."),
    click.option("--lr", type=float, help="Learning rate of the rounding.  [default: 1/iters]"),
    click.option("--minmax_lr", type=float, help="Learning rate of the clipping range.  [default: lr]"),
    click.option("--seed", type=int, help="Seed of the sample order.  [default: 42]"),
    click.option(
        "--dataset",
        default=None,
        help="Calibration data: a hub dataset, .txt .json .jsonl .parquet, `stdlib` (text), `synthetic` (drawn "
        "images), a folder of images with captions; several by commas; each may add :num=N :split=S :concat "
        ":apply_chat_template :system_prompt=TEXT :images=FOLDER."
        "  [default: NeelNanda/pile-10k; synthetic for vision-language models]",
    ),
    click.option("--skip_bad_samples", is_flag=True,
                 help="Leave out samples with images that cannot be read, and count them in the report."),
    click.option(
        "--amp/--no_amp", default=None, help="Matrix products in 16 bits while tuning.  [default: where faster]"
    ),
]
_RUN = [
    click.option(
        "--format", "format_", default="auto_round", show_default=True, help="Checkpoint format; several by commas."
    ),
    click.option("--gguf_pre", metavar="NAME", help="Of format gguf: llama.cpp's name for the tokenizer's splitting "
                                                   "rules, where they are not recognized."),
    click.option("--device", default="cpu", show_default=True, help="Where to tune: cpu, cuda, cuda:1, xpu, hpu."),
    click.option("--low_gpu_mem_usage", is_flag=True, help="Keep calibration states in main memory."),
]


_FORMAT_OPTIONS = ("gguf_pre",)


def quantization_options(command: Callable) -> Callable:
    """All options that decide what happens to a model."""
    for option in reversed([*_MODEL, *_SCHEME, *_ENGINE, *_TUNING, *_RUN]):
        command = option(command)
    return command


def make_autoround(options: dict[str, Any], progress: Any = None):
    """An AutoRound, or what the program makes instead, from the options of `quantization_options` but `format_`."""
    module, _, name = (click.get_current_context().find_root().obj or DEFAULT_FACE).rpartition(".")
    face = getattr(import_module(module), name)
    # an option left out takes the default of the library
    given = {name: value for name, value in options.items() if value is not None}
    of_formats = {name: given.pop(name) for name in _FORMAT_OPTIONS if name in given}
    return face(progress=progress, format_options=of_formats, **given)


DTYPES = ("auto", "bfloat16", "float16", "float32")


def parse_dtype(name: str):
    """The torch dtype of a `--dtype`, None for auto."""
    import torch

    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return None if name == "auto" else getattr(torch, name)


def parse_backends(text: str) -> list[str]:
    """The names of a `--backend`, separated by commas; known ones, or auto."""
    from autoround_core.backend import AUTO
    from autoround_core.registry import get_registry

    registry = get_registry()
    known = [*registry.backends(), AUTO]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise unknown_name("backend", name, known, registry.failure_notes)
        if names.count(name) > 1:
            raise UsageError(f"backend `{name}` is named twice; name it once")
    return names
