"""What takes the part of a gradient in which the lessons of an expert meet, and how importance falls to three matrices.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

import onn.functional as F
from onn import tree
from onn.functional.consolidation import Form
from tests.support import Case, assert_close, assert_same, cases, normal, tolerance

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BOUND = tolerance(torch.float64, terms=100, slack=1e3)


def passed(case: Case) -> tuple[F.Experts, F.Local]:
    """The gradients of a bank, and what they are made of."""
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    local, _ = F.bank_local(case.experts, residuals, case.dy)
    return F.bank_vjp(case.experts, case.x, case.weights, residuals, case.dy, select=None).experts, local


def output(experts: F.Experts, case: Case, centre: Tensor) -> Tensor:
    """The bank's output on `dy`, of which only what reads the inputs less `centre` is learnt."""
    fixed = tree.detach(case.experts)
    h1, h3 = (
        torch.einsum("teh,eih->tei", case.x[:, None] - centre, learnt) + torch.einsum("eh,eih->ei", centre, old)
        for learnt, old in ((experts.gate, fixed.gate), (experts.up, fixed.up))
    )
    rows = silu(h1) * h3 * case.weights[..., None]
    return (torch.einsum("tei,eih->th", rows, experts.down) * case.dy).sum()


def by_tokens(case: Case, centre: Tensor) -> F.Experts:
    """The same, one outer product at a time."""
    _, local = passed(case)
    gate, up, down = (torch.zeros_like(w) for w in case.experts)
    for t, e in case.weights.nonzero().tolist():
        w = case.weights[t, e]
        gate[e] += w * torch.outer(local.c1[t, e], case.x[t] - centre[e])
        up[e] += w * torch.outer(local.c3[t, e], case.x[t] - centre[e])
        down[e] += w * torch.outer(local.a[t, e], case.dy[t])
    return F.Experts(gate, up, down)


@given(case=cases(), seed=st.integers(0, 2**20))
def test_a_centred_gradient_is_that_of_what_differs_from_the_centre(case: Case, seed: int) -> None:
    grads, local = passed(case)
    centre = normal(seed, case.weights.shape[1], case.x.shape[1])
    biases = F.bias_gradients(local, case.weights)
    got = F.centre_inputs(grads, biases, centre)
    assert_close(got, tree.grad(output)(case.experts, case, centre), bound=BOUND)
    assert_close(got, by_tokens(case, centre), bound=BOUND)
    assert_same(F.centre_inputs(grads, biases, torch.zeros_like(centre)), grads)


@given(case=cases())
def test_an_expert_learns_nothing_of_gate_and_up_from_equal_inputs_less_their_mean(case: Case) -> None:
    same = case._replace(x=case.x[:1].expand_as(case.x), weights=case.weights.abs())
    grads, local = passed(same)
    got = F.centre_inputs(grads, F.bias_gradients(local, same.weights), F.expert_means(same.x, same.weights))
    for name in ("gate", "up"):
        assert_close(getattr(got, name), torch.zeros_like(getattr(got, name)), bound=BOUND)
    assert_same(got.down, grads.down)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**20))
def test_the_mean_of_an_expert_is_over_its_own_tokens(dtype: torch.dtype, seed: int) -> None:
    x, weights = normal(seed, 7, 3).to(dtype), normal(seed + 1, 7, 4).to(dtype)
    weights[:, 1] = 0
    weights[0, 2] = 0
    got = F.expert_means(x, weights)
    sizes = weights.double().abs()
    expected = [
        torch.stack([sizes[t, e] * x[t].double() for t in range(7)]).sum(dim=0) / max(float(sizes[:, e].sum()), 1e-9)
        for e in range(4)
    ]
    assert_close(got, torch.stack(expected), bound=tolerance(F.reduction_dtype(dtype), terms=30, slack=4))
    assert not got[1].any()
    moved = x.clone()
    moved[0] = 100
    assert_same(F.expert_means(moved, weights)[2], got[2])


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases())
def test_what_does_not_learn_has_no_part_in_centre_or_shares(dtype: torch.dtype, case: Case) -> None:
    _, local = passed(case)
    off = (case.weights == 0)[..., None]
    spoiled = F.Local(*(torch.where(off, math.nan, part) for part in local))
    plain, given_nan = (
        tree.map1(lambda leaf: leaf.to(dtype), (case.experts, part, case.x, case.weights, case.dy))
        for part in (local, spoiled)
    )
    centre = F.expert_means(case.x, case.weights).to(dtype)
    assert_same(
        *(
            F.centre_inputs(experts, F.bias_gradients(part, weights), centre)
            for experts, part, _, weights, _ in (plain, given_nan)
        )
    )
    assert_same(*(F.matrix_shares(F.matrix_surprise(part, *rest)) for _, part, *rest in (plain, given_nan)))


@given(case=cases())
def test_shares_are_those_of_the_squared_gradients_of_single_tokens(case: Case) -> None:
    _, local = passed(case)
    got = F.matrix_shares(F.matrix_surprise(local, case.x, case.weights, case.dy))
    squares = torch.zeros(3, dtype=torch.float64)
    for t in range(len(case.x)):
        one = case._replace(x=case.x[t : t + 1], weights=case.weights[t : t + 1], dy=case.dy[t : t + 1])
        squares += torch.stack([g.square().sum() for g in by_tokens(one, torch.zeros(case.experts.gate.shape[::2]))])
    if squares.sum() == 0:
        assert not got.any()
        return
    assert_close(got, squares / squares.mean(), bound=BOUND)


@pytest.mark.parametrize("form", ["root", "bounded"])
@given(seed=st.integers(0, 2**20))
def test_shares_divide_the_importance_among_the_matrices(form: Form, seed: int) -> None:
    grads = F.Experts(*(normal(seed + i, 4, 2, 3) for i in range(3)))
    importance, shares = normal(seed + 4, 4, 2).square(), torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    divided = importance * shares[:, None, None]
    got = F.consolidate(grads, divided, form=form, strength=2.0, eps=1e-3)
    for name, own in zip(F.Experts._fields, divided, strict=True):
        scale = 1 / (own + 1e-3).sqrt()
        if form == "bounded":
            scale = 1 / (1 + 2 * own / importance.mean().clamp_min(1e-3))
        assert_close(getattr(got, name), getattr(grads, name) * scale[..., None], bound=BOUND)
    whole = F.consolidate(grads, importance, form=form, strength=2.0, eps=1e-3)
    assert_close(
        F.consolidate(grads, importance.expand(3, 4, 2), form=form, strength=2.0, eps=1e-3), whole, bound=BOUND
    )


@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 12), damping=st.floats(1e-2, 1e2))
def test_a_whitened_gradient_is_divided_along_each_direction_by_how_much_the_inputs_share_it(
    seed: int, tokens: int, damping: float
) -> None:
    """By the eigenvectors of their second moment and by solving the damped system, both as exact as its condition."""
    grads, x = F.Experts(*(normal(seed + i, 4, 2, 5) for i in range(3))), normal(seed + 3, tokens, 5)
    got = F.whiten_inputs(grads, x, damping=damping)
    moments, directions = torch.linalg.eigh(x.mT @ x)
    divisor = (moments / moments.mean() + damping) / (1 + damping)
    damped = 5 * x.mT @ x / x.square().sum() + damping * torch.eye(5, dtype=torch.float64)
    bound = BOUND * (5 + damping) / damping
    for name in ("gate", "up"):
        before, after = getattr(grads, name), getattr(got, name)
        assert_close(after @ directions * divisor, before @ directions, bound=bound)
        solved = torch.linalg.solve(damped, (1 + damping) * before.flatten(0, 1).mT)
        assert_close(after.flatten(0, 1), solved.mT, bound=bound)
    assert_same(got.down, grads.down)


@pytest.mark.parametrize("dtype", DTYPES)
def test_white_inputs_change_nothing(dtype: torch.dtype) -> None:
    grads = F.Experts(*(normal(i, 4, 2, 4).to(dtype) for i in range(3)))
    got = F.whiten_inputs(grads, 2 * torch.eye(4, dtype=dtype), damping=1.0)
    assert {g.dtype for g in got} == {dtype}
    assert_close(got, grads, bound=tolerance(dtype, terms=8))


def test_a_batch_that_is_not_finite_leaves_gate_and_up_not_finite_and_raises_nothing() -> None:
    grads = F.Experts(*(normal(i, 4, 2, 4) for i in range(3)))
    got = F.whiten_inputs(grads, torch.full((3, 4), math.nan, dtype=torch.float64), damping=1.0)
    assert got.gate.isnan().all()
    assert_same(got.down, grads.down)


def test_a_damping_that_rounding_swallows_gives_no_numbers_in_place_of_wrong_ones() -> None:
    x = (normal(1, 1, 64) + 1e-4 * normal(2, 16, 64)).float()
    grads = F.Experts(*(normal(i, 4, 2, 64).float() for i in range(3)))
    assert F.whiten_inputs(grads, x, damping=1e-9).up.isnan().all()
    assert F.whiten_inputs(grads, x, damping=1e-2).up.isfinite().all()


def test_one_neuron_that_overflows_changes_no_share() -> None:
    squares = normal(0, 3, 4, 2).square()
    squares[0, 2, 1] = 0
    expected = F.matrix_shares(squares)
    for wrong in (math.inf, math.nan):
        squares[0, 2, 1] = wrong
        assert_same(F.matrix_shares(squares), expected)


def test_gradients_of_float16_are_scaled_in_the_dtype_of_the_importance() -> None:
    grads = F.Experts(*(1e-6 * normal(i, 4, 2, 3) for i in range(3)))
    scaled = F.consolidate(tree.map1(Tensor.half, grads), torch.zeros(4, 2), form="root", strength=1.0, eps=1e-10)
    assert_close(
        scaled, tree.map1(lambda g: (1e5 * g.half().double()).half(), grads), bound=tolerance(torch.float16, terms=2)
    )


def test_without_strength_an_importance_that_is_not_finite_changes_nothing() -> None:
    grads = F.Experts(*(normal(i, 4, 2, 3) for i in range(3)))
    importance = torch.full((4, 2), math.inf, dtype=torch.float64)
    assert_same(F.consolidate(grads, importance, form="bounded", strength=0.0, eps=1e-8), grads)
