"""Tiny vision-language models with random weights, for each row of the table of vision, and variants that matter.

The tokenizer is that of examples/tiny-qwen3, so the vocabulary is of its size; images are squares that llama.cpp takes
without resizing them. Gains and biases are not at their trivial start, so that a test notices when one is lost.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from autoround_core import CheckpointContext, ModelOutline, QuantRecipe, QuantScheme, TuningSettings
from autoround_export.gguf.file import GgufFile
from autoround_export.gguf.format import GgufFormat

VOCABULARY = 4096
IMAGE_TOKEN = 4090
TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
# unlike for each color, so that mixing them up is noticed
MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.25, 0.28]
_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    rms_norm_eps=1e-6,  # llama.cpp does not read that of qwen2vl, and would differ where it is large
)  # fmt: skip
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12])
_QWEN_IDS = dict(image_token_id=IMAGE_TOKEN, video_token_id=4091, vision_start_token_id=4092, vision_end_token_id=4093)
_QWEN = dict(depth=4, hidden_size=64, intermediate_size=96, num_heads=4, out_hidden_size=256)
_VIT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
)


@dataclass(frozen=True)
class TinyVision:
    """One model. config: its class in Transformers. side: of a square image, in pixels. tokens: that it becomes."""

    config: str
    options: dict[str, Any]
    side: int
    tokens: int

    def configuration(self) -> transformers.PretrainedConfig:
        return getattr(transformers, self.config)(**self.options)

    def build(self, seed: int = 0) -> torch.nn.Module:
        """In float32."""
        torch.manual_seed(seed)
        config = self.configuration()
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shift = torch.randn(parameter.shape)
                if parameter.dim() < 2:
                    parameter.add_(0.2 * shift)
                else:
                    wide = "embed" in name or "lm_head" in name
                    parameter.copy_((0.1 if wide else 0.06) * shift)
        return model.eval()


def _llava(text: str, vision: dict[str, Any], **more: Any) -> TinyVision:
    options = dict(text_config=dict(_TEXT, model_type=text), vision_config=vision, image_token_index=IMAGE_TOKEN,
                   tie_word_embeddings=False, **more)  # fmt: skip
    return TinyVision("LlavaConfig", options, 56, 16)


_CLIP, _SIGLIP = dict(_VIT, model_type="clip_vision_model"), dict(_VIT, model_type="siglip_vision_model")
MODELS: dict[str, TinyVision] = {
    "qwen2_vl": TinyVision("Qwen2VLConfig", dict(
        text_config=dict(_TEXT, rope_parameters=_MROPE), tie_word_embeddings=True, **_QWEN_IDS,
        vision_config=dict(depth=3, embed_dim=64, hidden_size=256, num_heads=4, mlp_ratio=2, patch_size=14),
    ), 112, 16),
    # five windows of 112 pixels a side, so that blocks with windows and blocks without differ
    "qwen2_5_vl": TinyVision("Qwen2_5_VLConfig", dict(
        text_config=dict(_TEXT, rope_parameters=_MROPE), tie_word_embeddings=False, **_QWEN_IDS,
        vision_config=dict(_QWEN, patch_size=14, window_size=112, fullatt_block_indexes=[1, 3]),
    ), 140, 25),
    # the grid of positions is not that of the image, so they are interpolated; with other sections llama.cpp would not
    # turn the last pairs at all, which are those that turn least
    "qwen3_vl": TinyVision("Qwen3VLConfig", dict(
        text_config=dict(_TEXT, head_dim=64, rope_parameters=dict(_MROPE, mrope_section=[11, 11, 10])),
        vision_config=dict(_QWEN, patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
        tie_word_embeddings=True, **_QWEN_IDS,
    ), 128, 16),
    "gemma3": TinyVision("Gemma3Config", dict(
        text_config=dict(_TEXT, head_dim=64, query_pre_attn_scalar=64, sliding_window=64),
        vision_config=dict(_SIGLIP, vision_use_head=False), mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN,
        boi_token_index=4092, eoi_token_index=4093,
    ), 56, 4),
    "llava": _llava("llama", _CLIP, vision_feature_layer=-2, vision_feature_select_strategy="default"),
    "llava_early": _llava("mistral", _CLIP, vision_feature_layer=[1, 2], vision_feature_select_strategy="default"),
    "llava_siglip": _llava("qwen2", _SIGLIP, vision_feature_layer=-2, vision_feature_select_strategy="full"),
}  # fmt: skip


def saved(model: torch.nn.Module, directory: Path) -> Path:
    """A model with the bundled tokenizer and what its image processor would say of pixels."""
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, directory / file)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return directory


def as_on_the_hub(source: Path, directory: Path) -> Path:
    """A copy of a saved model whose vision tower is spelled as in older checkpoints, which Transformers 5 reads too."""
    shutil.copytree(source, directory)
    tower = "vision_tower."
    tensors = {name.replace(tower, f"{tower}vision_model.", 1) if name.startswith(tower) else name: tensor
               for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def outlined(directory: Path, name: str = "model") -> tuple[ModelOutline, dict[str, torch.Tensor]]:
    """A saved model as the formats are told of it, and its tensors."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return ModelOutline(config, shapes, directory, {}, calibrated=False, name=name), tensors


def written(source: Path, out: Path, file_type: str = "f32") -> dict[str, torch.Tensor]:
    """Write a saved model, unquantized, as format gguf does; return its tensors."""
    model, tensors = outlined(source)
    recipe = QuantRecipe(QuantScheme(bits=4))
    context = CheckpointContext(model.config, recipe, [], [], [], [], torch.float32, TuningSettings(), model)
    out.mkdir(exist_ok=True)
    writer = GgufFormat(file_type).open(out, context)
    for name, tensor in tensors.items():
        writer.keep(name, tensor)
    writer.finish()
    return tensors


def files_in(directory: Path) -> tuple[GgufFile, GgufFile]:
    """The file of the language model, and that of the tower."""
    (towers,) = directory.glob("mmproj-*.gguf")
    (text,) = set(directory.glob("*.gguf")) - {towers}
    return GgufFile(text), GgufFile(towers)
