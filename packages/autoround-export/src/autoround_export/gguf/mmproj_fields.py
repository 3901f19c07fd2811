"""What the file of a vision tower says in numbers, and what llama.cpp computes with without being told.

llama.cpp knows each kind of tower and projector; a few numbers it reads, the rest is in its code. A model that wants
something else is refused, because its images would be seen wrongly without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoround_core import UnsupportedError, read_json
from autoround_export.gguf.vision import VisionModel
from autoround_export.gguf.vision_table import VISION_ARCH

_ACTIVATIONS = {
    "quick_gelu": {}, "silu": {"clip.use_silu": True},
    # llama.cpp has one approximation for both
    "gelu": {"clip.use_gelu": True}, "gelu_pytorch_tanh": {"clip.use_gelu": True},
}  # fmt: skip
_POOLED = 4  # patches a side that llama.cpp takes Gemma's projector to average, where the file does not say


def check_tower(model: VisionModel) -> None:
    """Raises UnsupportedError where llama.cpp computes something else."""
    kind = model.family.projector_type
    for part, fixed in ((model.vision, model.tower.fixed), (model.full, model.family.fixed)):
        for key, built_in in fixed.items():
            if part.get(key) != built_in:
                raise UnsupportedError(f"llama.cpp computes `{kind}` with {key} = `{built_in}`, the model has "
                                       f"`{part.get(key)}`: it cannot be stored as GGUF")
    sizes = model.sizes()
    if sizes["ffn"] == sizes["hidden"]:
        # it swaps the two matrices of a feed-forward network where only the first could be as wide as the tower
        raise UnsupportedError(f"llama.cpp takes a vision tower whose intermediate size is its width, {sizes['ffn']}, "
                               "for one of an old file and swaps two of its matrices")
    if model.vision.get("hidden_act") not in _ACTIVATIONS:
        raise UnsupportedError(f"llama.cpp knows no vision tower with hidden_act `{model.vision.get('hidden_act')}` "
                               f"(possible: {', '.join(_ACTIVATIONS)})")


def tower_fields(model: VisionModel) -> dict[str, Any]:
    """All fields but those of the pixels and of the file itself. Raises UnsupportedError."""
    sizes = model.sizes()
    numbers = {
        "image_size": sizes["image"], "patch_size": sizes["patch"], "embedding_length": sizes["hidden"],
        "feed_forward_length": sizes["ffn"], "block_count": sizes["blocks"], "projection_dim": sizes["text"],
        "attention.head_count": sizes["heads"], "attention.layer_norm_epsilon": model.tower.epsilon(model.vision),
    }  # fmt: skip
    more = _window(model) | _deepstack(model) | _pooling(model) | _features(model)
    return {
        "general.architecture": VISION_ARCH, "general.type": "mmproj", "clip.has_vision_encoder": True,
        "clip.projector_type": model.family.projector_type, **_ACTIVATIONS[model.vision["hidden_act"]],
        **{f"clip.vision.{key}": value for key, value in (numbers | more).items()},
    }  # fmt: skip


def _window(model: VisionModel) -> dict[str, Any]:
    """Qwen2.5-VL: every n-th block sees the whole image, the others a window."""
    if "fullatt_block_indexes" not in model.vision:
        return {}
    whole, blocks = list(model.vision["fullatt_block_indexes"] or ()), model.sizes()["blocks"]
    step = whole[0] + 1 if whole else 0
    if not step or [i for i in whole if i < blocks] != list(range(step - 1, blocks, step)):
        raise UnsupportedError("llama.cpp lets every n-th block of the vision tower see the whole image, the model "
                               f"has fullatt_block_indexes = {whole}: it cannot be stored as GGUF")
    return {"n_wa_pattern": step}


def _deepstack(model: VisionModel) -> dict[str, Any]:
    if "deepstack_visual_indexes" not in model.vision:
        return {}
    tapped, blocks = list(model.vision["deepstack_visual_indexes"]), model.sizes()["blocks"]
    if tapped != sorted(set(tapped)) or any(not 0 <= i < blocks for i in tapped):
        raise UnsupportedError(f"llama.cpp taps the blocks of a vision tower in their order, the model has "
                               f"deepstack_visual_indexes = {tapped}: it cannot be stored as GGUF")
    return {"spatial_merge_size": 2, "is_deepstack_layers": [i in tapped for i in range(blocks)]}


def _pooling(model: VisionModel) -> dict[str, Any]:
    """Gemma 3: how many patches a side become one token."""
    if "mm_tokens_per_image" not in model.full:
        return {}
    sizes, tokens = model.sizes(), model.full["mm_tokens_per_image"]
    patches, side = sizes["image"] // sizes["patch"], math.isqrt(tokens)
    if side * side != tokens or patches % side:
        raise UnsupportedError(f"{patches} x {patches} patches cannot be averaged to {tokens} tokens "
                               "(mm_tokens_per_image) by llama.cpp: it wants equal squares")
    return {} if patches // side == _POOLED else {"projector.scale_factor": patches // side}


def _features(model: VisionModel) -> dict[str, Any]:
    """LLaVA: after which blocks the projector takes its numbers. Said always, because what llama.cpp does otherwise is
    meant for old files without the last block.
    """
    blocks, strategy = model.sizes()["blocks"], model.full.get("vision_feature_select_strategy")
    layers = model.feature_layers(blocks)
    if not layers:
        return {}
    wanted = "default" if any(slot.gguf == ("v.class_embd",) for slot in model.tower.outer) else "full"
    if strategy != wanted:
        raise UnsupportedError(f"llama.cpp passes on the patches of this vision tower, which is "
                               f"vision_feature_select_strategy = `{wanted}`; the model has `{strategy}`")
    if layers != sorted(set(layers)) or not all(0 < layer < blocks for layer in layers):
        raise UnsupportedError("llama.cpp takes features after blocks of the vision tower in their order, before the "
                               f"last; the model has vision_feature_layer = {model.full['vision_feature_layer']}")
    return {"feature_layer": layers}


def pixel_fields(directory: Path) -> dict[str, Any]:
    """Mean and deviation of the pixels, from the image processor in a model's directory; what its files leave out is as
    in its class. Raises UnsupportedError where there is none.
    """
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = read_json(directory / name) if (directory / name).is_file() else {}
        if isinstance(content, Mapping):
            nested = content.get("image_processor")
            settings |= {**content, **(nested if isinstance(nested, dict) else {})}
    if settings and not {"image_mean", "image_std"} <= settings.keys():
        settings = {**_of_class(directory), **settings}
    fields = {}
    for key in ("image_mean", "image_std"):
        value = settings.get(key)
        listed = isinstance(value, (list, tuple)) and len(value) == 3
        if not listed or not all(isinstance(x, (int, float)) for x in value):
            raise UnsupportedError(f"llama.cpp needs `{key}` of the image processor as three numbers, and neither "
                                   f"preprocessor_config.json nor processor_config.json in `{directory}` has it; save "
                                   "the model's processor there")
        fields[f"clip.vision.{key}"] = [float(x) for x in value]
    return fields


def _of_class(directory: Path) -> dict[str, Any]:
    """All settings of an image processor, as Transformers completes them; empty where it cannot."""
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoImageProcessor.from_pretrained(directory, trust_remote_code=False).to_dict()
    except (OSError, ValueError, ImportError, KeyError):
        return {}
    finally:
        logging.set_verbosity(verbosity)
