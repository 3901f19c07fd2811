"""Processors of tiny vision-language models: the files that lie beside a checkpoint on a hub.

A byte-level tokenizer trained on a few sentences, the settings of the image processor, and a short chat template
with the family's own placeholder of an image. Token ids: see `TinyProcessor.ids`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

VOCABULARY = 320
BOS, EOS, PAD = 0, 1, 2
_USUAL = ("<s>", "</s>", "<pad>")
_SENTENCES = (
    "What is in the image? A red circle is left of two blue squares.",
    "How many triangles are there? There are three green triangles.",
    "Describe the image. The chart shows sales of four years.",
)
# a message is a string or a list of parts, as Transformers' own templates take them
_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}{{ 'IMAGE' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}assistant: {% endif -%}
"""


@dataclass(frozen=True, slots=True)
class TinyProcessor:
    """One processor.

    processor, image_processor: class names. images: settings of the image processor. image: what the chat template
    writes for one image. tokens: special tokens of the family. named: those that the tokenizer knows as attributes.
    settings: of the processor itself. more: further files, name -> content. template: whether it has a chat template.
    by_hand: for an image processor that exists only beside torchvision, what an image becomes in the text, and what
    the model is given besides it.
    """

    processor: str
    image_processor: str
    images: dict[str, Any]
    image: str
    tokens: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    template: bool = True
    by_hand: tuple[str, Callable[[Image], dict[str, torch.Tensor]]] | None = None

    @property
    def ids(self) -> dict[str, int]:
        """Special tokens -> id: start, end, padding, then `tokens` in their order."""
        return {token: index for index, token in enumerate((*_USUAL, *self.tokens))}

    def write(self, directory: Path) -> None:
        """Write tokenizer, settings and chat template into an existing directory."""
        (directory / "tokenizer.json").write_text(_tokenizer(tuple(self.ids)), encoding="utf-8")
        if self.template:
            template = _TEMPLATE.replace("IMAGE", self.image)
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        shared = {"processor_class": self.processor}
        files = {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "pad_token": "<pad>", "model_max_length": 4096, "padding_side": "left",
                "extra_special_tokens": self.named, **shared,
            },
            "preprocessor_config.json": {"image_processor_type": self.image_processor, **shared, **self.images},
            **({"processor_config.json": {**shared, **self.settings}} if self.settings else {}),
            **self.more,
        }
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def prompt(self, question: str) -> str:
        """A question about one image, as the chat template writes it."""
        return f"user: {self.image}{question}\nassistant: " if self.template else f"{self.image}{question}"

    def inputs(self, directory: Path, image: Image, question: str) -> dict[str, torch.Tensor]:
        """What the model is called with for one image and a question about it."""
        from transformers import AutoTokenizer

        from autoround_mllm.processor import load_processor

        if self.by_hand is None:
            processor = load_processor(directory, trust_remote_code=False)
            with warnings.catch_warnings():  # some processors give numpy a tensor in a way that it has deprecated
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                return dict(processor(text=self.prompt(question), images=[image], return_tensors="pt"))
        expanded, tensors = self.by_hand
        text = self.prompt(question).replace(self.image, expanded)
        return {**AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt"), **tensors(image)}


@cache
def _tokenizer(special: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def _square(size: int, **more: Any) -> dict[str, Any]:
    return {"size": {"height": size, "width": size}, **more}


def _pixels(image: Image) -> torch.Tensor:
    """float32 [3, 32, 32] in -1..1."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def _patches(image: Image) -> torch.Tensor:
    """float32 [16, 3, 8, 8], row by row."""
    return _pixels(image).unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, 3, 8, 8)


def _phi4(image: Image) -> dict[str, torch.Tensor]:
    pixels = _pixels(image).expand(1, 2, 3, 32, 32)  # as a whole, and its only tile
    return {"image_pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]]),
            "image_attention_mask": torch.ones(1, 2, 4, 4)}


def _lfm2(image: Image) -> dict[str, torch.Tensor]:
    patches = _patches(image).permute(0, 2, 3, 1).reshape(1, 16, -1)
    return {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}


def _kimi(image: Image) -> dict[str, torch.Tensor]:
    return {"pixel_values": _patches(image), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _whole(image: Image) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(image)[None]}


def _video(processor: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {"video_preprocessor_config.json": {"video_processor_type": processor, **settings}}


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_GRID = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
_QWEN_PIXELS = {**_QWEN_GRID, "min_pixels": 32 * 32, "max_pixels": 64 * 64}
_QWEN_SIZE = {**_QWEN_GRID, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
_CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
_TILES = {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 32]]}
_IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>",
            "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>")
_IDEFICS_SIZE = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
_GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>",
               "<|video|>")
_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_SIZE = {**_QWEN_GRID, "size": {"shortest_edge": 32 * 32 * 2, "longest_edge": 64 * 64 * 2}}
_OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}
_INTERN_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_AYA_TOKENS = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_1",
               "TILE_2", "TILE_GLOBAL")
_OVIS_TOKENS = ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_GEMMA4_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>",
}


def _named(tokens: dict[str, str]) -> dict[str, Any]:
    return {"tokens": tuple(tokens.values()), "named": tokens}


PROCESSORS: dict[str, TinyProcessor] = {
    "qwen2_vl": TinyProcessor("Qwen2VLProcessor", "Qwen2VLImageProcessor", _QWEN_PIXELS, _QWEN_IMAGE, _QWEN_TOKENS),
    "qwen2_5_vl": TinyProcessor(
        "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", _QWEN_PIXELS, _QWEN_IMAGE, _QWEN_TOKENS),
    "qwen3_vl": TinyProcessor(
        "Qwen3VLProcessor", "Qwen2VLImageProcessorFast", _QWEN_SIZE, _QWEN_IMAGE, _QWEN_TOKENS,
        more=_video("Qwen3VLVideoProcessor", **_QWEN_SIZE)),
    "qwen2_5_omni": TinyProcessor(
        "Qwen2_5OmniProcessor", "Qwen2VLImageProcessor",
        {**_QWEN_PIXELS, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 32},
        "<|vision_bos|><|IMAGE|><|vision_eos|>", **_named(_OMNI_TOKENS)),
    "llava": TinyProcessor(
        "LlavaProcessor", "CLIPImageProcessor", _CLIP, "<image>", ("<image>",),
        settings={"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "llava_next": TinyProcessor(
        "LlavaNextProcessor", "LlavaNextImageProcessor", {**_TILES, **_CLIP}, "<image>", ("<image>",),
        settings={"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "granite_vision": TinyProcessor(
        "LlavaNextProcessor", "LlavaNextImageProcessor", {**_TILES, "crop_size": {"height": 32, "width": 32}},
        "<image>", ("<image>",), settings={"patch_size": 16, "vision_feature_select_strategy": "full"}),
    "llava_onevision": TinyProcessor(
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", _TILES, "<image>", ("<image>", "<video>"),
        settings={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        more=_video("LlavaOnevisionVideoProcessor", **_square(32))),
    "mllama": TinyProcessor(
        "MllamaProcessor", "MllamaImageProcessor", _square(32, max_image_tiles=4), "<|image|>",
        ("<|image|>", "<|python_tag|>")),
    "gemma3": TinyProcessor(
        "Gemma3Processor", "Gemma3ImageProcessor", _square(32), "<start_of_image>",
        **_named({"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}),
        settings={"image_seq_length": 4}),
    "paligemma": TinyProcessor(
        "PaliGemmaProcessor", "SiglipImageProcessor", _square(32, image_seq_length=16), "<image>", ("<image>",),
        template=False),
    "idefics2": TinyProcessor(
        "Idefics2Processor", "Idefics2ImageProcessor", {"size": {"shortest_edge": 24, "longest_edge": 32}}, "<image>",
        _IDEFICS[:3], settings={"image_seq_len": 4}),
    "idefics3": TinyProcessor(
        "Idefics3Processor", "Idefics3ImageProcessor", _IDEFICS_SIZE, "<image>", _IDEFICS,
        settings={"image_seq_len": 4}),
    "smolvlm": TinyProcessor(
        "SmolVLMProcessor", "SmolVLMImageProcessor",
        {**_IDEFICS_SIZE, "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 32}}},
        "<image>", (*_IDEFICS, "<video>"), settings={"image_seq_len": 4}),
    "mistral3": TinyProcessor(
        "PixtralProcessor", "PixtralImageProcessor", {"patch_size": 8, "size": {"longest_edge": 64}}, "[IMG]",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), settings={"patch_size": 8, "spatial_merge_size": 2}),
    "pixtral": TinyProcessor(
        "PixtralProcessor", "PixtralImageProcessor", {"patch_size": 8, "size": {"longest_edge": 32}}, "[IMG]",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), settings={"patch_size": 8}),
    "internvl": TinyProcessor(
        "InternVLProcessor", "GotOcr2ImageProcessor", _square(32, crop_to_patches=True, max_patches=2),
        "<IMG_CONTEXT>", **_named(_INTERN_TOKENS), settings={"image_seq_length": 4},
        more=_video("InternVLVideoProcessor", **_square(32))),
    # its image processor knows the sides 490 and 980 only
    "aria": TinyProcessor(
        "AriaProcessor", "AriaImageProcessor", {"max_image_size": 980}, "<|img|>", **_named({"image_token": "<|img|>"}),
        settings={"size_conversion": {"490": 8, "980": 16}}),
    "aya_vision": TinyProcessor(
        "AyaVisionProcessor", "GotOcr2ImageProcessor", _square(32, crop_to_patches=True, max_patches=2), "<image>",
        _AYA_TOKENS, settings={"patch_size": 8, "img_size": 32, "downsample_factor": 2}),
    "glm4v": TinyProcessor(
        "Glm4vProcessor", "Glm4vImageProcessor", _GLM_SIZE, _GLM_IMAGE, _GLM_TOKENS,
        more=_video("Glm4vVideoProcessor", **_GLM_SIZE)),
    "glm46v": TinyProcessor(
        "Glm46VProcessor", "Glm46VImageProcessor", _GLM_SIZE, _GLM_IMAGE, _GLM_TOKENS,
        more=_video("Glm46VVideoProcessor", **_GLM_SIZE)),
    "deepseek_vl": TinyProcessor(
        "DeepseekVLProcessor", "DeepseekVLImageProcessor", _square(32), "<image_placeholder>",
        **_named({"image_token": "<image_placeholder>"}), settings={"num_image_tokens": 16}),
    "gemma4": TinyProcessor(
        "Gemma4Processor", "Gemma4ImageProcessor", {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        "<|image|>", **_named(_GEMMA4_TOKENS), settings={"image_seq_length": 70}),
    "ovis2": TinyProcessor(
        "Ovis2Processor", "Ovis2ImageProcessor", _square(32, crop_to_patches=True, max_patches=2), "<image>",
        _OVIS_TOKENS, settings={"image_seq_length": 4}),
    "phi4_multimodal": TinyProcessor(
        "Phi4MultimodalProcessor", "Phi4MultimodalImageProcessor",
        _square(32, patch_size=8, feature_extractor_type="Phi4MultimodalFeatureExtractor"), "<|image|>",
        **_named({"image_token": "<|image|>", "audio_token": "<|audio|>"}), by_hand=("<|image|>" * 13, _phi4)),
    "llama4": TinyProcessor(
        "Llama4Processor", "Llama4ImageProcessor", _square(32), "<|image|>",
        ("<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>"), settings={"patch_size": 8},
        by_hand=(f"<|image_start|><|image|>{'<|patch|>' * 4}<|image_end|>", _whole)),
    "kimi_k25": TinyProcessor(
        "Kimi_K25Processor", "Kimi_K25ImageProcessor", {"patch_size": 8, "merge_size": 2},
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        ("<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"),
        by_hand=(f"<|media_begin|>image<|media_content|>{'<|media_pad|>' * 4}<|media_end|>", _kimi)),
    "cohere2_vision": TinyProcessor(
        "Cohere2VisionProcessor", "Cohere2VisionImageProcessor", _square(32, patch_size=8), "<|IMG_PATCH|>",
        **_named({"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
                  "img_line_break_token": "<|IMG_LINE_BREAK|>"}),
        by_hand=(f"<|START_OF_IMG|>{'<|IMG_PATCH|>' * 4}<|IMG_LINE_BREAK|><|END_OF_IMG|>", _whole)),
    "lfm2_vl": TinyProcessor(
        "Lfm2VlProcessor", "Lfm2VlImageProcessor", {"encoder_patch_size": 8, "tile_size": 32, "max_num_patches": 16},
        "<image>", ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        by_hand=(f"<|image_start|>{'<image>' * 4}<|image_end|>", _lfm2)),
}
