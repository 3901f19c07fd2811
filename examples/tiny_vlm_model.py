"""The tiny vision-language model before it has learned anything: LLaVA, from its parts, and the processor for it.

Widths are multiples of 64, so that every linear layer has whole groups of 64. As in LLaVA, the projector takes the last
block but one of the vision tower, so the last one does nothing and stays as it was made.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tiny_vlm_lessons import CELL, SIDE, drawn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

END, IMAGE, USER, ASSISTANT = "<|end|>", "<image>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|> {% else %}<|user|>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POSITIONS = 10.0  # CLIP starts with positions so faint that it takes long to find them beside the pixels


def new_processor() -> ProcessorMixin:
    """A byte-level BPE that knows the words of the lessons, CLIP's image processor, and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END, IMAGE, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [turn[1:] for index in range(2000) for turn in drawn("calibration", index)[1]]
    bpe.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, extra_special_tokens=[IMAGE, USER, ASSISTANT]
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def new_model(processor: ProcessorMixin, width: int, layers: int, vision_width: int, seed: int) -> PreTrainedModel:
    """Random weights in 32 bits."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=4,
        num_attention_heads=vision_width // 32,
        image_size=SIDE,
        patch_size=CELL,
        projection_dim=vision_width,
    )
    ids = processor.tokenizer.convert_tokens_to_ids
    text = LlamaConfig(
        vocab_size=-(-len(processor.tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=ids(END),
        pad_token_id=ids(END),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids(IMAGE),
        image_seq_length=(SIDE // CELL) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.mul_(POSITIONS)
    return model
