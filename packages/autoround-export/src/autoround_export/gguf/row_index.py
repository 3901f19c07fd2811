"""Which rows of a model a tensor of a converted file is made of.

Every row is looked up by a hash of its numbers, and compared. So permuted heads, stacked experts and joined
projections are found without knowing the model.

A match is made of whole tensors where it can be. Otherwise rows are placed one by one; of equal rows, those are
taken that continue a run, then those of the tensors that the neighbours came from, then those of the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autoround_core import TensorFiles
from autoround_export.gguf.outline import Piece

if TYPE_CHECKING:
    import numpy

# no row that is shorter than the smallest block of llama.cpp is ever quantized, and short rows are easily confused
LEAST_COLUMNS = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """All rows of one length, of all tensors of the model, one after the other.

    names: of the tensors. starts: int64 [tensors + 1], where each begins. hashes: uint64 [rows]. order: the rows by
    their hashes. beginnings: {hash of a first row: the tensors that begin with it}.
    """

    names: list[str]
    starts: numpy.ndarray
    hashes: numpy.ndarray
    order: numpy.ndarray
    beginnings: dict[int, list[int]]

    def owners(self, rows: numpy.ndarray) -> numpy.ndarray:
        """The tensors that rows belong to."""
        return self.starts.searchsorted(rows, "right") - 1


class RowIndex:
    """The rows of a model, to be found again. Memory: the hashes, and one tensor at a time."""

    def __init__(self, tensors: TensorFiles, dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype
        self._used: set[str] = set()
        hashes: dict[int, dict[str, numpy.ndarray]] = {}
        for name in tensors.names():
            tensor = tensors.get(name)
            if tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() and tensor.shape[-1] >= LEAST_COLUMNS:
                hashes.setdefault(tensor.shape[-1], {})[name] = _hashes(tensor.to(dtype))
        self._rows = {columns: _rows(of_names) for columns, of_names in hashes.items()}

    def pieces(self, name: str, tensor: torch.Tensor) -> tuple[Piece, ...] | None:
        """What a tensor of the file is made of; None where that is not rows of the model, number for number."""
        rows = self._rows.get(tensor.shape[-1])
        if rows is None:
            return None
        wanted = _hashes(tensor.to(self._dtype))

        def rank(i: int) -> tuple[bool, bool, bool]:
            """The best of tensors with equal rows comes first. Embeddings are often stored again as the head."""
            source = rows.names[i]
            return _block(source) != _block(name), ("emb" in source) != ("emb" in name), source in self._used

        found = _whole_tensors(rows, wanted, rank)
        if found is None:
            found = _row_by_row(rows, wanted, rank)
        if found is None or not self._equal(rows, found, tensor):
            return None
        pieces = tuple(_runs(rows, found))
        self._used.update(piece.source for piece in pieces)
        return pieces

    def _equal(self, rows: _Rows, found: numpy.ndarray, tensor: torch.Tensor) -> bool:
        """Hashes may collide, and were taken in a dtype that may be narrower than that of some tensors."""
        bits = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        given, owners = tensor.reshape(-1, tensor.shape[-1]).view(bits), torch.from_numpy(rows.owners(found))
        for i in owners.unique().tolist():
            source = self._tensors.get(rows.names[i]).reshape(-1, tensor.shape[-1])
            # in parts, or an embedding would be copied twice
            for here in (owners == i).nonzero().flatten().split(4096):
                picked = source[torch.from_numpy(found)[here] - int(rows.starts[i])].to(tensor.dtype)
                if not torch.equal(picked.view(bits), given[here]):
                    return False
        return True


def _hashes(tensor: torch.Tensor) -> numpy.ndarray:
    """uint64 [rows]. The words of a row are mixed, and summed with odd random weights: order counts."""
    import numpy

    data = tensor.reshape(-1, tensor.shape[-1]).view(torch.uint8).numpy()
    words = -(-data.shape[1] // 8)
    weights = numpy.random.default_rng(0).integers(2**63, size=words, dtype=numpy.uint64) * 2 + 1
    found = numpy.empty(len(data), numpy.uint64)
    step = max(1, 2**16 // words)  # as much as stays in a cache
    for start in range(0, len(data), step):
        chunk = data[start : start + step]
        padded = numpy.zeros((len(chunk), 8 * words), numpy.uint8)
        padded[:, : data.shape[1]] = chunk
        mixed = padded.view(numpy.uint64)
        mixed *= numpy.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> numpy.uint64(32)  # or the sign bits of two words would cancel
        mixed *= weights
        found[start : start + step] = mixed.sum(1)
    return found


def _rows(of_names: dict[str, numpy.ndarray]) -> _Rows:
    import numpy

    beginnings: dict[int, list[int]] = {}
    for i, hashes in enumerate(of_names.values()):
        beginnings.setdefault(int(hashes[0]), []).append(i)
    joined = numpy.concatenate(list(of_names.values()))
    starts = numpy.cumsum([0, *map(len, of_names.values())])
    return _Rows(list(of_names), starts, joined, joined.argsort(kind="stable"), beginnings)


def _block(name: str) -> str | None:
    """The number of the block: 3 of `model.layers.3.mlp.experts.7.up_proj.weight` and of `blk.3.ffn_up_exps.weight`."""
    return next((part for part in name.split(".") if part.isdecimal()), None)


def _whole_tensors(rows: _Rows, wanted: numpy.ndarray, rank: Callable[[int], Any]) -> numpy.ndarray | None:
    """The rows as whole tensors, one below the other."""
    import numpy

    lengths = numpy.diff(rows.starts)
    found, place, taken = [], 0, set()
    while place < len(wanted):
        fitting = rows.beginnings.get(int(wanted[place]), [])
        if len(fitting) > 1:
            fitting = sorted(fitting, key=lambda i: (-lengths[i], i in taken, *rank(i)))
        for i in fitting:
            here = rows.hashes[rows.starts[i] : rows.starts[i + 1]]
            if numpy.array_equal(here, wanted[place : place + len(here)]):
                break
        else:
            return None
        found.append(numpy.arange(rows.starts[i], rows.starts[i + 1]))
        place += len(here)
        taken.add(i)
    return numpy.concatenate(found)


def _row_by_row(rows: _Rows, wanted: numpy.ndarray, rank: Callable[[int], Any]) -> numpy.ndarray | None:
    """First the rows that are there once; then their neighbours, up and down; then all others."""
    import numpy

    low, high = (rows.hashes.searchsorted(wanted, side, sorter=rows.order) for side in ("left", "right"))
    if (low == high).any():
        return None
    found = numpy.where(high - low == 1, rows.order[low], -1)
    _extend(rows, wanted, found, 1)
    _extend(rows, wanted[::-1], found[::-1], -1)
    open_places = (found < 0).nonzero()[0]
    if not len(open_places):
        return found
    near = set(rows.owners(found[found >= 0]).tolist())
    turns = numpy.empty(len(rows.names), int)
    turns[sorted(range(len(turns)), key=lambda i: (i not in near, *rank(i)))] = numpy.arange(len(turns))
    free = numpy.ones(len(rows.hashes), bool)
    free[found[found >= 0]] = False
    by_hash = open_places[wanted[open_places].argsort(kind="stable")]
    for places in numpy.split(by_hash, numpy.diff(wanted[by_hash]).nonzero()[0] + 1):
        equal = rows.order[low[places[0]] : high[places[0]]]
        # one after the other, in the order of the model: each row is used once while there are enough
        equal = equal[numpy.lexsort((equal, turns[rows.owners(equal)], ~free[equal]))]
        found[places] = numpy.resize(equal, len(places))
        free[found[places]] = False
    return found


def _extend(rows: _Rows, wanted: numpy.ndarray, found: numpy.ndarray, step: int) -> None:
    """Where a row is open (-1): take the one that follows on the last that is known, if it is equal."""
    import numpy

    places = numpy.arange(len(found))
    last = numpy.maximum.accumulate(numpy.where(found >= 0, places, -1))
    guess = numpy.where(last >= 0, found[last] + step * (places - last), -1)
    inside = (found < 0) & (guess >= 0) & (guess < len(rows.hashes))
    guess[~inside] = 0
    fits = inside & (rows.hashes[guess] == wanted) & (rows.owners(guess) == rows.owners(found[last]))
    found[fits] = guess[fits]


def _runs(rows: _Rows, found: numpy.ndarray) -> Iterator[Piece]:
    """One piece for as long as the tensor stays the same."""
    import numpy

    owners = rows.owners(found)
    for run in numpy.split(found, numpy.diff(owners).nonzero()[0] + 1):
        i = int(rows.owners(run[:1])[0])
        local = run - rows.starts[i]
        whole = numpy.array_equal(local, numpy.arange(rows.starts[i + 1] - rows.starts[i]))
        yield Piece(rows.names[i], None if whole else torch.from_numpy(local))
