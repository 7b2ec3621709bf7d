"""Surprise consolidation as an optimizer of a bank.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import optim, tree
from onn.region import inline
from tests.support import Case, assert_close, assert_same, cases, normal, tolerance
from tests.test_consolidation import by_tokens, output, passed

BOUND = tolerance(torch.float64, terms=100, slack=1e4)
DAMPING, EPS = 0.5, 1e-6
SPACING = float(torch.finfo(torch.bfloat16).eps)


class Measured(NamedTuple):
    """What the backward pass of a bank gives."""

    grads: F.Experts
    squares: Tensor
    biases: Tensor


def measured(case: Case) -> Measured:
    grads, local = passed(case)
    return Measured(
        grads, F.matrix_surprise(local, case.x, case.weights, case.dy), F.bias_gradients(local, case.weights)
    )


def consolidated(case: Case, importance: Tensor, given_: Measured) -> tuple[F.Experts, Tensor]:
    return optim.consolidation(
        given_.grads,
        importance,
        case.x,
        case.weights,
        squares=given_.squares,
        biases=given_.biases,
        damping=DAMPING,
        eps=EPS,
    )


def squares_by_token(case: Case) -> Tensor:
    """[3, E, I]: one token's gradient of every matrix at a time."""
    found = torch.zeros(3, *case.experts.gate.shape[:2], dtype=torch.float64)
    for t in range(len(case.x)):
        one = case._replace(x=case.x[t : t + 1], weights=case.weights[t : t + 1], dy=case.dy[t : t + 1])
        found += torch.stack([g.square().sum(dim=-1) for g in passed(one)[0]])
    return found


def spelled_out(case: Case, importance: Tensor, centred: F.Experts) -> tuple[F.Experts, Tensor]:
    """Along every direction of the batch's inputs, and weight by weight."""
    squares, (_, H) = squares_by_token(case), case.x.shape
    values, directions = torch.linalg.eigh(case.x.mT @ case.x)
    relative = values.clamp_min(0) / values.clamp_min(0).mean().clamp_min(1e-300)
    white = directions @ torch.diag((1 + DAMPING) / (relative + DAMPING)) @ directions.mT
    met = importance + squares.sum(dim=0)
    share = squares.sum(dim=(1, 2)) / squares.sum().clamp_min(1e-300) * 3
    gate, up, down = (
        g / (met * part / (3 * H) + EPS).sqrt()[..., None]
        for g, part in zip((centred.gate @ white, centred.up @ white, centred.down), share, strict=True)
    )
    return F.Experts(gate, up, down), met


@given(case=cases(), seed=st.integers(0, 2**20))
def test_it_descends_along_the_centred_white_gradient_over_the_root_of_what_each_weight_met(
    case: Case, seed: int
) -> None:
    importance = normal(seed, *case.experts.gate.shape[:2]).abs()
    got = consolidated(case, importance, measured(case))
    centre = F.expert_means(case.x, case.weights)
    as_it_was, _ = spelled_out(case, importance, passed(case)[0])
    for centred in (by_tokens(case, centre), tree.grad(output)(case.experts, case, centre)):
        expected, met = spelled_out(case, importance, centred)
        assert_close(got[1], met, bound=BOUND)
        for own, other, before in zip(got[0], expected, as_it_was, strict=True):
            assert float((own - other).norm()) <= BOUND * float(before.norm() + other.norm())


@given(case=cases())
def test_what_has_met_more_moves_less_and_nothing_moves_more_than_its_surprise_allows(case: Case) -> None:
    """By Cauchy and Schwarz the squared sum of T terms is at most T times the sum of their squares."""
    given_ = measured(case)
    nothing = torch.zeros(case.experts.gate.shape[:2], dtype=torch.float64)
    first, met = consolidated(case, nothing, given_)
    later, _ = consolidated(case, 3 * met, given_)
    for new, old in zip(first, later, strict=True):
        assert bool((old.abs() <= new.abs() * (1 + BOUND)).all())
    plain, share = given_.grads.down, F.matrix_shares(given_.squares)[2]
    bound = (len(case.x) * 3 * case.x.shape[1] * given_.squares[2] / (met * share).clamp_min(1e-300)).sqrt()
    assert bool((first.down.norm(dim=-1) <= bound * (1 + BOUND) + EPS).all())
    assert bool((first.down[plain == 0] == 0).all())


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_neuron_whose_surprise_is_not_finite_keeps_what_it_had_met(spoilt: float) -> None:
    case = Case(*tree.map1(lambda leaf: leaf, _example()))
    given_ = measured(case)
    importance = torch.ones(case.experts.gate.shape[:2], dtype=torch.float64)
    squares = given_.squares.clone()
    squares[1, 2, 0] = spoilt
    _, met = consolidated(case, importance, given_._replace(squares=squares))
    assert float(met[2, 0]) == 1
    others = torch.ones_like(met, dtype=torch.bool)
    others[2, 0] = False
    assert_same(met[others], (importance + given_.squares.sum(dim=0))[others])


def _example() -> Case:
    E, I, H, T = 3, 2, 4, 5
    experts = F.Experts(*(normal(seed, E, I, H) for seed in range(3)))
    return Case(experts, normal(3, T, H), normal(4, T, E), normal(5, T, H))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_importance_is_wide_and_of_a_neuron_and_the_direction_has_the_dtype_of_the_gradient(dtype: torch.dtype) -> None:
    case = Case(*tree.map1(lambda leaf: leaf.to(dtype), _example()))
    importance = optim.consolidation_init(case.experts)
    assert_same(importance, torch.zeros(3, 2, dtype=F.reduction_dtype(dtype)))
    direction, met = consolidated(case, importance, measured(case))
    assert {leaf.dtype for leaf in direction} == {dtype}
    assert met.dtype == F.reduction_dtype(dtype)
    wide = Case(*tree.map1(lambda leaf: leaf.double(), case))
    expected, _ = consolidated(wide, importance.double(), measured(wide))
    assert_close(
        tree.map1(lambda leaf: leaf.double(), direction), expected, bound=tolerance(dtype, terms=100, slack=20)
    )


@given(seed=st.integers(0, 999), rows=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_row_descends_or_keeps_its_bits(seed: int, rows: list[bool]) -> None:
    param, direction = normal(seed, 4, 2, 3), normal(seed + 1, 4, 2, 3)
    learns, rate = torch.tensor(rows)[:, None, None], torch.tensor(0.25, dtype=torch.float64)
    got = optim.descended(param, direction, learns, (), rate=rate, region=inline)
    assert_same(got, torch.where(learns, param - 0.25 * direction, param))
    direction[1, 0, 0] = math.nan
    direction[2, 1, 1] = math.inf
    spoilt = optim.descended(param, direction, torch.ones_like(learns), (), rate=rate, region=inline)
    assert_same(spoilt, torch.where(direction.isfinite(), param - 0.25 * direction, param))


def test_small_steps_of_bfloat16_experts_are_not_lost() -> None:
    source, param = torch.Generator().manual_seed(0), torch.ones(64, 8, 8, dtype=torch.bfloat16)
    learns, steps, rate = torch.ones(64, 1, 1, dtype=torch.bool), 20, 1e-4
    for _ in range(steps):
        bits = torch.randint(-(2**15), 2**15, param.shape, generator=source, dtype=torch.int16)
        param = optim.descended(param, torch.ones_like(param), learns, (bits,), rate=torch.tensor(rate), region=inline)
    standard_error = (steps * rate * SPACING / 2 / param.numel()) ** 0.5
    assert abs(float(param.double().mean()) - (1 - steps * rate)) < 6 * standard_error
    with pytest.raises(ValueError, match="bfloat16 parameters need noise"):
        optim.descended(param, param, learns, (), rate=torch.tensor(rate), region=inline)
