"""What rounding costs a vision-language model, by the data that it was calibrated on.

    python examples/train_tiny_vlm.py --output_dir DIR
    python benchmarks/vlm_quality.py --model DIR

The model is asked questions about pictures that nobody has shown it: the part of its greedy answers that is right to
the letter, and the KL divergence of the answers' tokens from the original model, each with its standard error over
questions. Every row starts from the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_vlm_lessons import lessons, questions
from train_tiny_vlm import answer_accuracy, batch_of, labels_of

from autoround_mllm import AutoRoundMLLM, Conversation, load_processor
from autoround_mllm.image_text_lm import ImageTextLM


def without_image(conversation: Conversation) -> Conversation:
    texts = tuple({**message, "content": [part for part in message["content"] if part["type"] == "text"]}
                  for message in conversation.messages)
    return replace(conversation, messages=texts, images=())


def data_sets(nsamples: int) -> dict[str, object]:
    """By the name in the table: what the model was trained on, the same without its pictures, drawings, other text."""
    own = list(itertools.islice(lessons(), nsamples))
    return {
        "images and questions": own,
        "the same questions without images": [without_image(conversation) for conversation in own],
        "`synthetic`": "synthetic",
        "`stdlib` (text)": "stdlib",
    }


@torch.no_grad()
def answer_scores(model, processor, asked: list[Conversation]) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] for each question."""
    scores = []
    for start in range(0, len(asked), 50):
        batch = batch_of(processor, asked[start : start + 50], True)
        labels, logits = labels_of(processor, batch)[:, 1:] >= 0, model(**batch, use_cache=False).logits[:, :-1]
        scores += [row[label].float().log_softmax(-1) for row, label in zip(logits, labels, strict=True)]
    return scores


def compare(truth: list[torch.Tensor], scores: list[torch.Tensor]) -> tuple[float, float]:
    """(mean KL divergence of a question's answer, its standard error)."""
    kl = torch.stack([(one.exp() * (one - two)).sum(-1).mean() for one, two in zip(truth, scores, strict=True)])
    return float(kl.mean()), float(kl.std() / math.sqrt(len(kl)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=["W4G64", "W2G64"])
    for name, default in dict(iters=200, nsamples=128, batch_size=8, seqlen=256, seed=42, questions=1000).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    processor = load_processor(options.model, trust_remote_code=False)
    asked = list(itertools.islice(questions(), options.questions))

    def fresh():
        return ImageTextLM().load(options.model, trust_remote_code=False).float()

    original = fresh()
    truth, right = answer_scores(original, processor, asked), answer_accuracy(original, processor, asked)["all"]
    print("| scheme | calibrated on | right answers | KL of answers | seconds |\n" + "|---" * 5 + "|")
    print(f"| float32 | | {right:.1%} | | |", flush=True)
    settings = {name: getattr(options, name) for name in ("iters", "nsamples", "batch_size", "seqlen", "seed")}
    for scheme in options.schemes:
        runs = [("nothing: rounded to nearest", dict(recipe="rtn"))]
        runs += [(name, dict(dataset=data, **settings)) for name, data in data_sets(options.nsamples).items()]
        for name, chosen in runs:
            start = time.perf_counter()
            model = AutoRoundMLLM(fresh(), processor, scheme=scheme, **chosen).quantize()
            seconds = time.perf_counter() - start
            kl, error = compare(truth, answer_scores(model, processor, asked))
            right = answer_accuracy(model, processor, asked)["all"]
            margin = math.sqrt(right * (1 - right) / len(asked))
            print(f"| {scheme} | {name} | {right:.1%} ±{margin:.1%} | {kl:.4f} ±{error:.4f} | {seconds:.0f} |",
                  flush=True)


if __name__ == "__main__":
    main()
