"""Quantize the bundled tiny model to 4 and 2 bits, offline, and show what it costs in quality.

For each width: rounding to nearest beside SignRound, scored against the original on held-out text of the
offline corpus. Then one line of text from the tuned 4-bit model. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autoround_core import AutoRound, AutoRoundError, evaluate, load
from autoround_core.evaluation import evaluation_texts, load_for_evaluation, windows_of

MODEL = Path(__file__).parent / "tiny-qwen3"
PROMPT = "def read_file(path):"


def weight_megabytes(checkpoint: Path) -> float:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=100, help="tuning steps per block (default 100)")
    parser.add_argument("--output_dir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output_dir or Path(scratch)
        reference, tokenizer = load_for_evaluation(MODEL, dtype=torch.float32)
        rows = windows_of(evaluation_texts(None), tokenizer, seqlen=256, windows=48)
        table = Table(
            "weights", "method", "perplexity", "KL divergence", "top-1", "MB", title=f"{MODEL.name}, held-out text"
        )
        original = evaluate(reference, rows)
        table.add_row("16 bit", "original", str(original.perplexity), "", "", f"{weight_megabytes(MODEL):.2f}")
        for scheme in ("W4G128", "W2G64"):
            for method, settings in (("rtn", {"recipe": "rtn"}), ("signround", {"iters": options.iters})):
                console.print(f"quantizing to {scheme} with {method} ...")
                checkpoint = output / f"{scheme}-{method}"
                AutoRound(
                    MODEL, scheme=scheme, dataset="stdlib", nsamples=64, seqlen=256, **settings
                ).quantize_and_save(checkpoint)
                score = evaluate(load(checkpoint, dtype=torch.float32), rows, reference)
                table.add_row(
                    scheme,
                    method,
                    str(score.perplexity),
                    str(score.kl),
                    str(score.top1),
                    f"{weight_megabytes(checkpoint):.2f}",
                )
        console.print(table)
        model = load(output / "W4G128-signround", dtype=torch.bfloat16)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
        console.print(f"the 4-bit model goes on: [bold]{text!r}[/]", markup=True)


if __name__ == "__main__":
    try:
        main()
    except AutoRoundError as error:
        raise SystemExit(f"quickstart: {error}") from None
