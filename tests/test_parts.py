"""How the active pairs of a bank are cut into parts: every pair once, and rows of nobody bring nothing."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onn.functional.kernels.cutting import parts
from onn.functional.kernels.parts import Padded, Pairs, Whole, active_pairs, kept_pairs
from onn.functional.kernels.tilings import Tiling, default_tiling
from tests.support import CUTS, assert_same


@st.composite
def routed(draw: st.DrawFn) -> Tensor:
    T, E = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.rand(T, E, generator=source) * (torch.rand(T, E, generator=source) < density)


@given(routed(), CUTS)
def test_parts_hold_every_expert_and_every_pair_once(weights: Tensor, tiling: Tiling) -> None:
    (T, E), pairs = weights.shape, active_pairs(weights)
    seen = torch.zeros(pairs.number + 1, 1)
    experts: list[int] = []
    for part in parts(pairs, tokens=T, width=2, hidden=3, tiling=tiling):
        rows = part.spread(torch.ones(pairs.number + 1, 1).index_fill(0, torch.tensor(pairs.number), 0))
        into = torch.zeros_like(seen)
        part.put(rows, into)
        seen[:-1] += into[:-1]
        part.put(torch.ones_like(rows), into)
        assert float(into[-1]) == 0
        match part:
            case Padded(experts=own, rows=rows_each):
                size = own.stop - own.start
                assert size == 1 or size * rows_each * 3 <= max(tiling.entries, 3)
                experts += range(own.start, own.stop)
            case Whole(experts=own):
                assert pairs.counts[own][0] >= tiling.whole_from * T
                assert all(count >= 0.75 * tiling.whole_from * T for count in pairs.counts[own])
                experts += range(own.start, own.stop)
    assert experts == list(range(E))
    assert_same(seen[:-1], torch.ones(pairs.number, 1))


@given(routed(), st.integers(0, 2**20))
def test_kept_pairs_are_the_active_pairs_of_the_kept_weights(weights: Tensor, seed: int) -> None:
    pairs = active_pairs(weights)
    keep = torch.rand(pairs.number, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept, places = kept_pairs(pairs, keep)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    mask[pairs.token[:-1], pairs.expert[:-1]] = keep
    expected = active_pairs(torch.where(mask, weights, 0))
    assert_same(cast("tuple[Tensor, ...]", kept[:3]), cast("tuple[Tensor, ...]", expected[:3]))
    assert kept.counts == expected.counts
    assert_same(pairs.token.index_select(0, places), kept.token)
    assert isinstance(kept, Pairs)


@pytest.mark.parametrize("tiling", [Tiling(40, 0.0), Tiling(1000, 0.0), Tiling(40, 2.0)], ids=str)
def test_what_has_no_pair_counts_nothing_finite_or_not(tiling: Tiling) -> None:
    """Rows are made as the banks make them: times the weights, and infinite where an expert that computes all tokens
    has no pair.
    """
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(12, 9, generator=source) * (torch.rand(12, 9, generator=source) < 0.5)
    pairs = active_pairs(weights)
    for part in parts(pairs, tokens=12, width=2, hidden=3, tiling=tiling):
        weight = part.spread(pairs.weight)
        values = torch.where(weight == 0, torch.inf, 1.0) if isinstance(part, Whole) else torch.ones(())
        assert_same(part.guarded(values * weight, weight), weight)


@given(st.integers(1, 96), st.integers(1, 4096), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_experts_that_all_tokens_take_gather_nothing(width: int, hidden: int, dtype: torch.dtype) -> None:
    tiling = default_tiling(width=width, hidden=hidden, dtype=dtype)
    assert tiling.entries > 0
    assert 0 < tiling.whole_from < 1
