"""llama.cpp loads our GGUF files and computes what was meant, on a CPU. Run by `tox -e llamacpp`.

It quantizes the inputs of quantized matrices to 8 bits as it runs, which no file can change: so its logits are compared
with those of the model that the file holds, dequantized, and may differ by that much.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from autoround_core import AutoRound, load
from autoround_export.gguf.mixture import FILE_TYPES
from engine_cases import TINY
from export.gguf.architecture_models import MODELS, VOCABULARY

llama_cpp = pytest.importorskip("llama_cpp", reason="tox -e llamacpp")

TEXTS = [
    "The function returns a list of the names that are defined in this module, sorted by length.",
    "Hello world! I'm 2023 years old, don't you think? 12345",
    "def f(x):\n    return x ** 2\n\n\n# done\t\tok",
    "Ünïcödé 你好，世界 🚀  multiple   spaces ",
    "<|endoftext|>user\n<|im_end|> <|im_start|>",
]
FLOATS = ("f32", "f16", "bf16")
CONTEXT, NEW_TOKENS = 256, 16
# nats, of each next token on average: the order of sums, the rounding of inputs to 16 bits, to 8 bits
MOST = {"f32": 1e-6, "f16": 1e-5, "bf16": 2e-4}
MOST_TRAINED, MOST_RANDOM = 2e-3, 5e-3
# where two experts are almost as good, a rounding chooses the other, and that token differs much; most do not
MOST_ROUTED = 0.05
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")


class Engine:
    """One file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: list[int]) -> torch.Tensor:
        self._llama.reset()
        self._llama.eval(ids)
        return torch.from_numpy(np.array(self._llama.scores[: len(ids)]))

    def generate(self, ids: list[int]) -> list[int]:
        stream = self._llama.generate(ids, temp=0.0)
        return [token for token, _ in zip(stream, range(NEW_TOKENS), strict=False)]


def file_in(directory: Path) -> Path:
    (found,) = directory.glob("*.gguf")
    return found


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def saved(model: torch.nn.Module, directory: Path) -> Path:
    """A model with the bundled tokenizer."""
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, directory / file)
    return directory


def written(source: Path, out: Path, file_type: str, **options) -> Path:
    return AutoRound(str(source), recipe="rtn", **options).quantize_and_save(out, f"gguf:{file_type}")


@torch.no_grad()
def divergence(model: torch.nn.Module, engine: Engine, ids: list[int]) -> torch.Tensor:
    """KL, in nats, of each of llama.cpp's next tokens from the model's."""
    ours = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    theirs = engine.logits(ids).double()[:, : ours.shape[1]].log_softmax(-1)
    assert torch.isfinite(theirs).all()
    return (ours.exp() * (ours - theirs)).sum(-1)


def encoded() -> tuple[list[list[int]], list[int]]:
    """TEXTS by the original tokenizer, one by one and together."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return rows, [token for row in rows for token in row]


def check(directory: Path, file_type: str, most: float) -> None:
    """The file loads, has our token ids, means what we mean, and generates."""
    engine, model = Engine(file_in(directory)), load(directory, dtype=torch.float32)
    rows, ids = encoded()
    assert [engine.tokens(text) for text in TEXTS] == rows
    found = divergence(model, engine, ids)
    print(f"KL {found.mean():.1e}, median {found.median():.1e}  {file_in(directory).name}")
    most = MOST.get(file_type, most)
    assert found.mean() < most and found.median() < min(most, MOST_RANDOM)
    new = engine.generate(ids)
    assert len(new) == NEW_TOKENS and all(0 <= token < VOCABULARY for token in new)
    if file_type == "f32":
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids + new])).logits[0].argmax(-1)
        assert new == best[len(ids) - 1 : -1].tolist()


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """bundled(file type) -> directory of the bundled model as a file of that type."""
    made: dict[str, Path] = {}

    def get(file_type: str) -> Path:
        if file_type not in made:
            made[file_type] = written(TINY, tmp_path_factory.mktemp(file_type) / "out", file_type)
        return made[file_type]

    return get


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            transformers.logging.disable_progress_bar()
            made[name] = saved(MODELS[name].build(), tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type(bundled, file_type):
    check(bundled(file_type), file_type, MOST_TRAINED)


def test_other_weights_would_be_noticed(bundled):
    original = load(bundled("f32"), dtype=torch.float32)
    found = divergence(original, Engine(file_in(bundled("q4_k_m"))), encoded()[1])
    print(f"KL {found.mean():.1e}, the original and q4_k_m")
    assert found.mean() > 3 * MOST_TRAINED


@pytest.mark.parametrize("file_type", [name for name in FILE_TYPES if name not in FLOATS])
def test_the_mixture_is_that_of_llama_cpp(bundled, file_type, tmp_path):
    from data.make_ggml_mixtures import NEEDS_IMPORTANCE, quantize

    source = file_in(bundled("f32"))
    shapes = None
    if file_type in NEEDS_IMPORTANCE:
        shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape))
                  for tensor in gguf.GGUFReader(source).tensors}
    quantize(str(source), str(tmp_path / "theirs.gguf"), FILE_TYPES[file_type].number, shapes)
    assert types_in(file_in(bundled(file_type))) == types_in(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("file_type", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(model_of, name, file_type, tmp_path):
    most = MOST_ROUTED if name in ROUTED else MOST_RANDOM
    check(written(model_of(name), tmp_path / "out", file_type), file_type, most)


@pytest.mark.skipif(not os.environ.get("LLAMA_CPP_ROOT"), reason="LLAMA_CPP_ROOT names no checkout of llama.cpp")
@pytest.mark.parametrize("file_type", ["f32", "q4_k_m"])
@pytest.mark.parametrize("biases", [False, True])
def test_an_architecture_outside_our_table(biases, file_type, tmp_path):
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, use_qkv_bias=biases, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = torch.randn(parameter.shape)
            parameter.add_(0.2 * shift) if parameter.dim() < 2 else parameter.copy_(0.06 * shift)
    out = written(saved(model, tmp_path / "model"), tmp_path / "out", file_type, format_options={"gguf_pre": "qwen2"})
    assert file_in(out).name == f"model-{file_type.upper()}.gguf"
    check(out, file_type, MOST_RANDOM)
