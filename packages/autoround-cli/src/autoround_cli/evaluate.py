"""`autoround eval`: how far a checkpoint is from its original."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from autoround_cli.display import table
from autoround_cli.options import parse_dtype


@click.command("eval")
@click.argument("checkpoint", type=click.Path())
@click.option("--reference", help="The original model: directory or hub id. Without it: perplexity only.")
@click.option("--text", help="A text file to score on.  [default: held-out part of the offline corpus `stdlib`]")
@click.option("--seqlen", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(min=1), default=48, show_default=True, help="Windows to score at most.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="A backend of `autoround backends`.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32, for both models.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along. Read it first.")
def evaluate(checkpoint, reference, text, seqlen, windows, device, backend, dtype, as_json, trust_remote_code) -> None:
    """Perplexity, KL divergence and top-1 agreement of a checkpoint, each with its standard error."""
    from autoround_core.evaluation import evaluate as score
    from autoround_core.evaluation import evaluation_texts, load_for_evaluation, windows_of

    options = dict(device=device, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
    texts = evaluation_texts(Path(text) if text else None)
    model, tokenizer = load_for_evaluation(checkpoint, backend=backend, **options)
    original = load_for_evaluation(reference, **options)[0] if reference else None
    result = score(model, windows_of(texts, tokenizer, seqlen=seqlen, windows=windows), original)
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    labels = {
        "perplexity": "perplexity",
        "reference_perplexity": "perplexity of the original",
        "kl": "KL divergence, mean (nats)",
        "kl_p99": "KL divergence, 99th percentile",
        "top1": "top-1 agreement",
    }
    rows = [[label, str(getattr(result, name))] for name, label in labels.items() if getattr(result, name) is not None]
    table(f"{checkpoint}: {result.tokens} tokens", ["figure", "value ± standard error"], rows)
