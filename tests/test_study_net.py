from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import onn.functional as F
from experiments.study.arms import Centre
from experiments.study.net import Examples, Learnt, Net, forward, learn, rank
from onn import tree
from tests.study_nets import C, E, T, but_the_experts, examples, net
from tests.support import assert_close, tolerance

BOUND = tolerance(torch.float64, terms=100, slack=1e4)
SEEDS = st.integers(0, 2**16)
BOTH = pytest.mark.parametrize("of_text", [False, True], ids=["features", "text"])


def most_like(affinity: Tensor) -> Tensor:
    return rank(-affinity) < 3


def nothing(scores: Tensor, surprise: Tensor, active: Tensor) -> Tensor:
    return 0 * scores.sum()


def everything(_: object, surprise: Tensor, __: Tensor) -> Tensor:
    return torch.ones_like(surprise, dtype=torch.bool)


def learnt(model: Net, batch: Examples, *, centre: Centre | None = None, whitened: bool = False) -> Learnt:
    return learn(
        model,
        batch,
        activate=most_like,
        select=lambda seen, _, __: seen.active,
        teach=nothing,
        centre=None if centre is None else torch.tensor(centre.value),
        by_weight=True,
        features=not batch.residual.shape[-1],
        whitened=whitened,
    )


def loss(model: Net, batch: Examples) -> Tensor:
    return cross_entropy(forward(model, batch.inputs, batch.residual, most_like).logits, batch.labels)


def token_gradients(model: Net, batch: Examples) -> list[Net]:
    """Of every token's own loss, by autograd."""
    singles = [Examples(*(part[t : t + 1] for part in batch)) for t in range(len(batch.labels))]
    return [tree.grad(loss)(model, single) for single in singles]


@BOTH
@given(seed=SEEDS)
def test_gradients_surprise_and_squares_are_those_of_autograd_token_by_token(of_text: bool, seed: int) -> None:
    model, batch = net(seed, of_text=of_text), examples(seed + 10, of_text=of_text)
    got, tokens = learnt(model, batch), token_gradients(model, batch)
    assert_close(got.grads, tree.grad(loss)(model, batch), bound=BOUND)
    assert got.squares
    squares = tree.unflatten(
        model,
        [torch.stack(column).square().sum(dim=0) / T**2 for column in zip(*map(tree.leaves, tokens), strict=True)],
    )
    assert_close(got.squares, squares, bound=BOUND)
    by_matrix = torch.stack([matrix.sum() for matrix in squares.experts])
    assert_close(got.shares, by_matrix / by_matrix.mean(), bound=BOUND)
    by_row = tree.map1(lambda leaf: leaf.sum(dim=-1), squares)
    rows = got.rows
    assert_close((rows.features, rows.prototypes, rows.readout), but_the_experts(by_row), bound=BOUND)
    assert_close(got.rows.experts, torch.stack(list(by_row.experts)).sum(dim=0), bound=BOUND)
    surprise = torch.stack(
        [torch.stack([g.square().sum(dim=(1, 2)) for g in one.experts]).sum(dim=0).sqrt() for one in tokens]
    )
    assert_close(got.surprise, surprise, bound=BOUND)


@BOTH
@given(seed=SEEDS)
def test_a_selection_masks_the_experts_gradient_as_in_the_specification_and_nothing_else(
    of_text: bool, seed: int
) -> None:
    model, batch = net(seed, of_text=of_text), examples(seed + 10, of_text=of_text)
    whole = learnt(model, batch)
    got = learn(
        model,
        batch,
        activate=most_like,
        select=lambda seen, surprise, _: F.min_k_mask(surprise, seen.active, min_k=1),
        teach=nothing,
        centre=None,
        by_weight=False,
        features=not of_text,
        whitened=False,
    )
    seen = whole.seen
    d_y = torch.func.vjp(lambda mixed: _loss_of(model, batch, mixed), seen.mixed)[1](
        torch.ones((), dtype=torch.float64)
    )[0]
    specified = F.bank_vjp(
        model.experts, seen.x, seen.weights, seen.residuals, d_y, select=lambda s, a: F.min_k_mask(s, a, min_k=1)
    )
    assert_close(got.grads.experts, specified.experts, bound=BOUND)
    assert_close(but_the_experts(got.grads), but_the_experts(whole.grads), bound=BOUND)
    assert got.squares == ()


def _loss_of(model: Net, batch: Examples, mixed: Tensor) -> Tensor:
    normed = torch.nn.functional.rms_norm(mixed, mixed.shape[-1:], eps=1e-6) if batch.residual.shape[-1] else mixed
    return cross_entropy(normed @ model.readout.mT, batch.labels)


@given(seed=SEEDS)
def test_the_router_learns_from_its_lesson_as_autograd_would_teach_it(seed: int) -> None:
    model, batch = net(seed), examples(seed + 10)

    def lesson(scores: Tensor, surprise: Tensor, active: Tensor) -> Tensor:
        return F.load_balance_loss(scores, active)

    taught = learn(
        model,
        batch,
        activate=most_like,
        select=lambda seen, _, __: seen.active,
        teach=lesson,
        centre=None,
        by_weight=False,
        features=True,
        whitened=False,
    )

    def total(candidate: Net) -> Tensor:
        seen = forward(candidate, batch.inputs, batch.residual, most_like)
        return loss(candidate, batch) + lesson(10 * seen.affinity, seen.affinity, seen.active)

    assert_close(taught.grads, tree.grad(total)(model), bound=BOUND)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("centre", [None, *Centre])
@BOTH
@given(seed=SEEDS)
def test_experts_and_features_learn_from_centred_and_whitened_inputs_and_nothing_else_changes(
    of_text: bool, centre: Centre | None, whitened: bool, seed: int
) -> None:
    model, batch = net(seed, of_text=of_text), examples(seed + 10, of_text=of_text)
    got, plain = learnt(model, batch, centre=centre, whitened=whitened), learnt(model, batch)
    x, weights = plain.seen.x, plain.seen.weights
    d_y = torch.func.grad(lambda mixed: _loss_of(model, batch, mixed))(plain.seen.mixed)
    local, _ = F.bank_local(model.experts, plain.seen.residuals, d_y)
    taken = {
        None: torch.zeros_like(model.prototypes),
        Centre.NOTHING: torch.zeros_like(model.prototypes),
        Centre.BATCH: x.mean(dim=0).expand(E, -1),
        Centre.EXPERT: F.expert_means(x, weights),
    }
    expected = F.centre_inputs(plain.grads.experts, F.bias_gradients(local, weights), taken[centre])
    features = plain.grads.features
    if whitened:
        expected = F.whiten_inputs(expected, x, damping=1.0)
    if whitened and not of_text:
        centred = batch.inputs - batch.inputs.mean(dim=0)
        columns = [
            one.features @ read / read.square().sum()
            for one, read in zip(token_gradients(model, batch), batch.inputs, strict=True)
        ]
        features = torch.stack(columns, dim=1) @ centred / T @ F.whitening(centred, damping=1.0)
    assert_close(got.grads.experts, expected, bound=BOUND)
    assert_close(got.grads.features, features, bound=BOUND)
    assert_close(got.shares, F.matrix_shares(F.matrix_surprise(local, x, weights, d_y)), bound=BOUND)
    rest = [(one.grads.prototypes, one.grads.readout) for one in (got, plain)]
    assert_close(*rest, bound=BOUND)
    assert_close((got.rows, got.surprise), (plain.rows, plain.surprise), bound=BOUND)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_rank_is_the_place_in_a_stable_sort(values: list[int]) -> None:
    keys = torch.tensor(values, dtype=torch.float64)
    order = sorted(range(len(values)), key=lambda place: values[place])
    assert [order.index(place) for place in range(len(values))] == rank(keys).tolist()


@given(seed=SEEDS)
def test_figures_of_the_loss_are_those_of_torch(seed: int) -> None:
    model, batch = net(seed), examples(seed + 10)
    got = learnt(model, batch)
    assert_close(got.loss, loss(model, batch), bound=BOUND)
    assert_close(got.tau, F.token_entropy(got.seen.logits).mean(), bound=BOUND)
    assert got.seen.active.sum(dim=1).tolist() == [3] * T
    assert got.seen.weights.shape == (T, E)
    assert got.seen.logits.shape == (T, C)
