"""How far a quantized model is from the original: perplexity, KL divergence, top-1 agreement.

Every figure comes with its standard error over windows of text, which are close to independent; tokens are
not. A NaN anywhere is an error, never a good score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from autoround_core.backend import AUTO
from autoround_core.corpus import stdlib_documents
from autoround_core.errors import CalibrationError, ModelError, NonFiniteError
from autoround_core.loading import find_format, load
from autoround_core.registry import get_registry
from autoround_core.shards import read_json
from autoround_core.source import find_model


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.5g} ± {self.error:.2g}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model; those against a reference are None without one.

    perplexity, reference_perplexity: exp of the mean negative log-likelihood per token. kl: mean of
    KL(reference || model) over tokens, in nats, over the full vocabulary. kl_p99: its 99th percentile.
    top1: share of tokens for which both models rank the same token first.
    """

    tokens: int
    windows: int
    perplexity: Estimate
    reference_perplexity: Estimate | None = None
    kl: Estimate | None = None
    kl_p99: Estimate | None = None
    top1: Estimate | None = None


def load_for_evaluation(model: str | Path, *, device="cpu", backend: str = AUTO, dtype=None, trust_remote_code=False):
    """(model, tokenizer) of a checkpoint or an ordinary model, by directory, file or hub id."""
    path = Path(model) if Path(model).is_file() else find_model(model)
    loaded = load(path, device=device, backend=backend, dtype=dtype, trust_remote_code=trust_remote_code)
    with find_format(path).home(path) as home:
        adapter = get_registry().adapter(read_json(home / "config.json"))
        tokenizer = adapter.tokenizer(home, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(
            f"`{path}` has no tokenizer, which reading and writing text needs; copy tokenizer.json and "
            "tokenizer_config.json from the original model"
        )
    return loaded, tokenizer


def evaluation_texts(path: Path | None) -> Iterator[str]:
    """Documents of a text file (separated by lines with a NUL), or the held-out part of the offline corpus."""
    if path is None:
        yield from stdlib_documents("evaluation")
        return
    if not path.is_file():
        raise CalibrationError(f"text file `{path}` does not exist")
    try:
        yield from path.read_text(encoding="utf-8").split("\n\x00\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file `{path}` is not UTF-8: {error.reason} at byte {error.start}") from None


def windows_of(texts: Iterable[str], tokenizer, *, seqlen: int, windows: int) -> torch.Tensor:
    """Up to `windows` rows [windows, seqlen] of token ids from texts, joined by the end-of-text token.

    Raises CalibrationError when the text does not fill one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= seqlen * windows:
            break
    count = min(windows, len(ids) // seqlen)
    if count == 0:
        raise CalibrationError(
            f"the text gives {len(ids)} tokens, one window needs {seqlen}; give more text or a smaller --seqlen"
        )
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: torch.Tensor, reference: torch.nn.Module | None = None) -> Evaluation:
    """Score a model on rows [windows, seqlen] of token ids, each window on its own.

    Raises NonFiniteError when a logit is NaN or infinite.
    """
    nll, reference_nll, kl, p99, top1, every_kl = [], [], [], [], [], []
    for row in rows:
        scores = _log_probabilities(model, row, "the model")
        nll.append(_nll(scores, row))
        if reference is None:
            continue
        truth = _log_probabilities(reference, row, "the reference")
        reference_nll.append(_nll(truth, row))
        divergence = (truth.exp() * (truth - scores)).sum(-1)
        every_kl.append(divergence)
        kl.append(float(divergence.mean()))
        p99.append(float(divergence.quantile(0.99)))
        top1.append(float((scores.argmax(-1) == truth.argmax(-1)).float().mean()))
    counts = dict(tokens=rows.shape[0] * (rows.shape[1] - 1), windows=len(rows), perplexity=_perplexity(nll))
    if reference is None:
        return Evaluation(**counts)
    return Evaluation(
        **counts,
        reference_perplexity=_perplexity(reference_nll),
        kl=_mean(kl),
        top1=_mean(top1),
        # the percentile of all tokens; its error from the percentiles of the windows
        kl_p99=Estimate(float(torch.cat(every_kl).quantile(0.99)), _mean(p99).error),
    )


def _log_probabilities(model: torch.nn.Module, row: torch.Tensor, which: str) -> torch.Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=row[None].to(device), use_cache=False).logits[0, :-1].float()
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"{which} computes NaN or infinite logits")
    return logits.log_softmax(-1).cpu()


def _nll(scores: torch.Tensor, row: torch.Tensor) -> float:
    return -float(scores.gather(1, row[1:, None]).mean())


def _mean(values: list[float]) -> Estimate:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def _perplexity(nll: list[float]) -> Estimate:
    mean = _mean(nll)
    return Estimate(math.exp(mean.value), math.exp(mean.value) * mean.error)
