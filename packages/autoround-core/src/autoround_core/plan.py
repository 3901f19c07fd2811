"""What will happen to each layer, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autoround_core.adapter import LinearSite, ModelView
from autoround_core.backend import Backend, answers
from autoround_core.errors import UnsupportedError
from autoround_core.family import NumberFamily
from autoround_core.format import CheckpointFormat, ModelOutline, SchemeChoice
from autoround_core.fusing import CHECK, PROMOTE, disagreement, fused_layers, promote
from autoround_core.recipe import LinearSpec, QuantRecipe
from autoround_core.settings import TuningSettings
from autoround_core.target import ANY_ENGINE, Target

# effective multiply-add rates of a tuning run, floating-point operations per second; rough on purpose
_CPU_RATE_PER_THREAD = 60e9
_GPU_RATE = 150e12


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer. reason: why it stays in 16 bits, empty if it is quantized. backend: what would run it here."""

    spec: LinearSpec
    reason: str
    stored_bytes: int
    backend: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer for a whole model. seconds, memory_bytes: rough. needs_data: whether there is something to
    calibrate. notes: what the target needs besides. outer: layers outside the blocks that a format has quantized, for
    those formats alone that store such. recipe: whose schemes these are. model: what formats were told of the model."""

    layers: tuple[LayerPlan, ...]
    kept: Mapping[str, str]
    stored_bytes: int
    original_bytes: int
    linear_bits_per_weight: float
    seconds: float
    memory_bytes: int
    needs_data: bool = True
    notes: tuple[str, ...] = ()
    outer: frozenset[str] = frozenset()
    recipe: QuantRecipe | None = None
    model: ModelOutline | None = None

    def quantized(self) -> dict[str, LinearSpec]:
        return {layer.spec.name: layer.spec for layer in self.layers if layer.spec.scheme is not None}

    def specs(self) -> list[LinearSpec]:
        return [layer.spec for layer in self.layers]


def make_plan(
    view: ModelView, recipe: QuantRecipe, settings: TuningSettings, *,
    formats: Sequence[CheckpointFormat], families: Mapping[str, NumberFamily], backends: Sequence[Backend],
    device: torch.device, dtype: torch.dtype, quant_lm_head: bool, strict: bool, needs_data: bool,
    quant_nontext: bool = False,
    model_type: str | None = None, fuse: str = CHECK, target: Target = ANY_ENGINE,
    other_formats: Sequence[CheckpointFormat] = (), choices: Mapping[str, SchemeChoice] | None = None,
) -> Plan:
    """Ask formats, number families, backends and the target about every layer.

    fuse: what to do about layers that engines run as one and whose schemes differ: "check" refuses them, "promote"
    gives all the widest, "off" lets them be. other_formats: those to recommend where the target refuses. choices: of a
    format that chooses schemes by itself; what the recipe overrides stays overridden. quant_nontext: also what is
    outside the language tower.

    Raises UnsupportedError when a format or family cannot take a layer, unless `strict` is false: then the layer
    stays in 16 bits with the reason; when lm_head is asked for but shares its weight with the embedding; and when
    the target cannot run what would be written.
    """
    if quant_nontext and not view.nontext:
        raise UnsupportedError("this model has no vision or audio tower; leave out --quant_nontext_module")
    sites = [*(view.nontext_sites() if quant_nontext else ()), *view.sites()]
    if quant_lm_head:
        if view.tied_head:
            raise UnsupportedError("lm_head shares its weight with the embedding, which engines look up in 16 bits; "
                                   "leave out --quant_lm_head for this model")
        if view.head is None:
            raise UnsupportedError("this model has no linear lm_head; leave out --quant_lm_head")
        sites.append(view.head)
    choices = choices or {}
    asked = {site.name for site in sites}
    sites += [site for site in view.outer() if site.name in choices and site.name not in asked]
    outer = frozenset(site.name for site in sites if site.name not in asked)
    schemes = recipe.resolve([site.name for site in sites], {name: choice.scheme for name, choice in choices.items()})
    # an engine is known to fuse, or the format is one of those that such engines read
    fusing = fuse == PROMOTE or (fuse == CHECK and target.fuses and any(fmt.fused for fmt in formats))
    groups = fused_layers(schemes, model_type) if fusing else {}
    if fuse == PROMOTE:
        schemes = promote(schemes, groups)
    layers = []
    for site in sites:
        spec = _spec(view, site, schemes[site.name])
        chosen = choices.get(site.name)
        reason = "" if spec.scheme else chosen.reason if chosen and not chosen.scheme else "by layer_config"
        if spec.scheme:
            stored_by = [fmt for fmt in formats if fmt.stores_outer] if site.name in outer else formats
            reason = _refusal(spec, stored_by, families)
            if spec.scheme.activation and site is view.head:
                reason = "the inputs of lm_head stay in 16 bits in every engine"
            if reason and strict:
                raise UnsupportedError(
                    f"layer `{spec.name}` ({spec.out_features}x{spec.in_features}) cannot be {spec.scheme}: {reason}; "
                    "give it another scheme in --layer_config, or pass --no_strict to keep such layers in 16 bits"
                )
        spec = spec if not reason else _spec(view, site, None)
        layers.append(LayerPlan(spec, reason, _stored_bytes(spec, dtype), _backend(spec, backends, device)))
    layers = _fused(layers, groups, dtype, fuse)
    specs = [layer.spec for layer in layers]
    quantized = [spec for spec in specs if spec.scheme is not None]
    for fmt in formats:
        if reason := fmt.why_not_together([s for s in quantized if fmt.stores_outer or s.name not in outer]):
            raise UnsupportedError(f"format {fmt.name}: {reason}; change --layer_config or choose another format")
    activations = [spec.scheme.activation for spec in quantized if spec.scheme.activation]
    needs_data = (needs_data and len(quantized) > 0) or any(activation.calibrated for activation in activations)
    notes = _target_notes(target, specs, formats, other_formats)
    outer &= {spec.name for spec in quantized}
    totals = _totals(view, layers, settings, device, dtype, needs_data)
    return replace(totals, kept=view.all_kept(nontext=quant_nontext), notes=notes, outer=outer, recipe=recipe)


def _fused(
    layers: list[LayerPlan], groups: Mapping[str, Sequence[str]], dtype: torch.dtype, fuse: str
) -> list[LayerPlan]:
    """The layers, once the parts of every fused layer agree. A part that a format refused keeps all in 16 bits."""
    by_name = {layer.spec.name: layer for layer in layers}
    for fused, members in groups.items():
        reason = disagreement(fused, {member: by_name[member].spec.scheme for member in members})
        if reason is None:
            continue
        if fuse != PROMOTE:
            raise UnsupportedError(reason)
        for member in members:
            spec = replace(by_name[member].spec, scheme=None)
            why = by_name[member].reason or f"part of `{fused}`, of which another part stays in 16 bits"
            by_name[member] = LayerPlan(spec, why, _stored_bytes(spec, dtype), "torch")
    return list(by_name.values())


def _target_notes(
    target: Target, specs: Sequence[LinearSpec], formats: Sequence[CheckpointFormat],
    other_formats: Sequence[CheckpointFormat],
) -> tuple[str, ...]:
    """What the target needs besides; raises UnsupportedError when it cannot run a format of these layers."""
    if target == ANY_ENGINE:
        return ()
    notes = []
    for fmt in formats:
        verdict = fmt.verdict(target, specs)
        if verdict.refusal:
            fitting = [other.name for other in other_formats if _runs(other, target, specs)]
            hint = f"--format {' or '.join(fitting)} would work" if fitting else "no installed format would work"
            raise UnsupportedError(f"{target} cannot run format {fmt.name}: {verdict.refusal}; {hint}")
        notes += verdict.notes
    return tuple(notes)


def _runs(fmt: CheckpointFormat, target: Target, specs: Sequence[LinearSpec]) -> bool:
    quantized = [spec for spec in specs if spec.scheme is not None]
    storable = all(fmt.why_not(spec) is None for spec in quantized) and fmt.why_not_together(quantized) is None
    return storable and fmt.stores_records and fmt.verdict(target, specs).refusal is None


def _spec(view: ModelView, site: LinearSite, scheme) -> LinearSpec:
    return LinearSpec(site.name, site.in_features, site.out_features, scheme, view.bias(site) is not None)


def _refusal(spec: LinearSpec, formats, families: Mapping[str, NumberFamily]) -> str:
    assert spec.scheme is not None
    family = families.get(spec.scheme.data_type)
    if family is None:
        return f"no number family `{spec.scheme.data_type}` is installed (known: {', '.join(sorted(families))})"
    reason = family.why_not_layer(spec)
    if reason:
        return reason
    refusals = [(fmt.name, fmt.why_not(spec)) for fmt in formats]
    return "; ".join(f"format {name}: {reason}" for name, reason in refusals if reason)


def _stored_bytes(spec: LinearSpec, dtype: torch.dtype) -> int:
    if spec.scheme is None:
        return spec.out_features * spec.in_features * dtype.itemsize
    return -(-spec.scheme.stored_bits(spec.out_features, spec.in_features) // 8)


def _backend(spec: LinearSpec, backends: Sequence[Backend], device: torch.device) -> str:
    if spec.scheme is None:
        return "torch"
    replies = answers(backends, spec, device, torch.bfloat16)
    return next((backend.name for backend, reason in replies if reason is None), "none")


def _totals(view, layers: list[LayerPlan], settings: TuningSettings, device, dtype, needs_data: bool) -> Plan:
    everything = sum(p.numel() for p in view.model.parameters())
    linear = sum(layer.spec.out_features * layer.spec.in_features for layer in layers)
    quantized = [layer for layer in layers if layer.spec.scheme is not None]
    weights = sum(layer.spec.out_features * layer.spec.in_features for layer in quantized)
    linear_bytes = sum(layer.stored_bytes for layer in layers)
    tokens = settings.batch_size * settings.gradient_accumulate_steps * settings.seqlen
    calibration = settings.nsamples * settings.seqlen if needs_data else 0
    # forward and backward of each step, two forwards of the whole calibration set, one search over the weights
    operations = 6.0 * linear * tokens * settings.iters + 4.0 * linear * calibration + 200.0 * linear
    rate = _CPU_RATE_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _GPU_RATE
    width = max((layer.spec.in_features for layer in layers), default=0)
    block = max((sum(s.out_features * s.in_features for s in b.sites) for b in view.blocks), default=0)
    states = calibration * min((layer.spec.in_features for layer in layers), default=0) * 4
    memory = everything * dtype.itemsize + 3 * states + block * (26 if settings.iters else 12) + tokens * width * 64
    return Plan(
        layers=tuple(layers), kept={},
        stored_bytes=(everything - linear) * dtype.itemsize + linear_bytes,
        original_bytes=everything * dtype.itemsize,
        linear_bits_per_weight=8 * sum(layer.stored_bytes for layer in quantized) / max(1, weights),
        needs_data=needs_data, seconds=operations / rate, memory_bytes=int(memory),
    )
