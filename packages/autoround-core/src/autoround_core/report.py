"""report.json: what was asked, what was done to each layer, and what it cost."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from autoround_core.calibration_set import CalibrationSet
from autoround_core.plan import Plan
from autoround_core.quantize import BlockOutcome
from autoround_core.settings import TuningSettings

_PACKAGES = (
    "autoround-core",
    "autoround-export",
    "autoround-backends",
    "autoround-mllm",
    "autoround-cli",
    "torch",
    "transformers",
    "safetensors",
)


class Phases:
    """Seconds and peak memory of each phase of a run."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            row = self.rows.setdefault(name, {"seconds": 0.0, "peak_memory_mb": 0.0})
            row["seconds"] = round(row["seconds"] + time.perf_counter() - start, 3)
            row["peak_memory_mb"] = round(peak_memory_mb(), 1)
            if torch.cuda.is_available():
                row["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def calibration_row(calibration: CalibrationSet | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "source": calibration.source,
        "documents": calibration.documents,
        "samples": calibration.samples,
        "seqlen": calibration.seqlen,
        "tokens": calibration.tokens,
        "unused_tokens": calibration.unused_tokens,
        "images": calibration.images,
        "skipped": calibration.skipped,
        "sha256": calibration.sha256,
    }


def build_report(
    *,
    model: str,
    formats: Sequence[str],
    plan: Plan,
    settings: TuningSettings,
    device: torch.device,
    products: torch.dtype,
    outcomes: Sequence[BlockOutcome],
    calibration: CalibrationSet | None,
    phases: Phases,
    verification: dict[str, Any],
) -> dict[str, Any]:
    """The content of report.json. products: dtype of matrix products while tuning."""
    errors = {layer.layer.name: layer.relative_error for outcome in outcomes for layer in outcome.layers}
    layers = {}
    for row in plan.layers:
        spec = row.spec
        layers[spec.name] = {
            "scheme": str(spec.scheme) if spec.scheme else "16 bit",
            "shape": [spec.out_features, spec.in_features],
            "bytes": row.stored_bytes,
            "bits_per_weight": round(8 * row.stored_bytes / (spec.out_features * spec.in_features), 6),
            "relative_weight_error": errors.get(spec.name),
            **({"reason": row.reason} if row.reason else {}),
        }
    blocks = {
        outcome.name: {
            "loss_before": outcome.before,
            "loss_after": outcome.after,
            "steps": outcome.steps,
            "best_step": outcome.best_step,
            "seconds": round(outcome.seconds, 3),
            "notes": list(outcome.notes),
        }
        for outcome in outcomes
    }
    return {
        "model": model,
        "formats": list(formats),
        "settings": settings.asdict(),
        "seed": settings.seed,
        "device": str(device),
        "product_dtype": str(products).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "calibration": calibration_row(calibration),
        "bytes": plan.stored_bytes,
        "original_bytes": plan.original_bytes,
        "bits_per_weight": round(plan.linear_bits_per_weight, 4),
        "layers": layers,
        "kept_in_16_bits": dict(plan.kept),
        "blocks": blocks,
        "phases": phases.rows,
        "verification": verification,
    }
