"""A training step whose experts surprise consolidation trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import onn.functional as F
from experiments import compiling
from onn import carve, objective, optim, train, tree
from onn.functional.transform import Taps
from onn.objective import Granularity, Measured, StepConfig
from onn.qwen3 import Model
from onn.train import State
from tests.support import assert_close, assert_same, each_backend, tolerance
from tests.test_qwen3 import parameters
from tests.test_train import (
    ARCHITECTURE,
    SETTINGS,
    SPARSE,
    batch,
    changed,
    experts_of,
    one_reborn,
    rounding,
    sparse,
    trained,
)

CONSOLIDATION = replace(SPARSE.consolidation, lr=0.02, damping=0.5)
HARDENED = changed(SETTINGS, optimizer="consolidation", consolidation=CONSOLIDATION)


def hardened_state(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> State:
    model = carve.carve(parameters(ARCHITECTURE, dtype=dtype, seed=seed), num_experts=10)
    return train.init_state(model, experts="consolidation")


def without(model: Model) -> tuple[Tensor, ...]:
    """All leaves but the experts'."""
    held = {id(leaf) for experts in experts_of(model) for leaf in experts}
    return tuple(leaf for leaf in tree.leaves(model) if id(leaf) not in held)


def descended(state: State, position: int, settings: StepConfig) -> tuple[list[F.Experts], list[Tensor]]:
    """The experts after one step and what they have met, from a backward pass of the summed loss."""
    data = batch(position)
    counted = data.mask.sum()

    def summed(model: Model, inputs: object, taps: Taps) -> tuple[Tensor, Measured]:
        loss, seen = objective.language_loss(model, data, taps, (), config=settings)
        return loss * counted, seen

    taps = objective.zero_taps(state.model, data.tokens.numel(), names=("surprise", "matrix", "bias"))
    _, seen, grads, found = F.surprise_and_grad(summed, taps=taps, engine="func")(state.model, data)
    _, metrics = train.step(state, data, (), settings)
    rate = optim.warmup_cosine(state.step, peak=CONSOLIDATION.lr, warmup=2, total=40, floor=0.1)
    clip = min(1.0, 1.0 / float(metrics.grad_norm))
    experts, met = [], []
    for own, grad, before, was, tap in zip(
        experts_of(state.model), experts_of(grads), state.importance, seen.carved, found, strict=True
    ):
        direction, after = optim.consolidation(
            grad,
            before,
            was.x,
            was.routing.weights,
            squares=tap["matrix"],
            biases=tap["bias"],
            damping=CONSOLIDATION.damping,
            eps=CONSOLIDATION.eps,
        )
        learns = torch.stack([g.flatten(1).any(dim=1) for g in grad]).any(dim=0)
        met.append(torch.where(learns[:, None], after, before))
        moved = tree.map2(lambda p, d: p - rate * clip * d, own, direction)
        experts.append(F.Experts(*(torch.where(learns[:, None, None], *pair) for pair in zip(moved, own, strict=True))))
    return experts, met


@pytest.mark.parametrize("min_k", [10, 2])
def test_experts_descend_along_what_consolidation_makes_of_the_gradient_of_the_summed_loss(min_k: int) -> None:
    settings = changed(HARDENED, moe=replace(SPARSE.moe, min_k=min_k))
    state = hardened_state()
    for position in range(3):
        after, _ = train.step(state, batch(position), (), settings)
        experts, met = descended(state, position, settings)
        norms_and_rate_are_rounded_to = tolerance(torch.float32, terms=100)
        assert_close(after.importance, tuple(met), bound=norms_and_rate_are_rounded_to)
        assert_close(tuple(experts_of(after.model)), tuple(experts), bound=norms_and_rate_are_rounded_to)
        state = after


def test_importance_is_the_squared_surprise_that_the_neurons_met() -> None:
    settings = changed(HARDENED, granularity="off")
    state, expected = hardened_state(), torch.zeros((), dtype=torch.float64)
    for position in range(3):
        _, _, surprise = objective.measure(state.model, batch(position), config=settings)
        expected = expected + torch.stack([tap["surprise"].square().sum() for tap in surprise])
        state, _ = train.step(state, batch(position), (), settings)
    met = torch.stack([layer.sum() for layer in state.importance])
    assert_close(met, expected, bound=tolerance(torch.float32, terms=100))


def test_all_but_the_experts_take_the_same_step_as_without_and_experts_have_no_moments() -> None:
    state = hardened_state()
    plain = train.init_state(state.model)
    hardened, _ = train.step(state, batch(0), (), HARDENED)
    adam, _ = train.step(plain, batch(0), (), SETTINGS)
    assert_same(without(hardened.model), without(adam.model))
    for moments in (state.optimizer.mean, state.optimizer.square, hardened.optimizer.mean, hardened.optimizer.square):
        assert all(leaf.numel() == 0 for experts in experts_of(moments) for leaf in experts)
    assert [tuple(met.shape) for met in state.importance] == [e.gate.shape[:2] for e in experts_of(state.model)]
    assert plain.importance == ()


@pytest.mark.parametrize("granularity", ["token", "batch", "off"])
def test_a_step_is_pure_and_both_engines_agree(granularity: Granularity) -> None:
    settings = changed(HARDENED, granularity=granularity)
    state, data = hardened_state(), batch(0)
    before = [leaf.clone() for leaf in tree.leaves((state, data))]
    first = train.step(state, data, (), settings)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((state, data)), strict=True))
    assert_same(train.step(state, data, (), settings), first)
    assert_close(train.step(state, data, (), replace(settings, engine="func")), first, bound=1e-12)


@each_backend("grouped", "loop", "native", "auto")
def test_a_step_on_active_pairs_alone_is_that_of_the_dense_bank(backend: str) -> None:
    """But for the router, which there has no gradient of what it did not choose."""
    settings = changed(HARDENED, moe=replace(SPARSE.moe, backend=backend))
    dense, other = (train.step(hardened_state(), batch(0), (), each)[0] for each in (HARDENED, settings))
    assert_close(tuple(experts_of(other.model)), tuple(experts_of(dense.model)), bound=1e-9)
    assert_close(other.importance, dense.importance, bound=1e-9)


def test_a_compiled_step_is_the_eager_one_and_is_compiled_once() -> None:
    settings = replace(HARDENED, engine="func")
    compiled = torch.compile(train.step, fullgraph=True, backend="aot_eager")
    state = hardened_state(dtype=torch.float32)
    expected, got = (run(state, batch(0), (), settings) for run in (train.step, compiled))
    assert_close(got, expected, bound=tolerance(torch.float32, terms=1000))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(got[0], batch(1), (), settings)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_step_by_regions_is_the_eager_one_and_never_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: True)
    torch._dynamo.reset()
    compiling._region.cache_clear()
    state, region = hardened_state(dtype=torch.bfloat16), compiling.by_region("aot_eager")
    bits = [rounding(state.model, seed) for seed in range(2)]
    expected = train.step(state, batch(0), bits[0], HARDENED)
    got = train.step(state, batch(0), bits[0], HARDENED, (), region)
    assert_close(got[0].model, expected[0].model, bound=tolerance(torch.bfloat16, terms=100))
    assert_close(got[0].importance, expected[0].importance, bound=tolerance(torch.bfloat16, terms=100))
    with torch.compiler.set_stance("fail_on_recompile"):
        train.step(got[0], batch(1), bits[1], HARDENED, (), region)


def test_experts_without_a_gradient_keep_weights_and_importance() -> None:
    settings = changed(HARDENED, granularity="batch")
    state, _ = trained(hardened_state(), changed(HARDENED, granularity="off"), steps=2)
    after, _ = train.step(state, batch(9), (), settings)
    pairs = zip(experts_of(state.model), experts_of(after.model), state.importance, after.importance, strict=True)
    for old, new, before, met in pairs:
        moved = torch.stack([(a != b).flatten(1).any(dim=1) for a, b in zip(old, new, strict=True)]).any(dim=0)
        assert moved.sum() == SPARSE.moe.min_k
        assert_same((before != met).any(dim=1), moved)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter() -> None:
    state = hardened_state()
    state = state._replace(model=state.model._replace(norm=torch.full_like(state.model.norm, torch.nan)))
    after, metrics = train.step(state, batch(0), (), HARDENED)
    assert bool(metrics.skipped)
    assert_same(after._replace(step=state.step), state)


def test_bfloat16_experts_learn_by_it() -> None:
    state, losses = hardened_state(dtype=torch.bfloat16), []
    frozen = changed(HARDENED, consolidation=replace(CONSOLIDATION, lr=0.0))
    still, stuck = state, []
    for position in range(25):
        bits = rounding(state.model, position)
        state, metrics = train.step(state, batch(position % 3), bits, HARDENED)
        still, without_experts = train.step(still, batch(position % 3), bits, frozen)
        losses.append(float(metrics.loss))
        stuck.append(float(without_experts.loss))
        assert float(sparse(metrics).surprise) > 0
    assert {met.dtype for met in state.importance} == {torch.float32}
    assert_same(tuple(experts_of(still.model)), tuple(experts_of(hardened_state(dtype=torch.bfloat16).model)))
    assert sum(losses[-3:]) < sum(stuck[-3:])


def test_the_reborn_have_met_nothing() -> None:
    state, _ = trained(hardened_state(), HARDENED, steps=2)
    after = one_reborn(state)
    assert not after.importance[0][3].any()
    rest = [expert for expert in range(10) if expert != 3]
    assert_same(after.importance[0][rest], state.importance[0][rest])


def test_a_state_of_another_optimizer_is_refused() -> None:
    state = hardened_state()
    with pytest.raises(ValueError, match=r"^step: the state is one of consolidation, .*sparse\.optimizer='adamw'\.$"):
        train.step(state, batch(0), (), SETTINGS)
    with pytest.raises(ValueError, match=r"^step: the state is one of adamw, .*sparse\.optimizer='consolidation'\.$"):
        train.step(train.init_state(state.model), batch(0), (), HARDENED)
    with pytest.raises(ValueError, match="importance of 1"):
        train.step(state._replace(importance=state.importance[:1]), batch(0), (), HARDENED)
    broken = (state.importance[0][:, 1:], *state.importance[1:])
    with pytest.raises(ValueError, match="importance"):
        train.step(state._replace(importance=broken), batch(0), (), HARDENED)
