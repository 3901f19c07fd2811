"""Is a tensor layout lossless, pure, and honest about its names?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from autoround_core.errors import AutoRoundError
from autoround_core.layout import TensorLayout
from autoround_core.records import QuantizedWeight
from autoround_core.scheme import QuantScheme
from autoround_core.testing.cases import (
    SCHEMES,
    Checked,
    ask,
    conclude,
    doing,
    random_weight,
    require,
    same,
    spec_of,
)

# square and not, groups that divide the row and groups that leave a rest, sizes that fill no word
SHAPES = ((32, 128), (64, 256), (16, 384), (96, 160), (8, 32), (32, 96), (40, 100), (7, 40), (1, 33))
_ODD_GROUP = 48


def check_layout(layout: TensorLayout, *, schemes: Iterable[QuantScheme] | None = None) -> Checked:
    """unpack(pack(w)) equals w bit for bit, for every scheme and shape that the layout accepts.

    schemes: those to try; all of the integer family when left out.
    """
    require(bool(layout.name), f"{type(layout).__name__} has no name")
    odd = tuple(QuantScheme(bits, _ODD_GROUP, sym) for bits in (3, 4) for sym in (True, False))
    cells, refusals = 0, set()
    for scheme in (*SCHEMES, *odd) if schemes is None else schemes:
        for shape in SHAPES:
            what = f"layout `{layout.name}`, {scheme} [{shape[0]}, {shape[1]}]"
            reason = ask(what, layout.why_not, spec_of(scheme, shape))
            if reason is not None:
                refusals.add(reason)
                continue
            _check_cell(layout, scheme, shape, what)
            cells += 1
    return conclude(f"layout `{layout.name}`", cells, refusals)


def _check_cell(layout: TensorLayout, scheme: QuantScheme, shape: tuple[int, int], what: str) -> None:
    weight = random_weight(scheme, shape, torch.Generator().manual_seed(0), extreme=True)
    before = weight.digest()
    with doing(f"{what}: pack"):
        packed = layout.pack(weight)
    require(weight.digest() == before, f"{what}: pack changes the record it is given")
    required, known = set(layout.tensor_names), {*layout.tensor_names, *layout.optional_names}
    require(required <= set(packed) <= known,
            f"{what}: pack gives {sorted(packed)}, tensor_names says {sorted(required)}"
            + (f" and optional_names {sorted(layout.optional_names)}" if layout.optional_names else ""))
    for name, tensor in packed.items():
        require(tensor.is_contiguous(), f"{what}: tensor `{name}` is not contiguous")
    again = layout.pack(weight)
    repeated = all(same(packed[name], again[name]) for name in packed)
    require(repeated, f"{what}: pack gives other tensors the second time")
    with doing(f"{what}: unpack"):
        back = layout.unpack(packed, scheme, shape)
    _require_equal(back, weight, what)
    try:
        unaided = layout.unpack(packed, scheme)
    except AutoRoundError:
        return  # where padding hides the shape, a layout may refuse to guess; it must not guess wrong
    _require_equal(unaided, weight, f"{what}, unpacked without the shape")


def _require_equal(back: QuantizedWeight, weight: QuantizedWeight, what: str) -> None:
    for name, tensor in weight.tensors().items():
        other = back.tensors().get(name)
        require(other is not None and same(other, tensor), f"{what}: `{name}` differs after pack and unpack")
    require(back.digest() == weight.digest(), f"{what}: the record differs after pack and unpack")
