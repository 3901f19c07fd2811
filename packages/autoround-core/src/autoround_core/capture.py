"""What flows into the blocks: the hidden states of the first one, and how each one is called.

One sample runs through the whole model to learn each block's arguments and whether it returns a tuple. For
the others the blocks are stood in for by recorders, so that only the embedding is computed. Arguments that
are the same for every sample (masks, rotary tables) are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoround_core.adapter import ModelView
from autoround_core.errors import UnsupportedError


class _Enough(Exception):
    """Ends a forward pass once everything wanted is recorded."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How one block is called: leaves of (args, kwargs) without the hidden states; a list = one per sample."""

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
        return tree_unflatten(leaves, self.spec)

    def run(self, forward: Callable[..., Any], hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Output hidden states of `forward` (the block, or a functional form of it) for the samples `rows`."""
        if not self.batchable and len(rows) > 1:
            return torch.cat([self.run(forward, hidden[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
        args, kwargs = self.arguments(rows, hidden.device)
        output = forward(hidden, *args, **kwargs)
        return output[0] if self.returns_tuple else output


@dataclass(frozen=True, slots=True)
class _PerSample:
    tensors: list[torch.Tensor]


PLAIN_CALL = BlockCall(tree_flatten(((), {}))[1], [], returns_tuple=False)
"""The call of a module that takes its input and nothing else, such as lm_head."""


@torch.no_grad()
def capture(view: ModelView, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
    """(hidden states [samples, seqlen, width] that enter the first block, the call of each block).

    input_ids: [samples, seqlen] without padding.
    """
    recorded: list[list[tuple[Any, list[Any]]]] = [[] for _ in view.blocks]
    returns_tuple = [False] * len(view.blocks)
    hidden: list[torch.Tensor] = []
    kept: dict[int, Any] = {}  # of the present sample: what each leaf was found equal to

    def record(index: int, original: Callable, args: tuple, kwargs: dict) -> Any:
        states, args, kwargs = _split_hidden(view.blocks[index].name, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if index == 0:
            hidden.append(states)
            kept.clear()
        if recorded[index]:
            leaves = [_shared(leaf, first, kept) for leaf, first in zip(leaves, recorded[index][0][1], strict=True)]
        recorded[index].append((spec, leaves))
        if len(hidden) == 1:
            output = original(states, *args, **kwargs)
            returns_tuple[index] = isinstance(output, tuple)
        else:
            output = (states, None) if returns_tuple[index] else states
        if index == len(view.blocks) - 1:
            raise _Enough
        return output

    with _replaced(view, record):
        for row in input_ids:
            try:
                view.model(input_ids=row[None], use_cache=False)
            except _Enough:
                pass
    calls = [_merge(samples, is_tuple) for samples, is_tuple in zip(recorded, returns_tuple, strict=True)]
    return torch.cat(hidden), calls


@torch.no_grad()
def head_inputs(view: ModelView, input_ids: torch.Tensor, last_hidden: torch.Tensor) -> torch.Tensor:
    """What enters lm_head [samples, seqlen, width] when the last block returns `last_hidden`."""
    assert view.head is not None
    found: list[torch.Tensor] = []

    def stop(module, args):
        found.append(args[0])
        raise _Enough

    sample = 0

    def pass_on(index: int, original: Callable, args: tuple, kwargs: dict) -> Any:
        states, _, _ = _split_hidden(view.blocks[index].name, args, kwargs)
        states = last_hidden[sample][None].to(states) if index == len(view.blocks) - 1 else states
        return (states, None) if tuples[index] else states

    _, calls = capture(view, input_ids[:1])
    tuples = [call.returns_tuple for call in calls]
    handle = view.model.get_submodule(view.head.module).register_forward_pre_hook(stop)
    try:
        with _replaced(view, pass_on):
            for sample in range(len(input_ids)):
                try:
                    view.model(input_ids=input_ids[sample][None], use_cache=False)
                except _Enough:
                    pass
    finally:
        handle.remove()
    return torch.cat(found)


@contextmanager
def _replaced(view: ModelView, replacement: Callable[[int, Callable, tuple, dict], Any]) -> Iterator[None]:
    """Let `replacement(index, original forward, args, kwargs)` answer for each block."""
    modules = [block.module for block in view.blocks]
    # an instance attribute shadows the class's forward; hooks and wrappers of the class stay untouched
    shadowed = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = _bound(replacement, index, module.forward)
    try:
        yield
    finally:
        for module, before in zip(modules, shadowed, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before


def _bound(replacement, index, original):
    return lambda *args, **kwargs: replacement(index, original, args, kwargs)


def _split_hidden(name: str, args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], kwargs
    if "hidden_states" not in kwargs:
        raise UnsupportedError(f"block `{name}` takes its input under an unknown name: {sorted(kwargs)}")
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def _merge(samples: list[tuple[Any, list[Any]]], returns_tuple: bool) -> BlockCall:
    """One call for all samples: leaves that differ from sample to sample become lists."""
    spec, first = samples[0]
    leaves: list[Any] = []
    for position, leaf in enumerate(first):
        column = [sample[position] for _, sample in samples]
        shared = all(other is leaf for other in column) or not isinstance(leaf, torch.Tensor)
        leaves.append(leaf if shared else _PerSample(column))
    return BlockCall(spec, leaves, returns_tuple)


def _shared(leaf: Any, first: Any, kept: dict[int, Any]) -> Any:
    """The first sample's leaf where this sample's is equal to it, so that only one of them stays in memory.

    Most blocks are handed the same objects; `kept` spares comparing them once per block.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if id(leaf) not in kept:
        same = isinstance(first, torch.Tensor) and torch.equal(leaf, first)
        # the leaf itself is kept too: a freed one could hand its id to another
        kept[id(leaf)] = (leaf, first if same else leaf)
    return kept[id(leaf)][1]


def is_batchable(call: BlockCall, forward: Callable[..., Any], hidden: torch.Tensor) -> bool:
    """Whether running two samples at once gives what running them one by one gives.

    Some models build arguments for a batch of one (ALiBi's [batch * heads, ...]) that do not broadcast.
    """
    if len(hidden) < 2:
        return True
    rows = torch.arange(2)
    single = torch.cat([call.run(forward, hidden[i : i + 1], rows[i : i + 1]) for i in range(2)])
    try:
        both = call.run(forward, hidden[:2], rows)
    except (RuntimeError, IndexError):
        return False
    return both.shape == single.shape and bool((both - single).norm() <= 0.02 * single.norm())
