"""What flows into the blocks: the hidden states of the first one, and how each one is called.

The samples run through the model with recorders in place of its blocks, so that only the embedding is
computed. Arguments that are the same for every sample (masks, rotary tables) are kept once.

States are kept as [samples, tokens, width]. A vision tower may hand its blocks another shape for each sample (patches
of images of several sizes): then each sample fills the beginning of its row, and is cut out and given its shape back
when a block runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoround_core.adapter import ModelView
from autoround_core.calibration_set import CalibrationSet
from autoround_core.errors import CalibrationError, UnsupportedError
from autoround_core.flow import Enough, equal, explore, flatten, forward, record, unflatten

_BATCH_TOLERANCE = 0.02  # of the norm: roundings to bfloat16, not another sample's mask
_PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How one block is called: leaves of (args, kwargs) without the hidden states.

    shapes: of the states of each sample [..., width], None = [1, tokens, width] for all.
    """

    spec: Any
    leaves: list[Any]
    returns_tuple: bool
    batchable: bool = True
    shapes: tuple[tuple[int, ...], ...] | None = None

    def arguments(self, rows: torch.Tensor, device: torch.device) -> tuple[tuple, dict]:
        """(args, kwargs) for a batch of samples."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, _PerSample):
                leaf = leaf.of(rows.tolist())
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
                leaf = _PerSample([None if tensor is None else convert(tensor) for tensor in leaf.tensors])
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
        if self.shapes is None:
            output = forward(hidden, *args, **kwargs)
            return output[0] if self.returns_tuple else output
        shape, tokens = self.shapes[int(rows)], hidden.shape[1]
        output = forward(hidden[0, : math.prod(shape[:-1])].view(shape), *args, **kwargs)
        output = output[0] if self.returns_tuple else output
        flat = output.reshape(1, -1, output.shape[-1])
        # a projector gives fewer or wider tokens, which are nobody's states
        return torch.nn.functional.pad(flat, (0, 0, 0, tokens - flat.shape[1])) if output.shape == shape else flat


@dataclass(frozen=True, slots=True)
class _PerSample:
    """A leaf that differs from sample to sample; None for a sample that has none."""

    tensors: list[torch.Tensor | None]

    def of(self, rows: list[int]) -> torch.Tensor | None:
        return self.tensors[rows[0]] if len(rows) == 1 else torch.cat([self.tensors[row] for row in rows])


PLAIN_CALL = BlockCall(flatten((), {})[1], [], returns_tuple=False)
"""The call of a module that takes its input and nothing else, such as lm_head."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What flows into blocks that run one after another.

    hidden: states that enter the first block [samples, tokens, width]; later those of the block that is next. calls: of
    each block. mask: bool [samples, tokens], False where a row is padding; None = nowhere. added: for the index of a
    block, (sample, tokens [n], states [n, width]) that the model adds before it.
    """

    hidden: torch.Tensor
    calls: tuple[BlockCall, ...]
    mask: torch.Tensor | None
    added: Mapping[int, list[tuple[int, torch.Tensor, torch.Tensor]]]

    def copy(self) -> Chain:
        return replace(self, hidden=self.hidden.clone())

    def to(self, device: torch.device) -> Chain:
        return replace(self, hidden=self.hidden.to(device))

    def enter(self, index: int) -> None:
        """Add to the states what the model adds before block `index`."""
        for sample, tokens, states in self.added.get(index, ()):
            place = self.hidden[sample]
            place[tokens.to(place.device)] += states.to(place)


@torch.no_grad()
def capture(view: ModelView, data: CalibrationSet) -> Chain:
    """What flows into the blocks of `view`.

    Raises CalibrationError for a token that the model does not know, UnsupportedError when the blocks are not simply
    run one after another.
    """
    known, largest = view.model.get_input_embeddings().weight.shape[0], int(data.input_ids.max())
    if largest >= known:
        raise CalibrationError(f"the data holds the token id {largest}, the model knows 0 to {known - 1}; "
                               "was it made with another tokenizer?")
    flow = explore(view, _probe(data))
    recorded: list[list[tuple[Any, list[Any]]]] = [[] for _ in view.blocks]
    entering: list[torch.Tensor] = []
    added: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for sample in range(data.samples):
        visits = record(view, data.inputs(sample), flow)
        if len(visits) != len(view.blocks):
            raise UnsupportedError(f"sample {sample} of the calibration set runs through {len(visits)} of "
                                   f"{len(view.blocks)} blocks of `{view.blocks[0].name}` and on; give every sample an "
                                   "image")
        entering.append(visits[0].states)
        kept: dict[int, Any] = {}  # what each leaf of this sample was found equal to
        for visit, samples in zip(visits, recorded, strict=True):
            leaves = visit.leaves
            if samples:
                pairs = zip(leaves, samples[0][1], strict=True)
                leaves = [_shared(leaf, first, kept) for leaf, first in pairs]
            samples.append((visit.spec, leaves))
        for visit in visits[1:] if flow.stand_in else ():
            states = visit.states.reshape(-1, visit.states.shape[-1])
            tokens = states.any(-1).nonzero()[:, 0]
            if len(tokens):
                added.setdefault(visit.index, []).append((sample, tokens, states[tokens]))
    hidden, shapes = _rows(entering)
    calls = [
        replace(_merge(block.name, samples, extras is not None), shapes=shapes)
        for block, samples, extras in zip(view.blocks, recorded, flow.extras, strict=True)
    ]
    return Chain(hidden, tuple(_with_batching(view, calls, hidden[:2])), _mask(data, hidden, shapes), added)


def _probe(data: CalibrationSet) -> dict[str, torch.Tensor]:
    """A sample to explore with: a few tokens of text, or a whole one with the most besides its tokens."""
    if data.extras:
        return data.inputs(max(range(data.samples), key=lambda sample: len(data.extras[sample])))
    return {"input_ids": data.input_ids[:1, :_PROBE_TOKENS]}


def _rows(entering: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...] | None]:
    """(states [samples, tokens, width], shapes as in BlockCall) of what enters the first block for each sample.

    Each is let go as its row is filled: there is no room for all of them twice.
    """
    shapes = tuple(tuple(states.shape) for states in entering)
    if len(shapes[0]) == 3 and shapes[0][0] == 1 and len(set(shapes)) == 1:
        shapes = None
    first, samples = entering[0], len(entering)
    tokens = max(states.numel() // states.shape[-1] for states in entering)
    hidden = first.new_zeros(samples, tokens, first.shape[-1])
    for row in reversed(hidden.unbind()):
        states = entering.pop()
        states = states.reshape(-1, states.shape[-1])
        row[: len(states)] = states
    return hidden, shapes


def _mask(
    data: CalibrationSet, hidden: torch.Tensor, shapes: tuple[tuple[int, ...], ...] | None
) -> torch.Tensor | None:
    if shapes is not None:
        lengths = torch.tensor([math.prod(shape[:-1]) for shape in shapes])
        return torch.arange(hidden.shape[1]) < lengths[:, None]
    return data.mask if data.mask is not None and data.mask.shape == hidden.shape[:2] else None


@torch.no_grad()
def head_inputs(view: ModelView, data: CalibrationSet, last_hidden: torch.Tensor) -> torch.Tensor:
    """What enters lm_head [samples, seqlen, width] when the last block returns `last_hidden`."""
    assert view.head is not None
    flow = explore(view, _probe(data))
    found: list[torch.Tensor] = []

    def enter(module, args):
        found.append(args[0])
        raise Enough

    def answer(index: int, original: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        if index == len(view.blocks) - 1:
            return flow.returned(index, last_hidden[len(found)].reshape(states.shape).to(states))
        return flow.pass_on(index, original, states, args, kwargs)

    handle = view.model.get_submodule(view.head.module).register_forward_pre_hook(enter)
    try:
        for sample in range(data.samples):
            forward(view, data.inputs(sample), answer)
    finally:
        handle.remove()
    return torch.cat(found)


def _merge(name: str, samples: list[tuple[Any, list[Any]]], returns_tuple: bool) -> BlockCall:
    """One call for all samples: leaves that differ from sample to sample become lists."""
    spec, first = samples[0]
    leaves: list[Any] = []
    for position, leaf in enumerate(first):
        column = [sample[position] for _, sample in samples]
        if all(other is None or isinstance(other, torch.Tensor) for other in column):
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
        if call.shapes is not None or any(map(_uneven, call.leaves)):
            found.append(replace(call, batchable=False))
            continue
        shapes = [leaf.shape if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in call.leaves]
        kind = f"{[type(module) for module in block.module.modules()]} {call.spec} {shapes}"
        if kind not in answers:
            answers[kind] = is_batchable(call, block.module, hidden)
        found.append(replace(call, batchable=answers[kind]))
    return found


def _uneven(leaf: Any) -> bool:
    """Whether samples cannot be joined along this leaf: it is absent for some, or of another size."""
    return isinstance(leaf, _PerSample) and len({None if t is None else t.shape for t in leaf.tensors}) > 1


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
