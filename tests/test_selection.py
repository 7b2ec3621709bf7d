"""What may learn: SMK by token and by batch, the rules it is compared with, and surprise consolidation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import NamedTuple, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

import onn.functional as F
from onn.functional.consolidation import Form
from tests.support import assert_close, assert_same, make_case, normal, tolerance

BOUND = tolerance(torch.float64, terms=64)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan])


class Surprised(NamedTuple):
    surprise: Tensor
    active: Tensor
    k: int


@st.composite
def surprised(draw: st.DrawFn) -> Surprised:
    """Surprise with ties, zeros, NaN and infinity, some of it on inactive experts."""
    T, E = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    values = draw(st.lists(VALUES, min_size=T * E, max_size=T * E))
    active = draw(st.lists(st.booleans(), min_size=T * E, max_size=T * E))
    dtype = draw(st.sampled_from(DTYPES))
    surprise = torch.tensor(values, dtype=dtype).view(T, E)
    return Surprised(surprise=surprise, active=torch.tensor(active).view(T, E), k=draw(st.integers(1, E)))


def by_loop(case: Surprised, *, sign: int) -> list[list[int]]:
    """The `k` active entries of each row with the smallest `sign * surprise`: finite ones first, then by index."""
    rows = []
    for row, active in zip(case.surprise.tolist(), case.active.tolist(), strict=True):
        keys = {
            e: (not math.isfinite(value), sign * value if math.isfinite(value) else 0.0, e)
            for e, value in enumerate(row)
        }
        rows.append(sorted((e for e in keys if active[e]), key=keys.__getitem__)[: case.k])
    return rows


def marked(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


@given(surprised())
def test_min_k_and_max_k_are_the_loop_with_ties_to_the_lowest_index_and_nan_last(case: Surprised) -> None:
    least = F.min_k_mask(case.surprise, case.active, min_k=case.k)
    most = F.max_k_mask(case.surprise, case.active, max_k=case.k)
    assert marked(least) == [sorted(row) for row in by_loop(case, sign=1)]
    assert marked(most) == [sorted(row) for row in by_loop(case, sign=-1)]


@given(surprised())
def test_min_k_keeps_active_experts_as_many_as_there_are_up_to_k_and_the_least_surprised(case: Surprised) -> None:
    keep = F.min_k_mask(case.surprise, case.active, min_k=case.k)
    assert not (keep & ~case.active).any()
    assert torch.equal(keep.sum(dim=-1), case.active.sum(dim=-1).clamp(max=case.k))
    size = torch.where(case.surprise.isfinite(), case.surprise, torch.inf)
    kept, dropped = torch.where(keep, size, -torch.inf), torch.where(case.active & ~keep, size, torch.inf)
    assert (kept.max(dim=-1).values <= dropped.min(dim=-1).values).all()


@given(surprised())
def test_min_k_of_all_experts_keeps_everything_active(case: Surprised) -> None:
    for got in (F.min_k_mask, lambda s, a, min_k: F.max_k_mask(s, a, max_k=min_k)):
        assert torch.equal(got(case.surprise, case.active, min_k=case.active.shape[1]), case.active)


@given(surprised())
def test_what_inactive_experts_would_be_surprised_by_changes_nothing(case: Surprised) -> None:
    silent = torch.where(case.active, case.surprise, 0)
    for surprise in (silent, torch.where(case.active, case.surprise, torch.nan)):
        got = F.min_k_mask(surprise, case.active, min_k=case.k)
        assert torch.equal(got, F.min_k_mask(case.surprise, case.active, min_k=case.k))


@given(surprised())
def test_min_k_indices_are_the_mask_from_the_least_surprise_up(case: Surprised) -> None:
    chosen, filled = F.min_k_indices(case.surprise, case.active, min_k=case.k)
    assert chosen.shape == filled.shape == (len(case.surprise), case.k)
    rows = [row[ok].tolist() for row, ok in zip(chosen, filled, strict=True)]
    assert rows == by_loop(case, sign=1)
    assert (filled.long().diff() <= 0).all()
    assert all(len(set(row)) == case.k for row in chosen.tolist())


@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 7), st.data())
def test_selections_follow_permutations_and_max_k_is_min_k_of_the_negative(
    seed: int, T: int, E: int, data: st.DataObject
) -> None:
    surprise, active, order = normal(seed, T, E), normal(seed + 1, T, E) > 0, normal(seed + 2, E).argsort()
    k = data.draw(st.integers(1, E))
    least = F.min_k_mask(surprise, active, min_k=k)
    assert torch.equal(F.min_k_mask(surprise[:, order], active[:, order], min_k=k), least[:, order])
    assert torch.equal(F.max_k_mask(-surprise, active, max_k=k), least)


@pytest.mark.parametrize("active", [(True, True, True, True), (True, False, True, True), (False, False, True, False)])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_random_k_chooses_every_set_of_active_experts_equally_often(active: tuple[bool, ...], k: int) -> None:
    noise = torch.tensor(list(permutations([0.1, 0.3, 0.6, 0.9])))
    mask = torch.tensor(active).expand(len(noise), 4)
    keep = F.random_k_mask(noise, mask, random_k=k)
    assert not (keep & ~mask).any()
    counts = Counter(tuple(row) for row in marked(keep))
    sets = math.comb(sum(active), min(k, sum(active)))
    assert sorted(counts.values()) == [24 // sets] * sets


@given(surprised())
def test_active_pairs_that_are_not_finite_are_counted(case: Surprised) -> None:
    values = zip(case.surprise.flatten().tolist(), case.active.flatten().tolist(), strict=True)
    assert int(F.non_finite(case.surprise, case.active)) == sum(on and not math.isfinite(value) for value, on in values)


def gradients(seed: int, *, E: int, I: int = 2, H: int = 3, dtype: torch.dtype = torch.float64) -> F.Experts:
    return F.Experts(*(normal(seed + i, E, I, H, dtype=dtype) for i in range(3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_expert_norms_are_over_all_three_matrices_and_in_float32(dtype: torch.dtype, scale: float) -> None:
    grads = F.Experts(*(g * scale for g in gradients(0, E=4, I=16, H=64, dtype=dtype)))
    got = F.expert_norms(grads)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.cat([g.double().flatten(1) for g in grads], dim=1).norm(dim=1)
    assert_close(got, expected, bound=tolerance(got.dtype, terms=64))


@given(st.integers(0, 2**20), st.integers(1, 7), st.data())
def test_select_min_k_is_the_loop_over_experts_of_a_batch(seed: int, E: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, E))
    size = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.inf, math.nan]), min_size=E, max_size=E))
    unit = gradients(seed, E=1)
    grads = F.Experts(*(g * torch.tensor(size, dtype=g.dtype)[:, None, None] for g in unit))
    candidates = [e for e in range(E) if size[e] != 0]
    kept = sorted(candidates, key=lambda e: (not math.isfinite(size[e]), size[e] if math.isfinite(size[e]) else 0, e))[
        :k
    ]
    for got, g in zip(F.select_min_k(grads, min_k=k), grads, strict=True):
        assert_same(got[kept], g[kept])
        assert not got[[e for e in range(E) if e not in kept]].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_a_broken_gradient_is_dropped_and_not_multiplied(bad: float, matrix: int) -> None:
    grads = gradients(0, E=3, dtype=torch.bfloat16)
    grads[matrix][0, 1, 2] = bad
    for got, g in zip(F.select_min_k(grads, min_k=2), grads, strict=True):
        assert not got[0].any()
        assert_same(got[1:], g[1:])
        assert got.dtype == torch.bfloat16


def scaled(g: Tensor, rows: Tensor) -> Tensor:
    out = torch.empty_like(g)
    for e, i in torch.cartesian_prod(torch.arange(g.shape[0]), torch.arange(g.shape[1])).tolist():
        out[e, i] = g[e, i] * float(rows[e, i])
    return out


@pytest.mark.parametrize("by", ["expert", "neuron"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**20), strength=st.floats(0, 10), eps=st.floats(1e-6, 1e-1))
def test_consolidation_is_its_formula_by_expert_and_by_neuron(
    by: str, dtype: torch.dtype, seed: int, strength: float, eps: float
) -> None:
    grads, fisher = gradients(seed, E=4, dtype=dtype), normal(seed + 3, 4, 2).square() * 10
    importance = fisher[:, 0] if by == "expert" else fisher
    rows = fisher[:, :1].expand(4, 2) if by == "expert" else fisher
    expected: dict[Form, Tensor] = {
        "root": 1 / (rows + eps).sqrt(),
        "bounded": 1 / (1 + strength * rows / max(float(importance.mean()), eps)),
    }
    stored = importance.to(F.reduction_dtype(dtype))
    for form, factors in expected.items():
        got = F.consolidate(grads, stored, form=form, strength=strength, eps=eps)
        assert {g.dtype for g in got} == {dtype}
        assert_close(got, F.Experts(*(scaled(g.double(), factors) for g in grads)), bound=tolerance(dtype, terms=4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_consolidation_of_strength_zero_changes_nothing(dtype: torch.dtype) -> None:
    grads = gradients(0, E=4, dtype=dtype)
    for importance in (normal(3, 4, 2).square(), normal(3, 4).square(), torch.zeros(4, 2)):
        got = F.consolidate(grads, importance.float(), form="bounded", strength=0.0, eps=1e-8)
        assert_same(got, grads)


@given(st.integers(0, 2**20), st.integers(-20, 20))
def test_what_was_surprised_more_moves_less_and_the_bounded_form_has_no_scale(seed: int, power: int) -> None:
    E, I = 4, 3
    ones, fisher = F.Experts(*(torch.ones(E, I, 2, dtype=torch.float64),) * 3), normal(seed, E, I).square() + 1e-3
    order = fisher.flatten().argsort()
    for form in ("root", "bounded"):
        got = F.consolidate(ones, fisher, form=form, strength=1.0, eps=1e-12)
        assert (got.gate.flatten(0, 1)[order].diff(dim=0) <= 0).all()
        assert_same((got.up, got.down), (got.gate, got.gate))
    rescaled = F.consolidate(ones, fisher * 2.0**power, form="bounded", strength=1.0, eps=1e-12)
    assert_same(rescaled, F.consolidate(ones, fisher, form="bounded", strength=1.0, eps=1e-12))


def test_accumulated_consolidation_is_adagrad_with_one_scalar_a_neuron() -> None:
    """With one token a batch the squared surprise of a neuron is the squared gradient of its three rows."""
    start, lr, eps = make_case(0, T=1, H=4, E=3, I=2), 0.1, 1e-3
    ours, theirs = start.experts, [[m.clone() for m in rows] for rows in zip(*start.experts, strict=True)]
    fisher, squares = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for seed in range(5):
        token = make_case(10 * seed, T=1, H=4, E=3, I=2, density=0.8)
        _, residuals = F.bank_forward(ours, token.x, token.weights)
        local, _ = F.bank_local(ours, residuals, token.dy)
        grads = F.bank_vjp(ours, token.x, token.weights, residuals, token.dy, select=None).experts
        fisher = fisher + F.neuron_surprise(local, token.x, token.weights, token.dy)
        steps = F.consolidate(grads, fisher, form="root", strength=0.0, eps=eps)
        ours = F.Experts(*(w - lr * 4**0.5 * step for w, step in zip(ours, steps, strict=True)))
        for e, rows in enumerate(theirs):
            gate, up, down = (m.requires_grad_() for m in rows)
            value = token.weights[0, e] * (silu(gate @ token.x[0]) * (up @ token.x[0])) @ (down @ token.dy[0])
            gradient = torch.autograd.grad(value, rows)
            for i in range(2):
                squares[e, i] += sum(float(g[i].square().sum()) for g in gradient)
            factor = lr * 4**0.5 / (squares[e] + eps).sqrt()
            theirs[e] = [(m - factor[:, None] * g).detach() for m, g in zip(rows, gradient, strict=True)]
    assert_close(fisher, squares, bound=100 * BOUND)
    assert_close(ours, F.Experts(*(torch.stack(list(m)) for m in zip(*theirs, strict=True))), bound=100 * BOUND)


def test_consolidation_refuses_an_eps_of_zero() -> None:
    with pytest.raises(ValueError, match="eps=0"):
        F.consolidate(gradients(0, E=2), torch.zeros(2, 2), form="root", strength=0.0, eps=0.0)


def test_a_neuron_of_infinite_importance_does_not_move() -> None:
    importance = torch.tensor([[1.0, math.inf], [1.0, 1.0]])
    got = F.consolidate(gradients(0, E=2), importance, form="bounded", strength=1.0, eps=1e-8)
    assert not got.gate[0, 1].any()


T4 = torch.ones(2, 4)
REFUSED: dict[str, Callable[[], object]] = {
    "1 <= min_k=0 <= 4": partial(F.min_k_mask, T4, T4 > 0, min_k=0),
    "1 <= min_k=5 <= 4": partial(F.min_k_indices, T4, T4 > 0, min_k=5),
    "1 <= max_k=5 <= 4": partial(F.max_k_mask, T4, T4 > 0, max_k=5),
    "active .*expected": partial(F.min_k_mask, T4, T4[:1] > 0, min_k=1),
    "3 <= 2": partial(F.select_min_k, gradients(0, E=2), min_k=3),
    "up .*expected": partial(F.expert_norms, gradients(0, E=2)._replace(up=torch.zeros(1, 2, 3))),
    "unknown form='rot'; did you mean 'root'": partial(
        F.consolidate, gradients(0, E=2), T4[0, :2], form=cast("Form", "rot"), strength=0.0, eps=1.0
    ),
    "strength=-1": partial(F.consolidate, gradients(0, E=2), T4[0, :2], form="root", strength=-1, eps=1.0),
    "importance .*expected": partial(F.consolidate, gradients(0, E=2), T4[0], form="root", strength=0, eps=1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
