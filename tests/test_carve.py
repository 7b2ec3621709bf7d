from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from experiments import noise, presets
from onn import carve, objective, partition, qwen3, train, tree
from onn.data import Batch
from onn.objective import StepConfig
from onn.qwen3 import Mlp, Model, Qwen3Config
from tests.support import BOUND, assert_close, assert_same, make_case, normal, tolerance
from tests.test_qwen3 import MOE, config, configs, parameters, random_tokens

EPS = 1e-6


def permutation(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def random_partitions(seed: int, settings: Qwen3Config, *, experts: int) -> list[Tensor]:
    size = settings.intermediate_size
    return [
        partition.cut(permutation(seed + layer, size), num_experts=experts)
        for layer in range(settings.num_hidden_layers)
    ]


def random_mlp(seed: int, *, neurons: int, hidden: int) -> Mlp:
    return Mlp(
        gate=normal(seed, neurons, hidden), up=normal(seed + 1, neurons, hidden), down=normal(seed + 2, hidden, neurons)
    )


def random_choice(seed: int, tokens: int, experts: int) -> Tensor:
    """Some experts of no token and some of all."""
    share = torch.linspace(-0.3, 1.3, experts)
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share


def route(router: F.Router, x: Tensor) -> F.Routing:
    affinity = F.cosine_affinity(x, router.prototypes, eps=EPS)
    return F.threshold_route(affinity, router.thresholds, squash="sigmoid", fallback_k=1, combine="sum")


@settings(max_examples=15)
@given(config=configs(), seed=st.integers(0, 99), shared=st.integers(0, 10))
def test_a_model_carved_by_any_partition_is_the_dense_model(config: Qwen3Config, seed: int, shared: int) -> None:
    dense, tokens = parameters(config, seed=seed), random_tokens(config, 2, 7)
    carved = carve.carve_by(dense, random_partitions(seed, config, experts=10), shared=shared)
    expected = qwen3.forward(dense, tokens, (), config=config, moe=None).logits
    output = qwen3.forward(carved, tokens, ({},) * config.num_hidden_layers, config=config, moe=MOE)
    assert all(bool(layer.routing.active.all()) for layer in output.carved)
    assert_close(output.logits, expected, bound=1e-10)


@given(seed=st.integers(0, 99), experts=st.sampled_from([10, 20, 40]))
def test_every_neuron_is_where_the_partition_puts_it(seed: int, experts: int) -> None:
    mlp = random_mlp(seed, neurons=40, hidden=6)
    order = permutation(seed, 40)
    split = carve.split_by(mlp, partition.cut(order, num_experts=experts))
    for position, neuron in enumerate(order.tolist()):
        at = divmod(position, 40 // experts)
        assert torch.equal(split.gate[at], mlp.gate[neuron])
        assert torch.equal(split.up[at], mlp.up[neuron])
        assert torch.equal(split.down[at], mlp.down[:, neuron])
    merged = carve.merge_experts(split)
    assert_same(merged, Mlp(gate=mlp.gate[order], up=mlp.up[order], down=mlp.down[:, order]))


def test_a_carve_by_contiguous_neurons_is_the_plain_one() -> None:
    dense = parameters(config())
    plain = carve.carve(dense, num_experts=10)
    by = carve.carve_by(dense, [partition.cut(torch.arange(40), num_experts=10)] * 2)
    assert tree.paths(by) == tree.paths(plain)
    assert_same(by, plain)


@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 5), size=st.integers(1, 4))
def test_contributions_are_the_norms_of_what_experts_and_neurons_write(seed: int, tokens: int, size: int) -> None:
    mlp, x = random_mlp(seed, neurons=3 * size, hidden=5), normal(seed + 3, tokens, 5)
    cut = partition.cut(permutation(seed, 3 * size), num_experts=3)
    experts = F.Experts(mlp.gate[cut], mlp.up[cut], mlp.down.mT[cut])
    alone = [[qwen3.mlp_forward(Mlp(g, u, d.mT), row).norm() for g, u, d in zip(*experts, strict=True)] for row in x]
    assert_close(carve.contributions(experts, x), torch.tensor(alone), bound=BOUND)
    neurons = F.Experts(mlp.gate[:, None], mlp.up[:, None], mlp.down.mT[:, None])
    assert_close(carve.neuron_norms(mlp, x), carve.contributions(neurons, x), bound=BOUND)


@given(seed=st.integers(0, 2**20), k=st.integers(1, 6), data=st.data())
def test_the_oracle_opens_the_shared_experts_and_those_that_contribute_most(
    seed: int, k: int, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, k))
    case = make_case(seed, T=4, H=5, E=6, I=2)
    chosen = carve.best_experts(case.experts, case.x, k=k, shared=shared)
    for row, active in zip(carve.contributions(case.experts, case.x).tolist(), chosen.tolist(), strict=True):
        rest = sorted(range(shared, 6), key=lambda expert: (-row[expert], expert))
        assert {expert for expert in range(6) if active[expert]} == {*range(shared), *rest[: k - shared]}


@given(seed=st.integers(0, 2**20), ridge=st.sampled_from([1e-3, 0.1, 10.0]))
def test_token_prototypes_solve_for_the_difference_of_the_means(seed: int, ridge: float) -> None:
    """From the definition, one expert at a time; the length of a token plays no part."""
    x, chosen = normal(seed, 30, 4), random_choice(seed, 30, 6)
    found = carve.token_prototypes(x * (1 + normal(seed + 1, 30, 1).abs()), chosen, ridge=ridge)
    unit = torch.stack([row / row.norm() for row in x])
    covariance = torch.cov(unit.mT, correction=0)
    damped = covariance + ridge * covariance.trace() / 4 * torch.eye(4, dtype=torch.float64)
    for expert, prototype in enumerate(found):
        own = unit[chosen[:, expert]]
        if len(own) in (0, 30):
            assert not prototype.any()
        else:
            direction = damped.inverse() @ (own.mean(dim=0) - unit.mean(dim=0))
            assert_close(prototype, direction / direction.norm(), bound=1e-8)


def test_prototypes_of_tokens_that_do_not_differ_are_finite() -> None:
    chosen = torch.tensor([[True, False]] * 2 + [[False, True]])
    for x in (torch.ones(3, 4), torch.zeros(3, 4)):
        assert bool(torch.isfinite(carve.token_prototypes(x, chosen, ridge=0.1)).all())


@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 20), experts=st.integers(1, 7))
def test_matched_thresholds_open_every_expert_as_often_as_it_was_chosen(seed: int, tokens: int, experts: int) -> None:
    affinity, chosen = torch.tanh(normal(seed, tokens, experts)), random_choice(seed, tokens, experts)
    thresholds = carve.matched_thresholds(affinity, chosen)
    routing = F.threshold_route(affinity, thresholds, squash="sigmoid", fallback_k=1, combine="sum")
    assert (routing.scores > 0).sum(dim=0).tolist() == chosen.sum(dim=0).tolist()


@given(seed=st.integers(0, 2**20), shared=st.integers(0, 2), share=st.sampled_from([0.25, 0.5, 1.0]))
def test_a_calibrated_router_opens_the_share_asked_for_and_shared_experts_always(
    seed: int, shared: int, share: float
) -> None:
    x, thresholds = normal(seed, 12, 5), 0.1 * normal(seed + 1, 10)
    router = F.Router(normal(seed + 2, 10, 5), carve.with_shared(thresholds, shared=shared))
    found = carve.calibrated(router, x, share=share, eps=EPS)
    scores = route(found, x).scores
    assert abs(int((scores > 0).sum()) - round(share * scores.numel())) <= 1  # a pair may stand on the threshold itself
    assert bool((scores[:, :shared] > 0).all())
    assert bool(torch.isneginf(found.thresholds[:shared]).all())
    moved = (found.thresholds - router.thresholds)[shared:]
    assert_close(moved, moved[:1].expand_as(moved), bound=BOUND)
    assert_same(found.prototypes, router.prototypes)


@given(seed=st.integers(0, 2**20), shared=st.integers(0, 2))
def test_the_analytic_router_finds_a_choice_that_a_plane_can_tell(seed: int, shared: int) -> None:
    case = make_case(seed, T=60, H=8, E=6, I=3)
    topics = torch.arange(60) % 6
    x = torch.eye(8, dtype=torch.float64)[topics] + 0.01 * case.x
    chosen = topics[:, None] == torch.arange(6)
    chosen[:, :shared] = True
    router = carve.analytic_router(case.experts, x, chosen, eps=EPS, shared=shared)
    assert torch.equal(route(router, x).active, chosen)
    by_gate = carve.gate_prototypes(case.experts)
    assert_close(router.prototypes.norm(dim=-1), by_gate.norm(dim=-1), bound=BOUND)
    assert_same(router.prototypes[:shared], by_gate[:shared])
    assert bool(torch.isneginf(router.thresholds[:shared]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_analytic_router_has_the_prototypes_of_its_experts_dtype_and_wide_thresholds(dtype: torch.dtype) -> None:
    case = make_case(0, T=40, H=8, E=6, I=3, dtype=dtype)
    chosen = carve.best_experts(case.experts, case.x, k=2)
    router = carve.analytic_router(case.experts, case.x, chosen, eps=EPS)
    assert (router.prototypes.dtype, router.thresholds.dtype) == (dtype, torch.float32)
    assert torch.equal((route(router, case.x).scores > 0).sum(dim=0), chosen.sum(dim=0))
    assert bool(tree.all_finite(router))
    assert carve.contributions(case.experts, case.x).dtype == torch.float32


@given(seed=st.integers(0, 2**20))
@example(seed=305456)
def test_a_representative_scores_what_it_does_with_rows_of_unit_length(seed: int) -> None:
    """To rounding of products of unit rows and a token, which may cancel to less than that."""
    mlp, x = random_mlp(seed, neurons=8, hidden=5), normal(seed + 3, 4, 5)
    neurons = torch.tensor([6, 0, 3])
    scores = carve.representative_scores(mlp, neurons, x)
    for expert, neuron in enumerate(neurons.tolist()):
        gate, up = mlp.gate[neuron], mlp.up[neuron]
        for token in range(4):
            opened = gate @ x[token] / gate.norm()
            expected = (opened * torch.sigmoid(opened) * (up @ x[token]) / up.norm()).abs()
            error = float((scores[token, expert] - expected).abs())
            assert error <= BOUND * float(x[token].square().sum())


def shared_settings(*, target: float) -> StepConfig:
    sparse = presets.TINY.sparse
    sparse = replace(
        sparse,
        moe=replace(sparse.moe, num_experts=10),
        density=replace(sparse.density, target=target, ramp_steps=2),
    )
    return presets.step_config(replace(presets.TINY, model=config(), sparse=sparse), phase="moe")


def text(seed: int) -> Batch:
    tokens = random_tokens(config(), 3, 9, seed=seed)
    mask = torch.ones(3, 8, dtype=torch.bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(3, dtype=torch.int64))


def thresholds_of(model: Model) -> Tensor:
    return torch.stack([layer.router.thresholds for layer in objective.carved_layers(model)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shared_experts_stay_open_and_everything_else_finite_in_training(dtype: torch.dtype) -> None:
    """Adam, the density controller and stochastic rounding all meet the -inf, and leave it as it is."""
    dense = parameters(config(), dtype=dtype)
    state = train.init_state(carve.carve_by(dense, random_partitions(0, config(), experts=10), shared=2))
    start = thresholds_of(state.model)
    for position in range(8):
        bits = noise.rounding_bits(state.model, noise.generator(position))
        state, metrics = train.step(state, text(position), bits, shared_settings(target=0.4))
        assert not bool(metrics.skipped)
    now = thresholds_of(state.model)
    assert bool(torch.isneginf(now[:, :2]).all())
    assert bool(torch.isfinite(now[:, 2:]).all())
    assert bool((now[:, 2:] > start[:, 2:]).all())
    assert all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves(state.model) if leaf.shape != (10,))
    assert bool(tree.all_finite(state.optimizer.mean))
    assert isinstance(metrics.sparse, objective.SparseMetrics)
    tokens = 3 * 8
    assert metrics.sparse.usage.routed[:, :2].tolist() == [[tokens] * 2] * 2
    assert float(metrics.sparse.active_share) < 0.7


def test_a_controller_that_wants_less_than_the_shared_experts_moves_nothing() -> None:
    state = train.init_state(carve.carve_by(parameters(config()), random_partitions(0, config(), experts=10), shared=6))
    start = thresholds_of(state.model)
    settings = shared_settings(target=0.3)
    state = state._replace(step=torch.tensor(5))
    state, metrics = train.step(state, text(0), (), replace(settings, optim=replace(settings.optim, lr=0.0)))
    assert_same(thresholds_of(state.model), start)
    assert not bool(metrics.skipped)


def test_the_gradient_of_a_shared_threshold_is_zero() -> None:
    affinity = torch.tanh(normal(0, 6, 4))

    def loss(thresholds: Tensor) -> Tensor:
        routing = F.threshold_route(affinity, thresholds, squash="sigmoid", fallback_k=1, combine="sum")
        return (routing.weights * normal(1, 6, 4)).sum()

    thresholds = carve.with_shared(0.1 * normal(2, 4), shared=2)
    gradient = tree.grad(loss)(thresholds)
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert bool((gradient[2:] != 0).all())


def test_bfloat16_experts_are_chosen_as_wide_ones_are_up_to_rounding() -> None:
    case = make_case(1, T=50, H=16, E=8, I=4, dtype=torch.bfloat16)
    wide = tree.map1(Tensor.double, case.experts)
    exact = carve.contributions(wide, case.x.double())
    assert_close(carve.contributions(case.experts, case.x), exact, bound=tolerance(torch.bfloat16, terms=16))


def test_a_carve_that_does_not_fit_is_refused() -> None:
    dense = parameters(config())
    cuts = random_partitions(0, config(), experts=10)
    with pytest.raises(ValueError, match="a partition for each of 2 layers, got 1"):
        carve.carve_by(dense, cuts[:1])
    with pytest.raises(ValueError, match="carve_by: expected dense MLPs, found a layer that is carved already"):
        carve.carve_by(carve.carve(dense, num_experts=10), cuts)
    with pytest.raises(ValueError, match="shared=11 <= 10"):
        carve.carve_by(dense, cuts, shared=11)
    with pytest.raises(ValueError, match=r"num_experts=8 >= 10"):
        carve.carve_by(dense, [cut.view(8, 5) for cut in cuts])
    with pytest.raises(ValueError, match=r"partition \[10, 3\] does not fit 40 neurons"):
        carve.carve_by(dense, [partition.cut(torch.arange(30), num_experts=10)] * 2)
    with pytest.raises(ValueError, match=r"missing \[39\]"):
        carve.carve_by(dense, [torch.arange(40).clamp(max=38).view(10, 4)] * 2)
    wide = Mlp(gate=torch.zeros(970, 2), up=torch.zeros(970, 2), down=torch.zeros(2, 970))
    with pytest.raises(ValueError, match="at most 96 neurons, num_experts=10 gives 97; take at least 11"):
        carve.split_by(wide, torch.arange(970).view(10, 97))


def test_routers_that_cannot_be_are_refused() -> None:
    case = make_case(0, T=10, H=4, E=10, I=1)
    chosen = carve.best_experts(case.experts, case.x, k=3)
    router = carve.analytic_router(case.experts, case.x, chosen, eps=EPS, shared=3)
    with pytest.raises(ValueError, match=r"share=0\.25 above that of the 3 shared of 10 experts"):
        carve.calibrated(router, case.x, share=0.25, eps=EPS)
    with pytest.raises(ValueError, match="k=11 <= 10"):
        carve.best_experts(case.experts, case.x, k=11)
    with pytest.raises(ValueError, match="shared=4 <= 3"):
        carve.best_experts(case.experts, case.x, k=3, shared=4)
    with pytest.raises(ValueError, match=r"ridge=0\.0 > 0"):
        carve.token_prototypes(case.x, chosen, ridge=0.0)
