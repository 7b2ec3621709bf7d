from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import carve, lessons, objective, optim, qwen3, train, tree
from onn.data import Batch
from onn.objective import (
    ConsolidationConfig,
    DensityConfig,
    DistillConfig,
    Granularity,
    IntegrityConfig,
    MoeTraining,
    OptimConfig,
    RouterConfig,
    RouterTarget,
    StepConfig,
)
from onn.qwen3 import Model, Moe
from onn.train import Metrics, State
from tests.support import assert_close, assert_same, normal, tolerance
from tests.test_qwen3 import MOE, config, hub_names, parameters, reference

ARCHITECTURE = config()
SPARSE = MoeTraining(
    moe=replace(MOE, min_k=2),
    granularity="token",
    optimizer="adamw",
    regime="everything",
    consolidation=ConsolidationConfig(lr=0.01, damping=1.0, eps=1e-8),
    router=RouterConfig(
        target="surprise",
        weight=0.1,
        w_ce=1.0,
        w_kl=1.0,
        w_diversity=0.1,
        w_simplicity=0.01,
        temperature=0.1,
        sensitivity=5.0,
        pi_threshold=0.3,
    ),
    density=DensityConfig(target=0.3, ramp_steps=10, gain=0.5),
    distill=DistillConfig(weight=0.0, temperature=1.0),
)
SETTINGS = StepConfig(
    model=ARCHITECTURE,
    sparse=SPARSE,
    optim=OptimConfig(lr=0.01, warmup=2, floor=0.1, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
    integrity=IntegrityConfig(alpha=1.0, gamma=0.2, tau_floor=0.1, delta=1.0),
    total_steps=40,
    engine="autograd",
)
DENSE = replace(SETTINGS, sparse=None)


def changed(settings: StepConfig, **changes: object) -> StepConfig:
    assert settings.sparse is not None
    return replace(settings, sparse=replace(settings.sparse, **changes))  # type: ignore[arg-type]


def batch(seed: int, *, size: int = 3, length: int = 8) -> Batch:
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(ARCHITECTURE.vocab_size, (size, length + 1), generator=source)
    mask = torch.rand(size, length, generator=source) < 0.8
    return Batch(tokens=text[:, :-1], targets=text[:, 1:], mask=mask, domain=torch.zeros(size, dtype=torch.int64))


def carved_state(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> State:
    return train.init_state(carve.carve(parameters(ARCHITECTURE, dtype=dtype, seed=seed), num_experts=10))


def rounding(model: Model, seed: int) -> Model:
    source = torch.Generator().manual_seed(seed)
    return tree.map1(lambda p: torch.randint(-(2**15), 2**15, p.shape, generator=source, dtype=torch.int16), model)


def trained(state: State, settings: StepConfig, *, steps: int) -> tuple[State, list[Metrics]]:
    history = []
    for position in range(steps):
        state, metrics = train.step(state, batch(position), (), settings)
        history.append(metrics)
    return state, history


def sparse(metrics: Metrics) -> objective.SparseMetrics:
    assert isinstance(metrics.sparse, objective.SparseMetrics)
    return metrics.sparse


def experts_of(model: Model) -> list[F.Experts]:
    return [layer.experts for layer in objective.carved_layers(model)]


def one_reborn(state: State) -> State:
    """After a look for unused experts of which the fourth of the first layer is the only one."""
    used = state.usage[0].active.clone()
    used[3] = 0
    usage = (state.usage[0]._replace(active=used), *state.usage[1:])
    noise = tuple(normal(0, *layer.router.prototypes.shape) for layer in objective.carved_layers(state.model))
    after, born = train.lifecycle(state._replace(usage=usage), noise, config=SPARSE, scale=0.1)
    assert int(born[0]) == 1
    return after


def test_dense_steps_are_those_of_transformers_and_torch() -> None:
    start = parameters(ARCHITECTURE)
    hub = reference(start, ARCHITECTURE)
    matrices = [p for p in hub.parameters() if p.ndim >= 2]
    vectors = [p for p in hub.parameters() if p.ndim < 2]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-8,
    )
    state = train.init_state(start)
    for position in range(4):
        data = batch(position)
        theirs.zero_grad()
        logits = hub(data.tokens, use_cache=False).logits
        labels = torch.where(data.mask, data.targets, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hub.parameters(), 1.0)
        rate = optim.warmup_cosine(torch.tensor(position), peak=0.01, warmup=2, total=40, floor=0.1)
        for group in theirs.param_groups:
            group["lr"] = float(rate)
        theirs.step()
        state, metrics = train.step(state, data, (), DENSE)
        # the norms, and so the gradients that pass them, are float32 in both
        assert_close(metrics.loss, loss.detach(), bound=tolerance(torch.float32, terms=1))
        assert_close(metrics.grad_norm, norm, bound=tolerance(torch.float32, terms=10))
        assert metrics.sparse == ()
    named = dict(hub.named_parameters())
    for name, value in hub_names(state.model).items():
        if name in named:
            assert_close(value, named[name].detach(), bound=tolerance(torch.float32, terms=100))


@pytest.mark.parametrize("granularity", ["token", "batch", "off"])
@pytest.mark.parametrize("target", ["surprise", "normalised", "counterfactual"])
def test_a_step_is_pure_and_both_engines_agree(granularity: Granularity, target: RouterTarget) -> None:
    settings = changed(SETTINGS, granularity=granularity, router=replace(SPARSE.router, target=target))
    state, data = carved_state(), batch(0)
    before = [leaf.clone() for leaf in tree.leaves((state, data))]
    first = train.step(state, data, (), settings)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((state, data)), strict=True))
    assert_same(train.step(state, data, (), settings), first)
    assert_close(train.step(state, data, (), replace(settings, engine="func")), first, bound=1e-12)


def test_a_compiled_step_is_the_eager_one_and_is_compiled_once() -> None:
    settings = replace(SETTINGS, engine="func")
    compiled = torch.compile(train.step, fullgraph=True, backend="aot_eager")
    state = carved_state(dtype=torch.float32)
    expected, got = (run(state, batch(0), (), settings) for run in (train.step, compiled))
    assert_close(got, expected, bound=tolerance(torch.float32, terms=1000))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(got[0], batch(1), (), settings)


def test_density_comes_down_from_one_to_its_target_and_stays() -> None:
    _, history = trained(carved_state(), SETTINGS, steps=40)
    shares = [float(sparse(metrics).active_share) for metrics in history]
    assert shares[0] == 1
    assert sum(shares[-10:]) / 10 == pytest.approx(0.3, rel=0.1)
    assert float(history[-1].loss) < float(history[0].loss)


def test_the_router_learns_which_expert_is_least_surprised() -> None:
    def accuracy_over_chance(weight: float) -> float:
        state, settings = carved_state(), changed(SETTINGS, router=replace(SPARSE.router, weight=weight))
        gates = []
        for _ in range(40):
            state, metrics = train.step(state, batch(0), (), settings)
            gates.append(sparse(metrics).gate)
        accuracy, chance = (float(torch.stack(column[-10:]).mean()) for column in zip(*gates, strict=True))
        return accuracy / chance

    assert accuracy_over_chance(0.1) > 1.5 * accuracy_over_chance(0.0)


def test_router_teaching_changes_the_routers_alone() -> None:
    state, data = carved_state(), batch(0)
    steps = [
        train.step(state, data, (), changed(SETTINGS, router=replace(SPARSE.router, weight=weight)))[0]
        for weight in (0.0, 1e-3)
    ]
    first, second = (tree.leaves(step.optimizer.mean.layers[0].attention) for step in steps)
    for a, b in zip(first, second, strict=True):
        assert_close(a / a.norm(), b / b.norm(), bound=1e-10)
    routers = [objective.carved_layers(step.optimizer.mean)[0].router.prototypes for step in steps]
    assert not torch.allclose(routers[0] / routers[0].norm(), routers[1] / routers[1].norm())


def test_masked_experts_keep_weights_and_optimizer_state() -> None:
    settings = changed(SETTINGS, granularity="batch")
    state, _ = trained(carved_state(), changed(SETTINGS, granularity="off"), steps=2)
    after, _ = train.step(state, batch(9), (), settings)
    for parts in (state.model, after.model), (state.optimizer.mean, after.optimizer.mean):
        for old, new in zip(*(experts_of(part) for part in parts), strict=True):
            moved = torch.stack([(a != b).flatten(1).any(dim=1) for a, b in zip(old, new, strict=True)])
            assert moved.any(dim=0).sum() == SPARSE.moe.min_k


@pytest.mark.parametrize("place", ["weight", "norm"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counter(place: str) -> None:
    state = carved_state()
    model = state.model
    if place == "norm":
        model = model._replace(norm=torch.full_like(model.norm, torch.nan))
    else:
        mlp = model.layers[0].mlp
        assert isinstance(mlp, Moe)
        poisoned = mlp.experts._replace(up=mlp.experts.up.clone().index_fill_(0, torch.tensor([3]), torch.inf))
        layer = model.layers[0]._replace(mlp=mlp._replace(experts=poisoned))
        model = model._replace(layers=(layer, *model.layers[1:]))
    state = state._replace(model=model)
    after, metrics = train.step(state, batch(0), (), SETTINGS)
    assert bool(metrics.skipped)
    assert_same(after.model, state.model)
    assert_same((after.optimizer, after.usage, after.lifetime), (state.optimizer, state.usage, state.lifetime))
    assert int(after.step) == int(state.step) + 1


def test_bfloat16_training_keeps_its_dtypes_and_learns() -> None:
    state = carved_state(dtype=torch.bfloat16)
    losses = []
    for position in range(25):
        state, metrics = train.step(state, batch(position % 3), rounding(state.model, position), SETTINGS)
        losses.append(float(metrics.loss))
    thresholds = {layer.router.thresholds.dtype for layer in objective.carved_layers(state.model)}
    assert thresholds == {torch.float32}
    assert [leaf.dtype for leaf in tree.leaves(state.model) if leaf.dtype != torch.bfloat16] == [torch.float32] * 2
    assert {leaf.dtype for leaf in tree.leaves(state.optimizer.mean)} == {torch.float32}
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_surprise_does_not_depend_on_the_batch_size() -> None:
    state, data = carved_state(), batch(0)
    twice = Batch(*(torch.cat([part, part]) for part in data))
    once, doubled = (objective.measure(state.model, b, config=SETTINGS) for b in (data, twice))
    for one, two in zip(once[2], doubled[2], strict=True):
        assert_close(two["surprise"], torch.cat([one["surprise"]] * 2), bound=tolerance(torch.float32, terms=10))


def test_measuring_gives_the_figures_of_the_step() -> None:
    state, data = carved_state(), batch(0)
    loss, seen, surprise = objective.measure(state.model, data, config=SETTINGS)
    _, metrics = train.step(state, data, (), SETTINGS)
    assert_same((loss, seen.tau, seen.accuracy), (metrics.loss, metrics.tau, metrics.accuracy))
    figures = objective.sparse_metrics(loss, seen, surprise, torch.ones(()), config=SETTINGS)
    assert_same(figures, sparse(metrics))


def test_lifecycle_gives_the_unused_a_new_start_and_counts_anew() -> None:
    state, _ = trained(carved_state(), SETTINGS, steps=6)
    dead = torch.tensor([2, 7])
    usage = F.Usage(*(counts.index_fill(0, dead, 0) for counts in state.usage[0]))
    state = state._replace(usage=(usage, *state.usage[1:]))
    noise = tuple(normal(layer, 10, ARCHITECTURE.hidden_size) for layer in range(2))
    after, reborn = train.lifecycle(state, noise, config=SPARSE, scale=0.1)
    assert reborn.tolist() == [2, 0]
    moments = objective.carved_layers(after.optimizer.mean)[0]
    for leaf in tree.leaves(moments):
        assert not leaf.index_select(0, dead).any()
        assert leaf.flatten(1).any(dim=1).sum() >= 7 if leaf.ndim > 1 else True
    steps = objective.carved_layers(after.optimizer.steps)[0].experts.gate.flatten()
    assert not steps[dead].any()
    assert all(not counts.any() for layer in after.usage for counts in layer)
    for old, new in zip(experts_of(state.model)[1:], experts_of(after.model)[1:], strict=True):
        assert_same(new, old)


def test_the_reborn_do_not_inherit_from_a_shared_expert() -> None:
    state, _ = trained(carved_state(), SETTINGS, steps=2)
    layer = state.model.layers[0]
    assert isinstance(layer.mlp, Moe)
    thresholds = layer.mlp.router.thresholds.clone().index_fill_(0, torch.tensor([0]), -torch.inf)
    shared = layer._replace(mlp=layer.mlp._replace(router=layer.mlp.router._replace(thresholds=thresholds)))
    counts = torch.tensor([100, 40, 0, 30, 20, 10, 9, 8, 7, 6])
    state = state._replace(
        model=state.model._replace(layers=(shared, *state.model.layers[1:])),
        usage=(F.Usage(routed=counts, active=counts), *state.usage[1:]),
    )
    noise = tuple(normal(seed, 10, ARCHITECTURE.hidden_size) for seed in range(2))
    after, reborn = train.lifecycle(state, noise, config=SPARSE, scale=0.1)
    assert reborn.tolist() == [1, 0]
    router = objective.carved_layers(after.model)[0].router
    assert torch.equal(router.thresholds[2], thresholds[1])
    assert torch.isneginf(router.thresholds).sum() == 1


def test_usage_and_lifetime_add_up_over_steps() -> None:
    state, history = trained(carved_state(), SETTINGS, steps=5)
    for index in range(2):
        total = torch.stack([sparse(metrics).usage.active[index] for metrics in history]).sum(dim=0)
        assert torch.equal(state.usage[index].active, total)
        assert torch.equal(state.lifetime[index], total)


def test_under_top_k_all_active_pairs_count_as_routed_whatever_the_sign_of_their_logits() -> None:
    settings = replace(SETTINGS, sparse=replace(SPARSE, moe=replace(SPARSE.moe, route="top_k", top_k=3)))
    state, data = carved_state(), batch(0)
    loss, seen, surprise = objective.measure(state.model, data, config=settings)
    chosen = torch.stack([layer.routing.scores[layer.routing.active] for layer in seen.carved])
    assert 0 < int((chosen > 0).sum()) < chosen.numel()
    usage = objective.sparse_metrics(loss, seen, surprise, torch.ones(()), config=settings).usage
    assert torch.equal(usage.routed, usage.active)
    assert int(usage.active.sum()) == chosen.numel()


def test_the_target_share_goes_down_in_a_line() -> None:
    shares: list[Tensor] = [
        objective.target_share(torch.tensor(at), config=DensityConfig(target=0.2, ramp_steps=4, gain=1.0))
        for at in range(7)
    ]
    assert torch.stack(shares).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    at_once = DensityConfig(target=0.2, ramp_steps=0, gain=1.0)
    assert float(objective.target_share(torch.tensor(0), config=at_once)) == pytest.approx(0.2)


def test_one_infinite_surprise_spoils_neither_the_figures_nor_the_lesson_of_the_others() -> None:
    state, data = carved_state(), batch(0)
    loss, seen, surprise = objective.measure(state.model, data, config=SETTINGS)
    poisoned = tuple(
        {"surprise": tap["surprise"].clone().index_fill_(0, torch.tensor([0]), torch.inf)} for tap in surprise
    )
    figures = objective.sparse_metrics(loss, seen, poisoned, torch.ones(()), config=SETTINGS)
    assert int(figures.non_finite) == 20
    kept = torch.stack([tap["surprise"][1:] for tap in surprise])
    assert_close(figures.surprise, kept.mean(), bound=tolerance(torch.float64, terms=500))
    routers = tuple(layer.router for layer in objective.carved_layers(state.model))
    taught = [
        tuple(
            lessons.router_lesson(*layer, torch.zeros(()), config=SPARSE)
            for layer in zip(routers, seen.carved, taps, strict=True)
        )
        for taps in (poisoned, tuple({"surprise": tap["surprise"] * 0} for tap in surprise))
    ]
    assert all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves(taught[0]))
    assert any(not torch.equal(a, b) for a, b in zip(*(tree.leaves(lesson) for lesson in taught), strict=True))


def test_an_expert_whose_weight_underflows_is_not_the_one_a_router_learns_to_prefer() -> None:
    """Its surprise is 0, since it has computed nothing."""
    teach = replace(SPARSE.router, w_diversity=0.0, w_simplicity=0.0)
    settings = replace(SPARSE, moe=replace(SPARSE.moe, route="top_k", top_k=3), router=teach)
    router = F.Router(torch.eye(10), torch.zeros(10))
    x = torch.tensor([[100.0, 99.0, -10.0, *[-300.0] * 7]])
    _, routing = qwen3.route(router, x, config=settings.moe)
    assert routing.active[0, 2]
    assert not routing.weights[0, 2]
    seen = qwen3.Carved(x=x, affinity=routing.scores, routing=routing)
    surprise = torch.zeros(1, 10).index_copy(1, torch.arange(2), torch.tensor([[2.0, 1.0]]))
    pushed = -lessons.router_lesson(router, seen, {"surprise": surprise}, torch.zeros(()), config=settings).prototypes
    assert float((pushed @ x[0])[1]) > 0
    assert not pushed[2].any()
