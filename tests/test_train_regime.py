"""A training step in which experts and routers alone learn."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from experiments import compiling
from onn import carve, objective, train, tree
from onn.objective import ExpertOptimizer, Granularity, StepConfig
from onn.qwen3 import Model
from onn.train import State
from tests.support import assert_close, assert_same, tolerance
from tests.test_qwen3 import parameters
from tests.test_train import ARCHITECTURE, SETTINGS, batch, changed, one_reborn, rounding, trained

EVERY = get_args(ExpertOptimizer)
UNCLIPPED = replace(SETTINGS, optim=replace(SETTINGS.optim, clip_norm=float("inf")))


def alone(optimizer: ExpertOptimizer, settings: StepConfig = SETTINGS) -> StepConfig:
    return changed(settings, optimizer=optimizer, regime="experts")


def begun(settings: StepConfig, *, dtype: torch.dtype = torch.float64) -> State:
    assert settings.sparse is not None
    model = carve.carve(parameters(ARCHITECTURE, dtype=dtype), num_experts=10)
    return train.init_state(model, experts=settings.sparse.optimizer, regime=settings.sparse.regime)


def outside(model: Model) -> Model:
    """The model with zeros for its experts and routers."""
    carved = {id(leaf) for layer in objective.carved_layers(model) for leaf in tree.leaves(layer)}
    return tree.map1(lambda leaf: torch.zeros_like(leaf) if id(leaf) in carved else leaf, model)


@pytest.mark.parametrize("optimizer", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_but_experts_and_routers_stays_and_every_matrix_of_these_moves(
    optimizer: ExpertOptimizer, dtype: torch.dtype
) -> None:
    settings = alone(optimizer)
    first = state = begun(settings, dtype=dtype)
    for position in range(4):
        bits = rounding(state.model, position) if dtype == torch.bfloat16 else ()
        state, _ = train.step(state, batch(position), bits, settings)
    assert_same(outside(state.model), outside(first.model))
    for old, new in zip(objective.carved_layers(first.model), objective.carved_layers(state.model), strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True))


@pytest.mark.parametrize("optimizer", EVERY)
def test_experts_and_routers_take_the_first_step_that_they_take_where_everything_learns(
    optimizer: ExpertOptimizer,
) -> None:
    """Unclipped: the norm that is clipped is that of what learns."""
    settings = alone(optimizer, UNCLIPPED)
    whole = changed(settings, regime="everything")
    (got, one), (expected, other) = (train.step(begun(each), batch(0), (), each) for each in (settings, whole))
    assert_same(tuple(objective.carved_layers(got.model)), tuple(objective.carved_layers(expected.model)))
    assert_same((got.importance, got.usage, got.lifetime), (expected.importance, expected.usage, expected.lifetime))
    assert_same(one.loss, other.loss)
    assert one.grad_norm < other.grad_norm


@pytest.mark.parametrize("optimizer", EVERY)
def test_there_are_moments_of_what_adamw_trains_alone(optimizer: ExpertOptimizer) -> None:
    settings = alone(optimizer)
    for state in (begun(settings), train.step(begun(settings), batch(0), (), settings)[0]):
        for moments in (state.optimizer.mean, state.optimizer.square):
            layers = objective.carved_layers(moments)
            held = sum(leaf.numel() for leaf in tree.leaves(moments))
            routers = sum(leaf.numel() for layer in layers for leaf in layer.router)
            experts = sum(leaf.numel() for layer in layers for leaf in layer.experts)
            assert held == routers + experts
            assert (experts > 0) == (optimizer == "adamw")


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("optimizer", EVERY)
def test_a_step_is_pure_and_both_engines_agree(optimizer: ExpertOptimizer, granularity: Granularity) -> None:
    settings = changed(alone(optimizer), granularity=granularity)
    state, data = begun(settings), batch(0)
    before = [leaf.clone() for leaf in tree.leaves((state, data))]
    first = train.step(state, data, (), settings)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((state, data)), strict=True))
    assert_same(train.step(state, data, (), settings), first)
    assert_close(train.step(state, data, (), replace(settings, engine="func")), first, bound=1e-12)


def test_a_compiled_step_is_the_eager_one_and_is_compiled_once() -> None:
    """By consolidation, where routers are AdamW's: both optimizers."""
    settings = replace(alone("consolidation"), engine="func")
    torch._dynamo.reset()
    compiled = torch.compile(train.step, fullgraph=True, backend="aot_eager")
    state = begun(settings, dtype=torch.float32)
    got, expected = (function(state, batch(0), (), settings) for function in (compiled, train.step))
    assert_close(got, expected, bound=tolerance(torch.float32, terms=1000))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(got[0], batch(1), (), settings)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_step_by_regions_is_the_eager_one_and_never_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: True)
    torch._dynamo.reset()
    compiling._region.cache_clear()
    settings = alone("consolidation")
    state, region = begun(settings, dtype=torch.bfloat16), compiling.by_region("aot_eager")
    bits = [rounding(state.model, seed) for seed in range(2)]
    expected = train.step(state, batch(0), bits[0], settings)
    got = train.step(state, batch(0), bits[0], settings, (), region)
    assert_close(got[0].model, expected[0].model, bound=tolerance(torch.bfloat16, terms=100))
    with torch.compiler.set_stance("fail_on_recompile"):
        train.step(got[0], batch(1), bits[1], settings, (), region)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter() -> None:
    settings = alone("adamw")
    state = begun(settings)
    state = state._replace(model=state.model._replace(norm=torch.full_like(state.model.norm, torch.nan)))
    after, metrics = train.step(state, batch(0), (), settings)
    assert bool(metrics.skipped)
    assert_same(after._replace(step=state.step), state)


def test_the_lifecycle_is_that_of_any_state() -> None:
    state, _ = trained(begun(alone("adamw")), alone("adamw"), steps=2)
    after = one_reborn(state)
    assert not objective.carved_layers(after.optimizer.mean)[0].experts.gate[3].any()
    assert_same(outside(after.model), outside(state.model))


def test_a_state_of_another_regime_is_refused() -> None:
    settings = alone("adamw")
    state = begun(settings)
    with pytest.raises(ValueError, match=r"^step: the state is one of experts, .*sparse\.regime='everything'\.$"):
        train.step(state, batch(0), (), SETTINGS)
    with pytest.raises(ValueError, match=r"^step: the state is one of everything, .*sparse\.regime='experts'\.$"):
        train.step(train.init_state(state.model), batch(0), (), settings)


def test_a_dense_model_learns_whole() -> None:
    dense = parameters(ARCHITECTURE)
    assert_same(train.init_state(dense, regime="experts"), train.init_state(dense))
