"""Train a small vision-language model on pictures that are drawn while it learns.

What rounding does to a model that looks at pictures shows only in a model that sees. This makes one from nothing in
minutes on two cores: LLaVA's structure (CLIP's vision tower, a projector, a Llama), asked about pictures of 64 x 64
pixels: which color, which shape, where, how many, what number, which bar. An answer is right to the letter, or wrong:

    python examples/train_tiny_vlm.py --output_dir my-tiny-vlm

As with large models, the vision tower comes first: it learns to name what is in each patch through the output layer of
the language tower. Then both learn to answer. The questions at the end are about pictures that it never saw (see
tiny_vlm_lessons.py). The same options, versions of libraries, and thread count give the same model; with `--minutes` it
also depends on the machine.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import click
from tiny_vlm_lessons import LESSONS, lessons, named_cells, questions
from tiny_vlm_model import ASSISTANT, END, new_model, new_processor

from autoround_mllm.conversation import Conversation

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

NAMING = 0.3  # steps of naming for one of answering; they take a tenth of its time
NAMING_TIME = 0.05
WARM_UP, LAST_RATE = 0.05, 0.02  # of the steps; of the learning rate


def train(model: PreTrainedModel, processor: ProcessorMixin, options: dict[str, Any]) -> None:
    """First the names of what is in the patches, then the questions."""
    steps, minutes, size = options["steps"], options["minutes"], options["batch_size"]
    named, asked = named_cells(), lessons()

    def naming() -> float:
        return name_patches(model, processor, list(itertools.islice(named, size)))

    def answering() -> float:
        return learn(model, processor, list(itertools.islice(asked, size)))

    repeat(naming, model, options["lr"], max(1, round(NAMING * steps)), minutes and NAMING_TIME * minutes)
    repeat(answering, model, options["lr"], steps, minutes and (1 - NAMING_TIME) * minutes)


def repeat(learn: Callable[[], float], model: PreTrainedModel, lr: float, steps: int, minutes: float | None) -> None:
    """Steps of something that leaves gradients and returns a loss: as many as `steps`, or for so many minutes."""
    import torch

    muon, adam = optimizers(model)
    losses: list[float] = []
    done, start = 0.0, time.monotonic()
    while done < 1:
        losses.append(learn())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        now = lr * rate(done)
        muon.step(now)
        adam.param_groups[0]["lr"] = now
        adam.step()
        model.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        done = seconds / 60 / minutes if minutes else len(losses) / steps
        if len(losses) % 25 == 0 or done >= 1:
            recent = sum(losses[-25:]) / len(losses[-25:])
            click.echo(f"{learn.__name__}: step {len(losses)}  loss {recent:.3f}  {seconds:.0f} s  {min(done, 1):.0%}")


def rate(done: float) -> float:
    """The learning rate, as a part of the highest, after this part of the steps."""
    if done < WARM_UP:
        return max(done, WARM_UP / 20) / WARM_UP
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def optimizers(model: PreTrainedModel) -> tuple[Muon, torch.optim.Optimizer]:
    """Muon for the matrices of linear layers, Adam for embeddings, the output, patches, norms and biases."""
    import torch

    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    known = set(map(id, linear))
    others = [p for p in model.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    return Muon(linear, [torch.zeros_like(weight) for weight in linear]), adam


@final
@dataclass(frozen=True, slots=True)
class Muon:
    """Moves each matrix along its momentum made orthogonal: in all its directions by equally much.

    After as many pictures the loss was lower than with Adam. The polynomial that brings singular values near one is
    that of torch.optim.Muon, which computes it in bfloat16; most processors do that slowly.
    """

    matrices: list[torch.Tensor]
    momenta: list[torch.Tensor]

    def step(self, lr: float) -> None:
        import torch

        with torch.no_grad():
            for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
                if matrix.grad is not None:
                    momentum.lerp_(matrix.grad, 0.05)
                    step = orthogonal(matrix.grad.lerp(momentum, 0.95))
                    matrix.mul_(1 - 0.01 * lr).sub_(step, alpha=0.2 * lr * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The same singular vectors, and singular values near one."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.7750 * square) @ matrix
    return matrix


def name_patches(
    model: PreTrainedModel, processor: ProcessorMixin, named: list[tuple[Image, list[list[str]]]]
) -> float:
    """Gradients of one step, for words of each cell as the output of its patch, in any order; returns the mean loss."""
    import torch

    end = processor.tokenizer.convert_tokens_to_ids(END)  # where a cell has fewer words
    most = max(len(words) for _, cells in named for words in cells)
    words = {word for _, cells in named for words in cells for word in words}
    tokens = {w: processor.tokenizer(w if w.isdigit() else f" {w}")["input_ids"][0] for w in words}
    ids = [[[tokens[w] for w in words] + [end] * (most - len(words)) for words in cells] for _, cells in named]
    pixels = processor.image_processor([image for image, _ in named], return_tensors="pt")["pixel_values"]
    features = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    loss = -model.lm_head(features).log_softmax(-1).gather(-1, torch.tensor(ids)).mean()
    loss.backward()
    return loss.item()


def learn(model: PreTrainedModel, processor: ProcessorMixin, conversations: list[Conversation]) -> float:
    """Add up the gradients of one step; returns the mean loss of a token of an answer.

    The lessons go through the model one after the other, because those of one sort are about equally long.
    """
    from torch.nn.functional import cross_entropy

    batches = [batch_of(processor, conversations[i :: len(LESSONS)], True) for i in range(len(LESSONS))]
    labels = [labels_of(processor, batch) for batch in batches]
    tokens, total = sum(int((label >= 0).sum()) for label in labels), 0.0
    for batch, label in zip(batches, labels, strict=True):
        logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), label[:, 1:].flatten(), reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def batch_of(processor: ProcessorMixin, conversations: list[Conversation], answered: bool) -> BatchFeature:
    """What the model takes, [batch, tokens]; without the last answers, the padding is on the left, to go on from."""
    said = [list(c.messages if answered else c.messages[:-1]) for c in conversations]
    texts = [processor.apply_chat_template(messages, add_generation_prompt=not answered) for messages in said]
    images = [image for c in conversations for image in c.images]
    side = "right" if answered else "left"
    return processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")


def labels_of(processor: ProcessorMixin, batch: BatchFeature) -> torch.Tensor:
    """The tokens of answers with their ends, and -100 everywhere else."""
    ids, (start, end) = batch["input_ids"], processor.tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    inside = (ids == start).cumsum(1) > (ids == end).cumsum(1)
    labels = ids.new_full(ids.shape, -100)
    labels[:, 1:] = ids[:, 1:].where(inside[:, :-1], -100)
    return labels


def answer_accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, conversations: Iterable[Conversation], batch_size: int = 50
) -> dict[str, float]:
    """The part of greedy answers that are right to the letter, by `where` of the conversations and of "all".

    Each conversation holds one question and its answer.
    """
    import torch

    end = processor.tokenizer.eos_token_id
    right: dict[str, list[bool]] = defaultdict(list)
    asked = sorted(conversations, key=_answer_length)  # a batch takes as long as its longest answer
    with torch.no_grad():
        for i in range(0, len(asked), batch_size):
            some = asked[i : i + batch_size]
            batch = batch_of(processor, some, False).to(model.device)
            room = 5 + _answer_length(some[-1]) // 2  # digits are tokens, and so are words
            ids = model.generate(**batch, max_new_tokens=room, do_sample=False, eos_token_id=end, pad_token_id=end)
            given = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for conversation, answer in zip(some, given, strict=True):
                right[conversation.where].append(answer.strip() == conversation.messages[-1]["content"][0]["text"])
    right["all"] = list(itertools.chain.from_iterable(right.values()))
    return {kind: sum(answers) / len(answers) for kind, answers in sorted(right.items())}


def _answer_length(conversation: Conversation) -> int:
    return len(conversation.messages[-1]["content"][0]["text"])


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help="Train a tiny vision-language model.")
@click.option(
    "--output_dir",
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="A directory that is new or empty.",
)
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Of answering.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train for so long instead of --steps.")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Seed of the weights.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Decoder layers.")
@click.option("--width", type=click.IntRange(64), default=192, show_default=True, help="Of the decoder; 64 divides it.")
@click.option("--vision_width", "--vision-width", type=click.IntRange(64), default=128, show_default=True)
@click.option("--batch_size", "--batch-size", type=click.IntRange(4), default=64, show_default=True)
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=5e-3, show_default=True)
@click.option("--questions", "asked", type=click.IntRange(1), default=1000, show_default=True, help="Asked at the end.")
def main(output_dir: Path, asked: int, **options: Any) -> None:
    if output_dir.exists() and any(output_dir.iterdir()):
        raise click.UsageError(f"--output_dir `{output_dir}` is not empty; name a new directory")
    for name in ("width", "vision_width"):
        if options[name] % 64:
            raise click.UsageError(f"--{name} must be a multiple of 64, got {options[name]}")
    output_dir.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor = new_processor()
    model = new_model(processor, options["width"], options["layers"], options["vision_width"], options["seed"])
    click.echo(f"{model.num_parameters():,} parameters on {torch.get_num_threads()} threads")
    start = time.monotonic()
    train(model, processor, options)
    seconds = time.monotonic() - start
    model.to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    model.float().eval()  # measured with the weights that were saved; few processors compute fast in bfloat16
    accuracy = answer_accuracy(model, processor, itertools.islice(questions(), asked))
    report = {**options, "seconds": round(seconds), "accuracy": accuracy}
    (output_dir / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for kind, part in accuracy.items():
        click.echo(f"{kind:>10} {part:.1%}")
    click.echo(f"saved to {output_dir}")


if __name__ == "__main__":
    main()
