"""Layers that engines run as one: q, k and v; gate and up; all experts of a layer.

vLLM and SGLang put the weights of such layers into one matrix, so they must share a scheme, and both look up
the settings of the whole under a name that no checkpoint contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from autoround_core.scheme import QuantScheme

CHECK, PROMOTE, OFF = FUSE_MODES = ("check", "promote", "off")
_EXPERTS = ".experts."
# fused name -> parts, for every model type: parts that a model does not have harm nobody
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# what meets the same input in an expert
_FIRST_OF_EXPERT = {"gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up"}
# what a model type has besides, where the names alone would say too much elsewhere
_PARTS_BY_TYPE = {
    "lfm2": {"w1": ("w1", "w3")},
    "lfm2_moe": {"w1": ("w1", "w3")},
}


def fused_layers(names: Iterable[str], model_type: str | None = None) -> dict[str, tuple[str, ...]]:
    """Fused name -> the layers among `names` that it is made of, two or more.

    model_type: as in config.json. The experts of a layer, all matrices of all of them, are one: `...experts`.
    """
    table = _PARTS | _PARTS_BY_TYPE.get(model_type or "", {})
    whole_of = {part: fused for fused, parts in table.items() for part in parts}
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if _EXPERTS in name:
            groups.setdefault(name.partition(_EXPERTS)[0] + _EXPERTS.rstrip("."), []).append(name)
        elif leaf in whole_of:
            groups.setdefault(f"{parent}.{whole_of[leaf]}", []).append(name)
    return {fused: tuple(members) for fused, members in groups.items() if len(members) > 1}


def sharing_layers(names: Iterable[str], model_type: str | None = None) -> list[tuple[str, ...]]:
    """The layers that share one number where engines keep one for all: the parts of a fused layer.

    Of the experts of a layer these are gate and up of all of them, and apart from those the matrices behind.
    """
    groups: dict[str, list[str]] = {}
    for fused, members in fused_layers(names, model_type).items():
        for member in members:
            leaf = member.rpartition(".")[2]
            kind = _FIRST_OF_EXPERT.get(leaf, leaf) if _EXPERTS in member else ""
            groups.setdefault(f"{fused} {kind}", []).append(member)
    return [tuple(members) for members in groups.values()]


def widest(schemes: Sequence[QuantScheme | None]) -> QuantScheme | None:
    """The scheme that loses least: 16 bits (None), else most bits, else smallest group, else asymmetric."""
    if None in schemes:
        return None
    return max(schemes, key=lambda scheme: (scheme.bits, scheme.group_size > 0, -scheme.group_size, not scheme.sym))


def promote(
    schemes: Mapping[str, QuantScheme | None], groups: Mapping[str, Sequence[str]]
) -> dict[str, QuantScheme | None]:
    """The schemes by layer, with all parts of each group raised to the widest among them."""
    result = dict(schemes)
    for members in groups.values():
        result |= dict.fromkeys(members, widest([schemes[member] for member in members]))
    return result


def disagreement(fused: str, schemes: Mapping[str, QuantScheme | None]) -> str | None:
    """None if the parts of a fused layer share a scheme, otherwise the reason and the line that would mend it.

    schemes: of the parts alone.
    """
    if len(set(schemes.values())) < 2:
        return None
    by_scheme: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(_spelled(scheme), []).append(name)
    parts = "; ".join(f"{scheme} for {_some(names)}" for scheme, names in by_scheme.items())
    parent = fused.rpartition(".")[0]
    leaves = [name.removeprefix(f"{parent}.") for name in schemes]
    pattern = f"{fused}." if f"{fused}." in next(iter(schemes)) else f"{parent}.({'|'.join(leaves)})"
    wanted = widest(list(schemes.values()))
    entry = 16 if wanted is None else f'"{wanted}"'
    return (f"engines run `{fused}` as one layer, so its parts must share a scheme, got {parts}; put "
            f'"{pattern}": {entry} first into --layer_config, or pass --fuse promote')


def _spelled(scheme: QuantScheme | None) -> str:
    return "16 bits" if scheme is None else str(scheme)


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
