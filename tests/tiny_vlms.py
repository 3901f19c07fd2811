"""Tiny vision-language checkpoints with random weights, one for each family that Transformers can build.

`FAMILIES[name].build(directory)` writes what a hub would hold: weights under the names of the hub, configuration,
tokenizer, image processor and chat template. As in `tiny_models`, widths are multiples of 32 and no gain or bias
is at its trivial start.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from tiny_processors import BOS, EOS, PAD, PROCESSORS, VOCABULARY, TinyProcessor

WIDTH = 64

@dataclass(frozen=True, slots=True)
class TinyVLM:
    """One family.

    config: class name and options of its configuration. tokens: what the configuration calls a special token -> that
    token. processor: key of PROCESSORS. text, vision, projector: modules of the model, by path. auto_class: what
    loads it. called: the part that takes texts and images, "" = the model itself.
    renamed: what Transformers calls otherwise when it saves than hub checkpoints do, and what those call it.
    """

    config: str
    options: dict[str, Any]
    tokens: dict[str, str]
    processor_name: str
    text: str
    vision: tuple[str, ...]
    projector: tuple[str, ...]
    auto_class: str = "AutoModelForImageTextToText"
    called: str = ""
    renamed: tuple[str, str] | None = None

    @property
    def processor(self) -> TinyProcessor:
        return PROCESSORS[self.processor_name]

    def configuration(self) -> transformers.PreTrainedConfig:
        return getattr(transformers, self.config)(**deepcopy(self.options), **_ids(self.processor_name, self.tokens))

    def build(self, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        """Write a complete checkpoint into an existing directory."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            maker = getattr(transformers, self.auto_class)
            make = maker.from_config if self.auto_class.startswith("Auto") else maker._from_config
            model = make(self.configuration(), dtype=dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    shift = 0.2 * torch.randn(parameter.shape)
                    if parameter.numel() == 1:  # a gate, which starts closed
                        shift = 0.5 * shift.sign()
                    parameter.add_(shift) if parameter.dim() < 2 else parameter.copy_(shift)
        # a model that was not loaded is saved without the `vision_model.` that hub checkpoints have
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [rule for rule in conversions if not isinstance(rule, PrefixChange)
                                     or rule.prefix_to_remove == "vision_model"]
        model.save_pretrained(directory)
        if self.renamed:
            file, (wrong, right) = directory / "model.safetensors", self.renamed
            tensors = {name.replace(wrong, right): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        self.processor.write(directory)
        if self.called:  # a model that speaks is not loaded without its voices
            torch.save({}, directory / "spk_dict.pt")


_USUAL = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
)
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_HALF_MROPE = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_VIT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
_QWEN_VIT = dict(
    depth=2, hidden_size=64, intermediate_size=96, num_heads=4, out_hidden_size=WIDTH, patch_size=8,
    spatial_merge_size=2, temporal_patch_size=2,
)
_WINDOWS = dict(_QWEN_VIT, window_size=32, fullatt_block_indexes=[1])
_DEEPSTACK = dict(_QWEN_VIT, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
_GLM_TEXT, _GLM_VIT = dict(_USUAL, rope_parameters=_HALF_MROPE), dict(_QWEN_VIT, image_size=32)
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}
_GLM_IDS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_OMNI_IDS = {
    "image_token_index": "<|IMAGE|>", "audio_token_index": "<|AUDIO|>", "video_token_index": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
}
_IMAGE, _IMAGE_ID = {"image_token_index": "<image>"}, {"image_token_id": "<image>"}
# where the parts of a model are: text, vision, projector
_TEXT, _TOWER, _PROJECTOR = "model.language_model", ("model.vision_tower",), ("model.multi_modal_projector",)
_LLAVA = (_TEXT, _TOWER, _PROJECTOR)
_VISUAL = (_TEXT, ("model.visual",), ("model.visual.merger",))
_DEEP = (_TEXT, ("model.visual",), ("model.visual.merger", "model.visual.deepstack_merger_list"))
_CONNECTOR = ("model.text_model", ("model.vision_model",), ("model.connector",))


def _ids(processor: str, tokens: dict[str, str]) -> dict[str, int]:
    return {name: PROCESSORS[processor].ids[token] for name, token in tokens.items()}


def _text(kind: str | None = None, **more: Any) -> dict[str, Any]:
    return {**_USUAL, **({"model_type": kind} if kind else {}), **more}


def _vit(kind: str | None = None, image: int = 32, patch: int = 8, **more: Any) -> dict[str, Any]:
    return {**_VIT, "image_size": image, "patch_size": patch, **({"model_type": kind} if kind else {}), **more}


def _two(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **more}


_SIGLIP = _vit("siglip_vision_model")
_BODY = dict(_SIGLIP, vision_use_head=False)
_LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_COARSE = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
_MROPE_TEXT = _text(rope_parameters=_MROPE)
_QWEN3_TEXT = dict(_MROPE_TEXT, num_hidden_layers=3, head_dim=16)
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_DEEPSEEK_V3 = dict(
    num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
    first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16,
)
_THINKER = _two(
    dict(_MROPE_TEXT, tie_word_embeddings=False), _WINDOWS, **_ids("qwen2_5_omni", _OMNI_IDS),
    audio_config=dict(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96, num_mel_bins=32,
                      output_dim=WIDTH, n_window=8, max_source_positions=64),
)
_TALKER = dict(
    _MROPE_TEXT, head_dim=16, embedding_size=WIDTH, **_ids("qwen2_5_omni", _OMNI_IDS),
    **dict.fromkeys((f"tts_text_{part}_token_id" for part in ("start", "end", "pad")), PAD),
    **dict.fromkeys((f"tts_codec_{part}_token_id" for part in ("start", "end", "pad", "mask")), PAD),
)
_VOCODER = {
    "dit_config": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, emb_dim=64, mel_dim=32,
                       num_embeds=32, enc_emb_dim=32, enc_dim=32, enc_channels=[32, 32, 32, 32, 64], enc_se_channels=32,
                       enc_attention_channels=32, look_ahead_layers=[1], look_backward_layers=[0]),
    "bigvgan_config": dict(mel_dim=32, upsample_initial_channel=64, upsample_rates=[5, 3],
                           upsample_kernel_sizes=[11, 7]),
}

FAMILIES: dict[str, TinyVLM] = {
    "qwen2_vl": TinyVLM(
        "Qwen2VLConfig",
        _two(_MROPE_TEXT, dict(depth=2, embed_dim=64, hidden_size=WIDTH, num_heads=4, mlp_ratio=2, patch_size=8)),
        _QWEN_IDS, "qwen2_vl", *_VISUAL),
    "qwen2_5_vl": TinyVLM("Qwen2_5_VLConfig", _two(_MROPE_TEXT, _WINDOWS), _QWEN_IDS, "qwen2_5_vl", *_VISUAL),
    "qwen3_vl": TinyVLM("Qwen3VLConfig", _two(_QWEN3_TEXT, _DEEPSTACK), _QWEN_IDS, "qwen3_vl", *_DEEP),
    "qwen3_vl_moe": TinyVLM(
        "Qwen3VLMoeConfig",
        _two(dict(_QWEN3_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), _DEEPSTACK),
        _QWEN_IDS, "qwen3_vl", *_DEEP),
    "qwen3_5": TinyVLM(
        "Qwen3_5Config",
        _two(
            _text(head_dim=16, rope_parameters=_HALF_MROPE, layer_types=["linear_attention", "full_attention"],
                  linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4, linear_num_value_heads=4),
            dict(_QWEN_VIT, num_position_embeddings=16)),
        _QWEN_IDS, "qwen3_vl", *_VISUAL),
    "qwen2_5_omni_thinker": TinyVLM(
        "Qwen2_5OmniThinkerConfig", _THINKER, {}, "qwen2_5_omni", _TEXT, ("model.visual", "model.audio_tower"),
        ("model.visual.merger", "model.audio_tower.proj")),
    # with the talker and the vocoder, which make speech of what the thinker says
    "qwen2_5_omni": TinyVLM(
        "Qwen2_5OmniConfig", {"thinker_config": _THINKER, "talker_config": _TALKER, "token2wav_config": _VOCODER}, {},
        "qwen2_5_omni", "thinker.model.language_model", ("thinker.model.visual", "thinker.model.audio_tower"),
        ("thinker.model.visual.merger", "thinker.model.audio_tower.proj"), "AutoModelForMultimodalLM", "thinker"),
    "llava": TinyVLM(
        "LlavaConfig", _two(_text("llama"), _vit("clip_vision_model", projection_dim=64)), _IMAGE, "llava", *_LLAVA),
    "llava_next": TinyVLM(
        "LlavaNextConfig", _two(_text("mistral"), _vit("clip_vision_model", patch=16, projection_dim=64), **_COARSE),
        _IMAGE, "llava_next", *_LLAVA),
    "granite_vision": TinyVLM(
        "LlavaNextConfig",
        _two(
            _text("granite", embedding_multiplier=6.0, attention_multiplier=0.3, logits_scaling=2.0),
            dict(_SIGLIP, patch_size=16), **_COARSE, **_LAST | {"vision_feature_layer": [-2, -1]}),
        _IMAGE, "granite_vision", *_LLAVA),
    "llava_onevision": TinyVLM(
        "LlavaOnevisionConfig", _two(_text("qwen2"), dict(_BODY, patch_size=16), **_COARSE),
        {**_IMAGE, "video_token_index": "<video>"}, "llava_onevision", *_LLAVA),
    "mllama": TinyVLM(
        "MllamaConfig",
        _two(
            _text(num_hidden_layers=3, cross_attention_layers=[1]),
            dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
                 image_size=32, patch_size=8, vision_output_dim=192, intermediate_layers_indices=[0, 1])),
        {"image_token_index": "<|image|>"}, "mllama", _TEXT, ("model.vision_model",), _PROJECTOR),
    "gemma3": TinyVLM(
        "Gemma3Config",
        _two(_text(num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=_SLIDING),
             _SIGLIP, mm_tokens_per_image=4),
        {"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
         "eoi_token_index": "<end_of_image>"}, "gemma3", *_LLAVA),
    "gemma4": TinyVLM(
        "Gemma4Config",
        _two(
            _text(head_dim=16, global_head_dim=16, sliding_window=8, hidden_size_per_layer_input=32,
                  vocab_size_per_layer_input=VOCABULARY, layer_types=_SLIDING[:2]),
            dict(_VIT, num_key_value_heads=4, head_dim=16, pooling_kernel_size=2, patch_size=8,
                 position_embedding_size=64)),
        {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
         "audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}, "gemma4",
        _TEXT, _TOWER, ("model.embed_vision",)),
    "paligemma": TinyVLM(
        "PaliGemmaConfig",
        _two(_text("gemma", head_dim=16), _BODY, hidden_size=WIDTH, projection_dim=WIDTH, vocab_size=VOCABULARY),
        _IMAGE, "paligemma", *_LLAVA),
    "idefics2": TinyVLM(
        "Idefics2Config", _two(_text("mistral"), _vit(), perceiver_config=dict(
            hidden_size=WIDTH, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=16,
            num_key_value_heads=2)),
        _IMAGE_ID, "idefics2", *_CONNECTOR),
    "idefics3": TinyVLM("Idefics3Config", _two(_text("llama"), _vit()), _IMAGE_ID, "idefics3", *_CONNECTOR),
    "smolvlm": TinyVLM("SmolVLMConfig", _two(_text("llama"), _vit()), _IMAGE_ID, "smolvlm", *_CONNECTOR),
    "mistral3": TinyVLM(
        "Mistral3Config", _two(_text("mistral", head_dim=16), _vit("pixtral", image=64), tie_word_embeddings=False),
        {"image_token_index": "[IMG]"}, "mistral3", *_LLAVA),
    "pixtral": TinyVLM(
        "LlavaConfig", _two(_text("mistral", head_dim=16), _vit("pixtral", image=64), **_LAST),
        {"image_token_index": "[IMG]"}, "pixtral", *_LLAVA),
    "internvl": TinyVLM(
        "InternVLConfig", _two(_text("qwen2"), _vit(use_qk_norm=True), image_seq_length=4),
        {"image_token_id": "<IMG_CONTEXT>"}, "internvl", *_LLAVA),
    "aria": TinyVLM(
        "AriaConfig",
        _two(_text(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
             _vit("idefics3_vision", image=980, patch=70), projector_patch_to_query_dict={49: 8, 196: 16}),
        {"image_token_index": "<|img|>"}, "aria", *_LLAVA),
    "aya_vision": TinyVLM(
        "AyaVisionConfig", _two(_text("cohere2"), _BODY), {"image_token_index": "<|IMG_PATCH|>"}, "aya_vision",
        *_LLAVA),
    "glm4v": TinyVLM("Glm4vConfig", _two(_GLM_TEXT, _GLM_VIT), _GLM_IDS, "glm4v", *_VISUAL),
    "glm46v": TinyVLM(
        "Glm46VConfig", _two(dict(_GLM_TEXT, model_type="glm4v_text"), dict(_GLM_VIT, model_type="glm4v_vision")),
        _GLM_IDS, "glm46v", *_VISUAL),
    "deepseek_vl": TinyVLM(
        "DeepseekVLConfig", _two(_text("llama"), _SIGLIP), {"image_token_id": "<image_placeholder>"}, "deepseek_vl",
        _TEXT, ("model.vision_model",), ("model.aligner",)),
    "ovis2": TinyVLM(
        "Ovis2Config",
        _two(_text("qwen2"), _vit(vocab_size=64 + 5, hidden_stride=2), hidden_size=WIDTH, vocab_size=VOCABULARY),
        {"image_token_id": "<IMG_ATOM>"}, "ovis2", _TEXT, _TOWER, ("model.visual_embeddings_table",)),
    # the image processors of those that follow exist only beside torchvision
    "phi4_multimodal": TinyVLM(
        "Phi4MultimodalConfig",
        dict(
            _USUAL, vision_config=_vit(crop_size=32, **_ids("phi4_multimodal", {"image_token_id": "<|image|>"})),
            audio_config=dict(
                hidden_size=64, intermediate_size=96, num_blocks=2, num_attention_heads=4, ext_pw_out_channel=64,
                depthwise_separable_out_channel=64, nemo_conv_channels=64, input_size=32,
                **_ids("phi4_multimodal", {"audio_token_id": "<|audio|>"}))),
        {}, "phi4_multimodal", "model", ("model.embed_tokens_extend.image_embed.img_processor",),
        ("model.embed_tokens_extend.image_embed.img_projection_up",), "AutoModelForMultimodalLM"),
    "llama4": TinyVLM(
        "Llama4Config",
        _two(
            _text(head_dim=16, intermediate_size_mlp=96, num_local_experts=4, interleave_moe_layer_step=2),
            _vit(intermediate_size=256, vision_output_dim=WIDTH, projector_input_dim=64, projector_output_dim=64)),
        {"image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"},
        "llama4", "language_model", ("vision_model",), ("multi_modal_projector",)),
    "kimi_k25": TinyVLM(
        "Kimi_K25Config",
        _two(_text("deepseek_v3", **_DEEPSEEK_V3), dict(_VIT, patch_size=8, pos_emb_height=4, pos_emb_width=4),
             projection_hidden_size=64),
        {"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>",
         "vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"},
        "kimi_k25", _TEXT, _TOWER, ("model.mm_projector",),
        renamed=("language_model.model.blocks.", "language_model.model.layers.")),
    "cohere2_vision": TinyVLM(
        "Cohere2VisionConfig", _two(_text("cohere2"), _BODY, alignment_intermediate_size=128),
        {"image_token_id": "<|IMG_PATCH|>"}, "cohere2_vision", *_LLAVA),
    "lfm2_vl": TinyVLM(
        "Lfm2VlConfig",
        _two(_text("lfm2", layer_types=["conv", "full_attention"]), projector_hidden_size=64, vision=dict(
            _VIT, model_type="siglip2_vision_model", patch_size=8, num_patches=16, vision_use_head=False)),
        _IMAGE_ID, "lfm2_vl", *_LLAVA),
}
