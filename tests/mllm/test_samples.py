"""Samples of image and text: padded as the processor itself would, with a model that cannot tell the difference."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from autoround_core.calibration import load_calibration
from autoround_core.errors import CalibrationError, UnsupportedError, UsageError
from autoround_mllm.conversation import Conversation
from autoround_mllm.processor import load_processor
from autoround_mllm.samples import encode, image_text_samples, padded
from tiny_vlms import FAMILIES

# each way to take images: among the tokens, with a grid, seen both ways, as a prefix, by cross-attention, in tiles
KINDS = ("llava", "qwen2_5_vl", "gemma3", "paligemma", "mllama", "internvl", "idefics3", "pixtral")
WITH_TEMPLATE = tuple(kind for kind in KINDS if kind != "paligemma")
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def image(seed, width=36, height=36):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(name, question, answer, *images):
    parts = [*([IMAGE] * len(images)), text(question)]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": [text(answer)]})
    return Conversation(messages, images, name)


ONE = talk("one", "What is in the image?", "A red circle.", image(0, 40, 30))
LONG = talk("long", "How many triangles are there? Describe them.", "Three green triangles, and a chart.", image(1))
TWO = talk("two", "Compare.", "Different.", image(2), image(3))
WORDS = talk("words", "Hello?", "Hi.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (directory, processor) of a tiny model; leave both as they are."""
    known = {}

    def get(name):
        if name not in known:
            directory = tmp_path_factory.mktemp(name)
            transformers.logging.disable_progress_bar()
            FAMILIES[name].build(directory)
            known[name] = directory, load_processor(directory, trust_remote_code=False)
        return known[name]

    return get


@pytest.fixture
def processor(made):
    """A processor of one's own, with chat template."""
    return copy.deepcopy(made("llava")[1])


def sample_all(dataset, processor, nsamples, seqlen=512, **options):
    return image_text_samples(dataset, processor, processor.tokenizer, nsamples=nsamples, seqlen=seqlen, **options)


def prompt(conversation, processor):
    """What is to be sent to the processor, written by its own chat template."""
    if processor.chat_template is None:
        question, answer = (message["content"][-1]["text"] for message in conversation.messages)
        keywords = {"text": ["<image>" * len(conversation.images) + question], "suffix": [answer]}
    else:
        keywords = {"text": [processor.apply_chat_template(list(conversation.messages), tokenize=False)]}
    return {**keywords, **({"images": [list(conversation.images)]} if conversation.images else {})}


def own_padding(processor, length, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        padding = {"padding": "max_length", "max_length": length, "padding_side": "right"}
        inputs = dict(processor(**keywords, **padding, return_tensors="pt"))
    inputs.pop("labels", None)
    return inputs


# --- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_sample_is_what_the_processor_pads_itself(made, kind):
    processor = made(kind)[1]
    given = [ONE, LONG, TWO] + [WORDS] * (kind != "paligemma")
    calibration = sample_all(given, processor, len(given))
    assert calibration.seqlen == max(len(encode(each, processor, processor.tokenizer).ids) for each in given)
    for index, conversation in enumerate(given):
        wanted = own_padding(processor, calibration.seqlen, **prompt(conversation, processor))
        inputs = calibration.inputs(index)
        assert set(inputs) == set(wanted)
        for name, tensor in wanted.items():
            assert inputs[name].dtype == tensor.dtype and torch.equal(inputs[name], tensor), name


@pytest.mark.parametrize("kind", WITH_TEMPLATE)
def test_a_set_is_the_batch_that_the_processor_makes(made, kind):
    processor = made(kind)[1]
    calibration = sample_all([ONE, LONG], processor, 2)
    texts = [prompt(each, processor)["text"][0] for each in (ONE, LONG)]
    images = [list(each.images) for each in (ONE, LONG)]
    batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    assert torch.equal(calibration.input_ids, batch["input_ids"])
    assert torch.equal(calibration.mask.long(), batch["attention_mask"])
    for name in ("token_type_ids", "mm_token_type_ids", "cross_attention_mask"):
        if name in batch:
            assert torch.equal(torch.cat([extra[name] for extra in calibration.extras]), batch[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_cannot_tell_a_padded_sample(made, kind):
    directory, processor = made(kind)
    model = getattr(transformers, FAMILIES[kind].auto_class).from_pretrained(directory).eval()
    other = talk("one", "What is in the image?", "A red circle.", image(9, 40, 30))
    for conversation in (ONE, TWO):
        sample = encode(conversation, processor, processor.tokenizer)
        longer = padded(sample, len(sample.ids) + 9, processor.tokenizer.pad_token_id)
        with torch.no_grad():
            alone = model(input_ids=sample.ids[None], **sample.extras).logits
            logits = model(input_ids=longer.ids[None], attention_mask=longer.mask[None].long(), **longer.extras).logits
        assert logits.isfinite().all()
        assert torch.allclose(logits[:, : len(sample.ids)], alone, atol=2e-5)
    # the same tokens with another image are something else: the pixels of a sample are its own
    sample, another = (encode(each, processor, processor.tokenizer) for each in (ONE, other))
    assert torch.equal(sample.ids, another.ids)
    with torch.no_grad():
        last = [model(input_ids=each.ids[None], **each.extras).logits[0, -1] for each in (sample, another)]
    assert (last[0] - last[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_cut_behind_its_images(made, kind):
    processor = made(kind)[1]
    whole = encode(LONG, processor, processor.tokenizer)
    ids = set(processor.image_token_ids)
    needed = max(index for index, token in enumerate(whole.ids.tolist()) if token in ids) + 1
    assert 0 < needed < len(whole.ids) - 3
    calibration = sample_all([LONG], processor, 1, seqlen=needed)
    assert torch.equal(calibration.input_ids, whole.ids[None, :needed])
    assert calibration.mask is None and calibration.images == 1
    for name, value in calibration.extras[0].items():
        kept = value.shape[1] == needed if name in whole.along else torch.equal(value, whole.extras[name])
        assert kept, name
    with pytest.raises(CalibrationError, match=rf"images of 1 samples did not fit, .*: pass --seqlen {needed} for all"):
        sample_all([LONG], processor, 1, seqlen=needed - 1)


class AsManyPatches:
    """A processor whose images have as many patches as the prompt has tokens."""

    chat_template, image_token = "there is one", "<image>"
    image_processor = type("Images", (), {"model_input_names": ["pixel_values", "aspect_ratio_ids"]})

    def apply_chat_template(self, messages, **_):
        return "<image><image>Compare. Different."

    def __call__(self, **_):
        ones = torch.ones(1, 2, dtype=torch.int64)
        return dict.fromkeys(("input_ids", "aspect_ratio_ids", "token_type_ids"), ones)


def test_as_many_patches_as_tokens_are_no_tokens(processor):
    sample = encode(TWO, AsManyPatches(), processor.tokenizer)
    longer = padded(sample, 5, 7)
    assert longer.ids.tolist() == [1, 1, 7, 7, 7] and longer.mask.tolist() == [True] * 2 + [False] * 3
    assert longer.extras["aspect_ratio_ids"].tolist() == [[1, 1]]
    assert longer.extras["token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]


# --- which samples ---------------------------------------------------------------------------------


def test_counts_and_the_drawn_set(made):
    processor = made("gemma3")[1]
    calibration = sample_all("synthetic", processor, 3)
    again = sample_all("synthetic", processor, 3, seed=7)
    assert calibration.samples == calibration.images == calibration.documents == 3
    assert (calibration.source, calibration.unused_tokens, calibration.skipped) == ("synthetic", 0, 0)
    assert calibration.tokens == int(calibration.mask.sum()) < calibration.input_ids.numel()
    assert calibration.sha256 == again.sha256
    assert sample_all([ONE, TWO, WORDS], processor, 3).images == 3


def test_text_alone_is_what_core_makes(made, tmp_path):
    processor = made("llava")[1]
    options = dict(nsamples=2, seqlen=16)
    for dataset in ("stdlib", ["a long text " * 20, "another " * 20], [list(range(40))]):
        ours = image_text_samples(dataset, processor, processor.tokenizer, **options)
        core = load_calibration(dataset, processor.tokenizer, **options)
        assert ours.sha256 == core.sha256 and ours.source == core.source and ours.extras == ()


def test_text_stands_beside_images(made, tmp_path):
    processor = made("qwen2_5_vl")[1]
    words = tmp_path / "words.txt"
    words.write_text("\n\0\n".join(" ".join(map(str, range(start, start + 300))) for start in (0, 1000)))
    dataset = f"{words}:num=2,synthetic:num=3"
    calibration = sample_all(dataset, processor, 5, seqlen=256)
    text_rows = load_calibration(str(words), processor.tokenizer, nsamples=2, seqlen=256).input_ids.tolist()
    images = [bool(extra) for extra in calibration.extras]
    assert sorted(images) == [False, False, True, True, True] and calibration.images == 3
    rows = calibration.input_ids.tolist()
    assert sorted(row for row, extra in zip(rows, images, strict=True) if not extra) == sorted(text_rows)
    assert all(calibration.mask[index].all() for index, extra in enumerate(images) if not extra)
    assert calibration.documents == 5 and calibration.source == dataset
    orders = {tuple(bool(extra) for extra in sample_all(dataset, processor, 5, seqlen=256, seed=seed).extras)
              for seed in range(3)}
    assert len(orders) > 1
    assert sample_all(dataset, processor, 5, seqlen=256).sha256 == calibration.sha256


def test_rows_of_a_file(made, tmp_path):
    processor = made("llava")[1]
    image(0).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is in the image?"}, {"from": "gpt", "value": "A red circle."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    calibration = sample_all(str(path), processor, 1)
    same = sample_all([talk("same", "What is in the image?", "A red circle.", image(0))], processor, 1)
    assert calibration.sha256 == same.sha256 and calibration.source == str(path)


def test_bad_samples_are_an_error_or_counted(made):
    processor = made("qwen2_5_vl")[1]
    # 1 pixel high: refused by the processor. Not an image: refused before
    flat = talk("flat", "What?", "A line.", image(0, 400, 1))
    rows = [ONE, flat, {"image": b"nothing", "text": "a"}, LONG, TWO]
    with pytest.raises(CalibrationError, match="the processor refuses flat: ValueError"):
        sample_all(rows, processor, 3)
    calibration = sample_all(rows, processor, 3, skip_bad_samples=True)
    assert (calibration.samples, calibration.skipped, calibration.documents) == (3, 2, 3)
    assert calibration.sha256 == sample_all([ONE, LONG, TWO], processor, 3).sha256
    message = "gives 3 samples .* 4 were asked; 2 could not be read: add data, or pass --nsamples 3"
    with pytest.raises(CalibrationError, match=message):
        sample_all(rows, processor, 4, skip_bad_samples=True)


def test_too_long_samples_are_left_out(made):
    processor = made("llava")[1]
    # an image takes 16 tokens, `user: ` before it 6: the images end after 22, 38 and 54
    calibration = sample_all([TWO, ONE, WORDS], processor, 2, seqlen=30)
    assert (calibration.samples, calibration.images, calibration.documents, calibration.skipped) == (2, 1, 3, 0)
    message = "gives 2 samples of up to 30 tokens, 3 were asked; the images of 1 samples did not fit, they take up to"
    with pytest.raises(CalibrationError, match=f"{message} 32 tokens: pass --seqlen 38 for all, or pass --nsamples 2"):
        sample_all([TWO, ONE, WORDS], processor, 3, seqlen=30)
    given = [ONE, talk("three", "?", "!", image(1), image(2), image(3)), TWO, WORDS]
    with pytest.raises(CalibrationError, match="up to 48 tokens: pass --seqlen 38 for enough of them, 54 for all"):
        sample_all(given, processor, 3, seqlen=20)
    with pytest.raises(CalibrationError, match="pass --seqlen 54 for all, and add data, or pass --nsamples 1"):
        sample_all(given, processor, 5, seqlen=20)


def test_an_endless_set_that_never_fits_comes_to_an_end(processor):
    endless = (talk(str(number), "?", "!", image(0)) for number in itertools.count())
    with pytest.raises(CalibrationError, match="gives 0 samples of up to 8 tokens, 1 were asked; the images of 73 "):
        sample_all(endless, processor, 1, seqlen=8)
    bad = ({"image": b"", "text": str(number)} for number in itertools.count())
    with pytest.raises(CalibrationError, match="73 samples of `given rows` cannot be used; the last: the image"):
        sample_all(bad, processor, 1, skip_bad_samples=True)


def test_what_cannot_be_meant(processor, tmp_path):
    for wrong in (dict(nsamples=0, seqlen=8), dict(nsamples=1, seqlen=1), dict(nsamples=True, seqlen=8)):
        with pytest.raises(UsageError, match="must be a whole number of at least"):
            image_text_samples("synthetic", processor, processor.tokenizer, **wrong)
    with pytest.raises(UsageError, match="`concat` is for text"):
        sample_all("synthetic:concat", processor, 1)
    with pytest.raises(CalibrationError, match="`given rows` gives 1 samples .* add data, or pass --nsamples 1"):
        sample_all([ONE], processor, 2)
    with pytest.raises(CalibrationError, match="empty"):
        sample_all([], processor, 2)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template; leave apply_chat_template and system_prompt out"):
        sample_all("synthetic:system_prompt=Be brief.", processor, 1)


# --- chat templates --------------------------------------------------------------------------------

LOOP = "{%% for m in messages %%}{{ m['role'] }}: %s{{ '\\n' }}{%% endfor %%}"
PARTS = "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
STRING = "{{ m['content'] | trim }}"
SYSTEM = {"role": "system", "content": [text("Be brief.")]}
TOLD = Conversation((SYSTEM, *ONE.messages), ONE.images, "told")
WRITTEN = "user: <image>What is in the image?\nassistant: A red circle.\n"
TEMPLATES = {
    "parts": (LOOP % PARTS, ONE, WRITTEN),
    # Llama 3.2's takes the system's message for a string
    "a system's string": (
        LOOP % f"{{% if m['role'] == 'system' %}}{STRING}{{% else %}}{PARTS}{{% endif %}}", TOLD,
        f"system: Be brief.\n{WRITTEN}"),
    "strings without images": (
        LOOP % f"{{% if m['role'] != 'user' %}}{STRING}{{% else %}}{PARTS}{{% endif %}}", TOLD,
        f"system: Be brief.\n{WRITTEN}"),
    "strings": (LOOP % STRING, TOLD, f"system: Be brief.\n{WRITTEN}"),
    "strings and nothing else": (LOOP % "{{ m['content'] + '' }}", ONE, WRITTEN),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_chat_template_takes_is_found_out(processor, name):
    template, conversation, wanted = TEMPLATES[name]
    processor.chat_template = template
    sample = encode(conversation, processor, processor.tokenizer)
    by_hand = processor(text=[wanted], images=[list(conversation.images)], return_tensors="pt")
    assert torch.equal(sample.ids, by_hand["input_ids"][0])


@pytest.mark.parametrize(("template", "message"), [
    (LOOP % "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}", "leaves out text or images"),
    ("{% for m in messages[1:] %}" + PARTS + "{% endfor %}", "leaves out text or images"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
])
def test_a_chat_template_that_loses_something_is_an_error(processor, template, message):
    processor.chat_template = template
    with pytest.raises(CalibrationError, match=f"cannot write told: .*{message}"):
        encode(TOLD, processor, processor.tokenizer)


def test_the_template_may_be_the_tokenizers(processor):
    with_own = encode(ONE, processor, processor.tokenizer).ids
    processor.tokenizer.chat_template, processor.chat_template = {"default": processor.chat_template}, None
    assert torch.equal(encode(ONE, processor, processor.tokenizer).ids, with_own)


def test_a_template_that_begins_the_text_is_not_begun_twice(processor):
    from tokenizers.processors import TemplateProcessing

    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    plain = encode(ONE, processor, processor.tokenizer).ids
    assert plain[:2].tolist().count(0) == 1
    processor.chat_template = "<s>" + processor.chat_template
    assert torch.equal(encode(ONE, processor, processor.tokenizer).ids, plain)


def test_without_a_template_images_come_first_and_texts_are_lines(processor):
    processor.chat_template = processor.tokenizer.chat_template = None
    sample = encode(TWO, processor, processor.tokenizer)
    by_hand = processor(text=["<image><image>Compare.\nDifferent."], images=[list(TWO.images)], return_tensors="pt")
    assert torch.equal(sample.ids, by_hand["input_ids"][0])
    processor.image_token = None
    with pytest.raises(UnsupportedError, match="LlavaProcessor has neither a chat template nor an image token"):
        encode(TWO, processor, processor.tokenizer)


def test_what_a_prefix_model_says_is_its_suffix(made):
    processor = made("paligemma")[1]
    sample = encode(ONE, processor, processor.tokenizer)
    said = sample.ids[sample.extras["token_type_ids"][0] == 1]
    assert processor.tokenizer.decode(said) == "A red circle.</s>"
    assert "labels" not in sample.extras
    with pytest.raises(CalibrationError, match="the processor refuses words: ValueError: `images` are expected"):
        encode(WORDS, processor, processor.tokenizer)
