"""What llama.cpp calls the parts of vision-language models, as data: one row for each model_type, one for each tower.

A vision-language model becomes two files. The language model is a row of `architecture_table`, sometimes under another
name because its positions have several axes. The vision tower and the projector lie in a second file, of the
architecture `clip`; here is where each of their tensors goes, and what llama.cpp computes with without reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
VISION_ARCH = "clip"


@dataclass(frozen=True, slots=True)
class VisionSlot:
    """One tensor of a tower or projector.

    hf: its name below the prefix of its part; {i} = the block, {j} = the place of that block in the list of tapped
    ones. gguf: its names in the file; of several, each gets an equal share: of a convolution over time one frame, of
    anything else rows; none = llama.cpp does not read it, and only our reader will. shape: in sizes of `Tower.sizes`.
    exact: float32 always. offset: added to every number. when: the option of vision_config without which it is absent.
    """

    hf: str
    gguf: tuple[str, ...]
    shape: tuple[str, ...]
    exact: bool = False
    offset: float = 0.0
    when: str = ""


@dataclass(frozen=True, slots=True)
class Tower:
    """A row for one model_type of vision_config.

    prefix: where Transformers stores it. anchor: a tensor that it always has. block: for each of its blocks; tapped:
    for those in `deepstack_visual_indexes`. sizes: of shapes, and `blocks`, `heads`, `image` and `patch` besides.
    epsilon: of its norms. fixed: {key of vision_config: what llama.cpp computes with}.
    """

    prefix: str
    anchor: str
    outer: tuple[VisionSlot, ...]
    block: tuple[VisionSlot, ...]
    sizes: Callable[[Config], dict[str, int]]
    epsilon: Callable[[Config], float]
    tapped: tuple[VisionSlot, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """A row for one model_type of config.json.

    projector_type: as llama.cpp calls what leads from the tower to the language model. towers: {model_type of
    vision_config: row}. projector: its tensors, where they are a part of their own. text, arch: the language model as
    an ordinary one, and the architecture of its file; empty = as text_config says. text_prefix, head_prefix: where
    Transformers stores it, for `model.` and before `lm_head`. sections: how many pairs of a head turn with each axis of
    a position, where config.json does not say. fixed: as for a tower, of config.json.
    """

    projector_type: str
    towers: Mapping[str, Tower]
    projector: tuple[VisionSlot, ...] = ()
    projector_prefix: str = "multi_modal_projector."
    projector_anchor: str = ""
    text: str = ""
    arch: str = ""
    text_prefix: str = "language_model.model."
    head_prefix: str = "language_model."
    sections: tuple[int, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _vector(hf: str, gguf: str, size: str, **more: Any) -> VisionSlot:
    return VisionSlot(hf, (gguf,), (size,), **more)


def _norm(hf: str, gguf: str, size: str = "hidden") -> tuple[VisionSlot, ...]:
    return _vector(f"{hf}.weight", f"{gguf}.weight", size), _vector(f"{hf}.bias", f"{gguf}.bias", size)


def _linear(hf: str, gguf: str | tuple[str, ...], rows: str, columns: str) -> tuple[VisionSlot, ...]:
    names = (gguf,) if isinstance(gguf, str) else gguf
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return VisionSlot(f"{hf}.weight", weights, (rows, columns)), VisionSlot(f"{hf}.bias", biases, (rows,))


def _unread(hf: str, *shape: str, when: str = "") -> VisionSlot:
    return VisionSlot(hf, (), shape, when=when)


_BLK = "v.blk.{i}."
_FRAMES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_SPLIT = tuple(f"{_BLK}attn_{part}" for part in "qkv")

# --- the towers of Qwen ---------------------------------------------------------------------------------------------

_PATCHES = VisionSlot("patch_embed.proj.weight", _FRAMES, ("hidden", "channels", "frames", "patch", "patch"))
_MERGER = (
    *_linear("merger.mlp.0", "mm.0", "merged", "merged"),
    *_linear("merger.mlp.2", "mm.2", "text", "merged"),
)
_QWEN_ATTENTION = (
    *_linear("blocks.{i}.attn.qkv", _SPLIT, "qkv", "hidden"),
    *_linear("blocks.{i}.attn.proj", f"{_BLK}attn_out", "hidden", "hidden"),
)
_QWEN_FIXED = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}


def _qwen_sizes(vision: Config) -> dict[str, int]:
    hidden, patch, merge = vision["hidden_size"], vision["patch_size"], vision["spatial_merge_size"]
    return {
        "hidden": hidden, "qkv": 3 * hidden, "merged": hidden * merge * merge, "ffn": vision["intermediate_size"],
        "channels": vision["in_channels"], "frames": vision["temporal_patch_size"], "patch": patch,
        "blocks": vision["depth"], "heads": vision["num_heads"], "image": 560,
    }  # fmt: skip


def _qwen2_sizes(vision: Config) -> dict[str, int]:
    """Its `hidden_size` is that of the language model."""
    hidden = vision["embed_dim"]
    return _qwen_sizes({**vision, "hidden_size": hidden, "intermediate_size": int(hidden * vision["mlp_ratio"])})


def _qwen3_sizes(vision: Config) -> dict[str, int]:
    positions = vision["num_position_embeddings"]
    return _qwen_sizes(vision) | {"positions": positions, "image": int(positions**0.5) * vision["patch_size"]}


def _in_code(vision: Config) -> float:
    """Qwen's towers have it in their code, not in config.json."""
    return 1e-6


_QWEN2 = Tower(
    "visual.", "patch_embed.proj.weight",
    (_PATCHES, *_norm("merger.ln_q", "v.post_ln"), *_MERGER),
    (*_norm("blocks.{i}.norm1", f"{_BLK}ln1"), *_norm("blocks.{i}.norm2", f"{_BLK}ln2"), *_QWEN_ATTENTION,
     *_linear("blocks.{i}.mlp.fc1", f"{_BLK}ffn_up", "ffn", "hidden"),
     *_linear("blocks.{i}.mlp.fc2", f"{_BLK}ffn_down", "hidden", "ffn")),
    _qwen2_sizes, _in_code, fixed=_QWEN_FIXED,
)  # fmt: skip
_QWEN25 = Tower(
    "visual.", "patch_embed.proj.weight",
    (_PATCHES, _vector("merger.ln_q.weight", "v.post_ln.weight", "hidden"), *_MERGER),
    (_vector("blocks.{i}.norm1.weight", f"{_BLK}ln1.weight", "hidden"),
     _vector("blocks.{i}.norm2.weight", f"{_BLK}ln2.weight", "hidden"), *_QWEN_ATTENTION,
     *_linear("blocks.{i}.mlp.gate_proj", f"{_BLK}ffn_gate", "ffn", "hidden"),
     *_linear("blocks.{i}.mlp.up_proj", f"{_BLK}ffn_up", "ffn", "hidden"),
     *_linear("blocks.{i}.mlp.down_proj", f"{_BLK}ffn_down", "hidden", "ffn")),
    _qwen_sizes, _in_code, fixed={**_QWEN_FIXED, "window_size": 112},
)  # fmt: skip
_QWEN3 = Tower(
    "model.visual.", "patch_embed.proj.weight",
    (_PATCHES, _vector("patch_embed.proj.bias", "v.patch_embd.bias", "hidden"),
     VisionSlot("pos_embed.weight", ("v.position_embd.weight",), ("positions", "hidden"), exact=True),
     *_norm("merger.norm", "v.post_ln"), *_linear("merger.linear_fc1", "mm.0", "merged", "merged"),
     *_linear("merger.linear_fc2", "mm.2", "text", "merged")),
    (*_norm("blocks.{i}.norm1", f"{_BLK}ln1"), *_norm("blocks.{i}.norm2", f"{_BLK}ln2"),
     *_linear("blocks.{i}.attn.qkv", f"{_BLK}attn_qkv", "qkv", "hidden"), *_QWEN_ATTENTION[2:],
     *_linear("blocks.{i}.mlp.linear_fc1", f"{_BLK}ffn_up", "ffn", "hidden"),
     *_linear("blocks.{i}.mlp.linear_fc2", f"{_BLK}ffn_down", "hidden", "ffn")),
    _qwen3_sizes, _in_code,
    (*_norm("deepstack_merger_list.{j}.norm", "v.deepstack.{i}.norm", "merged"),
     *_linear("deepstack_merger_list.{j}.linear_fc1", "v.deepstack.{i}.fc1", "merged", "merged"),
     *_linear("deepstack_merger_list.{j}.linear_fc2", "v.deepstack.{i}.fc2", "text", "merged")),
    _QWEN_FIXED,
)  # fmt: skip

# --- CLIP and SigLIP ------------------------------------------------------------------------------------------------

_LAYER = "encoder.layers.{i}."
_VIT_BLOCK = (
    *_norm(f"{_LAYER}layer_norm1", f"{_BLK}ln1"), *_norm(f"{_LAYER}layer_norm2", f"{_BLK}ln2"),
    *(slot for part in "qkv"
      for slot in _linear(f"{_LAYER}self_attn.{part}_proj", f"{_BLK}attn_{part}", "hidden", "hidden")),
    *_linear(f"{_LAYER}self_attn.out_proj", f"{_BLK}attn_out", "hidden", "hidden"),
    *_linear(f"{_LAYER}mlp.fc1", f"{_BLK}ffn_up", "ffn", "hidden"),
    *_linear(f"{_LAYER}mlp.fc2", f"{_BLK}ffn_down", "hidden", "ffn"),
)  # fmt: skip
_POSITIONS = VisionSlot(
    "embeddings.position_embedding.weight", ("v.position_embd.weight",), ("positions", "hidden"), exact=True
)
_SIGLIP_POOLING = tuple(
    _unread(f"head.{hf}", *shape, when="vision_use_head") for hf, shape in {
        "probe": ("one", "one", "hidden"), "attention.in_proj_weight": ("qkv", "hidden"),
        "attention.in_proj_bias": ("qkv",), "attention.out_proj.weight": ("hidden", "hidden"),
        "attention.out_proj.bias": ("hidden",), "layernorm.weight": ("hidden",), "layernorm.bias": ("hidden",),
        "mlp.fc1.weight": ("ffn", "hidden"), "mlp.fc1.bias": ("ffn",), "mlp.fc2.weight": ("hidden", "ffn"),
        "mlp.fc2.bias": ("hidden",),
    }.items()
)  # fmt: skip


def _patches(exact: bool = False) -> VisionSlot:
    shape = ("hidden", "channels", "patch", "patch")
    return VisionSlot("embeddings.patch_embedding.weight", ("v.patch_embd.weight",), shape, exact)


def _siglip_sizes(vision: Config) -> dict[str, int]:
    hidden, image, patch = vision["hidden_size"], vision["image_size"], vision["patch_size"]
    return {
        "hidden": hidden, "qkv": 3 * hidden, "ffn": vision["intermediate_size"], "channels": vision["num_channels"],
        "patch": patch, "blocks": vision["num_hidden_layers"], "heads": vision["num_attention_heads"],
        "image": image, "positions": (image // patch) ** 2, "one": 1,
    }  # fmt: skip


def _clip_sizes(vision: Config) -> dict[str, int]:
    sizes = _siglip_sizes(vision)
    return sizes | {"positions": sizes["positions"] + 1}


def _layer_norm_eps(vision: Config) -> float:
    return float(vision["layer_norm_eps"])


def _siglip(after: tuple[VisionSlot, ...], exact: bool) -> Tower:
    """after: what follows the last block."""
    patch_bias = _vector("embeddings.patch_embedding.bias", "v.patch_embd.bias", "hidden")
    return Tower(
        "vision_tower.", "embeddings.patch_embedding.weight",
        (_patches(exact), patch_bias, _POSITIONS, *after, *_SIGLIP_POOLING),
        _VIT_BLOCK, _siglip_sizes, _layer_norm_eps, fixed={"num_channels": 3},
    )  # fmt: skip


# the features come from a block before the last; with `v.post_ln` in the file llama.cpp would normalize them
_POST_UNREAD = (_unread("post_layernorm.weight", "hidden"), _unread("post_layernorm.bias", "hidden"))
_CLIP = Tower(
    "vision_tower.", "embeddings.patch_embedding.weight",
    (_vector("embeddings.class_embedding", "v.class_embd", "hidden"), _patches(), _POSITIONS,
     *_norm("pre_layrnorm", "v.pre_ln"), *_POST_UNREAD),
    _VIT_BLOCK, _clip_sizes, _layer_norm_eps, fixed={"num_channels": 3},
)  # fmt: skip

# --- the models -----------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        "qwen2vl_merger", {"qwen2_vl_vision": _QWEN2}, text="qwen2", arch="qwen2vl", text_prefix="model.",
        head_prefix="", sections=(16, 24, 24),
    ),
    "qwen2_5_vl": Family(
        "qwen2.5vl_merger", {"qwen2_5_vl_vision": _QWEN25}, text="qwen2", arch="qwen2vl", text_prefix="model.",
        head_prefix="", sections=(16, 24, 24),
    ),
    "qwen3_vl": Family(
        "qwen3vl_merger", {"qwen3_vl_vision": _QWEN3}, text="qwen3", arch="qwen3vl",
        text_prefix="model.language_model.", head_prefix="", sections=(24, 20, 20),
    ),
    "gemma3": Family(
        "gemma3", {"siglip_vision_model": _siglip(_norm("post_layernorm", "v.post_ln"), exact=True)},
        (VisionSlot("mm_input_projection_weight", ("mm.input_projection.weight",), ("hidden", "text")),
         VisionSlot("mm_soft_emb_norm.weight", ("mm.soft_emb_norm.weight",), ("hidden",), offset=1.0)),
        projector_anchor="mm_soft_emb_norm.weight",
    ),
    "llava": Family(
        "mlp", {"clip_vision_model": _CLIP, "siglip_vision_model": _siglip(_POST_UNREAD, exact=False)},
        (*_linear("linear_1", "mm.0", "text", "features"), *_linear("linear_2", "mm.2", "text", "text")),
        projector_anchor="linear_1.weight",
        fixed={"projector_hidden_act": "gelu", "multimodal_projector_bias": True},
    ),
}  # fmt: skip
# what the language model of a file is without its images: {architecture: model_type}
TEXT_OF = {family.arch: family.text for family in FAMILIES.values() if family.arch}
