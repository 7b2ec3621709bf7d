"""SMK inside `bank`: which (token, expert) pairs learn, that nothing else changes, and that no NaN spreads."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import tree
from tests.support import (
    BOUND,
    Case,
    assert_close,
    assert_same,
    cases,
    differentiate,
    kept_sum,
    least_pairs,
    make_case,
    pair_bias_gradients,
    pair_gradients,
    pair_norms,
)

ENGINES: tuple[tree.Engine, ...] = get_args(tree.Engine)
UNMASKED: tuple[F.TapName, ...] = ("surprise", "counterfactual", "neuron", "matrix")
POISONS = [torch.nan, torch.inf, -torch.inf]


def specification(case: Case, *, min_k: int) -> F.BankGrads:
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)

    def select(surprise: Tensor, active: Tensor) -> Tensor:
        return F.min_k_mask(surprise, active, min_k=min_k)

    return F.bank_vjp(case.experts, case.x, case.weights, residuals, case.dy, select=select)


def poisoned(values: Tensor, row: int, poison: float) -> Tensor:
    """`values` with one entry of one row of the first dimension replaced."""
    changed = values.clone()
    changed[row].view(-1)[0] = poison
    return changed


def learning(experts: F.Experts) -> list[bool]:
    """Which experts have any gradient."""
    return (F.expert_norms(experts) != 0).tolist()


@given(cases(), st.sampled_from(ENGINES))
def test_the_min_k_pairs_of_least_untied_gradient_learn_and_no_others(case: Case, engine: tree.Engine) -> None:
    pairs, biases = pair_gradients(case), pair_bias_gradients(case)
    norms = pair_norms(pairs)
    for min_k in range(1, case.weights.shape[1] + 1):
        got = differentiate(case, min_k=min_k, taps=("surprise", "bias"), engine=engine)
        assert_close(got.taps["surprise"], norms, bound=BOUND)
        keep = least_pairs(norms, case.weights, min_k=min_k)
        assert_close(got.experts, kept_sum(pairs, keep), bound=BOUND)
        assert_close(got.taps["bias"], torch.where(keep[:, None, :, None], biases, 0).sum(dim=0), bound=BOUND)


@given(cases(), st.sampled_from(ENGINES))
def test_bank_is_bank_vjp_under_the_min_k_mask_for_every_min_k(case: Case, engine: tree.Engine) -> None:
    for min_k in range(1, case.weights.shape[1] + 1):
        got, expected = differentiate(case, min_k=min_k, engine=engine), specification(case, min_k=min_k)
        assert_close((got.experts, got.x, got.weights), (expected.experts, expected.x, expected.weights), bound=BOUND)


@given(cases())
def test_what_lies_below_never_feels_the_mask_bit_for_bit(case: Case) -> None:
    num_experts = case.weights.shape[1]
    plain = differentiate(case, min_k=num_experts, taps=UNMASKED)
    for min_k in range(1, num_experts):
        got = differentiate(case, min_k=min_k, taps=UNMASKED)
        assert_same((got.x, got.weights, got.taps), (plain.x, plain.weights, plain.taps))


@given(cases())
def test_keeping_every_expert_is_keeping_without_a_rule(case: Case) -> None:
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    plain = F.bank_vjp(case.experts, case.x, case.weights, residuals, case.dy, select=None)
    assert_close(specification(case, min_k=case.weights.shape[1]), plain, bound=BOUND)


@given(cases())
def test_tokens_with_at_most_min_k_active_experts_teach_them_all(case: Case) -> None:
    E = case.weights.shape[1]
    for min_k in range(1, E):
        few = (case.weights != 0).sum(dim=1, keepdim=True) <= min_k
        thin = case._replace(weights=torch.where(few, case.weights, 0))
        got, plain = differentiate(thin, min_k=min_k), differentiate(thin, min_k=E)
        assert_close(got.experts, plain.experts, bound=BOUND)


def test_ties_go_to_the_lowest_index_among_the_active() -> None:
    case = make_case(0, T=6, H=5, E=5, I=3)
    same = tree.map1(lambda w: w[:1].expand_as(w), case.experts)
    active = torch.tensor([False, True, False, True, True]).expand(6, 5)
    tied = case._replace(experts=same, weights=torch.where(active, 0.5, 0.0).double())
    for min_k, learns in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [1, 3, 4])):
        assert learning(differentiate(tied, min_k=min_k).experts) == [e in learns for e in range(5)]


def test_an_expert_of_weight_zero_has_surprise_zero_and_is_never_chosen() -> None:
    case = make_case(0, T=6, H=5, E=4, I=3, density=1.0)
    idle = case.weights.clone()
    idle[:, 1] = 0.0
    idle[:, 2] = -0.0
    got = differentiate(case._replace(weights=idle), min_k=1, taps=("surprise", "counterfactual"))
    assert not got.taps["surprise"][:, 1:3].any()
    assert bool((got.taps["counterfactual"] > 0).all())
    assert learning(got.experts)[1:3] == [False, False]
    assert any(learning(got.experts))
    assert bool((got.weights[:, 1:3] != 0).all())


@given(cases(), st.permutations(range(9)))
def test_each_token_chooses_for_itself(case: Case, order: list[int]) -> None:
    permutation = torch.tensor([position for position in order if position < len(case.x)])
    shuffled = Case(case.experts, case.x[permutation], case.weights[permutation], case.dy[permutation])
    got, expected = differentiate(shuffled, min_k=1), differentiate(case, min_k=1)
    assert_close(got.experts, expected.experts, bound=BOUND)
    assert_close((got.x, got.weights), (expected.x[permutation], expected.weights[permutation]), bound=BOUND)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["dy", "x"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("min_k", [1, 2, 4])
def test_a_poisoned_token_reaches_only_the_experts_that_it_keeps(
    min_k: int, poison: float, part: str, engine: tree.Engine
) -> None:
    case = make_case(1, T=7, H=5, E=6, I=3, density=1.0)
    case = case._replace(weights=case.weights.index_fill(1, torch.tensor([1]), 0))
    at = 3
    if part == "dy":
        bad = case._replace(dy=poisoned(case.dy, at, poison))
    else:
        bad = case._replace(x=poisoned(case.x, at, poison))
    got = differentiate(bad, min_k=min_k, taps=("surprise", "bias"), engine=engine)
    assert not torch.isfinite(got.taps["surprise"][at]).logical_and(case.weights[at] != 0).any()
    kept = [expert for expert in range(6) if expert != 1][:min_k]
    without = case._replace(weights=case.weights.index_fill(0, torch.tensor([at]), 0))
    expected = differentiate(without, min_k=min_k, taps=("bias",))
    taught, untaught = ((*one.experts, *one.taps["bias"]) for one in (got, expected))
    for matrix, clean in zip(taught, untaught, strict=True):
        for expert in range(6):
            if expert in kept:
                assert not torch.isfinite(matrix[expert]).all()
            else:
                assert_close(matrix[expert], clean[expert], bound=BOUND)
    rest = torch.arange(7) != at
    assert bool(torch.isfinite(got.x[rest]).all())
    assert bool(torch.isfinite(got.weights[rest]).all())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("matrix", F.Experts._fields)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("min_k", [1, 3])
def test_an_expert_of_poisoned_weights_is_not_chosen_and_spoils_no_other(
    min_k: int, poison: float, matrix: str, engine: tree.Engine
) -> None:
    case = make_case(2, T=7, H=5, E=5, I=3, density=1.0)
    at = 2
    weights = poisoned(getattr(case.experts, matrix), at, poison)
    bad = case._replace(experts=case.experts._replace(**{matrix: weights}))
    got = differentiate(bad, min_k=min_k, taps=("surprise", "bias"), engine=engine)
    assert not torch.isfinite(got.taps["surprise"][:, at]).any()
    assert int(F.non_finite(got.taps["surprise"], case.weights != 0)) == 7
    without = case._replace(weights=case.weights.index_fill(1, torch.tensor([at]), 0))
    expected = differentiate(without, min_k=min_k, taps=("bias",))
    assert_close((got.experts, got.taps["bias"]), (expected.experts, expected.taps["bias"]), bound=BOUND)
    assert learning(got.experts)[at] is False


@pytest.mark.parametrize("poison", POISONS)
def test_a_selection_of_bank_vjp_leaves_out_pairs_of_poisoned_tokens_that_keep_none(poison: float) -> None:
    case = make_case(3, T=5, H=5, E=4, I=3, density=1.0)
    bad = case._replace(dy=poisoned(case.dy, 1, poison), x=poisoned(case.x, 2, poison))
    _, residuals = F.bank_forward(*bad[:3])
    keep = torch.ones(5, 4, dtype=torch.bool)
    keep[1:3] = False
    got = F.bank_vjp(*bad[:3], residuals, bad.dy, select=lambda surprise, active: keep)
    expected = F.bank_vjp(*case[:3], F.bank_forward(*case[:3])[1], case.dy, select=lambda surprise, active: keep)
    assert_close(got.experts, expected.experts, bound=BOUND)


def test_a_selection_of_bank_vjp_leaves_out_masked_pairs_of_poisoned_tokens_that_keep_others() -> None:
    case = make_case(3, T=5, H=5, E=4, I=3, density=1.0)
    bad = case._replace(dy=poisoned(case.dy, 1, torch.nan))
    got, expected = specification(bad, min_k=2), differentiate(bad, min_k=2)
    assert_close(got.experts, expected.experts, bound=BOUND)
