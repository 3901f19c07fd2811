"""`autoround run`: the text as it is made, the speed apart from it, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoround_cli import run as command
from autoround_cli.run import TextStream
from autoround_core import load

from .conftest import TINY

SPEED = re.compile(r"prompt: (\d+) tokens?, [\d.]+ tokens/s; generated: (\d+) tokens?(, [\d.]+ tokens/s)?\n")

EXACT = ("--dtype", "float32")


@lru_cache(maxsize=1)
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def expected(checkpoint, ids: list[int], count: int) -> list[int]:
    """The likeliest ids after `ids`, without a cache, and in float32, where no two logits are equal."""
    model = load(checkpoint, dtype=torch.float32)
    made = []
    for _ in range(count):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def test_a_prompt_is_continued(autoround, checkpoint):
    ids = tokenizer()("def main(")["input_ids"]
    text = tokenizer().decode(ids + expected(checkpoint, ids, 8), skip_special_tokens=True)
    result = autoround("run", checkpoint, "def main(", "--max_new_tokens", 8, *EXACT)
    assert (result.code, result.out) == (0, text + "\n")
    assert SPEED.fullmatch(result.err).groups()[:2] == (str(len(ids)), "8")
    quiet = autoround("run", checkpoint, "def main(", "--max_new_tokens", 8, "--quiet", *EXACT)
    assert (quiet.code, quiet.out, quiet.err) == (0, text + "\n", "")


def test_one_token_has_no_speed_of_steps(autoround, checkpoint):
    result = autoround("run", checkpoint, "def main(", "--max_new_tokens", 1)
    assert SPEED.fullmatch(result.err).groups()[1:] == ("1", None)


def test_chat_shows_the_answer_only(autoround, checkpoint):
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer()(text)["input_ids"]
    answer = tokenizer().decode(expected(checkpoint, ids, 6), skip_special_tokens=True)
    result = autoround("run", checkpoint, "hello", "--max_new_tokens", 6, "--chat", *EXACT)
    assert (result.code, result.out) == (0, answer + "\n")
    assert SPEED.fullmatch(result.err)[1] == str(len(ids))


def test_chat_needs_a_template(autoround, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    result = autoround("run", copy, "hello", "--chat")
    assert result.code == 1 and result.out == "" and len(result.err.splitlines()) == 1
    assert "has no chat template" in result.err and "leave out --chat" in result.err


def test_a_text_ends_where_the_generation_configuration_says(autoround, checkpoint, tmp_path):
    ids = tokenizer()("def main(")["input_ids"]
    made = expected(checkpoint, ids, 4)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [made[2], 0]}))
    result = autoround("run", copy, "def main(", "--max_new_tokens", 9, *EXACT)
    assert SPEED.fullmatch(result.err)[2] == str(made.index(made[2]) + 1)


def test_sampling(autoround, checkpoint):
    def made(*options):
        result = autoround("run", checkpoint, "def main(", "--max_new_tokens", 12, "--quiet", *EXACT, *options)
        assert (result.code, result.err) == (0, "")
        return result.out

    greedy = made()
    hot = [made("--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] and len({greedy, *hot}) == 3
    # of the likeliest tokens that have nearly no probability together there is one
    assert made("--temperature", 1.5, "--top_p", 1e-6, "--seed", 1) == greedy == made("--temperature", 0, "--seed", 1)


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["{w4}", ""], 2, ["prompt is empty"]),
    (["{w4}", "x", "--backend", "referense"], 2, ["did you mean `reference`"]),
    (["{tiny}", "x", "--backend", "referense"], 2, ["did you mean `reference`"]),
    (["{w4}", "x", "--backend", "auto,reference"], 2, ["one backend"]),
    (["{w4}", "x", "--backend", "cpu_int8"], 1, ["needs bits 8, got 4"]),
    (["{w4}", "x", "--device", "cuba"], 2, ["cuba", "cannot be used"]),
    (["{w4}", "x", "--dtype", "float61"], 2, ["did you mean `float16`"]),
    (["{w4}", "x", "--temperature", "-1"], 2, ["--temperature must be 0", "got -1.0"]),
    (["{w4}", "x", "--temperature", "nan"], 2, ["got nan"]),
    (["{w4}", "x", "--temperature", "1", "--top_p", "0"], 2, ["--top_p must be above 0"]),
    (["{w4}", "x", "--temperature", "1", "--top_p", "nan"], 2, ["got nan"]),
    (["{w4}", "x", "--temperature", "1e-30"], 2, ["0.001"]),
    (["{w4}", "x", "--temperature", "inf"], 2, ["1000"]),
    (["{w4}", "x", "--seed", "-1"], 2, ["--seed"]),
    (["{w4}", "x", "--top_p", "0.9"], 2, ["--temperature above 0"]),
    (["{w4}", "x", "--max_new_tokens", "0"], 2, ["x>=1"]),
    (["{w5}", "x"], 1, ["w5"]),
])  # fmt: skip
def test_mistakes(autoround, checkpoint, arguments, code, says):
    places = dict(w4=checkpoint, tiny=TINY, w5=checkpoint.parent / "w5")
    result = autoround("run", *(argument.format(**places) for argument in arguments))
    assert (result.code, result.out) == (code, "") and len(result.err.splitlines()) == 1, result.err
    assert all(text in result.err for text in says), result.err


def test_a_prompt_of_no_tokens(autoround, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    result = autoround("run", copy, "   ")
    assert result.code == 2 and "no token of the prompt" in result.err and len(result.err.splitlines()) == 1


def start(*arguments: object) -> subprocess.Popen:
    code = "from autoround_cli.main import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, "run", *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_interrupted(checkpoint):
    with start(checkpoint, "def main(", "--max_new_tokens", 2000) as process:
        began = process.stdout.read(len("def main("))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert began == "def main(" and rest.endswith("\n")
    assert process.returncode == command.INTERRUPTED and "Traceback" not in errors
    assert errors == "" or SPEED.fullmatch(errors)  # nothing to tell if no token was there yet


def test_a_reader_that_goes_away(checkpoint):
    with start(checkpoint, "def main(", "--max_new_tokens", 2000) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors and process.returncode == 1


# --- the stream --------------------------------------------------------------------------------------------


def pieces(monkeypatch, tokenizer, prompt: list[int], made: list[int], *, show_prompt: bool = True) -> list[str]:
    """What is shown after the prompt, after each token, and at the end."""
    shown = [""]
    monkeypatch.setattr(command.click, "echo", lambda text="\n", nl=True: shown.append(shown.pop() + text))
    stream = TextStream(tokenizer, show_prompt=show_prompt)
    for tokens in ([prompt], *made):
        stream.put(torch.tensor(tokens))
        shown.append("")
    stream.end()
    assert (stream.prompt_tokens, stream.new_tokens) == (len(prompt), len(made))
    return shown


@pytest.mark.parametrize("show_prompt", [True, False])
def test_pieces_make_the_whole_text(monkeypatch, show_prompt):
    ids = tokenizer()("naïve 日本語 🙂🙂\n\n    return x  # ok")["input_ids"]
    for split in (1, 3, 7, len(ids) - 1):
        shown = pieces(monkeypatch, tokenizer(), ids[:split], ids[split:], show_prompt=show_prompt)
        assert "\ufffd" not in "".join(shown[1:])
        whole, before = tokenizer().decode(ids), tokenizer().decode(ids[:split])
        if show_prompt:
            assert "".join(shown) == whole + "\n"
        elif not before.endswith("\ufffd"):
            assert "".join(shown) == whole[len(before) :] + "\n"


def test_any_tokens_make_the_text_that_they_decode_to(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ids = torch.randint(4096, (24,), generator=generator).tolist()
        whole = tokenizer().decode(ids, skip_special_tokens=True)
        assert "".join(pieces(monkeypatch, tokenizer(), ids[:4], ids[4:])) == whole + "\n"


def test_each_token_is_shown_as_it_is_made(monkeypatch):
    ids = tokenizer()("def main(arguments, options):\n    return")["input_ids"]
    shown = pieces(monkeypatch, tokenizer(), ids[:1], ids[1:])
    assert all(shown[:-1]) and shown[-1] == "\n"


def test_spaces_at_the_start_of_a_token_are_kept(monkeypatch):
    """A tokenizer as Llama's drops the space before the first token that it decodes."""
    words = {"<unk>": 0, "▁if": 1, "▁x": 2, ":": 3, "\n": 4, "▁▁▁▁return": 5}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = Metaspace(), decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=plain)
    shown = pieces(monkeypatch, metaspace, [1], [2, 3, 4, 5, 2])
    assert shown == ["if", " x", ":", "\n", "    return", " x", "\n"]


def test_the_speed_is_that_of_prompt_and_steps(monkeypatch):
    times = iter([10.0, 12.0, 12.5, 13.0, 13.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    stream = TextStream(tokenizer(), show_prompt=False)
    for tokens in ([[5, 6, 7, 8]], [9], [10], [11], [12]):
        stream.put(torch.tensor(tokens))
    assert stream.speed() == "prompt: 4 tokens, 2.0 tokens/s; generated: 4 tokens, 2.0 tokens/s"
