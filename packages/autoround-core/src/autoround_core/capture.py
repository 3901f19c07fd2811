"""What flows into the blocks: the hidden states of the first one, and how each one is called.

The samples run through the model with recorders in place of its blocks, so that only the embedding is
computed. Arguments that are the same for every sample (masks, rotary tables) are kept once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoround_core.adapter import ModelView
from autoround_core.errors import CalibrationError, UnsupportedError
from autoround_core.flow import Enough, equal, explore, flatten, forward, record, unflatten

_BATCH_TOLERANCE = 0.02  # of the norm: roundings to bfloat16, not another sample's mask


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How one block is called: leaves of (args, kwargs) without the hidden states."""

    spec: Any
    leaves: list[Any]
    returns_tuple: bool
    batchable: bool = True

    def arguments(self, rows: torch.Tensor, device: torch.device) -> tuple[tuple, dict]:
        """(args, kwargs) for a batch of samples."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, _PerSample):
                leaf = torch.cat([leaf.tensors[row] for row in rows.tolist()])
            leaves.append(leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf)
        return unflatten(leaves, self.spec)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> BlockCall:
        """The same call with what all samples share on `device`, so that it moves there once and not in every
        step; and, if `dtype` is given, every float argument in it.
        """
        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, _PerSample):
                leaf = _PerSample([convert(tensor) for tensor in leaf.tensors])
            elif isinstance(leaf, torch.Tensor):
                leaf = convert(leaf).to(device)
            leaves.append(leaf)
        return replace(self, leaves=leaves)

    def run(self, forward: Callable[..., Any], hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Output hidden states of `forward` (the block, or a form of it) for the samples `rows`."""
        if not self.batchable and len(rows) > 1:
            pairs = zip(hidden.split(1), rows.split(1), strict=True)
            return torch.cat([self.run(forward, state, row) for state, row in pairs])
        args, kwargs = self.arguments(rows, hidden.device)
        output = forward(hidden, *args, **kwargs)
        return output[0] if self.returns_tuple else output


@dataclass(frozen=True, slots=True)
class _PerSample:
    """A leaf that differs from sample to sample."""

    tensors: list[torch.Tensor]


PLAIN_CALL = BlockCall(flatten((), {})[1], [], returns_tuple=False)
"""The call of a module that takes its input and nothing else, such as lm_head."""


@torch.no_grad()
def capture(view: ModelView, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
    """(hidden states [samples, seqlen, width] that enter the first block, the call of each block).

    input_ids: [samples, seqlen] without padding. Raises CalibrationError for a token that the model does not
    know, UnsupportedError when the blocks are not simply run one after another.
    """
    known, largest = view.model.get_input_embeddings().weight.shape[0], int(input_ids.max())
    if largest >= known:
        raise CalibrationError(f"the data holds the token id {largest}, the model knows 0 to {known - 1}; "
                               "was it made with another tokenizer?")
    flow = explore(view, input_ids)
    recorded: list[list[tuple[Any, list[Any]]]] = [[] for _ in view.blocks]
    hidden = torch.empty(0)
    for sample in range(len(input_ids)):
        visits = record(view, input_ids[sample : sample + 1], flow)
        states = visits[0].states
        if sample == 0:
            hidden = states.new_empty(len(input_ids), *states.shape[1:])
        hidden[sample] = states[0]
        kept: dict[int, Any] = {}  # what each leaf of this sample was found equal to
        for visit, samples in zip(visits, recorded, strict=True):
            leaves = visit.leaves
            if samples:
                pairs = zip(leaves, samples[0][1], strict=True)
                leaves = [_shared(leaf, first, kept) for leaf, first in pairs]
            samples.append((visit.spec, leaves))
    calls = [
        _merge(block.name, samples, extras is not None)
        for block, samples, extras in zip(view.blocks, recorded, flow.extras, strict=True)
    ]
    return hidden, _with_batching(view, calls, hidden[:2])


@torch.no_grad()
def head_inputs(view: ModelView, input_ids: torch.Tensor, last_hidden: torch.Tensor) -> torch.Tensor:
    """What enters lm_head [samples, seqlen, width] when the last block returns `last_hidden`."""
    assert view.head is not None
    flow = explore(view, input_ids)
    found: list[torch.Tensor] = []

    def enter(module, args):
        found.append(args[0])
        raise Enough

    def answer(index: int, original: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        if index == len(view.blocks) - 1:
            return flow.returned(index, last_hidden[len(found)][None].to(states))
        return flow.pass_on(index, original, states, args, kwargs)

    handle = view.model.get_submodule(view.head.module).register_forward_pre_hook(enter)
    try:
        for sample in range(len(input_ids)):
            forward(view, input_ids[sample : sample + 1], answer)
    finally:
        handle.remove()
    return torch.cat(found)


def _merge(name: str, samples: list[tuple[Any, list[Any]]], returns_tuple: bool) -> BlockCall:
    """One call for all samples: leaves that differ from sample to sample become lists."""
    spec, first = samples[0]
    leaves: list[Any] = []
    for position, leaf in enumerate(first):
        column = [sample[position] for _, sample in samples]
        if isinstance(leaf, torch.Tensor):
            leaves.append(leaf if all(other is leaf for other in column) else _PerSample(column))
        elif all(equal(other, leaf) for other in column):
            leaves.append(leaf)
        else:
            raise UnsupportedError(f"block `{name}` is given a {type(leaf).__name__} that differs from "
                                   "sample to sample, which is not supported")
    return BlockCall(spec, leaves, returns_tuple)


def _shared(leaf: Any, first: Any, kept: dict[int, Any]) -> Any:
    """The first sample's leaf where this sample's is equal to it, so that only one of them stays in memory.

    Most blocks are handed the same objects; `kept` spares comparing them once per block.
    """
    if id(leaf) not in kept:
        # the leaf itself is kept too: a freed one could hand its id to another
        kept[id(leaf)] = (leaf, first if equal(leaf, first) else leaf)
    return kept[id(leaf)][1]


def _with_batching(view: ModelView, calls: list[BlockCall], hidden: torch.Tensor) -> list[BlockCall]:
    """The calls, each knowing whether its block takes several samples at once."""
    answers: dict[str, bool] = {}
    found = []
    for block, call in zip(view.blocks, calls, strict=True):
        shapes = [leaf.shape if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in call.leaves]
        kind = f"{[type(module) for module in block.module.modules()]} {call.spec} {shapes}"
        if kind not in answers:
            answers[kind] = is_batchable(call, block.module, hidden)
        found.append(replace(call, batchable=answers[kind]))
    return found


def is_batchable(call: BlockCall, block: torch.nn.Module, hidden: torch.Tensor) -> bool:
    """Whether a block gives for two samples at once what it gives for each of them.

    Some models build arguments for a batch of one (ALiBi's [batch * heads, ...]) that do not broadcast.
    hidden: states [samples, seqlen, width]; any will do.
    """
    if len(hidden) < 2:
        return True
    # routers and norms may be float32 in a block of bfloat16
    hidden = hidden[:2].to(max(block.parameters(), key=torch.numel).dtype)
    rows = torch.arange(2)
    # copies, as some models work in place on what they are given
    single = torch.cat([call.run(block, hidden[i : i + 1].clone(), rows[i : i + 1]) for i in range(2)])
    try:
        both = replace(call, batchable=True).run(block, hidden.clone(), rows)
    except Exception:  # a block that refuses two samples may do so in any way
        return False
    return both.shape == single.shape and bool((both - single).norm() <= _BATCH_TOLERANCE * single.norm())
