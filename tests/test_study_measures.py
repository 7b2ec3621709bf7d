"""Who serves which task, against loops over tokens, scikit-learn's own figures, and models without the expert."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import Tensor
from torch.nn.functional import cross_entropy

import onn.functional as F
from experiments.study import measures
from tests.support import BOUND, assert_close, make_case, normal, tolerance


class Served(NamedTuple):
    active: Tensor
    task: Tensor
    tasks: int


@st.composite
def served(draw: st.DrawFn) -> Served:
    seed, T, E, tasks = (draw(st.integers(low, high)) for low, high in ((0, 2**20), (1, 12), (2, 6), (1, 4)))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(T, E, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return Served(active, torch.randint(tasks, (T,), generator=generator), tasks)


def orders(seed: int, *, P: int, T: int) -> Tensor:
    return torch.rand(P, T, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


@given(served())
def test_usage_counts_the_tokens_of_every_task(case: Served) -> None:
    expected = torch.zeros(case.tasks, case.active.shape[1], dtype=torch.int64)
    for token, expert in case.active.nonzero().tolist():
        expected[int(case.task[token]), expert] += 1
    found = measures.usage(case.active, case.task, tasks=case.tasks)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@given(served())
def test_information_is_that_of_the_active_pairs(case: Served) -> None:
    tokens, experts = case.active.nonzero(as_tuple=True)
    expected = mutual_info_score(case.task[tokens].numpy(), experts.numpy()) if len(tokens) else 0.0
    found = measures.information(measures.usage(case.active, case.task, tasks=case.tasks))
    assert found == pytest.approx(expected, abs=BOUND)
    assert 0 <= found <= math.log(min(case.tasks, case.active.shape[1])) + BOUND


@given(served(), st.integers(0, 2**16), st.integers(1, 5))
def test_permuted_information_is_that_of_each_permuted_task(case: Served, seed: int, P: int) -> None:
    order = orders(seed, P=P, T=len(case.task))
    found = measures.permutation_information(case.active, case.task, order=order)
    expected = [
        measures.information(measures.usage(case.active, case.task[row], tasks=case.tasks)) for row in order.unbind(0)
    ]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), bound=BOUND)


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_permuted_information_does_not_depend_on_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    active, task = normal(0, 10, 6) > 0.5, torch.arange(10) % 2
    order = orders(1, P=7, T=10)
    whole = measures.permutation_information(active, task, order=order)
    monkeypatch.setattr(measures, "CHUNK", chunk)
    assert torch.equal(measures.permutation_information(active, task, order=order), whole)


def test_experts_that_belong_to_tasks_stand_out_from_the_permutations() -> None:
    task = torch.arange(200) % 4
    order = orders(0, P=50, T=200)
    own = torch.eye(4, dtype=torch.bool)[task].repeat_interleave(2, dim=1)
    found = measures.information(measures.usage(own, task, tasks=4))
    assert found == pytest.approx(math.log(4))
    assert measures.permutation_information(own, task, order=order).max() < 0.1 * found
    unrelated = normal(3, 200, 8) > 0.5
    null = measures.permutation_information(unrelated, task, order=order)
    assert measures.information(measures.usage(unrelated, task, tasks=4)) < null.max()


@st.composite
def symbols(draw: st.DrawFn) -> tuple[Served, list[int]]:
    case = draw(served())
    T = len(case.task)
    return case, draw(st.lists(st.sampled_from([-3, 0, 5, 6, 2**40]), min_size=T, max_size=T))


@given(symbols())
def test_vocabulary_is_the_mean_over_the_tokens_served_of_the_share_of_their_symbol(
    found: tuple[Served, list[int]],
) -> None:
    case, symbol = found
    got = measures.vocabulary(case.active, torch.tensor(symbol))
    assert (got.dtype, got.shape) == (torch.float64, (case.active.shape[1],))
    for share, column in zip(got.tolist(), case.active.mT.tolist(), strict=True):
        served = [x for x, is_active in zip(symbol, column, strict=True) if is_active]
        if not served:
            assert math.isnan(share)
            continue
        expected = [served.count(x) / symbol.count(x) for x in served]
        assert share == pytest.approx(sum(expected) / len(served), abs=BOUND)
        assert len(served) / len(symbol) - BOUND <= share <= 1 + BOUND


@given(symbols(), st.integers(0, 2**16))
def test_vocabulary_knows_no_order_of_tokens_and_no_names_of_symbols(
    found: tuple[Served, list[int]], seed: int
) -> None:
    case, symbol = found
    order = orders(seed, P=1, T=len(symbol))[0]
    names = torch.tensor([-x for x in symbol])
    expected = measures.vocabulary(case.active, torch.tensor(symbol))
    assert_close(measures.vocabulary(case.active[order], names[order]), expected, bound=BOUND)


@given(served(), st.integers(1, 4))
def test_vocabulary_of_experts_blind_to_symbols_is_their_share_of_the_tokens(case: Served, kinds: int) -> None:
    T = len(case.task)
    found = measures.vocabulary(case.active.repeat(kinds, 1), torch.arange(kinds).repeat_interleave(T))
    share = case.active.double().mean(dim=0)
    assert_close(found, torch.where(share > 0, share, torch.nan), bound=BOUND)


def test_vocabulary_of_experts_that_divide_the_symbols_is_whole_whatever_their_load() -> None:
    symbol = torch.tensor([0] * 50 + [1] * 5 + [2] * 20 + [3])
    divided = torch.eye(4, dtype=torch.bool)[symbol]
    assert measures.vocabulary(divided, symbol).tolist() == [1, 1, 1, 1]
    permuted = measures.vocabulary(divided, symbol[orders(0, P=1, T=len(symbol))[0]])
    assert permuted[1] < 0.5 < permuted[0] < 0.8


@given(served(), st.integers(0, 2**16))
def test_saturation_is_the_mean_share_of_the_final_set(case: Served, seed: int) -> None:
    after, before = case.active, case.active[:, orders(seed, P=1, T=case.active.shape[1])[0]]
    sets = [
        (set(was.nonzero().flatten().tolist()), set(now.nonzero().flatten().tolist()))
        for was, now in zip(before, after, strict=True)
    ]
    shares = [len(was & now) / len(now) for was, now in sets if now]
    found = measures.saturation(before, after)
    if not shares:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum(shares) / len(shares))
    assert measures.saturation(after, after) == 1
    assert measures.saturation(torch.ones_like(after), after) == 1
    assert measures.saturation(torch.zeros_like(after), after) == 0


@given(served())
def test_coactivation_is_the_mean_over_pairs_of_the_rarer_experts_share(case: Served) -> None:
    E = case.active.shape[1]
    columns = [set(column.nonzero().flatten().tolist()) for column in case.active.unbind(1)]
    shares = [
        len(one & other) / min(len(one), len(other)) if one and other else 0.0
        for one, other in itertools.combinations(columns, 2)
    ]
    assert len(shares) == E * (E - 1) // 2
    assert measures.coactivation(case.active) == pytest.approx(sum(shares) / len(shares), abs=BOUND)
    assert measures.coactivation(case.active.repeat(3, 1)) == pytest.approx(sum(shares) / len(shares), abs=BOUND)


def test_coactivation_of_sets_that_are_the_same_or_disjoint() -> None:
    sets = torch.eye(4, dtype=torch.bool).repeat_interleave(3, dim=1)
    assert measures.coactivation(sets.repeat(5, 1)) == pytest.approx(2 / 11)
    assert measures.coactivation(torch.ones(5, 6, dtype=torch.bool)) == 1
    assert measures.coactivation(torch.eye(6, dtype=torch.bool)) == 0


class Model(NamedTuple):
    """A bank and a read-out over a residual stream, with tokens of several tasks."""

    bank: F.Experts
    x: Tensor
    weights: Tensor
    read_out: Tensor
    labels: Tensor
    task: Tensor

    def head(self, y: Tensor) -> Tensor:
        return torch.tanh(y) @ self.read_out

    def outputs(self, weights: Tensor) -> Tensor:
        return self.x + F.bank_forward(self.bank, self.x, weights)[0]

    def contribution(self) -> Tensor:
        alone = torch.eye(self.weights.shape[1], dtype=self.x.dtype).unbind(0)
        return torch.stack([F.bank_forward(self.bank, self.x, self.weights * one)[0] for one in alone], dim=1)


def model(seed: int, *, T: int, E: int, tasks: int) -> Model:
    case = make_case(seed, T=T, H=7, E=E, I=3)
    generator = torch.Generator().manual_seed(seed)
    labels, task = (torch.randint(n, (T,), generator=generator) for n in (5, tasks))
    return Model(case.experts, case.x, case.weights, normal(seed, 7, 5), labels, task)


@given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_ablation_is_the_rise_of_the_loss_of_a_model_without_the_expert(seed: int, T: int, E: int, tasks: int) -> None:
    m = model(seed, T=T, E=E, tasks=tasks)
    expected = torch.full((E, tasks), torch.nan, dtype=torch.float64)
    for expert, task in itertools.product(range(E), range(tasks)):
        own = m.task == task
        if own.any():
            without = m.weights.clone()
            without[:, expert] = 0
            losses = [cross_entropy(m.head(m.outputs(w))[own], m.labels[own]) for w in (without, m.weights)]
            expected[expert, task] = losses[0] - losses[1]
    found = measures.ablation(m.outputs(m.weights), m.contribution(), m.head, m.labels, m.task, tasks=tasks)
    assert found.dtype == torch.float64
    assert torch.equal(found.isnan(), expected.isnan())
    difference = (found - expected).nan_to_num().abs()
    assert float(difference.max()) <= 64 * tolerance(torch.float64, terms=64)
    idle = (m.weights == 0).all(dim=0)
    assert not found[idle].nan_to_num().any()


def test_ablation_leaves_no_graph_and_its_inputs_alone() -> None:
    m = model(0, T=6, E=3, tasks=2)
    base, contribution = m.outputs(m.weights).requires_grad_(), m.contribution().bfloat16()
    kept = base.detach().clone()
    found = measures.ablation(base.bfloat16(), contribution, lambda y: y[:, :5], m.labels, m.task, tasks=2)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(base, kept)


def test_wrong_arguments_are_named() -> None:
    active, task = torch.ones(4, 3, dtype=torch.bool), torch.tensor([0, 1, 2, 1])
    with pytest.raises(ValueError, match="usage: expected task from 0 to 1, got 0 to 2"):
        measures.usage(active, task, tasks=2)
    with pytest.raises(ValueError, match="usage: shape of task"):
        measures.usage(active, task[:3], tasks=3)
    with pytest.raises(ValueError, match="permutation_information: expected order from 0 to 3, got 1 to 4"):
        measures.permutation_information(active, task, order=torch.arange(1, 5)[None])
    with pytest.raises(ValueError, match="vocabulary: shape of symbol"):
        measures.vocabulary(active, task[:3])
    with pytest.raises(ValueError, match="saturation: expected bool before"):
        measures.saturation(active.float(), active)
    with pytest.raises(ValueError, match="coactivation: expected experts=1 >= 2"):
        measures.coactivation(active[:, :1])
    with pytest.raises(ValueError, match="ablation: shape of contribution"):
        measures.ablation(torch.ones(4, 2), torch.ones(4, 3, 5), lambda y: y, task, task, tasks=3)
