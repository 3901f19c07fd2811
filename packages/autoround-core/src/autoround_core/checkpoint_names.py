"""What checkpoints call a model's parameters, asked of Transformers' own conversion.

Transformers keeps the experts of a layer in one tensor and may rename what it loads; checkpoints, and every
engine that reads them, have one matrix per expert (`experts.3.gate_proj`, or `w1` in Mixtral). Numbers
sent through the conversion that `save_pretrained` uses come out under the right names, whatever the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch

from autoround_core.errors import UnsupportedError


def to_checkpoint(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by parameter name -> what `save_pretrained` would store, by checkpoint name."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, tensors)
    except (RuntimeError, ValueError, KeyError) as error:  # a conversion that turns some tensors in a way of their own
        first = str(error).strip().splitlines()[0]
        name = type(model).__name__
        raise UnsupportedError(f"Transformers cannot say what a checkpoint of `{name}` calls its tensors "
                               f"({first}), so that none can be written") from error


def follow_names(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Let a model made from its configuration call its tensors as a checkpoint does that holds `names`.

    Hub checkpoints of one class come with and without a prefix. Transformers writes back what it has read, for which it
    keeps those of its conversions that changed a name; so do we, with names in place of tensors. Packed tensors of a
    quantized layer count as its weight.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    names = set(names)
    for name in names | {f"{name.rpartition('.')[0]}.weight" for name in names}:
        rename_source_key(name, renamings, converters)
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


def stored_names(model: torch.nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """{parameter name: checkpoint name} of each of `own` that is stored by itself, as it is.

    Left out: what is stored transposed, as a part of another tensor, or as several.
    """
    # small tables of numbers stand in for matrices and vectors: rows and columns of different number, so that
    # whatever is cut, joined, turned or reordered is noticed
    flat = [name for name, tensor in own.items() if tensor.dim() < 3]
    tables = {name: torch.arange(120).view(12, 10) + 120 * i for i, name in enumerate(flat)}
    found = {}
    for stored, table in to_checkpoint(model, tables).items():
        name = flat[int(table.flatten()[0]) // 120]
        if torch.equal(table, tables[name]):
            found[name] = stored
    for name, tensor in own.items():
        if tensor.dim() >= 3:
            # sides of different length again; the first is that of the experts
            table = torch.arange(tensor.shape[0] * 12 * 10).view(-1, 12, 10, *[1] * (tensor.dim() - 3))
            alone = to_checkpoint(model, {name: table})
            stored, part = next(iter(alone.items()))
            if len(alone) == 1 and torch.equal(part, table):
                found[name] = stored
    return found


def assembled(
    model: torch.nn.Module, own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameters `own` that are stored in pieces, or as pieces of others, put together from `stored`.

    Every number of every parameter is sent through the conversion to see where it is stored. What `stored`
    does not hold completely is left out.
    """
    ends = list(itertools.accumulate(tensor.numel() for tensor in own.values()))
    starts = dict(zip(own, [0, *ends], strict=False))
    tables = {name: torch.arange(starts[name], starts[name] + tensor.numel()).view(tensor.shape)
              for name, tensor in own.items()}
    places = to_checkpoint(model, tables)
    values = torch.full((ends[-1] if ends else 0,), torch.nan)
    for name, place in places.items():
        if name in stored and stored[name].shape == place.shape:
            values[place.flatten()] = stored[name].flatten().float()
    whole = {name: values[table.flatten()].view(table.shape) for name, table in tables.items()}
    return {name: tensor for name, tensor in whole.items() if not tensor.isnan().any()}


def expert_names(
    model: torch.nn.Module, parameter: str, experts: int, parts: int
) -> dict[tuple[int, int], str]:
    """{(expert, part): checkpoint name without `.weight`} of a parameter that holds all experts' matrices.

    parts: equal slices along the output (gate and up = 2). Where checkpoints keep all experts in one tensor of this
    name, engines look for them one by one once they are quantized: `experts.3.gate_proj`. Empty if they are kept
    otherwise.
    """
    numbers = torch.arange(experts * parts).view(experts, parts, 1)
    stored = to_checkpoint(model, {parameter: numbers})
    home, _, attribute = next(iter(stored)).rpartition(".")
    if len(stored) == 1 and attribute == parameter.rpartition(".")[2]:
        names = ("gate_proj", "up_proj") if parts == 2 else (attribute,)
        return {(expert, part): f"{home}.{expert}.{name}"
                for expert in range(experts) for part, name in enumerate(names)}
    if len(stored) != experts * parts:
        return {}
    return {divmod(int(number), parts): name.removesuffix(".weight") for name, number in stored.items()}


def aliases(own: Mapping[str, torch.Tensor]) -> dict[int, list[str]]:
    """All names of each parameter, by the parameter's id: more than one where weights are tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    return names
