"""What a converter did to a matrix is found again from its numbers alone, and never claimed where it is not so."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_export.gguf.outline import Piece
from autoround_export.gguf.row_index import RowIndex


class Model:
    """Tensors by name, as those of a checkpoint."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def index(dtype: torch.dtype = torch.bfloat16, **tensors: torch.Tensor) -> RowIndex:
    """Of a model whose names have dots for the double underscores."""
    return RowIndex(Model({name.replace("__", "."): tensor for name, tensor in tensors.items()}), dtype)


def said(pieces: tuple[Piece, ...] | None) -> list[tuple[str, list[int] | None]] | None:
    if pieces is None:
        return None
    return [(piece.source, None if piece.rows is None else piece.rows.tolist()) for piece in pieces]


A, B = matrix(4, 64, seed=1), matrix(6, 64, seed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [32, 33, 64, 1000])
def test_whole_tensors_alone_joined_and_stacked(dtype, columns):
    a, b = matrix(4, columns, seed=1, dtype=dtype), matrix(4, columns, seed=2, dtype=dtype)
    model = index(dtype, a=a, b=b)
    assert said(model.pieces("x", a)) == [("a", None)]
    assert said(model.pieces("x", torch.cat([b, a]))) == [("b", None), ("a", None)]
    assert said(model.pieces("x", torch.stack([a, b]))) == [("a", None), ("b", None)]
    # a router of a 16-bit model is stored in 32 bits
    assert said(model.pieces("x", a.float())) == [("a", None)]


def test_heads_are_permuted():
    # two heads of four rows: in each, the second half is woven into the first
    rows = [0, 2, 1, 3, 4, 6, 5, 7]
    a = matrix(8, 64)
    assert torch.equal(a[rows], a.reshape(2, 2, 2, 64).transpose(1, 2).reshape(8, 64))
    assert said(index(a=a, b=B).pieces("x", a[rows])) == [("a", rows)]


def test_parts_of_tensors():
    model = index(a=A, b=B)
    assert said(model.pieces("x", torch.cat([A[2:], B[:2]]))) == [("a", [2, 3]), ("b", [0, 1])]
    assert said(model.pieces("x", torch.cat([A, B[3:]]))) == [("a", None), ("b", [3, 4, 5])]
    # woven: a row of one, a row of the other
    woven = torch.stack([A, B[:4]], dim=1).view(8, 64)
    assert said(model.pieces("x", woven)) == [("a", [0]), ("b", [0]), ("a", [1]), ("b", [1]),
                                              ("a", [2]), ("b", [2]), ("a", [3]), ("b", [3])]  # fmt: skip
    # heads of keys that are written twice
    assert said(model.pieces("x", A.repeat_interleave(2, dim=0))) == [("a", [0, 0, 1, 1, 2, 2, 3, 3])]


def test_experts_of_one_tensor_are_taken_apart():
    # [experts, gate and up, in]: rows count through all experts
    fused = matrix(2, 4, 64)
    model = index(e=fused)
    assert said(model.pieces("gate", fused[:, :2])) == [("e", [0, 1, 4, 5])]
    assert said(model.pieces("up", fused[:, 2:])) == [("e", [2, 3, 6, 7])]
    assert said(model.pieces("both", fused)) == [("e", None)]


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_tensors_the_one_of_that_name(order):
    names = ["lm_head.weight", "model.embed_tokens.weight"][::order]
    for files in (["token_embd.weight", "output.weight"], ["output.weight", "token_embd.weight"]):
        model = RowIndex(Model({name: B.clone() for name in names}), torch.bfloat16)
        found = {name: said(model.pieces(name, B)) for name in files}
        assert found == {"token_embd.weight": [("model.embed_tokens.weight", None)],
                         "output.weight": [("lm_head.weight", None)]}  # fmt: skip


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 2, 1, 3]])
def test_of_equal_blocks_the_one_of_that_number(rows):
    # models are made larger by doubling blocks
    tensors = {f"model.layers.{i}.q.weight": A.clone() for i in (0, 1, 10)}
    model = RowIndex(Model(tensors), torch.bfloat16)
    for i in (10, 0, 1):
        [(source, _)] = said(model.pieces(f"blk.{i}.attn_q.weight", A[rows]))
        assert source == f"model.layers.{i}.q.weight"


def test_equal_experts_are_used_in_turn():
    zeros = torch.zeros(2, 64, dtype=torch.bfloat16)
    model = index(x__0=zeros, x__1=A[:2], x__2=zeros.clone(), x__3=zeros.clone())
    stacked = torch.stack([zeros, A[:2], zeros, zeros])
    assert said(model.pieces("x", stacked)) == [(f"x.{i}", None) for i in range(4)]


def test_equal_rows_continue_the_run_that_they_lie_in():
    def emptied(tensor: torch.Tensor, *rows: int) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor(rows), 0)

    first, second = emptied(A, 0, 2), emptied(B, 0, 1, 4)
    model = index(a=first, b=second)
    # the last row of the run is found from above
    assert said(model.pieces("x", second[2:5])) == [("b", [2, 3, 4])]
    # the first rows are found from below
    assert said(model.pieces("x", torch.cat([second[:3], first[1:]]))) == [("b", [0, 1, 2]), ("a", [1, 2, 3])]
    # 4 follows on 3, 1 comes before 2; the first has no such neighbour and is the one that is left of this tensor
    assert said(model.pieces("x", second[[4, 3, 0, 5, 1, 2]])) == [("b", [0, 3, 4, 5, 1, 2])]


def test_what_is_not_rows_of_the_model_is_not_claimed():
    square = matrix(64, 64)
    model = index(a=A, square=square)
    assert model.pieces("x", square.T.contiguous()) is None
    assert model.pieces("x", A + 1) is None
    assert model.pieces("x", torch.cat([A, torch.ones(1, 64, dtype=torch.bfloat16)])) is None
    assert model.pieces("x", A[:, :32].contiguous()) is None
    assert model.pieces("x", A.view(8, 32)) is None


def test_rows_equal_only_when_rounded_are_not_claimed():
    exact = matrix(4, 64, dtype=torch.float32)
    model = index(a=exact, b=B)
    # rounded by the converter: the same rows, in the dtype of the file
    assert said(model.pieces("x", exact.bfloat16())) == [("a", None)]
    assert said(model.pieces("x", exact)) == [("a", None)]
    assert model.pieces("x", exact.bfloat16().float()) is None
    assert model.pieces("x", B.float() * (1 + 2**-20)) is None


def test_numbers_are_compared_bit_for_bit():
    strange = A.clone()
    strange[0, 0], strange[1, 1], strange[2, 2] = float("nan"), float("inf"), -0.0
    model = index(a=strange)
    assert said(model.pieces("x", strange.flip(0))) == [("a", [3, 2, 1, 0])]
    positive = strange.clone()
    positive[2, 2] = 0.0
    assert model.pieces("x", positive) is None


def test_signs_do_not_cancel_in_a_hash():
    # the two top bits of two words: a sum of words times odd numbers is the same with both flipped
    rows = A[:1].repeat(2, 1)
    rows[1, [3, 7]] *= -1
    assert said(index(a=rows).pieces("x", rows.flip(0))) == [("a", [1, 0])]


def test_short_rows_vectors_and_integers_are_left_alone():
    model = index(short=A[:, :16].contiguous(), vector=A[0], number=torch.ones(4, 64, dtype=torch.int32))
    assert model.pieces("x", A[:, :16].contiguous()) is None
    assert model.pieces("x", A[:1]) is None
    assert model.pieces("x", torch.ones(4, 64).bfloat16()) is None


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_cut_and_pasted_is_put_together_again(data):
    # few different rows, so that many are equal
    pool = torch.stack([torch.full((32,), float(i)) for i in range(5)])
    tensors = {}
    for i in range(data.draw(st.integers(1, 4), "tensors")):
        tensors[f"t.{i}"] = pool[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6), "rows")]
    everything = torch.cat(list(tensors.values()))
    rows = data.draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=12), "wanted")
    pieces = RowIndex(Model(tensors), torch.float32).pieces("x", everything[rows])
    found = [tensors[p.source] if p.rows is None else tensors[p.source][p.rows] for p in pieces]
    assert torch.equal(torch.cat(found), everything[rows])
    # as long as can be: the next piece is of another tensor
    assert all(one.source != two.source for one, two in pairwise(pieces))
