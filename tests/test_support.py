"""The suite's own helpers: what they accept, what they must refuse, and that the strategies reach their corners."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn.tree import Tree
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
    normal,
    pair_gradients,
    pair_norms,
    record,
    relative_error,
    tolerance,
    untied,
    untied_forward,
)

PLAIN = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float64, 2.0**-52), (torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)]
)
def test_tolerance_is_the_roundoff_times_the_root_of_the_terms(dtype: torch.dtype, eps: float) -> None:
    assert tolerance(dtype, terms=1, slack=1.0) == eps
    assert tolerance(dtype, terms=16, slack=2.0) == 8 * eps
    assert tolerance(dtype, terms=9) == 24 * eps


@given(st.floats(1e-12, 1e3), st.integers(0, 99))
def test_relative_error_is_what_was_put_in(size: float, seed: int) -> None:
    expected = normal(seed, 3, 4)
    got = expected + size * torch.linalg.vector_norm(expected) / math.sqrt(12)
    assert relative_error(got, expected) == pytest.approx(size, rel=1e-3)
    assert relative_error(expected, torch.zeros(3, 4)) == pytest.approx(float(expected.norm()))
    assert relative_error(expected.requires_grad_(), expected) == 0


def test_comparisons_accept_what_is_equal_and_only_that() -> None:
    odd = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    trees: list[Tree] = [PLAIN, odd, (odd, {"a": PLAIN}), torch.tensor([True]), torch.arange(3), torch.zeros(0)]
    for tree in trees:
        assert_same(tree, tree)
        assert_close(tree, tree, bound=0.0)
    assert_close(PLAIN.double(), PLAIN, bound=0.0)
    assert_close(PLAIN * (1 + 1e-4), PLAIN, bound=2e-4)


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        (PLAIN[:2], PLAIN, "shape"),
        (PLAIN[None], PLAIN, "shape"),
        (PLAIN + 1e-3, PLAIN, "relative error"),
        (-PLAIN, PLAIN, "relative error"),
        (PLAIN * torch.nan, PLAIN, "NaN in other places"),
        (PLAIN, PLAIN * torch.nan, "NaN in other places"),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, 1.0]), "infinities in other places"),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([-torch.inf, 1.0]), "infinities in other places"),
        (torch.tensor([torch.finfo(torch.float32).max]), torch.tensor([torch.inf]), "infinities in other places"),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 2.0]), "relative error"),
        (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 2.0]), "relative error"),
        ((PLAIN, {"a": PLAIN}), (PLAIN, {"a": PLAIN + 1}), r"1\.a: relative error"),
    ],
)
def test_assert_close_refuses_and_names_what_differs(got: Tree, expected: Tree, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(got, expected, bound=1e-4)


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        (PLAIN.double(), PLAIN, "dtype"),
        (PLAIN[None], PLAIN, "shape"),
        (torch.nextafter(PLAIN, PLAIN + 1), PLAIN, "got"),
        (torch.tensor([1e30]), torch.tensor([torch.nan]), "got"),
        (torch.tensor([torch.finfo(torch.float32).max]), torch.tensor([torch.inf]), "got"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "got"),
        (torch.tensor([True]), torch.tensor([False]), "got"),
        (F.Router(PLAIN, PLAIN), F.Router(PLAIN, -PLAIN), "thresholds: got"),
    ],
)
def test_assert_same_refuses_and_names_what_differs(got: Tree, expected: Tree, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same(got, expected)


@pytest.mark.parametrize("compare", [assert_same, lambda got, expected: assert_close(got, expected, bound=1.0)])
def test_comparisons_refuse_another_number_of_leaves(compare: Callable[[Tree, Tree], None]) -> None:
    for got, expected in (((PLAIN,), (PLAIN, PLAIN)), ((PLAIN, PLAIN), (PLAIN,)), ((), (PLAIN,)), ((PLAIN,), ())):
        with pytest.raises(ValueError, match="zip"):
            compare(got, expected)


def test_normal_depends_on_seed_and_shape_alone_and_is_standard() -> None:
    torch.manual_seed(1)
    first = normal(3, 50, 40)
    torch.manual_seed(2)
    assert_same(normal(3, 50, 40), first)
    assert not torch.equal(normal(4, 50, 40), first)
    assert_same(normal(3, 50, 40, dtype=torch.bfloat16), first.bfloat16())
    assert abs(float(first.mean())) < 5 / math.sqrt(2000)
    assert float(first.std()) == pytest.approx(1, abs=5 / math.sqrt(4000))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_weights_of_a_case_are_as_dense_as_asked_and_of_both_signs(density: float) -> None:
    weights = make_case(0, T=60, H=1, E=50, I=1, density=density).weights
    assert float((weights != 0).double().mean()) == pytest.approx(density, abs=5 * 0.5 / math.sqrt(3000))
    assert bool((weights < 0).any()) == bool((weights > 0).any()) == (density > 0)


CORNERS: dict[str, Callable[[Case], bool]] = {
    "one token": lambda case: len(case.x) == 1,
    "one expert": lambda case: case.weights.shape[1] == 1,
    "one neuron": lambda case: case.experts.gate.shape[1] == 1,
    "one hidden": lambda case: case.x.shape[1] == 1,
    "no active pair": lambda case: not case.weights.any(),
    "all pairs active": lambda case: bool((case.weights != 0).all()) and case.weights.numel() > 1,
    "an empty expert beside a busy one": lambda case: len(set((case.weights != 0).any(dim=0).tolist())) == 2,
    "a token without experts beside one with": lambda case: len(set((case.weights != 0).any(dim=1).tolist())) == 2,
    "a negative weight": lambda case: bool((case.weights < 0).any()),
    "a large one": lambda case: len(case.x) * case.experts.gate.numel() >= 600,
}


@pytest.mark.parametrize("corner", CORNERS)
def test_the_strategy_of_cases_reaches_its_corners(corner: str) -> None:
    find(cases(), CORNERS[corner])


@given(cases())
def test_the_untied_oracle_is_the_bank_and_its_pairs_sum_to_the_gradient(case: Case) -> None:
    tokens, num_experts = case.weights.shape
    y = untied_forward(untied(case.experts, tokens=tokens), case.x, case.weights)
    assert_close(y, F.bank_forward(case.experts, case.x, case.weights)[0], bound=BOUND)
    pairs = pair_gradients(case)
    everything = torch.ones(tokens, num_experts, dtype=torch.bool)
    assert_close(kept_sum(pairs, everything), differentiate(case, min_k=num_experts).experts, bound=BOUND)
    one = torch.zeros_like(everything)
    one[0, 0] = True
    assert_close(
        kept_sum(pairs, one),
        F.Experts(*(pair[0] * torch.eye(num_experts)[0][:, None, None] for pair in pairs)),
        bound=0.0,
    )
    squares = sum((pair.square().flatten(2).sum(dim=2) for pair in pairs), torch.zeros(()))
    assert_close(pair_norms(pairs).square(), squares, bound=BOUND)


def test_least_pairs_takes_the_least_active_and_the_lowest_index_of_a_tie() -> None:
    norms = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 0.0, 4.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, -1.0]])
    chosen = {1: [[1], [3]], 2: [[1, 3], [1, 3]], 3: [[1, 2, 3], [1, 3]], 4: [[0, 1, 2, 3], [1, 3]]}
    for min_k, rows in chosen.items():
        keep = least_pairs(norms, weights, min_k=min_k)
        assert [[expert for expert in range(4) if row[expert]] for row in keep] == rows


def test_record_counts_what_computes_and_finds_the_largest() -> None:
    x = torch.ones(3, requires_grad=True)

    def work() -> Tensor:
        return (x[:, None] * x[None, :]).sum()

    seen = record(lambda: work().backward())
    assert seen.operators["aten.mul.Tensor"] >= 1
    assert seen.operators["aten.unsqueeze.default"] == 0
    assert seen.largest == 9
    assert record(lambda: None) == ({}, 0)
