"""A training step under every route and granularity: what the controller moves and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from onn import objective, train, tree
from onn.functional.routing import Combine
from onn.objective import Granularity, MoeTraining, StepConfig
from tests.support import assert_same
from tests.test_train import SETTINGS, SPARSE, batch, carved_state, sparse


def routed(moe: MoeTraining) -> StepConfig:
    return replace(SETTINGS, sparse=moe)


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("normalise", [True, False])
def test_under_top_k_the_share_is_k_of_e_at_every_step_and_thresholds_stay(
    normalise: bool, granularity: Granularity
) -> None:
    moe = replace(SPARSE.moe, route="top_k", top_k=3, normalise=normalise)
    settings = routed(replace(SPARSE, moe=moe, granularity=granularity))
    state = carved_state()
    start = [layer.router for layer in objective.carved_layers(state.model)]
    for position in range(3):
        state, metrics = train.step(state, batch(position), (), settings)
        assert not bool(metrics.skipped)
        assert float(sparse(metrics).active_share) == pytest.approx(0.3)
    for before, layer in zip(start, objective.carved_layers(state.model), strict=True):
        assert_same(layer.router.thresholds, before.thresholds)
        assert not torch.equal(layer.router.prototypes, before.prototypes)
    assert bool(tree.all_finite((state.model, state.optimizer.mean, state.optimizer.square)))


@pytest.mark.parametrize("combine", get_args(Combine))
def test_under_the_threshold_route_the_share_comes_down_however_weights_are_made(combine: Combine) -> None:
    settings = routed(replace(SPARSE, moe=replace(SPARSE.moe, combine=combine)))
    state, shares = carved_state(), []
    for position in range(12):
        state, metrics = train.step(state, batch(position), (), settings)
        assert not bool(metrics.skipped)
        shares.append(float(sparse(metrics).active_share))
    assert shares[0] == 1
    assert shares[-1] < 0.6
    moved = [layer.router.thresholds for layer in objective.carved_layers(state.model)]
    assert bool((torch.stack(moved) > -1.5).all())
