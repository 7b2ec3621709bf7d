"""What native code does to the activations of pairs between the products, operation by operation."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn.functional.kernels import native
from onn.functional.kernels.local import unit_gradients, unit_norms
from tests.numerics import (
    SIGMOID,
    STEEPEST_SIGMOID,
    Arithmetic,
    Rounded,
    assert_within,
    together,
)
from tests.support import assert_close, assert_same, listed_pairs, make_case, needs_native, normal, tolerance
from tests.test_native import COUNTS, HIDDEN, WIDTHS, every_dtype, make, owners, transposed

EXTREMES = (math.inf, -math.inf, math.nan, 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 1.5)


class Activations(NamedTuple):
    """What `native.local` takes."""

    residuals: F.Residuals
    """[R, I]"""
    u: Tensor
    pairs: native.Active
    lengths: native.Lengths
    """[T]"""


def make_local(seed: int, *, T: int, E: int, I: int, dtype: torch.dtype, scale: float = 1) -> Activations:
    weights = make_case(seed, T=T, H=2, E=E, I=1, dtype=dtype).weights
    pairs = listed_pairs(weights)
    h1, h3, u = (normal(seed + place, pairs.number, I, dtype=dtype) for place in range(3))
    lengths = (normal(seed + place, T, dtype=F.reduction_dtype(dtype)).abs() for place in (4, 5))
    return Activations(F.Residuals((h1 * scale).clamp(-80, 80), h3), u, pairs, native.Lengths(*lengths))


def locally(one: Activations) -> dict[str, Tensor]:
    T, R = len(one.lengths.x), one.pairs.number
    used_up = one.pairs._replace(weight=one.pairs.weight.clone())
    rows, d_weights, surprise = native.local(one.residuals, one.u.clone(), used_up, tokens=T, lengths=one.lengths)
    place = (one.pairs.segments.token, owners(one.pairs.segments))
    assert int(d_weights.count_nonzero()) <= R
    weighted = native.activate(one.residuals, one.pairs.weight)
    return {**rows._asdict(), "weighted": weighted, "inner": d_weights[place], "surprise": surprise}


def local_bounds(one: Activations) -> dict[str, Rounded]:
    """`locally`, operation by operation, with what each may be off; squares of the norms may underflow."""
    wide, stored = Arithmetic(dtype=one.pairs.weight.dtype), Arithmetic(dtype=one.u.dtype)
    gate, up, by = (wide.exactly(part) for part in (*one.residuals, one.u))
    weight = wide.exactly(one.pairs.weight[:, None])
    opened = wide.through(torch.sigmoid, gate, steepest=STEEPEST_SIGMOID, units=SIGMOID)
    gated = wide.times(gate, opened)
    rest = wide.plus(wide.exactly(torch.ones(())), Rounded(-opened.value, opened.error))
    slope = wide.plus(opened, wide.times(gated, rest))
    c1, c3, a = wide.times(wide.times(by, up), slope), wide.times(by, gated), wide.times(gated, up)
    of_x, of_dy = (wide.exactly(length[one.pairs.segments.token][:, None]) for length in one.lengths)
    limits = torch.finfo(wide.dtype)
    lost = math.sqrt(2 * one.u.shape[-1] * limits.tiny * limits.eps)
    first, second, outer = (Rounded(norm.value, norm.error + lost) for norm in map(wide.norm, (c1, c3, a)))
    both = wide.hypot(wide.times(wide.hypot(first, second), of_x), wide.times(outer, of_dy))
    surprise = wide.times(both, Rounded(weight.value.abs(), weight.error))
    results = {name: wide.times(rows, weight) for name, rows in (("c1", c1), ("c3", c3), ("a", a), ("weighted", a))}
    results["inner"] = wide.total(wide.times(a, by), dim=-1)
    return {
        **{name: stored.stored(*result) for name, result in results.items()},
        "surprise": surprise.over(lambda column: column[:, 0]),
    }


@needs_native
@every_dtype
@pytest.mark.parametrize("I", [*WIDTHS, 33])
@pytest.mark.parametrize("scale", [0.01, 1.0, 25.0])
def test_activations_are_within_their_derived_bounds(scale: float, I: int, dtype: torch.dtype) -> None:
    one = make_local(I, T=70, E=5, I=I, dtype=dtype, scale=scale)
    assert_within(locally(one), local_bounds(one))


@needs_native
@every_dtype
def test_how_the_numbers_lie_in_memory_changes_nothing(dtype: torch.dtype) -> None:
    one = make_local(0, T=9, E=4, I=5, dtype=dtype)
    moved = one._replace(residuals=F.Residuals(*map(transposed, one.residuals)), u=transposed(one.u))
    assert_same(locally(moved), locally(one))
    assert_same(native.lengths(transposed(one.u)), native.lengths(one.u))
    total, segments = native.total(transposed(one.u), one.pairs.segments, scale=None), one.pairs.segments
    assert_same(total, native.total(one.u, segments, scale=None))


@needs_native
def test_surprise_that_is_not_measured_has_no_entries_and_leaves_the_weights() -> None:
    one = make_local(0, T=9, E=4, I=5, dtype=torch.float32)
    before = one.pairs.weight.clone()
    *_, surprise = native.local(one.residuals, one.u, one.pairs, tokens=9, lengths=None)
    assert len(surprise) == 0
    assert_same(one.pairs.weight, before)


@needs_native
@every_dtype
def test_spread_values_lie_at_their_token_and_expert(dtype: torch.dtype) -> None:
    weights = make_case(3, T=70, H=2, E=5, I=1, dtype=dtype).weights
    pairs = listed_pairs(weights)
    table = native.spread(pairs.weight, pairs.segments, tokens=70, dtype=dtype)
    assert_same(table, weights.to(table.dtype))


@needs_native
@every_dtype
def test_extreme_activations_are_finite_where_those_of_torch_are(dtype: torch.dtype) -> None:
    h1, h3, u = (
        part.flatten()[:, None].to(dtype) for part in torch.meshgrid(*[torch.tensor(EXTREMES)] * 3, indexing="ij")
    )
    wide, R = F.reduction_dtype(dtype), len(u)
    pairs = listed_pairs(torch.ones(R, 1, dtype=dtype))
    ones = native.Lengths(*torch.ones(2, R, dtype=wide))
    local, inner, surprise = native.local(F.Residuals(h1, h3), u.clone(), pairs, tokens=R, lengths=ones)
    stock = unit_gradients(F.Residuals(h1.to(wide), h3.to(wide)), u.to(wide))
    stored = tolerance(dtype if dtype != torch.bfloat16 else wide, terms=1)
    assert_close(local, F.Local(*(rows.to(dtype) for rows in stock)), bound=stored)
    assert_close(inner, (stock.a * u).to(dtype), bound=stored)
    assert_close(surprise, torch.hypot(*unit_norms(stock)), bound=tolerance(wide, terms=2))


@needs_native
@every_dtype
@pytest.mark.parametrize("H", HIDDEN)
def test_lengths_are_norms(H: int, dtype: torch.dtype) -> None:
    rows = normal(H, 7, H, dtype=dtype)
    rows[3], rows[5, 0] = 0, torch.inf
    exact = torch.linalg.vector_norm(rows.double(), dim=-1)
    assert_close(native.lengths(rows), exact, bound=tolerance(F.reduction_dtype(dtype), terms=H))


@needs_native
@every_dtype
@pytest.mark.parametrize("I", WIDTHS)
def test_totals_are_sums_over_the_pairs_of_an_expert(I: int, dtype: torch.dtype) -> None:
    work = make(I, COUNTS, T=300, H=1, I=I, dtype=dtype, number=1)
    (rows,), wide = work.rows, Arithmetic(dtype=F.reduction_dtype(dtype))
    scale = normal(1, 300, dtype=wide.dtype)
    roots = wide.times(wide.exactly(rows), wide.exactly(scale[work.segments.token][:, None]))
    for factor, terms in ((None, wide.exactly(rows)), (scale, wide.times(roots, roots))):
        sums = [wide.total(terms.over(own), dim=0) for own in slices(work.segments)]
        assert_within({"total": native.total(rows, work.segments, scale=factor)}, {"total": together(sums)})


def slices(segments: native.Segments) -> list[Callable[[Tensor], Tensor]]:
    """What takes the rows of each expert."""
    ends = [0, *segments.ends.tolist()]
    return [operator.itemgetter(slice(*edge)) for edge in itertools.pairwise(ends)]
