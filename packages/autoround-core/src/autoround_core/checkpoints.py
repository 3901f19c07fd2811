"""The checkpoints of one run, one for each format: written layer by layer, then read back and compared.

Formats differ in what they store of the matrices outside the blocks. Where one quantizes the embedding and another
keeps it, the original is written before it is quantized, and each checkpoint is compared with the model that it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoround_core.activations import QuantizedInputs
from autoround_core.adapter import ModelAdapter, ModelView
from autoround_core.format import CheckpointContext, CheckpointFormat
from autoround_core.plan import Plan
from autoround_core.records import QuantizedLayer
from autoround_core.settings import TuningSettings
from autoround_core.verify import Expectation, check_forward, probe


class Checkpoints:
    """One checkpoint of each format, in `folders`. Begun before the first block is quantized."""

    def __init__(
        self, formats: Sequence[CheckpointFormat], work: Path, plan: Plan, view: ModelView, adapter: ModelAdapter, *,
        config: Mapping[str, Any], settings: TuningSettings,
    ) -> None:
        self._formats, self._plan, self._adapter = formats, plan, adapter
        self._view: ModelView | None = view
        self.folders = [work if len(formats) == 1 else work / fmt.name.replace(":", "-") for fmt in formats]
        self._transposed = {site.name for site in view.all_sites() if site.transposed}
        self._writers = []
        for fmt, folder in zip(formats, self.folders, strict=True):
            folder.mkdir(exist_ok=True)
            self._writers.append(fmt.open(folder, _context(fmt, plan, view, config, settings)))
        stores_dense = any(not fmt.stores_records for fmt in formats)
        self._expectation = Expectation(view.model.dtype if stores_dense else None)
        self._outer: dict[str, torch.Tensor] = {}
        if plan.outer and not all(fmt.stores_outer for fmt in formats):
            self._keep_outer(view)

    def _keep_outer(self, view: ModelView) -> None:
        inner = set(self._plan.quantized()) - self._plan.outer
        for name, tensor in self._adapter.rest(view, inner):
            if name.rpartition(".")[0] in self._plan.outer:
                for fmt, writer in zip(self._formats, self._writers, strict=True):
                    if not fmt.stores_outer:
                        writer.keep(name, tensor)
        self._outer = {site.path: view.parameter(site).detach().clone()
                       for site in view.outer() if site.name in self._plan.outer}

    def add(self, layer: QuantizedLayer) -> None:
        self._expectation.add(layer)
        for fmt, writer in zip(self._formats, self._writers, strict=True):
            if fmt.stores_outer or layer.name not in self._plan.outer:
                writer.add(layer)

    def finish(self) -> None:
        """Store what was not quantized, and close."""
        assert self._view is not None
        for name, tensor in self._adapter.rest(self._view, set(self._plan.quantized())):
            for writer in self._writers:
                writer.keep(name, tensor)
        for writer in self._writers:
            writer.finish()

    def expected(self, inputs: Mapping[str, torch.Tensor], rounded: QuantizedInputs) -> list[torch.Tensor]:
        """The logits that each checkpoint should give; after this the model may go."""
        assert self._view is not None
        model, self._view = self._view.model, None
        as_stored = probe(model, inputs)
        with rounded.off():
            weights_only = probe(model, inputs)
        kept = as_stored
        if self._outer:
            for path, original in self._outer.items():
                parameter = model.get_parameter(path)
                self._outer[path], parameter.data = parameter.data, original
            kept = probe(model, inputs)
            for path, quantized in self._outer.items():
                model.get_parameter(path).data = quantized
            self._outer = {}
        return [weights_only if not fmt.stores_records else as_stored if fmt.stores_outer else kept
                for fmt in self._formats]

    def verify(
        self, inputs: Mapping[str, torch.Tensor], expected: Sequence[torch.Tensor], *, trust_remote_code: bool
    ) -> dict[str, Any]:
        """Read every checkpoint back; for each format, how many layers are equal and how far the logits differ.

        Raises VerificationError when one is not what was meant.
        """
        rows = {}
        for fmt, folder, logits in zip(self._formats, self.folders, expected, strict=True):
            absent = frozenset() if fmt.stores_outer else self._plan.outer
            count = self._expectation.check_layers(fmt, folder, self._transposed, absent)
            difference = check_forward(
                fmt, folder, self._adapter, inputs, logits, trust_remote_code=trust_remote_code
            )
            rows[fmt.name] = {"layers_equal": count, "forward_difference": difference}
        return rows


def _context(
    fmt: CheckpointFormat, plan: Plan, view: ModelView, config: Mapping[str, Any], settings: TuningSettings
) -> CheckpointContext:
    assert plan.recipe is not None
    return CheckpointContext(
        config=config,
        recipe=plan.recipe,
        layers=[spec for spec in plan.specs() if fmt.stores_outer or spec.name not in plan.outer],
        blocks=view.stored_blocks(plan.quantized()),
        kept=list(plan.kept),
        transposed=[site.name for site in view.all_sites() if site.transposed and site.expert is None],
        dtype=view.model.dtype,
        settings=settings,
        model=plan.model,
    )
