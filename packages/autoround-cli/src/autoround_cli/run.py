"""`autoround run`: generate text with a checkpoint, token by token.

Standard output gets the text and nothing else. How fast it was goes to standard error: the prompt and the steps after
it apart, because the first is bound by arithmetic and the second by memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from autoround_cli.options import parse_backends, parse_dtype
from autoround_core.errors import UnsupportedError, UsageError

_CONTEXT = 8  # tokens of a prompt that is not shown which the first new one is decoded with
_HALF = "\ufffd"  # what a tokenizer makes of bytes that are no character yet
_COLDEST, _HOTTEST = 0.001, 1000.0  # beyond these the logits would overflow, or vanish
INTERRUPTED = 130


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("prompt")
@click.option("--max_new_tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="A backend of `autoround backends`.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template; show the answer only.")
@click.option("--temperature", type=float, default=0.0, show_default=True,
              help="Of sampling; 0 = always the likeliest token.")
@click.option("--top_p", type=float, default=1.0, show_default=True,
              help="Sample among the likeliest tokens that together have this probability.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=42, show_default=True, help="Of sampling.")
@click.option("--quiet", is_flag=True, help="Do not show the speed.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def run(checkpoint, prompt, max_new_tokens, device, backend, dtype, chat, temperature, top_p, seed, quiet,
        trust_remote_code) -> None:
    """Continue PROMPT with a saved model, and show the text as it is made."""
    if not prompt:
        raise UsageError("the prompt is empty; give at least one word")
    kind, sampling = parse_dtype(dtype), _sampling(temperature, top_p)
    if "," in backend:
        raise UsageError(f"a text is made with one backend, got `{backend}`")
    parse_backends(backend)
    import torch

    from autoround_core.evaluation import load_for_evaluation
    from autoround_core.source import find_model

    path = Path(checkpoint) if Path(checkpoint).is_file() else find_model(checkpoint)
    model, tokenizer = load_for_evaluation(
        path, device=device, backend=backend, dtype=kind, trust_remote_code=trust_remote_code
    )
    inputs = _encode(tokenizer, prompt, chat, path)
    stops = _stops(path, model, tokenizer)
    torch.manual_seed(seed)
    stream = TextStream(tokenizer, show_prompt=not chat)
    try:
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                max_new_tokens=max_new_tokens, streamer=stream, **sampling,
                **({"eos_token_id": stops, "pad_token_id": stops[0]} if stops else {}),
            )  # fmt: skip
    except KeyboardInterrupt:
        stream.end()
        raise click.exceptions.Exit(INTERRUPTED) from None
    finally:
        if not quiet and stream.new_tokens:
            click.echo(stream.speed(), err=True)


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `generate`. Written so that NaN is refused."""
    if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
        raise UsageError(f"--temperature must be 0 (no sampling) or from {_COLDEST} to {_HOTTEST}, got {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0 and top_p != 1:
        raise UsageError("--top_p chooses among sampled tokens; give --temperature above 0 with it")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _encode(tokenizer: Any, prompt: str, chat: bool, path: Path) -> Any:
    """input_ids and attention_mask [1, tokens] of the prompt."""
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise UnsupportedError(f"`{path}` has no chat template; leave out --chat, or copy chat_template.jinja from the "
                               "original model")
    else:
        # in one step: a template writes the special tokens itself, and tokenizing its text would add some again
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if inputs["input_ids"].shape[-1] == 0:
        raise UsageError("the tokenizer makes no token of the prompt; give at least one word")
    return inputs


def _stops(path: Path, model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text. Chat models name some in one place only: their configurations, or their tokenizer."""
    from autoround_core.loading import find_format
    from autoround_core.shards import read_json

    named = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    with find_format(path).home(path) as home:
        if (home / "generation_config.json").is_file():
            named.append(read_json(home / "generation_config.json").get("eos_token_id"))
    found = [one for item in named for one in (item if isinstance(item, list) else [item]) if one is not None]
    return list(dict.fromkeys(found))


class TextStream:
    """What `generate` gives each token to: shows the text as soon as it is whole, and takes the time.

    A token may end within a character, and a tokenizer may drop the space before the first token that it decodes. So
    what is new in the text is found by decoding it together with the piece before.
    """

    def __init__(self, tokenizer: Any, *, show_prompt: bool) -> None:
        self._tokenizer, self._show_prompt = tokenizer, show_prompt
        self._ids: list[int] = []
        self._context = self._shown = 0  # where the piece before begins, and where it ends
        self._times: list[float] = []  # of the prompt and of each token
        self.prompt_tokens = 0

    @property
    def new_tokens(self) -> int:
        return max(0, len(self._times) - 1)

    def put(self, tokens: Any) -> None:
        """The ids of the prompt [1, tokens], when the model is about to see them; then each new id [1]."""
        self._times.append(time.perf_counter())
        self._ids += tokens.flatten().tolist()
        if len(self._times) == 1:
            self.prompt_tokens = len(self._ids)
            if not self._show_prompt:
                self._shown, self._context = len(self._ids), max(0, len(self._ids) - _CONTEXT)
        self._show()

    def end(self) -> None:
        """Show what is left, and end the line."""
        self._show(last=True)
        click.echo()

    def speed(self) -> str:
        """One line. The first new token comes with the prompt; the others take a step each."""
        prompt, first, last = self._times[0], self._times[1], self._times[-1]
        made = f"{self.new_tokens} token" + ("s" if self.new_tokens > 1 else "")
        if self.new_tokens > 1:
            made += f", {(self.new_tokens - 1) / (last - first):.1f} tokens/s"
        read = f"{self.prompt_tokens} token" + ("s" if self.prompt_tokens > 1 else "")
        return f"prompt: {read}, {self.prompt_tokens / (first - prompt):.1f} tokens/s; generated: {made}"

    def _show(self, last: bool = False) -> None:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(_HALF) and not last):
            return
        click.echo(text[len(before) :], nl=False)
        self._context, self._shown = self._shown, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
