"""The driver: block after block through an algorithm, along two chains of hidden states.

The target of a block is what the original block makes of the original chain's states; its input while tuning
is what the blocks quantized so far made of theirs, so that later blocks repair what earlier ones broke.

What feeds the language tower (the embedding, a vision tower, a projector) comes before it where it is quantized at all,
so that the language tower is tuned on what it will be given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from autoround_core.activations import QuantizedInputs, families_of, shared_greatest
from autoround_core.adapter import BlockView, LinearSite, ModelView
from autoround_core.algorithm import Algorithm, BlockResult, Run
from autoround_core.calibration_set import CalibrationSet
from autoround_core.capture import PLAIN_CALL, BlockCall, Chain, capture, head_inputs
from autoround_core.compute import Compute
from autoround_core.errors import NonFiniteError, in_layer
from autoround_core.family import NumberFamily
from autoround_core.flow import UnreachedError
from autoround_core.model_block import ModelBlock
from autoround_core.plan import Plan
from autoround_core.progress import Progress
from autoround_core.records import QuantizedLayer, QuantizedWeight
from autoround_core.rtn import importance_of
from autoround_core.settings import TuningSettings


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """A finished layer. relative_error: Frobenius norm of the weight's error over that of the weight."""

    layer: QuantizedLayer
    relative_error: float


@dataclass(frozen=True, slots=True)
class BlockOutcome:
    """A finished block. before: output error of round-to-nearest (of searched scales, where a family begins with
    them), after: of what was kept; None without data."""

    name: str
    layers: tuple[LayerOutcome, ...]
    before: float | None
    after: float | None
    steps: int
    best_step: int
    seconds: float
    notes: tuple[str, ...]


def check_finite(model: torch.nn.Module) -> None:
    """Raises NonFiniteError naming the first tensor with NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            position = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
            raise NonFiniteError(
                f"tensor `{name}` holds {float(tensor[position])} at {list(position)}; repair the model first"
            )


class BlockDriver:
    """Quantizes a model's blocks in order, and then lm_head if the plan asks for it.

    The model is changed: every finished layer holds its dequantized weight, so that the model ends as the
    fake-quantized twin of the checkpoint.
    """

    def __init__(
        self, view: ModelView, plan: Plan, algorithm: Algorithm, families: Mapping[str, NumberFamily],
        settings: TuningSettings, compute: Compute, progress: Progress, inputs: QuantizedInputs | None = None,
    ) -> None:
        """inputs: collects the layers whose inputs are quantized."""
        self._view, self._algorithm, self._families = view, algorithm, families
        self._settings, self._compute, self._progress = settings, compute, progress
        self._sites = {site.name: site for site in view.all_sites()}
        self._outer = {name: site for name, site in self._sites.items() if name in plan.outer}
        self._schemes = {name: spec.scheme for name, spec in plan.quantized().items() if spec.scheme}
        self._model_type = view.model.config.model_type
        self._inputs = inputs or QuantizedInputs()
        self._done = self._total = 0

    def run(self, data: CalibrationSet | None) -> Iterator[BlockOutcome]:
        """Yield each block as it is finished. data: None if the algorithm needs none."""
        view = self._view
        with_head = view.head is not None and view.head.name in self._schemes and view.head.name not in self._outer
        nontext = [chain for chain in view.nontext if any(self._chosen(block) for block in chain)]
        self._total = len(view.blocks) + with_head + sum(map(len, nontext))
        original = self._capture(view, data)
        if view.embedding is not None and view.embedding.name in self._outer:
            yield self._round_outer(view.embedding, None, calibrated=data is not None)
        for chain in nontext:
            yield from self._run_nontext(replace(view, blocks=chain), data)
        # what the embedding and the towers make now is what the language tower will be given
        changed = nontext or (view.embedding is not None and view.embedding.name in self._outer)
        quantized = self._capture(view, data) if changed else original
        chains = (original, quantized)
        calls = [PLAIN_CALL] * len(view.blocks) if quantized is None else quantized.calls
        for index, (block, call) in enumerate(zip(view.blocks, calls, strict=True)):
            chains = yield from self._step(block, call, chains, index)
        if with_head:
            head = BlockView(view.head.name, view.model.get_submodule(view.head.module), (view.head,))
            if data is not None:
                chains = tuple(replace(chain, hidden=head_inputs(view, data, chain.hidden)) for chain in chains)
            yield from self._step(head, PLAIN_CALL, chains, None)
        elif view.head is not None and view.head.name in self._outer:
            inputs = None if data is None else head_inputs(view, data, chains[1].hidden)
            yield self._round_outer(view.head, inputs, calibrated=data is not None)

    def _run_nontext(self, view: ModelView, data: CalibrationSet | None) -> Iterator[BlockOutcome]:
        """Quantize the blocks of `view` on what the model as it is now gives them; blocks that no sample runs through
        (those for sound, where there are images only) are rounded to nearest, which the report and a warning say.
        """
        try:
            chain = self._capture(view, data)
        except UnreachedError as error:
            self._progress.warn(f"{error}; its layers are rounded to nearest")
            chain = None
        chains = (chain, chain)
        calls = [PLAIN_CALL] * len(view.blocks) if chain is None else chain.calls
        for index, (block, call) in enumerate(zip(view.blocks, calls, strict=True)):
            # a projector alone: what it returns is no input of its like
            chains = yield from self._step(block, call, chains, index if len(view.blocks) > 1 else None)

    def _step(self, block: BlockView, call: BlockCall, chains, index: int | None):
        """Quantize one block, yield its outcome, and return the chains behind it.

        index: in its chain; None for what stands alone and whose outputs nothing else is tuned on.
        """
        self._progress.block(self._done, self._total, block.name)
        outcome, chains = self._quantize(index, block, call, chains)
        yield outcome
        self._progress.block_done(self._done, self._total, block.name, outcome.before, outcome.after)
        self._done += 1
        return chains

    def _chosen(self, block: BlockView) -> bool:
        return any(site.name in self._schemes for site in block.sites)

    def _round_outer(self, site: LinearSite, inputs: torch.Tensor | None, *, calibrated: bool) -> BlockOutcome:
        """A matrix outside the blocks, its scales searched: tuning the logits by themselves would gain nothing.

        inputs: what enters it [samples, seqlen, in], None for an embedding or if unknown.
        """
        start = time.perf_counter()
        parameter = self._view.parameter(site).detach()
        weight, scheme = site.read(parameter).to(self._compute.device), self._schemes[site.name]
        family = self._families[scheme.data_type]
        importance = torch.ones(site.in_features) if inputs is None else importance_of(_mean_square(inputs))
        with in_layer(site.name):
            record = (family.search(weight, scheme, importance.to(weight.device)) if calibrated
                      else family.round_to_nearest(weight, scheme))
        layer = self._layer(site.name, weight, record, None)
        site.read(parameter).copy_(record.dequantize(torch.float32))
        return BlockOutcome(site.name, (layer,), None, None, 0, 0, time.perf_counter() - start, ())

    def _capture(self, view: ModelView, data: CalibrationSet | None) -> Chain | None:
        return None if data is None else capture(view, data).to(self._compute.storage)

    def _quantize(self, index: int | None, view: BlockView, call: BlockCall, chains):
        """(outcome of one block, the chains behind it). index: as in `_step`."""
        start, alone = time.perf_counter(), index is None
        home = next(view.module.parameters()).device
        view.module.to(self._compute.device)
        schemes = {site.name: self._schemes[site.name] for site in view.sites if site.name in self._schemes}
        weights = {site.name: site.read(self._view.parameter(site).detach()) for site in view.sites
                   if site.name in schemes}
        families = families_of(schemes, weights, self._families, self._model_type)
        # logits are wide: no targets are kept of lm_head, and one sample runs at a time
        compute = self._compute.one_by_one() if alone else self._compute
        original, quantized = chains
        block = ModelBlock(view.name, view.module, view.sites, call, schemes=schemes, families=families,
                           compute=compute, mask=None if quantized is None else quantized.mask)
        if quantized is not None:
            if original is quantized:  # the chains part here
                original = original.copy()
            block.set_chains(original.hidden, quantized.hidden, targets_given=not alone)
            if not alone:
                block.advance(original.hidden)
        input_scales = self._quantize_inputs(block, view)
        result, before, after = self._tune(block)
        layers = tuple(
            self._layer(name, block.weights[name], weight, input_scales.get(name))
            for name, weight in result.weights.items()
        )
        block.write_back({layer.layer.name: layer.layer.weight.dequantize(torch.float32) for layer in layers})
        if quantized is not None and not alone:
            block.advance(quantized.hidden)
            for chain in (original, quantized):
                chain.enter(index + 1)
        view.module.to(home)
        outcome = BlockOutcome(view.name, layers, before, after, result.steps, result.best_step,
                               time.perf_counter() - start, result.notes)
        return outcome, (original, quantized)

    def _quantize_inputs(self, block: ModelBlock, view: BlockView) -> dict[str, torch.Tensor]:
        """From now on inputs pass through the activation schemes; the original chain is behind this block already.

        Returns the `input_scale` of each layer that has one.
        """
        activations = {name: scheme.activation for name, scheme in block.schemes.items() if scheme.activation}
        scales: dict[str, torch.Tensor] = {}
        if any(activation.calibrated for activation in activations.values()):
            greatest = shared_greatest(block.input_greatest(), block.schemes, self._model_type)
            scales = {name: block.families[name].input_scale(activation, greatest[name])
                      for name, activation in activations.items() if activation.calibrated}
        for site in view.sites:
            if site.name in activations and site.expert is None:
                self._inputs.add(self._view.model.get_submodule(site.module), block.families[site.name],
                                activations[site.name], scales.get(site.name))
        return scales

    def _tune(self, block: ModelBlock):
        """(result, error of round-to-nearest, error of the result), errors on the validation slice."""
        if not block.schemes:
            return BlockResult({}), None, None
        searched = {name for name in block.weights if block.families[name].starts_from_search}
        rounded = {name: self._round_to_nearest(block, name) for name in block.weights if name not in searched}
        if self._algorithm.needs_data and not block.samples:
            rounded = {name: self._round_to_nearest(block, name) for name in block.weights}
            note = f"{block.name}: no calibration sample runs through it; rounded to nearest"
            return BlockResult(rounded, notes=(note,)), None, None
        run = Run(self._settings, seed=self._settings.seed * 1_000_003 + self._done, progress=self._progress.step)
        result = self._algorithm.quantize_block(block, run)
        if not block.samples:
            return result, None, None
        # what begins with searched scales has nothing before them to go back to
        start = {name: rounded.get(name, record) for name, record in result.weights.items()}
        after = self._error(block, result.weights)
        before = self._error(block, start) if rounded else result.start_error or after
        if after <= before:
            return result, before, after
        note = f"{block.name}: tuning did not help (error {after:.3g}, was {before:.3g}); rounded to nearest"
        self._progress.warn(note)
        return replace(result, weights=start, best_step=0, notes=(*result.notes, note)), before, before

    def _round_to_nearest(self, block: ModelBlock, name: str) -> QuantizedWeight:
        """Where every algorithm begins; what cannot even be rounded is refused by name before any tuning."""
        with in_layer(name):
            return block.families[name].round_to_nearest(block.weights[name], block.schemes[name])

    @staticmethod
    def _error(block: ModelBlock, weights: Mapping[str, QuantizedWeight]) -> float:
        dense = {name: weight.dequantize(block.weights[name].dtype) for name, weight in weights.items()}
        return block.error(dense, block.validation)

    def _layer(
        self, name: str, original: torch.Tensor, weight: QuantizedWeight, input_scale: torch.Tensor | None
    ) -> LayerOutcome:
        original = original.float()
        error = torch.linalg.norm(weight.dequantize(torch.float32) - original)
        norm = torch.linalg.norm(original)
        bias = self._view.bias(self._sites[name])
        cpu = torch.device("cpu")
        layer = QuantizedLayer(name, weight.to(cpu), None if bias is None else bias.detach(),
                               None if input_scale is None else input_scale.to(cpu))
        return LayerOutcome(layer, float(error / norm) if norm > 0 else 0.0)


def _mean_square(inputs: torch.Tensor) -> torch.Tensor:
    """Of each channel, float32 [in]; sample by sample, for all of them in float32 would be large."""
    return sum(sample.float().square().mean(0) for sample in inputs) / len(inputs)
