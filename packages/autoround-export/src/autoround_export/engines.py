"""What engines make of packed layers: the rules that several formats share. Facts and versions: docs/compatibility.md.

A rule takes the layers that are quantized and gives a Verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoround_core import LinearSpec, Target, Verdict

Rule = Callable[[Sequence[LinearSpec]], Verdict]
FINE = Verdict()
_MARLIN_BITS = (4, 8)
_MARLIN_GROUPS = (-1, 32, 64, 128)
_EXPERT = ".experts."


def judge(rules: dict[str, Rule], target: Target, specs: Sequence[LinearSpec]) -> Verdict:
    """The verdict of the rule for `engine:device` or for `engine`."""
    rule = rules.get(f"{target.engine}:{target.device}") or rules.get(target.engine)
    if rule is None:
        reads = sorted({key.partition(":")[0] for key in rules})
        return Verdict(f"it does not read this format on {target.device}" if target.engine in reads
                       else f"it does not read this format ({', '.join(reads)} do)")
    return rule([spec for spec in specs if spec.scheme is not None])


def each(why_not: Callable[[LinearSpec], str | None]) -> Rule:
    """A rule that refuses the first layer for which `why_not` gives a reason."""

    def rule(specs: Sequence[LinearSpec]) -> Verdict:
        for spec in specs:
            if reason := why_not(spec):
                return Verdict(f"{reason} (layer `{spec.name}`)")
        return FINE

    return rule


def anything(specs: Sequence[LinearSpec]) -> Verdict:
    """The rule of an engine that runs all that the format stores."""
    return FINE


def marlin(spec: LinearSpec) -> str | None:
    """The kernel of vLLM and SGLang on CUDA: symmetric 4 and 8 bits."""
    if not spec.scheme.sym:
        return f"it has no kernel for asymmetric layers in this packing, got {spec.scheme}"
    if spec.scheme.bits not in _MARLIN_BITS:
        return f"it runs 4 and 8 bits in this format, got {spec.scheme}"
    return marlin_groups(spec)


def marlin_groups(spec: LinearSpec) -> str | None:
    """The group sizes of Marlin."""
    if spec.scheme.group_size not in _MARLIN_GROUPS:
        return f"it knows the group sizes {', '.join(map(str, _MARLIN_GROUPS))}, got {spec.scheme}"
    return None


def vllm_cpu(spec: LinearSpec) -> str | None:
    """vLLM on a CPU: 4 bits, no experts, sizes divisible by 32."""
    if _EXPERT in spec.name:
        return "it runs no quantized mixture of experts on a CPU"
    if spec.scheme.bits != 4:
        return f"on a CPU it runs 4 bits, got {spec.scheme}"
    if spec.in_features % 32 or spec.out_features % 32:
        return f"on a CPU sizes must be divisible by 32, got {spec.out_features}x{spec.in_features}"
    return None


def with_humming(why_not: Callable[[LinearSpec], str | None]) -> Rule:
    """`why_not` for 4 and 8 bits; others run with the optional package that vLLM has for them."""

    def rule(specs: Sequence[LinearSpec]) -> Verdict:
        verdict = each(why_not)([spec for spec in specs if spec.scheme.bits in _MARLIN_BITS])
        others = sorted({spec.scheme.bits for spec in specs if spec.scheme.bits not in _MARLIN_BITS})
        if verdict.refusal or not others:
            return verdict
        return Verdict(notes=(f"vLLM runs layers of {', '.join(map(str, others))} bits with its optional package "
                              "`humming` only",))

    return rule
