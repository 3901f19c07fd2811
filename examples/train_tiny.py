"""Train a small Qwen3 on the standard library of Python, with nothing but this machine.

A toolkit that rounds weights wants a model whose weights mean something: in random ones every
rounding is as good as another. This makes one of 4.6 M parameters from text that every Python
brings along, the sources and documentation strings of its library, in an hour or so on two cores:

    python examples/train_tiny.py --output_dir my-tiny-qwen3

Modules that `autoround_core.corpus` keeps for evaluation are not trained on; the perplexity at the
end is theirs. The same options, versions of Python and libraries, and thread count give the same
model.
"""

from __future__ import annotations

import json
import math
import random
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoround_core.corpus import part_of, stdlib_documents, stdlib_modules

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END, SPEAKER, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HEAD_SIZE = 64
CONTEXT = 2048
WARM_UP = 0.03  # of the steps
LAST_RATE = 0.1  # of the learning rate
HELD_OUT_ROWS = 64

# how Qwen cuts text into words before merging bytes: digits stand alone, a space goes with its word
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that decides about the model."""

    tokens: int
    seed: int
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab_size: int
    seqlen: int
    batch_size: int
    lr: float

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch_size * self.seqlen)


def training_texts(seed: int) -> list[str]:
    """The sources and the documentation of every module that is not held out, shuffled."""
    texts = list(stdlib_documents("calibration"))
    for name, path in sorted(stdlib_modules()):
        if part_of(name) == "calibration":
            try:
                with tokenize.open(path) as file:
                    texts.append(file.read())
            except (SyntaxError, UnicodeDecodeError):
                continue  # no source that Python itself could read
    random.Random(seed).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE as Qwen's, with the three special tokens of its chat format."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytewise])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, SPEAKER, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[SPEAKER, END_OF_TURN],
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def token_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, options: Options
) -> torch.Tensor:
    """The texts as one stream of tokens, cut into rows [rows, seqlen]; no more than are needed."""
    import torch

    stream: list[int] = []
    for start in range(0, len(texts), 32):
        for ids in tokenizer(texts[start : start + 32], verbose=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        if len(stream) >= options.tokens:
            break
    rows = len(stream) // options.seqlen
    return torch.tensor(stream[: rows * options.seqlen]).view(rows, options.seqlen)


def batches(rows: torch.Tensor, options: Options) -> Iterator[torch.Tensor]:
    """`steps` batches [batch, seqlen]: every row once in a random order, then again in another."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    wanted = options.steps * options.batch_size
    epochs = -(-wanted // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    for chosen in order[:wanted].split(options.batch_size):
        yield rows[chosen]


def new_model(options: Options) -> PreTrainedModel:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(options.seed)
    config = Qwen3Config(
        vocab_size=options.vocab_size,
        hidden_size=options.width,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def train(model: PreTrainedModel, rows: torch.Tensor, options: Options) -> float:
    """AdamW with warm-up and a cosine; returns the mean loss of the last tenth of the steps."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # norms: decay would only shrink them
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
    losses: list[float] = []
    every, start = max(1, options.steps // 40), time.monotonic()
    model.train()
    for step, batch in enumerate(batches(rows, options), 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % every == 0 or step == options.steps:
            seconds = time.monotonic() - start
            recent = sum(losses[-every:]) / len(losses[-every:])
            left = seconds / step * (options.steps - step)
            click.echo(f"step {step}/{options.steps}  loss {recent:.3f}  {left:.0f} s left")
    tail = losses[-max(1, options.steps // 10) :]
    return sum(tail) / len(tail)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step as a part of the highest: up in a line, down along a cosine."""
    warm_up = max(1, round(steps * WARM_UP))
    if step < warm_up:
        return (step + 1) / warm_up
    along = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * along)) / 2


def held_out_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> float:
    """exp of the mean loss on documentation of modules that the model has not seen."""
    import torch

    from autoround_core.calibration import load_calibration

    held_out = load_calibration(
        "stdlib:split=evaluation:concat", tokenizer, nsamples=HELD_OUT_ROWS, seqlen=seqlen
    )
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=batch, labels=batch, use_cache=False).loss.float()
            for batch in held_out.input_ids.split(8)
        ]
    return torch.stack(losses).mean().exp().item()


def option(name: str, default: Any, help: str) -> Callable:
    """An option of the command line, spelled with underscores or with dashes."""
    kind = click.IntRange(min=0 if name == "seed" else 1) if isinstance(default, int) else float
    spellings = dict.fromkeys((f"--{name}", "--" + name.replace("_", "-")))
    return click.option(*spellings, type=kind, default=default, show_default=True, help=help)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help="Train a tiny Qwen3.")
@click.option(
    "--output_dir",
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="A directory that is new or empty.",
)
@option("tokens", 10_000_000, "Tokens to train on.")
@option("seed", 42, "Seed of the weights and of the order of the data.")
@option("layers", 6, "Decoder layers.")
@option("width", 256, "Width of the model.")
@option("ffn", 512, "Width of the feed-forward layers.")
@option("heads", 4, f"Attention heads, of {HEAD_SIZE}.")
@option("kv_heads", 2, "Key-value heads; must divide --heads.")
@option("vocab_size", 4096, "Tokens of the vocabulary.")
@option("seqlen", 256, "Tokens of a row.")
@option("batch_size", 16, "Rows of a step.")
@option("lr", 2e-3, "The highest learning rate.")
def main(output_dir: Path, **values: Any) -> None:
    options = Options(**values)
    check(options, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()

    texts = training_texts(options.seed)
    tokenizer = train_tokenizer(texts, options.vocab_size)
    rows = token_rows(texts, tokenizer, options)
    model = new_model(options)
    click.echo(
        f"{model.num_parameters():,} parameters, {rows.numel():,} different tokens, "
        f"{options.steps} steps on {torch.get_num_threads()} threads"
    )
    loss = train(model, rows, options)
    model.to(torch.bfloat16)  # measured as it is saved
    perplexity = held_out_perplexity(model, tokenizer, options.seqlen)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    report = {**asdict(options), "training_loss": loss, "held_out_perplexity": perplexity}
    text = json.dumps(report, indent=2) + "\n"
    (output_dir / "training.json").write_text(text, encoding="utf-8")
    click.echo(f"held-out perplexity {perplexity:.2f}; saved to {output_dir}")


def check(options: Options, output_dir: Path) -> None:
    """Refuse what would fail after an hour, or overwrite something."""
    if output_dir.exists() and any(output_dir.iterdir()):
        raise click.UsageError(f"--output_dir `{output_dir}` is not empty; name a new directory")
    if options.heads % options.kv_heads:
        raise click.UsageError(f"--kv_heads {options.kv_heads} must divide --heads {options.heads}")
    if not options.steps:
        least = options.batch_size * options.seqlen
        raise click.UsageError(f"--tokens {options.tokens} is less than one step of {least}")
    if not 2 <= options.seqlen <= CONTEXT:
        raise click.UsageError(f"--seqlen must be from 2 to {CONTEXT}, got {options.seqlen}")
    if options.vocab_size < 256 + 3:
        raise click.UsageError(f"--vocab_size must be at least 259, got {options.vocab_size}")
    if not options.lr > 0:
        raise click.UsageError(f"--lr must be positive, got {options.lr}")


if __name__ == "__main__":
    main()
