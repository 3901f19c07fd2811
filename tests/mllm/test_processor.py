"""Processors of tiny checkpoints are loaded without torchvision, and what they make is what the models expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors import safe_open
from transformers import processing_utils
from transformers.models import pixtral
from transformers.models.smolvlm import processing_smolvlm

from autoround_core import ModelError, UnsupportedError
from autoround_mllm.processor import load_processor
from tiny_vlms import FAMILIES, TinyVLM

QUESTION = "What is in the image?"
WITHOUT_TORCHVISION = not transformers.utils.is_torchvision_available()
needs_stand_in = pytest.mark.skipif(not WITHOUT_TORCHVISION, reason="torchvision is here, so nothing stands in for it")
# some processors give numpy a tensor in a way that numpy has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# tokens that an image of 60 x 36 pixels takes. Patches of 8 pixels, or of 16 where two are merged, unless said
IMAGE_TOKENS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm46v"), 4 * 2),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen2_5_omni"), 4 * 2),
    "llava": 4 * 4,
    # patches of 16: the whole as 2 x 2, the details as 2 rows of 4 that end with a new line
    **dict.fromkeys(("llava_next", "granite_vision", "llava_onevision"), 2 * 2 + 2 * (4 + 1)),
    "mllama": 1,
    "gemma3": 4,
    # enlarged to 160 x 96, since it may take 70
    "gemma4": 10 * 6,
    "paligemma": 4 * 4,
    "idefics2": 4,
    # four tiles and the whole
    **dict.fromkeys(("idefics3", "smolvlm"), 5 * 4),
    "mistral3": 4 * 3,
    "pixtral": 4 * 3,
    # two tiles and the whole
    **dict.fromkeys(("internvl", "aya_vision", "ovis2"), 3 * 4),
    "aria": 16,
    "deepseek_vl": 4 * 4,
    # a tile of 2 rows that end with a mark, a mark, and the whole like the tile
    "phi4_multimodal": 2 * 3 + 1 + 2 * 3,
    **dict.fromkeys(("llama4", "kimi_k25", "cohere2_vision", "lfm2_vl"), 2 * 2),
}
ALL = sorted(FAMILIES)
LOADABLE = [name for name in ALL if FAMILIES[name].processor.by_hand is None]
WITH_VIDEOS = [name for name in LOADABLE if "qwen" in name or FAMILIES[name].processor.more]


def drawn(colour: str, size: tuple[int, int] = (60, 36)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 30, 30), fill=colour)
    pen.rectangle((35, 10, 50, 35), fill="blue")
    return image


def message(*parts: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"} if part == "image" else {"type": "text", "text": part}
                                         for part in parts]}]


@pytest.fixture
def own(family, tmp_path):
    """own(name) -> a processor's files that a test may change."""

    def get(name: str) -> Path:
        family(name)
        FAMILIES[name].processor.write(tmp_path)
        (tmp_path / "config.json").write_text((family(name) / "config.json").read_text())
        return tmp_path

    return get


def loaded(row: TinyVLM, directory: Path) -> torch.nn.Module:
    model = getattr(transformers, row.auto_class).from_pretrained(directory)
    return model.eval().get_submodule(row.called)


def image_id(config) -> int:
    """The id that marks an image's place, as the model's configuration has it."""
    return (config if hasattr(config, "image_token_id") else config.vision_config).image_token_id


def test_every_family_says_how_many_tokens():
    assert sorted(IMAGE_TOKENS) == ALL
    assert len(LOADABLE) >= 18


@pytest.mark.parametrize("name", ALL)
def test_image_and_prompt_give_logits_that_depend_on_the_image(name, family):
    row, directory = FAMILIES[name], family(name)
    model = loaded(row, directory)
    logits = {}
    for colour in ("red", "green"):
        inputs = row.processor.inputs(directory, drawn(colour), QUESTION)
        assert (inputs["input_ids"] == image_id(model.config)).sum() == IMAGE_TOKENS[name]
        with torch.no_grad():
            logits[colour] = model(**inputs).logits[0, -1]
    assert all(torch.isfinite(row).all() for row in logits.values())
    assert (logits["red"] - logits["green"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_is_complete(name, family):
    row, directory = FAMILIES[name], family(name)
    if not row.called:  # Transformers cannot report on a model that speaks
        _, report = getattr(transformers, row.auto_class).from_pretrained(directory, output_loading_info=True)
        assert not any(report.values())
    model = getattr(transformers, row.auto_class).from_pretrained(directory)
    for path in (row.text, *row.vision, *row.projector):
        assert any(True for _ in model.get_submodule(path).parameters()), path
    assert all(parameter.abs().max() > 0.05 for parameter in model.parameters())
    assert (directory / "generation_config.json").is_file()


@pytest.mark.parametrize("name", [name for name in LOADABLE if FAMILIES[name].processor.template])
def test_chat_template_writes_the_prompt(name, family):
    processor = load_processor(family(name), trust_remote_code=False)
    text = processor.apply_chat_template(message("image", QUESTION), tokenize=False, add_generation_prompt=True)
    assert text == FAMILIES[name].processor.prompt(QUESTION)
    assert processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "user: Hello\n"


# as the index files on the hub have them
@pytest.mark.parametrize("name, stored", [
    ("qwen2_5_vl", "visual.blocks.0. visual.merger. model.layers.0. lm_head."),
    ("qwen3_vl", "model.visual.blocks.0. model.visual.deepstack_merger_list.0. model.language_model.layers.0."),
    ("qwen2_5_omni", "thinker.visual.blocks.0. thinker.audio_tower.layers.0. thinker.model.layers.0. talker."),
    ("llava", "vision_tower.vision_model.encoder.layers.0. multi_modal_projector. language_model.model.layers.0."),
    ("gemma3", "vision_tower.vision_model.encoder.layers.0. multi_modal_projector. language_model.model.layers.0."),
    ("mllama", "vision_model.transformer.layers.0. multi_modal_projector. language_model.model.layers.1.cross_attn."),
    ("mistral3", "vision_tower.transformer.layers.0. multi_modal_projector. language_model.model.layers.0."),
    ("smolvlm", "model.vision_model.encoder.layers.0. model.connector.modality_projection. model.text_model.layers.0."),
    ("kimi_k25", "vision_tower.encoder.blocks.0.wqkv. mm_projector. language_model.model.layers.1.mlp.experts.0."),
])
def test_weights_have_the_names_of_the_hub(name, stored, family):
    with safe_open(family(name) / "model.safetensors", "pt") as file:
        for start in stored.split():
            assert any(key.startswith(start) for key in file.keys()), start


def test_a_family_may_have_no_chat_template(family):
    assert load_processor(family("paligemma"), trust_remote_code=False).chat_template is None


@pytest.mark.parametrize("name", LOADABLE)
def test_saved_processor_makes_the_same_inputs(name, family, tmp_path):
    row = FAMILIES[name]
    processor = load_processor(family(name), trust_remote_code=False)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path, trust_remote_code=False)
    assert type(again) is type(processor)
    arguments = {"text": [row.processor.prompt(QUESTION)], "images": [drawn("red")], "return_tensors": "pt"}
    before, after = processor(**arguments), again(**arguments)
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


@needs_stand_in
@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_are_refused_and_their_settings_kept(name, own, tmp_path_factory):
    directory = own(name)
    processor = load_processor(directory, trust_remote_code=False)
    with pytest.raises(UnsupportedError, match="videos need torchvision.*pass images"):
        processor.video_processor([np.zeros((2, 3, 32, 32), dtype=np.uint8)], return_tensors="pt")
    saved = tmp_path_factory.mktemp("saved")
    processor.save_pretrained(saved)
    file = directory / next(iter(FAMILIES[name].processor.more), "preprocessor_config.json")
    kept = json.loads((saved / "processor_config.json").read_text())["video_processor"]
    assert kept == json.loads(file.read_text())


@needs_stand_in
def test_a_prompt_with_a_video_is_refused(family):
    processor = load_processor(family("qwen2_5_vl"), trust_remote_code=False)
    with pytest.raises(UnsupportedError, match="videos need torchvision"):
        processor(text="<|video_pad|>", videos=[np.zeros((2, 3, 32, 32), dtype=np.uint8)], return_tensors="pt")


def test_batch_of_images_and_texts_is_padded(family):
    processor = load_processor(family("qwen2_5_vl"), trust_remote_code=False)
    prompt = FAMILIES["qwen2_5_vl"].processor.prompt(QUESTION)
    inputs = processor(text=[prompt, prompt + "A red circle.", "Hello"], images=[drawn("red"), drawn("blue", (40, 64))],
                       padding=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8], [1, 8, 4]]
    assert inputs["attention_mask"].sum(1).tolist()[0] < inputs["input_ids"].shape[1]


def test_a_directory_without_processor_gives_none(saved, tmp_path):
    assert load_processor(saved("llama"), trust_remote_code=False) is None
    assert load_processor(tmp_path, trust_remote_code=False) is None


@needs_stand_in
@pytest.mark.parametrize("name", [name for name in ALL if name not in LOADABLE])
def test_an_image_processor_that_needs_torchvision_is_an_error(name, family):
    with pytest.raises(ModelError, match="needs torchvision.*`pip install torchvision`") as error:
        load_processor(family(name), trust_remote_code=False)
    assert "\n" not in str(error.value)


_NAMELESS = {f"{kind}_config.json": {"processor_class": None} for kind in ("preprocessor", "processor", "tokenizer")}
_OWN_CODE = {file: {**change, "auto_map": {"AutoProcessor": "mine.MyProcessor"}} for file, change in _NAMELESS.items()}


# what becomes of a file: a text in its place, other entries, or None = it is gone
@pytest.mark.parametrize("harm, says", [
    ({"preprocessor_config.json": "{"}, "preprocessor_config.json' is not a valid JSON"),
    ({"preprocessor_config.json": {"image_processor_type": "NoSuchProcessor"}}, "Unrecognized image processor"),
    ({"preprocessor_config.json": {"size": "large"}}, "size"),
    ({"tokenizer.json": None}, "tokenizer"),
    ({"tokenizer.json": "{}"}, "missing"),
    ({**_OWN_CODE, "config.json": {"model_type": "mine"}}, "--trust_remote_code"),
    ({**_NAMELESS, "config.json": {"model_type": "mine"}}, "no processor of texts and images together"),
])
def test_a_processor_that_cannot_be_built_is_one_line(harm, says, own):
    directory = own("llava")
    before = touched()
    for name, change in harm.items():
        file = directory / name
        if change is None:
            file.unlink()
        elif isinstance(change, str):
            file.write_text(change)
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError) as error:
        load_processor(directory, trust_remote_code=False)
    text = str(error.value)
    assert says in text and str(directory) in text and "\n" not in text and len(text) < 300
    assert touched() == before


def touched() -> list:
    """What is replaced in Transformers while a processor is built."""
    return [id(processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING), id(processing_utils.MODALITY_TO_BASE_CLASS_MAPPING),
            processing_smolvlm.num2words, pixtral.PixtralProcessor,
            f"{pixtral.__name__}.image_processing_pixtral" in sys.modules]


@pytest.mark.parametrize("name", ["mistral3", "smolvlm"])
def test_transformers_is_left_as_it_was(name, family):
    before = touched()
    assert load_processor(family(name), trust_remote_code=False) is not None
    assert touched() == before


def test_beside_torchvision_transformers_is_left_as_it_is(family, monkeypatch):
    seen = []

    def build(path, trust_remote_code):
        seen.append((path, trust_remote_code, processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING))
        return real

    real = load_processor(family("llava"), trust_remote_code=False)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", build)
    assert load_processor(family("llava"), trust_remote_code=True) is real
    assert seen == [(family("llava"), True, processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING)]


def test_nothing_is_written_to_the_screen(family):
    # in a process of its own, since Transformers says each thing once
    code = ("import sys; from pathlib import Path; from autoround_mllm.processor import load_processor\n"
            "for path in sys.argv[1:]: print(type(load_processor(Path(path), trust_remote_code=False)).__name__)")
    paths = [str(family(name)) for name in ("llava", "qwen3_vl", "mistral3")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split() == ["LlavaProcessor", "Qwen3VLProcessor", "PixtralProcessor"]
