"""The search over whole matrices: beside ggml's own quantizer, over chunks and threads, and where numbers are extreme.

The weights of errors are spelled here once more, by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from autoround_core import QuantScheme, SuperBlockWeight, UnsupportedError
from autoround_core.scheme import BLOCK_TYPES
from autoround_export.gguf import search
from autoround_export.gguf.block_grid import block_grid
from autoround_export.gguf.group_fit import Columns
from autoround_export.gguf.search import Fit, fit

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "ggml_blocks.safetensors")
PARTS = ("scale", "minimum", "sub_scale", "sub_minimum")
COLUMNS = 512
TYPES = list(BLOCK_TYPES)
KNOWN = pytest.mark.parametrize("known", [False, True], ids=["plain", "importance"])


def make_weight(rows: int, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed rows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    return torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.1) * 0.05


def make_importance(columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(99)).square() + 1e-3


def error_weights(weight: torch.Tensor, data_type: str, importance: torch.Tensor | None) -> torch.Tensor:
    """float64 [out, in]: what an error counts, from the formulas in words."""
    x, kind = weight.double(), BLOCK_TYPES[data_type]

    def mean_square(length: int) -> torch.Tensor:
        return (x * x).view(len(x), -1, length).mean(-1).repeat_interleave(length, dim=1)

    if importance is not None:
        mean = mean_square(x.shape[1] if data_type in ("q4_1", "q5_1") else 256)
        return importance.double() * (2 * mean + x * x) ** (0 if data_type == "q6_k" else 0.25)
    if data_type in ("q4_k", "q5_k"):
        return mean_square(kind.group_size).sqrt() + x.abs()
    return {"q2_k": x.abs(), "q3_k": x * x, "q6_k": x * x}.get(data_type, torch.ones_like(x))


def nearest(weight: torch.Tensor, data_type: str, found: Fit) -> torch.Tensor:
    """float64 [out, in]: each weight at its nearest code."""
    kind = BLOCK_TYPES[data_type]
    groups = weight.double().view(-1, kind.group_size)

    def product(outer, inner):
        outer = outer.double().flatten().repeat_interleave(kind.block // kind.group_size)
        return (outer if inner is None else outer * inner.double().flatten())[:, None]

    low = -(2 ** (kind.bits - 1)) if kind.sym else 0
    step = product(found.scale, found.sub_scale)
    shift = torch.zeros_like(step) if kind.sym else product(found.minimum, found.sub_minimum)
    codes = torch.where(step == 0, 0.0, (groups + shift) / step).round().clamp(low, low + 2**kind.bits - 1)
    return (codes * step - shift).view(weight.shape)


def row_errors(weight: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of each row, as a share of what zeros would lose."""
    energy, error = ((part.double() ** 2 * weights).sum(1) for part in (weight, values.double() - weight))
    return torch.where(energy == 0, error, error / energy)


def same(one: Fit, other: Fit) -> bool:
    pairs = [(getattr(one, part), getattr(other, part)) for part in PARTS]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def rows_of(found: Fit, rows: slice) -> Fit:
    return Fit(*(None if getattr(found, part) is None else getattr(found, part)[rows] for part in PARTS))


# --- beside ggml ----------------------------------------------------------------------------------------------


# rows of ordinary weights; the others are zero, constant, one outlier, or smaller than what float16 can hold
ORDINARY = [1, 2, 5, 7, 8, 10, 11, 12, 13, 14, 15]
# how much of ggml's error in these rows is left, by the weights that we take, (plain, with importance); with a margin
SHARES = {
    "q4_1": (0.83, 0.99), "q5_1": (0.82, 0.99), "q2_k": (0.89, 0.92), "q3_k": (0.9, 0.99), "q4_k": (0.99, 0.97),
    "q5_k": (0.95, 0.9), "q6_k": (0.94, 0.96),
}  # fmt: skip


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_no_more_error_than_ggml(data_type, known):
    weight, importance = GOLDEN["weight"], GOLDEN["importance"] if known else None
    weights = error_weights(weight, data_type, importance)
    theirs = GOLDEN[f"{data_type.upper()}.{'important' if known else 'plain'}.values"]
    ours = nearest(weight, data_type, fit(weight, data_type, importance))
    ours, theirs = (row_errors(weight, values, weights) for values in (ours, theirs))
    assert ours[ORDINARY].sum() <= SHARES[data_type][known] * theirs[ORDINARY].sum()
    # nor is any row much worse; what a constant row loses is the rounding of float16
    assert (ours <= 1.15 * theirs + 3e-6).all()


@pytest.mark.parametrize("data_type", TYPES)
def test_no_more_error_than_ggml_where_channels_count_by_importance_alone(data_type):
    weight, importance = GOLDEN["weight"], GOLDEN["importance"]
    theirs = GOLDEN[f"{data_type.upper()}.important.values"]
    ours = nearest(weight, data_type, fit(weight, data_type, importance))
    ours, theirs = (row_errors(weight, values, importance.double()) for values in (ours, theirs))
    assert ours[ORDINARY].sum() <= 0.99 * theirs[ORDINARY].sum()


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_errors_are_weighed_as_documented(data_type, known):
    weight, importance, kind = make_weight(32), make_importance() if known else None, BLOCK_TYPES[data_type]
    weights = error_weights(weight, data_type, importance).float()
    groups = [part.reshape(-1, kind.group_size).T.contiguous() for part in (weight, weights)]
    scale = block_grid(Columns(*groups, kind)).stored(32)[0]
    # all but those where the last bit of a weight decides
    assert (scale == fit(weight, data_type, importance).scale).double().mean() > 0.9


@pytest.mark.parametrize("data_type", ["q3_k", "q6_k"])
def test_a_constant_that_float16_holds_is_exact(data_type):
    weight = GOLDEN["weight"][3:5]
    assert weight.abs().unique().tolist() == [0.0625]
    assert torch.equal(GOLDEN[f"{data_type.upper()}.plain.values"][3:5], weight)
    assert torch.equal(nearest(weight, data_type, fit(weight, data_type)).float(), weight)


# --- rows, chunks, threads ------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.sampled_from(TYPES), st.integers(1, 4), st.integers(1, 3), st.integers(-3, 3), st.integers(0, 2**32 - 1))
def test_every_shape_gives_a_record_that_beats_zeros(data_type, rows, blocks, exponent, seed):
    kind = BLOCK_TYPES[data_type]
    columns = blocks * kind.block
    weight = make_weight(rows, columns, seed) * 10.0**exponent
    importance = make_importance(columns) if seed % 2 else None
    before = weight.clone()
    found = fit(weight, data_type, importance)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    SuperBlockWeight(QuantScheme.parse(f"GGUF:{data_type}"), codes, *(getattr(found, part) for part in PARTS)).check()
    errors = row_errors(weight, nearest(weight, data_type, found), error_weights(weight, data_type, importance))
    assert (errors <= 0.5).all()
    assert torch.equal(weight, before)
    assert importance is None or torch.equal(importance, make_importance(columns))


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_chunks_do_not_matter(data_type, known, monkeypatch):
    monkeypatch.setattr(search, "CHUNK_WEIGHTS", 50 * COLUMNS + 7)
    weight, importance = make_weight(103), make_importance() if known else None
    whole = fit(weight, data_type, importance)
    assert same(whole, fit(weight, data_type, importance))
    for rows in (slice(0, 50), slice(50, 100), slice(50, 103)):
        assert same(rows_of(whole, rows), fit(weight[rows], data_type, importance))
    # other cuts change the order of float32 sums, and so which of two nearly equal scales is chosen
    weights = error_weights(weight, data_type, importance)
    errors = row_errors(weight, nearest(weight, data_type, whole), weights)
    for size in (1, 1000):
        monkeypatch.setattr(search, "CHUNK_WEIGHTS", size * COLUMNS)
        apart = row_errors(weight, nearest(weight, data_type, fit(weight, data_type, importance)), weights)
        assert (apart / errors - 1).abs().median() < 1e-4 and 0.99 < apart.sum() / errors.sum() < 1.01


@pytest.mark.parametrize("data_type", ["q4_1", "q3_k", "q4_k"])
def test_threads_do_not_matter(data_type):
    weight, importance = make_weight(72), make_importance()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(fit(weight, data_type, importance))
    finally:
        torch.set_num_threads(threads)
    assert same(found[0], found[1]) and same(found[1], found[2])


@pytest.mark.parametrize("data_type", TYPES)
def test_16_bit_and_strided_weights_are_as_their_float32_copies(data_type):
    weight, importance = make_weight(6), make_importance()
    for dtype in (torch.bfloat16, torch.float16):
        rounded = weight.to(dtype)
        assert same(fit(rounded, data_type, importance), fit(rounded.float(), data_type, importance))
    strided = torch.stack([weight, -weight], dim=-1)[..., 0]
    assert not strided.is_contiguous() and same(fit(strided, data_type), fit(weight, data_type))
    # by columns: sums in another order
    found = [fit(view, data_type, importance) for view in (weight.T.contiguous().T, weight)]
    weights = error_weights(weight, data_type, importance)
    errors = [row_errors(weight, nearest(weight, data_type, each), weights) for each in found]
    assert torch.allclose(*errors, rtol=0.05)
    wanting = weight.clone().requires_grad_()
    assert not fit(wanting, data_type).scale.requires_grad


# --- importance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", TYPES)
def test_only_the_ratios_of_importance_count(data_type):
    weight, importance = make_weight(4), make_importance()
    assert same(fit(weight, data_type, importance), fit(weight, data_type, importance * 2**9))
    assert same(fit(weight, data_type, importance), fit(weight, data_type, importance.double()))


@pytest.mark.parametrize("data_type", TYPES)
def test_a_channel_that_is_nearly_silent_spoils_no_other(data_type):
    weight = make_weight(16, 256)
    weight[:, 7] = 3.0  # far outside of everything else
    loud = torch.ones(256)
    silent = loud.index_fill(0, torch.tensor(7), 1e-7)
    group = [i for i in range(BLOCK_TYPES[data_type].group_size) if i != 7]
    silent, loud = (((nearest(weight, data_type, fit(weight, data_type, importance)) - weight) ** 2)[:, group].sum()
                    for importance in (silent, loud))
    assert silent < 0.95 * loud


# --- numbers that are no ordinary ones ------------------------------------------------------------------------


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_extreme_weights(data_type, known):
    importance = make_importance(256) if known else None

    def lost(weight: torch.Tensor) -> torch.Tensor:
        return row_errors(weight, nearest(weight, data_type, fit(weight, data_type, importance)), torch.ones(256))

    # what is left of these is the rounding of float16, or of a sub-scale
    constant = torch.tensor([0.37, -0.37, 0.02, -500.0]).view(4, 1).expand(4, 256)
    outlier, one = make_weight(4, 256), torch.zeros(2, 256)
    outlier[:2, 5], outlier[2:, 200], one[0, 9], one[1, 250] = 3000, -3000, 1, -1
    for weight in (constant, outlier, one):
        assert (lost(weight) < 2e-5).all()
    # one sign only: what lies far from zero is a matter of the minimum, if there is one
    kind, negative = BLOCK_TYPES[data_type], -make_weight(4, 256).abs()
    limit = {2: 0.12, 3: 0.06, 4: 0.008, 5: 0.002, 6: 0.0015}[kind.bits]
    assert (lost(negative) < limit).all() and (lost(-negative) < limit).all()
    assert (lost(negative - 2) < limit / (10 if kind.sym else 40)).all()
    # where float16 has few bits left, a minimum may miss by as much as there is
    assert (lost(negative * 1e-5) < 1.5).all()


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_zeros_stay_zeros(data_type, known):
    importance = make_importance(256) if known else None
    weight = make_weight(4, 256)
    weight[1], weight[2, 64:96] = 0, 0
    # too small for float16 is as good as zero, and never a NaN
    weight[3] *= 1e-20
    found = fit(weight, data_type, importance)
    assert not found.scale[1].any() and (found.minimum is None or not found.minimum[1].any())
    values = nearest(weight, data_type, found)
    assert not values[1].any() and not values[2, 64:96].any() and not values[3].any()
    for tiny in (1e-38, 1e-44):
        assert not nearest(weight * tiny, data_type, fit(weight * tiny, data_type, importance)).any()


@KNOWN
@pytest.mark.parametrize("data_type", TYPES)
def test_a_scale_beyond_float16_is_refused(data_type, known):
    weight = make_weight(3, 256)
    weight[1] *= 1e9
    with pytest.raises(UnsupportedError, match="65504"):
        fit(weight, data_type, make_importance(256) if known else None)
    # the greatest that float16 holds is no problem
    weight[1] *= 6e4 / weight[1].abs().max()
    assert (row_errors(weight, nearest(weight, data_type, fit(weight, data_type)), torch.ones(256)) < 0.3).all()


@pytest.mark.parametrize("data_type", TYPES)
def test_large_weights_are_refused_or_stored(data_type):
    for greatest in (1e5, 1e6, 1e7, 1e18, 1e30):
        for row in make_weight(4, 256).split(1):
            weight = row * (greatest / row.abs().max())
            try:
                values = nearest(weight, data_type, fit(weight, data_type))
            except UnsupportedError:
                continue
            assert (row_errors(weight, values, torch.ones(256)) < 0.3).all(), greatest
