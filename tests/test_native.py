"""Native code for the active pairs of a bank against loops in float64 and against the stock parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.functional.kernels import native
from onn.functional.kernels.cutting import parts
from onn.functional.kernels.local import unit_gradients, unit_norms
from onn.functional.kernels.parts import Native, Ragged, active_pairs
from onn.functional.kernels.tilings import NATIVE, Tiling
from tests.numerics import (
    SIGMOID,
    STEEPEST_SIGMOID,
    Arithmetic,
    Rounded,
    analysed,
    assert_within,
    computed,
)
from tests.support import (
    BOUND,
    assert_close,
    assert_same,
    differentiate,
    make_case,
    needs_native,
    normal,
    record,
    tolerance,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TAPS: tuple[F.TapName, ...] = ("surprise", "neuron", "matrix", "bias")
COUNTS = (0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 300, 0)
"""Rows of experts, about the edges of every block of rows."""
HIDDEN, WIDTHS = (1, 3, 15, 16, 17, 63, 64, 65, 130), (1, 5, 6, 7, 16, 17)
EXTREMES = (math.inf, -math.inf, math.nan, 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 1.5)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Work(NamedTuple):
    """What the products of a bank are made of."""

    x: Tensor
    """[T, H]"""
    matrices: tuple[Tensor, ...]
    """[E, I, H] each"""
    rows: tuple[Tensor, ...]
    """[R, I] each, in the dtype of reductions"""
    into: Tensor
    """[T, H]: what a sum by token is added to."""
    segments: native.Segments


def make(seed: int, counts: Sequence[int], *, T: int, H: int, I: int, dtype: torch.dtype, number: int = 2) -> Work:
    source = torch.Generator().manual_seed(seed)
    token = [torch.randperm(T, generator=source)[:count].sort().values for count in counts]
    wide = F.reduction_dtype(dtype)
    return Work(
        x=normal(seed, T, H, dtype=dtype),
        matrices=tuple(normal(seed + 10 + j, len(counts), I, H, dtype=dtype) for j in range(number)),
        rows=tuple(normal(seed + 20 + j, sum(counts), I, dtype=wide) for j in range(number)),
        into=normal(seed + 1, T, H, dtype=wide),
        segments=native.Segments(torch.cat(token), ends=torch.tensor(counts).cumsum(0)),
    )


def owners(segments: native.Segments) -> Tensor:
    counts = torch.diff(segments.ends, prepend=segments.ends.new_zeros(1))
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def by_native(work: Work) -> dict[str, Tensor]:
    """All three products, of all matrices side by side; what they write to held NaN before."""
    into = work.into.clone()
    native.combine(list(zip(work.rows, work.matrices, strict=True)), work.segments, into)
    learnt = [matrix.new_full(matrix.shape, torch.nan) for matrix in work.matrices]
    native.outer(work.x, list(zip(work.rows, learnt, strict=True)), work.segments)
    projected = native.project(work.x, work.matrices, work.segments)
    return {"project": torch.stack(projected, dim=1), "combine": into, "outer": torch.stack(learnt, dim=1)}


def by_loop(work: Work) -> dict[str, Tensor]:
    """The same, pair by pair, in float64."""
    x, combined = work.x.double(), work.into.double()
    matrices, rows = (torch.stack(each, dim=1).double() for each in (work.matrices, work.rows))
    projected, learnt = torch.zeros_like(rows), torch.zeros_like(matrices)
    for r, (e, t) in enumerate(zip(owners(work.segments).tolist(), work.segments.token.tolist(), strict=True)):
        projected[r] = matrices[e] @ x[t]
        combined[t] += torch.tensordot(rows[r], matrices[e], dims=2)
        learnt[e] += rows[r][..., None] * x[t]
    return {"project": projected, "combine": combined, "outer": learnt}


def bounded(work: Work) -> dict[str, Rounded]:
    """The exact products and how far off those of a narrow dtype may be.

    Of each term two roundings of a factor, of the sum as many as there are terms, and one of what is stored.
    """
    at = Arithmetic(dtype=work.x.dtype)
    magnitudes = by_loop(Work(*tree.map1(Tensor.abs, work[:4]), work.segments))
    counts = torch.diff(work.segments.ends, prepend=work.segments.ends.new_zeros(1))
    of_token = torch.bincount(work.segments.token).tolist()
    number, I, H = len(work.rows), *work.matrices[0].shape[1:]
    terms = {"project": H, "combine": 1 + number * I * max([0, *of_token]), "outer": int(counts.max())}
    return {
        name: at.stored(exact, (at.gamma(terms[name]) + 2 * at.unit) * magnitudes[name])
        for name, exact in by_loop(work).items()
    }


@needs_native
@every_dtype
@pytest.mark.parametrize("I", WIDTHS)
@pytest.mark.parametrize("H", HIDDEN)
def test_products_are_those_of_a_loop_at_every_edge_of_a_block(H: int, I: int, dtype: torch.dtype) -> None:
    work = make(H + I, COUNTS, T=300, H=H, I=I, dtype=dtype)
    assert_within(by_native(work), bounded(work))


@needs_native
@every_dtype
@given(
    st.integers(0, 2**20),
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 3),
)
def test_products_are_those_of_a_loop_at_any_size(
    dtype: torch.dtype, seed: int, counts: list[int], H: int, I: int, number: int
) -> None:
    work = make(seed, counts, T=max(1, *counts), H=H, I=I, dtype=dtype, number=number)
    assert_within(by_native(work), bounded(work))


@needs_native
@every_dtype
@pytest.mark.parametrize(
    ("counts", "T", "H", "I"),
    [
        ((0, 0), 4, 5, 3),
        ((1,), 1, 17, 3),
        ((1, 0, 1), 1, 17, 3),
        ((0, 300, 0), 300, 17, 3),
        ((9000, 4097, 1), 9000, 3, 2),
        ((4097, 5), 4097, 130, 1),
        ((3000,), 3000, 9, 1),
    ],
    ids=["no pair", "one token", "one token, two experts", "one expert", "batches", "batches and columns", "deep"],
)
def test_products_are_those_of_a_loop_however_few_and_many_the_rows(
    counts: tuple[int, ...], T: int, H: int, I: int, dtype: torch.dtype
) -> None:
    work = make(0, counts, T=T, H=H, I=I, dtype=dtype)
    assert_within(by_native(work), bounded(work))


@needs_native
@every_dtype
@given(st.integers(0, 2**20), st.integers(1, 90), st.integers(1, 7), st.integers(1, 70), st.integers(1, 20))
def test_a_native_part_does_what_a_ragged_one_does(
    dtype: torch.dtype, seed: int, T: int, E: int, H: int, I: int
) -> None:
    case = make_case(seed, T=T, H=H, E=E, I=I, dtype=dtype)
    pairs, wide = active_pairs(case.weights), F.reduction_dtype(dtype)
    rows = torch.cat([normal(seed + 7, pairs.number, I, dtype=dtype), torch.zeros(1, I, dtype=dtype)])
    found = []
    for tiling in (Tiling(NATIVE, 2.0), Tiling(0, 2.0)):
        (part,) = parts(pairs, tokens=T, width=I, hidden=H, tiling=tiling)
        assert isinstance(part, Native if tiling.entries else Ragged)
        own, source, into = part.spread(rows), part.take(case.x, "x"), torch.ones(T + 1, H, dtype=wide)
        learnt, total = [torch.empty_like(matrix) for matrix in case.experts], torch.empty(E, I, dtype=wide)
        part.send(*((own, matrix) for matrix in case.experts), into=into)
        part.outer(source, *((own, one) for one in learnt))
        part.total(own, total)
        found.append((tuple(part.project(source, *case.experts)), into[:-1], tuple(learnt), total))
    assert_close(*found, bound=tolerance(dtype, terms=max(H, 3 * E * I, T) if dtype != torch.bfloat16 else 1))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_a_bank_over_many_blocks_is_within_its_derived_bound(density: float, dtype: torch.dtype) -> None:
    case = make_case(2, T=150, H=130, E=5, I=17, density=density, dtype=dtype)
    assert_within(computed(case, min_k=5, backend="native"), analysed(case, dtype))


@needs_native
@pytest.mark.parametrize("min_k", [1, 2, 5])
def test_a_bank_over_many_blocks_is_the_dense_one(min_k: int) -> None:
    case = make_case(2, T=150, H=130, E=5, I=17)
    got, expected = (differentiate(case, min_k=min_k, taps=TAPS, backend=name) for name in ("native", "dense"))
    weights = torch.where(case.weights != 0, expected.weights, 0)
    assert_close(got, expected._replace(weights=weights), bound=BOUND)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return tensor.mT.contiguous().mT


@needs_native
@every_dtype
def test_how_the_numbers_lie_in_memory_changes_nothing(dtype: torch.dtype) -> None:
    work = make(3, (4, 0, 7), T=9, H=18, I=5, dtype=dtype)
    matrices, rows = (tuple(map(transposed, each)) for each in (work.matrices, work.rows))
    assert not transposed(work.x).is_contiguous()
    assert_same(by_native(work._replace(x=transposed(work.x), matrices=matrices, rows=rows)), by_native(work))
    one = make_case(0, T=9, H=18, E=1, I=5, dtype=dtype)
    h1, h3, u = (normal(seed, 9, 5, dtype=dtype) for seed in range(3))
    assert_same(
        native.local(F.Residuals(transposed(h1), transposed(h3)), transposed(u)),
        native.local(F.Residuals(h1, h3), u),
    )
    assert_same(native.lengths(transposed(one.x)), native.lengths(one.x))


@needs_native
@every_dtype
def test_the_bits_depend_on_no_thread(dtype: torch.dtype) -> None:
    work = make(4, (300, 0, 65, 129, 1), T=300, H=130, I=17, dtype=dtype)
    case = make_case(4, T=128, H=64, E=8, I=16, dtype=dtype)
    before, found = torch.get_num_threads(), []

    def everything() -> tuple[Tensor, ...]:
        few, all_ = (differentiate(case, min_k=min_k, taps=TAPS, backend="native") for min_k in (2, 8))
        return (*by_native(work).values(), *tree.leaves(few), *tree.leaves(all_))

    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(everything).result())
    for other in found[1:]:
        assert_same(other, found[0])


@needs_native
@every_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_its_pairs(poison: float, dtype: torch.dtype) -> None:
    work = make(5, (20, 0, 33, 7), T=40, H=33, I=17, dtype=dtype)
    owner, token = owners(work.segments), work.segments.token
    row, clean = 25, by_native(work)
    e, t = int(owner[row]), int(token[row])
    of_token = work._replace(x=work.x.index_fill(0, torch.tensor(t), poison))
    of_row = work._replace(rows=tuple(one.index_fill(0, torch.tensor(row), poison) for one in work.rows))
    of_expert = work._replace(matrices=tuple(one.index_fill(0, torch.tensor(e), poison) for one in work.matrices))
    learners = owner[token == t].unique()
    expected: list[tuple[Work, dict[str, Tensor]]] = [
        (of_token, {"project": token == t, "outer": marked(learners, 4)}),
        (of_row, {"combine": marked(torch.tensor([t]), 40), "outer": marked(torch.tensor([e]), 4)}),
        (of_expert, {"project": owner == e, "combine": marked(token[owner == e], 40)}),
    ]
    for bad, spoilt in expected:
        for name, value in by_native(bad).items():
            mark = spoilt.get(name, torch.zeros(len(value), dtype=torch.bool))
            assert not value[mark].isfinite().any()
            assert_same(value[~mark], clean[name][~mark])


def marked(places: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, places, True)


def local_bounds(h1: Tensor, h3: Tensor, u: Tensor) -> dict[str, Rounded]:
    """`native.local`, operation by operation, with what each may be off; squares of the norms may underflow."""
    at = Arithmetic(dtype=F.reduction_dtype(u.dtype))
    gate, up, by = (at.exactly(part) for part in (h1, h3, u))
    opened = at.through(torch.sigmoid, gate, steepest=STEEPEST_SIGMOID, units=SIGMOID)
    gated = at.times(gate, opened)
    rest = at.plus(at.exactly(torch.ones(())), Rounded(-opened.value, opened.error))
    slope = at.plus(opened, at.times(gated, rest))
    c1, c3, a = at.times(at.times(by, up), slope), at.times(by, gated), at.times(gated, up)
    norm, error = map(torch.cat, zip(at.hypot(at.norm(c1), at.norm(c3)), at.norm(a), strict=True))
    limits = torch.finfo(at.dtype)
    lost = math.sqrt(2 * u.shape[-1] * limits.tiny * limits.eps)
    inner = at.total(at.times(a, by), dim=-1)
    return {"c1": c1, "c3": c3, "a": a, "inner": inner, "norms": Rounded(norm[:, 0], error[:, 0] + lost)}


@needs_native
@every_dtype
@pytest.mark.parametrize("I", [*WIDTHS, 33])
@pytest.mark.parametrize("scale", [0.01, 1.0, 25.0])
def test_unit_gradients_are_within_their_derived_bounds(scale: float, I: int, dtype: torch.dtype) -> None:
    h1, h3, u = (normal(seed, 70, I, dtype=dtype) for seed in range(3))
    h1 = (h1 * scale).clamp(-80, 80)
    local, inner, norms = native.local(F.Residuals(h1, h3), u)
    got = {**local._asdict(), "inner": inner[:, 0], "norms": norms.mT.flatten()}
    assert_within(got, local_bounds(h1, h3, u))


@needs_native
@every_dtype
def test_extreme_activations_are_finite_where_those_of_torch_are(dtype: torch.dtype) -> None:
    h1, h3, u = (
        part.flatten()[:, None].to(dtype) for part in torch.meshgrid(*[torch.tensor(EXTREMES)] * 3, indexing="ij")
    )
    local, inner, norms = native.local(F.Residuals(h1, h3), u)
    wide = F.reduction_dtype(dtype)
    stock = unit_gradients(F.Residuals(h1.to(wide), h3.to(wide)), u.to(wide))
    assert_close(local, stock, bound=tolerance(wide, terms=1))
    assert_close(inner, stock.a * u, bound=tolerance(wide, terms=1))
    assert_close(norms, torch.stack(unit_norms(stock), dim=-1), bound=tolerance(wide, terms=2))


@needs_native
@every_dtype
@pytest.mark.parametrize("H", HIDDEN)
def test_lengths_are_norms(H: int, dtype: torch.dtype) -> None:
    rows = normal(H, 7, H, dtype=dtype)
    rows[3], rows[5, 0] = 0, torch.inf
    exact = torch.linalg.vector_norm(rows.double(), dim=-1)
    assert_close(native.lengths(rows), exact, bound=tolerance(F.reduction_dtype(dtype), terms=H))


@needs_native
@given(st.integers(0, 2**20), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_the_least_surprised_pairs_are_those_of_the_mask(seed: int, T: int, E: int, min_k: int) -> None:
    source = torch.Generator().manual_seed(seed)
    active = torch.rand(T, E, generator=source) < 0.6
    values = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.5, torch.inf, torch.nan])
    surprise = values[torch.randint(len(values), (T, E), generator=source)]
    expert, token = active.mT.nonzero(as_tuple=True)
    got = native.least(surprise[token, expert], token, tokens=T, min_k=min_k, dtype=torch.float32)
    assert_same(got, F.min_k_mask(surprise, active, min_k=min(min_k, E))[token, expert])


@needs_native
def test_nothing_is_gathered() -> None:
    """No operator makes a row of H for each pair."""
    case = make_case(1, T=16, H=64, E=8, I=4, dtype=torch.float32)
    pairs = int((case.weights != 0).sum())
    recorded = record(lambda: differentiate(case, min_k=2, taps=TAPS, backend="native"))
    assert 0 < recorded.largest < pairs * 64
