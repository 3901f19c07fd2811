"""How hidden states flow through the blocks of a model, seen from outside: no model's code is known here.

A few tokens run through the whole model to learn what each block returns, that states flow from block to
block, and whether any argument of a block depends on what an earlier one computed. If not, as almost always,
the blocks need not be computed to learn how they are called: stand-ins that return zeros will do, and what a model adds
to the states between two blocks (features of an image, in Qwen3-VL) is then all that the second one is given.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoround_core.adapter import ModelView
from autoround_core.errors import UnsupportedError


class UnreachedError(UnsupportedError):
    """No sample runs through the blocks."""


class Enough(Exception):
    """Ends a forward pass once everything wanted is recorded."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of a block in a forward pass: the states [..., width] it was given, and leaves of its other arguments.
    """

    index: int
    states: torch.Tensor
    spec: Any
    leaves: list[Any]


@dataclass(frozen=True, slots=True)
class Flow:
    """How states flow through a model's blocks.

    extras: for each block, how many values it returns besides its states, None = the states as a bare tensor.
    stand_in: whether each block's arguments are the same when no block is computed.
    """

    extras: tuple[int | None, ...]
    stand_in: bool

    def returned(self, index: int, states: torch.Tensor) -> Any:
        """`states` as block `index` would return them."""
        extras = self.extras[index]
        return states if extras is None else (states, *[None] * extras)

    def pass_on(self, index: int, original: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        """Something for the next block to be called with: zeros where a stand-in is enough."""
        return (self.returned(index, torch.zeros_like(states)) if self.stand_in
                else original(states, *args, **kwargs))


def explore(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> Flow:
    """Run one sample through the whole model. Raises UnsupportedError unless each block runs once, in order, on what
    the one before it returned, to which the model may have added something that no block computed.

    inputs: keyword arguments of the model.
    """
    visits: list[Visit] = []
    outputs: list[torch.Tensor] = []
    extras: list[int | None] = []

    def answer(index: int, original: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        # copies, as some models work in place on what they are given
        visits.append(_visit(index, states.clone(), args, kwargs))
        output = original(states, *args, **kwargs)
        bare = isinstance(output, torch.Tensor)
        outputs.append((output if bare else output[0]).clone())
        extras.append(None if bare else len(output) - 1)
        return output

    forward(view, inputs, answer)
    _check_order(view, visits)
    stand_ins = _stand_ins(view, inputs, visits, tuple(extras))
    _check_states(view, visits, outputs, stand_ins)
    return Flow(tuple(extras), stand_ins is not None)


def _check_order(view: ModelView, visits: list[Visit]) -> None:
    name = _list_name(view)
    if not visits:
        raise UnreachedError(f"no calibration sample runs through `{name}`")
    order = [visit.index for visit in visits]
    if order != list(range(len(view.blocks))):
        shown = ", ".join(map(str, order[:8])) + (", ..." if len(order) > 8 else "")
        raise UnsupportedError(f"each block of `{name}` must run once, in order; this model ran {shown} "
                               f"of {len(view.blocks)}")


def _check_states(
    view: ModelView, visits: list[Visit], outputs: list[torch.Tensor], stand_ins: list[Visit] | None
) -> None:
    for index, visit in enumerate(visits[1:], 1):
        output = outputs[index - 1]
        if stand_ins is not None and stand_ins[index].states.shape == output.shape:
            output = output + stand_ins[index].states
        # NaN is no difference here: that is for whoever looks at the numbers
        if not torch.equal(output.nan_to_num(), visit.states.nan_to_num()):
            raise UnsupportedError(f"`{_list_name(view)}.{index}` is not given what the block before it returned; "
                                   "a model that computes between its blocks is not supported")


def _list_name(view: ModelView) -> str:
    first = view.blocks[0].name
    return first.rpartition(".")[0] if len(view.blocks) > 1 else first


def _stand_ins(
    view: ModelView, inputs: Mapping[str, torch.Tensor], visits: list[Visit], extras: tuple[int | None, ...]
) -> list[Visit] | None:
    """The calls with stand-ins in place of the blocks; None if an argument depends on what a block computed."""
    try:
        again = record(view, inputs, Flow(extras, stand_in=True))
    except Exception:  # a stand-in returns None for all but the states, over which models may stumble
        return None
    same = len(again) == len(visits) and all(
        one.spec == two.spec and all(map(equal, one.leaves, two.leaves))
        for one, two in zip(visits, again, strict=True)
    )
    return again if same else None


def record(view: ModelView, inputs: Mapping[str, torch.Tensor], flow: Flow) -> list[Visit]:
    """How each block is called for one sample. inputs: keyword arguments of the model."""
    visits: list[Visit] = []

    def answer(index: int, original: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        visits.append(_visit(index, states if flow.stand_in else states.clone(), args, kwargs))
        if index == len(view.blocks) - 1:
            raise Enough
        return flow.pass_on(index, original, states, args, kwargs)

    forward(view, inputs, answer)
    return visits


def forward(view: ModelView, inputs: Mapping[str, torch.Tensor], answer: Callable[..., Any]) -> None:
    """One sample through the model, each block answered for by `answer(index, original forward, states, args, kwargs)`.
    """

    def replacement(index: int, original: Callable, args: tuple, kwargs: dict) -> Any:
        states, args, kwargs = _split_hidden(view.blocks[index].name, original, args, kwargs)
        return answer(index, original, states, args, kwargs)

    with _replaced(view, replacement), suppress(Enough):
        view.model(**as_taken(view.model, inputs), use_cache=False)


def as_taken(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs where the model is, and its dtype for what is no number of anything, such as pixels."""
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()}


class _Opened(NamedTuple):
    """A mapping of a class of its own, into which pytrees do not look. Keys and values are handed on so."""

    kind: type
    content: dict


def flatten(args: tuple, kwargs: dict) -> tuple[list[Any], Any]:
    """(leaves, spec) of a call's arguments."""
    opened = {name: _Opened(type(value), dict(value)) if isinstance(value, UserDict) else value
              for name, value in kwargs.items()}
    return tree_flatten((args, opened))


def unflatten(leaves: list[Any], spec: Any) -> tuple[tuple, dict]:
    """(args, kwargs) again; a mapping is a new one, so that what a block puts into it does not stay."""
    args, kwargs = tree_unflatten(leaves, spec)
    return args, {name: value.kind(value.content) if isinstance(value, _Opened) else value
                  for name, value in kwargs.items()}


def _visit(index: int, states: torch.Tensor, args: tuple, kwargs: dict) -> Visit:
    leaves, spec = flatten(args, kwargs)
    return Visit(index, states, spec, leaves)


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


def _split_hidden(name: str, original: Callable, args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """(states, other args, other kwargs): the states are what the block's forward takes first."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    first = "hidden_states" if "hidden_states" in rest else next(iter(signature(original).parameters), "")
    if args or not isinstance(rest.get(first), torch.Tensor):
        raise UnsupportedError(f"block `{name}` is not given hidden states as its first argument `{first}`")
    return rest.pop(first), args, rest


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one is two or torch.equal(one, two)
    return one is two or (type(one) is type(two) and bool(one == two))
