"""From a checkpoint directory to a model that runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoround_core.adapter import ModelAdapter, ModelView
from autoround_core.backend import AUTO, Backend, answers, select_backend
from autoround_core.compute import find_device
from autoround_core.errors import CheckpointError, UsageError
from autoround_core.format import CheckpointFormat, CheckpointReader
from autoround_core.recipe import LinearSpec
from autoround_core.records import QuantizedLayer
from autoround_core.registry import get_registry
from autoround_core.shards import read_json


def find_format(path: Path) -> CheckpointFormat:
    """The format of a checkpoint, a directory or a file. Raises CheckpointError when no format recognizes it."""
    if not path.exists():
        raise CheckpointError(f"`{path}` does not exist")
    formats = get_registry().formats()
    for found in formats.values():
        if found.recognizes(path):
            return found
    if path.is_file():
        raise CheckpointError(f"no format recognizes the file `{path}`; give the directory of a checkpoint")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"`{path}` has no config.json, so it is no checkpoint")
    method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method", "none")
    raise CheckpointError(f"no format recognizes `{path}` (quant_method {method}); known: {', '.join(sorted(formats))}")


def spec_of(layer: QuantizedLayer) -> LinearSpec:
    """The question to a backend about a layer."""
    out_features, in_features = layer.weight.shape
    return LinearSpec(layer.name, in_features, out_features, layer.weight.scheme, layer.bias is not None)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """Load a checkpoint of any registered format as a Transformers model with generate().

    backend: a backend's name, or "auto" for the fastest that takes each layer. dtype: of activations and of what
    is not quantized; None = as stored. Experts that Transformers keeps in one tensor are dequantized, as are
    embeddings.
    """
    path, device = Path(path), find_device(device)
    found = find_format(path)
    adapter, model = skeleton_of(found, path, dtype=dtype, trust_remote_code=trust_remote_code)
    return assemble(model, adapter, found.read(path), device=device, backend=backend)


def skeleton_of(
    found: CheckpointFormat, path: Path, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[ModelAdapter, Any]:
    """The adapter of a checkpoint of format `found`, and its model without weights. dtype: None = as stored."""
    with found.home(path) as home:
        adapter: ModelAdapter = get_registry().adapter(read_json(home / "config.json"))
        return adapter, adapter.skeleton(home, trust_remote_code=trust_remote_code, dtype=dtype or found.dtype)


def assemble(
    model: torch.nn.Module,
    adapter: ModelAdapter,
    reader: CheckpointReader,
    *,
    device: torch.device,
    backend: str,
) -> torch.nn.Module:
    """Fill a skeleton: a backend's module for each quantized layer, tensors for the rest."""
    rest = dict(reader.rest())
    adapter.follow(model, _stored_names(reader, rest))
    view = adapter.view(model)
    backends = list(get_registry().backends().values())
    sites = {site.name: site for site in view.all_sites()}
    dtype, unserved = model.dtype, dequantized_names(view)
    dense, built = {}, []
    for layer in reader.layers():
        site = sites.get(layer.name)
        if site is None:
            raise CheckpointError(f"the checkpoint holds a quantized layer `{layer.name}` that the model does not have")
        if (site.out_features, site.in_features) != layer.weight.shape:
            raise CheckpointError(
                f"layer `{layer.name}` is {layer.weight.shape} in the checkpoint, "
                f"{(site.out_features, site.in_features)} in the model"
            )
        if layer.name in unserved:
            dense[f"{layer.name}.weight"] = layer.weight.dequantize(dtype)
            continue
        chosen = select_backend(backends, spec_of(layer), device, dtype, backend)
        built.append((site, chosen.build(layer, device, dtype)))
    if (dense or built) and (strange := adapter.unexpected(view, rest)):
        raise CheckpointError(f"the checkpoint holds `{min(strange)}`, for which the model has no place")
    for site, module in built:
        model.set_submodule(site.module, module)
    missing = adapter.fill(view, dense | rest)
    if missing:
        raise CheckpointError(
            f"the checkpoint has no weights for {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    if backend == AUTO:
        speed_up_dense(model, {site.module for site in (*view.nontext_sites(), *view.sites())}, backends, device)
        adapter.serve(model, device)
    return model.to(device)


def _stored_names(reader: CheckpointReader, rest: Iterable[str]) -> Iterator[str]:
    """What a checkpoint calls its tensors, a packed layer by its weight; layers are asked for only if anybody wants to
    know."""
    yield from rest
    yield from (f"{name}.weight" for name in reader.layer_names())


def speed_up_dense(model: Any, paths: Iterable[str], backends: list[Backend], device: torch.device) -> None:
    """Give linear layers that are not quantized, those at `paths` and the head, to a backend that is faster at them."""
    head = model.get_output_embeddings()
    for path in {*paths, *(name for name, module in model.named_modules() if module is head)}:
        linear = model.get_submodule(path)
        if not isinstance(linear, torch.nn.Linear):
            continue
        spec = LinearSpec(path, linear.in_features, linear.out_features, None, linear.bias is not None)
        dtype = linear.weight.dtype
        found = next((found for found, reason in answers(backends, spec, device, dtype) if reason is None), None)
        if found is not None:
            model.set_submodule(path, found.build(linear, device, dtype))


def dequantized_names(view: ModelView) -> set[str]:
    """Layers that no backend is asked about, because no module fits into their places: experts that Transformers
    keeps in one tensor, and the embedding. Their weights are dequantized when they are loaded."""
    return {site.name for site in view.all_sites() if site.expert is not None or site is view.embedding}


def explain(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[LinearSpec, int, list[tuple[str, str | None]] | None]]:
    """For each kind of layer: an example, how many there are, and every backend's answer, best first.

    None instead of answers for layers that are dequantized when they are loaded. dtype: as in `load`.
    """
    path, device = Path(path), find_device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype must be a float type, got {dtype}")
    found = find_format(path)
    adapter, model = skeleton_of(found, path, dtype=dtype, trust_remote_code=trust_remote_code)
    unserved = dequantized_names(adapter.view(model))
    kinds: dict[tuple, tuple[LinearSpec, int]] = {}
    for layer in found.read(path).layers():
        spec = spec_of(layer)
        key = (spec.in_features, spec.out_features, spec.scheme, spec.name in unserved)
        kinds[key] = (kinds[key][0] if key in kinds else spec, kinds.get(key, (spec, 0))[1] + 1)
    backends = [backend for backend in get_registry().backends().values() if not backend.support.dense]
    for (*_, dequantized), (spec, count) in kinds.items():
        replies = answers(backends, spec, device, model.dtype)
        yield spec, count, None if dequantized else [(backend.name, reason) for backend, reason in replies]


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint in numbers. schemes: scheme -> (layers, bytes of codes, scales and zero points)."""

    format: str
    model_type: str
    schemes: dict[str, tuple[int, int]]
    rest_tensors: int
    rest_bytes: int
    total_bytes: int
    bits_per_weight: float
    report_lines: tuple[str, ...]


def describe(path: str | Path) -> Description:
    """Read a checkpoint's layers one by one and count."""
    path = Path(path)
    found = find_format(path)
    reader = found.read(path)
    schemes: dict[str, tuple[int, int]] = {}
    weights = bits = 0
    for layer in reader.layers():
        scheme, stored = layer.weight.scheme, layer.weight.scheme.stored_bits(*layer.weight.shape)
        count, size = schemes.get(str(scheme), (0, 0))
        schemes[str(scheme)] = (count + 1, size + -(-stored // 8))
        weights, bits = weights + math.prod(layer.weight.shape), bits + stored
    rest = [tensor.numel() * tensor.element_size() for _, tensor in reader.rest()]
    return Description(
        format=found.name,
        model_type=str(reader.config.get("model_type")),
        schemes=schemes,
        rest_tensors=len(rest),
        rest_bytes=sum(rest),
        # whatever a format calls its files
        total_bytes=sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()),
        bits_per_weight=bits / max(1, weights),
        report_lines=_report_lines(path),
    )


def _report_lines(path: Path) -> tuple[str, ...]:
    if not (path / "report.json").is_file():
        return ()
    report = read_json(path / "report.json")
    settings, calibration = report.get("settings", {}), report.get("calibration")
    how = f"{settings.get('algorithm')}, {settings.get('iters')} steps, seed {report.get('seed')}"
    lines = [f"made from {report.get('model')} by {how}"]
    if calibration:
        lines.append(
            f"calibrated on {calibration['samples']} samples, {calibration['tokens']} tokens of {calibration['source']}"
        )
    return tuple(lines)
