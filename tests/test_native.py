"""Native code for the active pairs of a bank against loops in float64 and against the dense bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from experiments.bench_cases import BankCase, bank_step, random_bank
from experiments.measure import peak_bytes
from onn import tree
from onn.functional.kernels import native
from onn.functional.kernels.tilings import NATIVE, Tiling
from tests.numerics import (
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
    listed_pairs,
    make_case,
    needs_native,
    normal,
    record,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TAPS: tuple[F.TapName, ...] = ("surprise", "neuron", "matrix", "bias")
COUNTS = (0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 300, 0)
"""Rows of experts, about the edges of every block of rows."""
HIDDEN, WIDTHS = (1, 3, 15, 16, 17, 63, 64, 65, 130), (1, 5, 6, 7, 16, 17)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Work(NamedTuple):
    """What the products of a bank are made of."""

    x: Tensor
    """[T, H]"""
    matrices: tuple[Tensor, ...]
    """[E, I, H] each"""
    rows: tuple[Tensor, ...]
    """[R, I] each"""
    segments: native.Segments


def make(seed: int, counts: Sequence[int], *, T: int, H: int, I: int, dtype: torch.dtype, number: int = 2) -> Work:
    source = torch.Generator().manual_seed(seed)
    token = [torch.randperm(T, generator=source)[:count].sort().values for count in counts]
    return Work(
        x=normal(seed, T, H, dtype=dtype),
        matrices=tuple(normal(seed + 10 + j, len(counts), I, H, dtype=dtype) for j in range(number)),
        rows=tuple(normal(seed + 20 + j, sum(counts), I, dtype=dtype) for j in range(number)),
        segments=native.Segments(torch.cat(token), ends=torch.tensor(counts).cumsum(0)),
    )


def owners(segments: native.Segments) -> Tensor:
    counts = torch.diff(segments.ends, prepend=segments.ends.new_zeros(1))
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def by_native(work: Work) -> dict[str, Tensor]:
    """All three products, of all matrices side by side; what they write to held NaN before."""
    projected, learnt = ([one.new_full(one.shape, torch.nan) for one in ones] for ones in (work.rows, work.matrices))
    native.project(work.x, work.matrices, work.segments, out=projected)
    native.outer(work.x, list(zip(work.rows, learnt, strict=True)), work.segments)
    products = list(zip(work.rows, work.matrices, strict=True))
    return {
        "project": torch.stack(projected, dim=1),
        "combine": native.combine(products, work.segments, tokens=len(work.x)),
        "outer": torch.stack(learnt, dim=1),
    }


def by_loop(work: Work) -> dict[str, Tensor]:
    """The same, pair by pair, in float64."""
    x = work.x.double()
    matrices, rows = (torch.stack(each, dim=1).double() for each in (work.matrices, work.rows))
    projected, combined, learnt = (torch.zeros_like(one) for one in (rows, x, matrices))
    for r, (e, t) in enumerate(zip(owners(work.segments).tolist(), work.segments.token.tolist(), strict=True)):
        projected[r] = matrices[e] @ x[t]
        combined[t] += torch.tensordot(rows[r], matrices[e], dims=2)
        learnt[e] += rows[r][..., None] * x[t]
    return {"project": projected, "combine": combined, "outer": learnt}


def bounded(work: Work) -> dict[str, Rounded]:
    """The exact products and how far off those of a narrow dtype may be: sums of as many terms, rounded once."""
    at = Arithmetic(dtype=work.x.dtype)
    magnitudes = by_loop(Work(*tree.map1(Tensor.abs, work[:3]), work.segments))
    counts = torch.diff(work.segments.ends, prepend=work.segments.ends.new_zeros(1))
    of_token = torch.bincount(work.segments.token).tolist()
    number, I, H = len(work.rows), *work.matrices[0].shape[1:]
    terms = {"project": H, "combine": number * I * max([0, *of_token]), "outer": int(counts.max())}
    return {name: at.stored(exact, at.gamma(terms[name]) * magnitudes[name]) for name, exact in by_loop(work).items()}


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
@given(st.integers(0, 2**20), st.integers(0, 40), st.integers(1, 70), st.floats(0, 1))
def test_the_pairs_are_those_whose_weight_is_not_zero(
    dtype: torch.dtype, seed: int, T: int, E: int, density: float
) -> None:
    weights = make_weights(seed, T, E, density=density, dtype=dtype)
    pairs = listed_pairs(weights)
    expert, token = weights.mT.nonzero(as_tuple=True)
    assert_same(pairs.segments.token, token)
    assert_same(pairs.segments.ends, torch.bincount(expert, minlength=E).cumsum(0))
    assert_same(pairs.weight, weights[token, expert].to(F.reduction_dtype(dtype)))
    assert pairs.most == max([0, *(weights != 0).sum(dim=1).tolist()])


def make_weights(seed: int, T: int, E: int, *, density: float, dtype: torch.dtype) -> Tensor:
    """Combine weights [T, E], some 0, some of these -0, and NaN, which is not 0."""
    source = torch.Generator().manual_seed(seed)
    weights = normal(seed, T, E, dtype=dtype)
    weights = torch.where(torch.rand(T, E, generator=source) < density, weights, 0 * weights)
    return weights.masked_fill(torch.rand(T, E, generator=source) < 0.02, torch.nan)


@needs_native
@given(
    st.integers(0, 2**20),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_a_bank_of_any_size_is_the_dense_one(seed: int, T: int, E: int, H: int, I: int, min_k: int) -> None:
    case = make_case(seed, T=T, H=H, E=E, I=I)
    backends: tuple[Tiling, Literal["dense"]] = (Tiling(NATIVE, math.inf), "dense")
    got, expected = (differentiate(case, min_k=min(min_k, E), taps=TAPS, backend=backend) for backend in backends)
    weights = torch.where(case.weights != 0, expected.weights, 0)
    assert_close(got, expected._replace(weights=weights), bound=BOUND)


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
    weights = make_weights(0, 9, 5, density=0.5, dtype=torch.float32)
    assert_same(listed_pairs(transposed(weights)).segments, listed_pairs(weights).segments)


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


@needs_native
@given(st.integers(0, 2**20), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_the_least_surprised_pairs_are_those_of_the_mask(seed: int, T: int, E: int, min_k: int) -> None:
    source = torch.Generator().manual_seed(seed)
    active = torch.rand(T, E, generator=source) < 0.6
    values = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.5, torch.inf, torch.nan])
    surprise = values[torch.randint(len(values), (T, E), generator=source)]
    segments = listed_pairs(active.to(torch.float32)).segments
    of_pairs = surprise[segments.token, owners(segments)]
    places, kept = native.least(of_pairs, segments, tokens=T, min_k=min_k, dtype=torch.float32)
    mask = F.min_k_mask(surprise, active, min_k=min(min_k, E))
    expert, token = mask.mT.nonzero(as_tuple=True)
    assert_same(kept, native.Segments(token, torch.bincount(expert, minlength=E).cumsum(0)))
    assert_same((segments.token[places], owners(segments)[places]), (token, expert))


@needs_native
def test_nothing_is_gathered() -> None:
    """No operator makes a row of H for each pair."""
    case = make_case(1, T=16, H=64, E=8, I=4, dtype=torch.float32)
    pairs = int((case.weights != 0).sum())
    recorded = record(lambda: differentiate(case, min_k=2, taps=TAPS, backend="native"))
    assert 0 < recorded.largest < pairs * 64


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device's memory is measured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["func", "autograd"])
@pytest.mark.parametrize("min_k", [2, 16])
def test_surprise_peaks_no_higher_than_a_pass_without_it(min_k: int, engine: tree.Engine, dtype: torch.dtype) -> None:
    bank = random_bank(BankCase(T=128, H=64, E=16, I=32, k=8), dtype, seed=0)

    def peak(names: tuple[F.TapName, ...]) -> int:
        return peak_bytes(bank_step(bank, names=names, min_k=min_k, backend="native", engine=engine, eager=True))

    assert 0 < peak(("surprise",)) <= peak(())
