"""What is minimised and measured, under stress: predictive integrity, entropy, router losses and routes at extreme
values, and a whole model at every scale of its loss, in micro-batches, in another order, and in no company at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import objective, optim, train, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.objective import Measured
from onn.qwen3 import Model
from tests.support import assert_close, assert_same, normal, relative_error, tolerance
from tests.test_train import ARCHITECTURE, SETTINGS, SPARSE, batch, carved_state

SCALES = [10.0**exponent for exponent in range(-12, 13)]
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ALPHA, GAMMA, FLOOR = 0.7, 0.3, 1e-3


def integrity(error: float, tau: float, surprise: float, dtype: torch.dtype = torch.float32) -> float:
    values = (torch.tensor(value, dtype=dtype) for value in (error, tau, surprise))
    return float(F.predictive_integrity(*values, alpha=ALPHA, gamma=GAMMA, tau_floor=FLOOR))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integrity_is_its_formula_in_zero_to_one_at_every_scale_of_its_inputs(dtype: torch.dtype) -> None:
    """Seven roundings of half an eps in the exponent, one more of its exponential; 0 only where that underflows."""
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    for error, tau, surprise in itertools.product([0.0, *SCALES[::3]], repeat=3):
        exponent = ALPHA * ((1 - GAMMA) * error / max(tau, FLOOR) + GAMMA * surprise)
        got = integrity(error, tau, surprise, dtype)
        assert 0 <= got <= 1
        assert got == pytest.approx(math.exp(-exponent), rel=eps * (1 + 3.5 * exponent), abs=least)
        assert got > 0 or math.exp(-exponent) <= least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integrity_is_monotone_in_every_input_from_1e_12_to_1e12(dtype: torch.dtype) -> None:
    for one, other in itertools.product([0.0, *SCALES[::4]], repeat=2):
        by_error = [integrity(value, one, other, dtype) for value in (0.0, *SCALES, math.inf)]
        by_surprise = [integrity(one, other, value, dtype) for value in (0.0, *SCALES, math.inf)]
        by_tau = [integrity(one, value, other, dtype) for value in (0.0, *SCALES, math.inf)]
        assert by_error == sorted(by_error, reverse=True)
        assert by_surprise == sorted(by_surprise, reverse=True)
        assert by_tau == sorted(by_tau)
        assert by_error[-1] == by_surprise[-1] == 0


LOGITS: dict[str, list[float]] = {
    "one certain": [0.0, 1e4, -1e4],
    "one certain, others barred": [1e4, -math.inf, -math.inf],
    "two alike far above": [1e4, -1e4, 1e4],
    "all far below": [-1e4, -1e4, -1e4],
    "one barred": [1.0, -math.inf, 2.0],
    "close together, far away": [1e4, 1e4 + 64, -1e4],
    "one alone": [-1e4],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOGITS)
def test_entropy_of_extreme_logits_is_that_of_the_exact_distribution(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS[name], dtype=dtype).requires_grad_()
    top = max(logits.tolist())
    weights = [math.exp(value - top) for value in logits.tolist()]
    shares = [weight / math.fsum(weights) for weight in weights]
    entropy = F.token_entropy(logits)
    expected = -math.fsum(share * math.log(share) for share in shares if share > 0)
    assert float(entropy.detach()) == pytest.approx(expected, abs=tolerance(entropy.dtype, terms=3))
    (gradient,) = torch.autograd.grad(entropy, logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_entropy_of_a_whole_vocabulary_in_float32_is_that_of_float64(scale: float) -> None:
    logits = (normal(0, 2, 151_936) * scale).float()
    got, expected = F.token_entropy(logits), F.token_entropy(logits.double())
    bound = tolerance(torch.float32, terms=151_936) * math.log(151_936)
    assert torch.allclose(got.double(), expected, rtol=0, atol=bound)


class Lesson(NamedTuple):
    scores: Tensor
    surprise: Tensor
    active: Tensor


def lesson(scores: list[float], surprise: list[float]) -> Lesson:
    return Lesson(torch.tensor([scores]), torch.tensor([surprise]), torch.ones(1, len(scores), dtype=torch.bool))


LESSONS = {
    "scores far apart": lesson([1e4, -1e4, 0.0], [1.0, 2.0, 3.0]),
    "the least surprised far behind": lesson([-1e4, 1e4, 1e4], [0.0, 1.0, 2.0]),
    "surprise far apart": lesson([0.5, 0.0, 1.0], [1e12, 1e-12, 1.0]),
    "surprise all but zero": lesson([0.5, 0.0, 1.0], [1e-12, 2e-12, 0.0]),
    "surprise enormous": lesson([0.5, 0.0, 1.0], [1e12, 2e12, 1e12]),
    "surprise equal": lesson([0.5, 0.0, 1.0], [0.0, 0.0, 0.0]),
    "one expert": lesson([1e4], [1e12]),
}
LOSSES: dict[str, Callable[[Lesson], Tensor]] = {
    "router_loss": lambda given: F.router_loss(*given, w_ce=1.0, w_kl=1.0),
    "expected_surprise": lambda given: F.expected_surprise(*given),
    "load_balance_loss": lambda given: F.load_balance_loss(given.scores, given.active),
    "z_loss": lambda given: F.z_loss(given.scores),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LESSONS)
def test_router_losses_and_their_gradients_at_extreme_values_are_those_of_float64(name: str, loss: str) -> None:
    """The gradient of the z-loss is torch's, by `exp(logits - log-partition)`: as exact as the size of the latter."""
    narrow = LESSONS[name]
    wide = Lesson(narrow.scores.double(), narrow.surprise.double(), narrow.active)
    found = []
    for given_ in (narrow, wide):
        scores = given_.scores.clone().requires_grad_()
        value = LOSSES[loss](given_._replace(scores=scores))
        found.append((value.detach(), torch.autograd.grad(value, scores)[0]))
    (value, gradient), (exact, exact_gradient) = found
    assert bool(torch.isfinite(gradient).all())
    bound = tolerance(torch.float32, terms=3)
    assert_close(value, exact, bound=bound)
    size = max(1.0, float(narrow.scores.abs().max())) if loss == "z_loss" else 1.0
    assert_close(gradient, exact_gradient, bound=bound * size)


def test_the_router_loss_of_one_expert_or_of_equal_ones_is_what_chance_leaves() -> None:
    assert float(LOSSES["router_loss"](LESSONS["one expert"])) == 0
    equal = lesson([3.0, 3.0], [1e12, 1e12])
    assert float(LOSSES["router_loss"](equal)) == pytest.approx(math.log(2))
    first = F.gate_accuracy(*equal)
    assert float(first.accuracy) == 1  # ties go to the lowest index on both sides
    assert float(first.chance) == 0.5


ROUTES: dict[str, Callable[[Tensor], F.Routing]] = {
    "top_k": lambda logits: F.top_k_route(logits, k=2, normalise=True),
    "top_p": lambda logits: F.top_p_route(logits, p=0.9, normalise=True),
    "relu": F.relu_route,
    "expert_choice": lambda logits: F.expert_choice_route(logits, capacity=1),
    "biased_top_k": lambda logits: F.biased_top_k_route(logits, torch.zeros(3).to(logits.dtype), k=2, normalise=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [name for name, logits in LOGITS.items() if len(logits) == 3])
def test_routes_of_extreme_logits_have_finite_weights_and_gradients_and_none_for_what_is_barred(
    name: str, route: str, dtype: torch.dtype
) -> None:
    logits = torch.tensor([LOGITS[name], [0.5, 0.25, 0.0]], dtype=dtype).requires_grad_()
    routing = ROUTES[route](logits)
    assert bool(torch.isfinite(routing.weights).all())
    assert not routing.weights[logits.isneginf() | ~routing.active].any()
    if route in ("top_k", "top_p"):
        assert_close(routing.weights.sum(dim=1).detach(), torch.ones(2), bound=tolerance(dtype, terms=3))
    (gradient,) = torch.autograd.grad(routing.weights[:, 0].sum(), logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("combine", ["softmax", "uniform", "sum"])
def test_thresholds_that_nothing_or_everything_passes_leave_finite_weights(combine: F.routing.Combine) -> None:
    affinity = normal(0, 4, 5).clamp(-1, 1)
    for threshold, active in ((1e4, 1), (math.inf, 1), (-1e4, 5), (-math.inf, 5)):
        thresholds = torch.full((5,), threshold, dtype=torch.float64)
        got = F.threshold_route(affinity, thresholds, squash="sigmoid", fallback_k=1, combine=combine)
        assert torch.equal(got.active.sum(dim=1), torch.full((4,), active))
        if active == 1:
            assert torch.equal(got.active.int().argmax(dim=1), affinity.argmax(dim=1))
        expected = got.active.double() / (1 if combine == "sum" else active)
        if combine != "softmax" or active == 1:
            assert_same(got.weights, expected)
        assert_close(got.weights.sum(dim=1), expected.sum(dim=1), bound=tolerance(torch.float64, terms=5))


Result = F.SurpriseAndGrad[Model, Measured]


def differentiated(model: Model, data: Batch, *, factor: float = 1.0, min_k: int = 10) -> Result:
    """Loss, gradients and taps of `factor` times the main loss."""
    config = replace(SETTINGS, sparse=replace(SPARSE, moe=replace(SPARSE.moe, min_k=min_k)))

    def loss(model: Model, data: Batch, taps: Taps) -> tuple[Tensor, Measured]:
        value, seen = objective.language_loss(model, data, taps, (), config=config)
        return value * factor, seen

    taps = objective.zero_taps(model, data.tokens.numel(), names=("surprise", "neuron"))
    return F.surprise_and_grad(loss, taps=taps, engine="autograd")(model, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-12, -1e-6, 1e6, 1e12])
def test_the_surprise_of_a_whole_model_scales_with_its_loss(dtype: torch.dtype, factor: float) -> None:
    """In bfloat16 the factor itself is rounded with every tensor that it passes through, two layers deep."""
    model, data = carved_state(dtype=dtype).model, batch(0)
    plain, got = differentiated(model, data), differentiated(model, data, factor=factor)
    rounding = tolerance(torch.float32, terms=100) if dtype == torch.float32 else tolerance(dtype, terms=10)
    for one, other in zip(plain.surprise, got.surprise, strict=True):
        assert_close(other["surprise"], one["surprise"].double() * abs(factor), bound=rounding)
        assert_close(other["neuron"], one["neuron"].double() * factor**2, bound=2 * rounding)
    assert bool(tree.all_finite(got.grads))


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)])
@pytest.mark.parametrize("min_k", [2, 10])
def test_accumulated_micro_batches_are_one_batch_surprise_and_integrity_included(
    sizes: tuple[int, ...], min_k: int
) -> None:
    """Of the mean loss each counts by its share of the targets; the surprise of the summed loss needs no such care."""
    model, whole = carved_state().model, batch(0)
    columns = (part.split(list(sizes)) for part in whole)
    pieces = [Batch(*row) for row in zip(*columns, strict=True)]
    assert len({int(piece.mask.sum()) for piece in pieces}) > 1, "shares that differ"
    shares = [float(piece.mask.sum() / whole.mask.sum()) for piece in pieces]
    one, parts = differentiated(model, whole, min_k=min_k), [differentiated(model, p, min_k=min_k) for p in pieces]
    bound = tolerance(torch.float32, terms=10)  # of norms and softmax inside transformers' modules

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(dim=0)

    assert_close(mean([part.loss for part in parts]), one.loss, bound=bound)
    assert_close(mean([part.aux.tau for part in parts]), one.aux.tau, bound=bound)
    gradients = zip(*(tree.leaves(part.grads) for part in parts), strict=True)
    for path, got, expected in zip(tree.paths(one.grads), gradients, tree.leaves(one.grads), strict=True):
        assert relative_error(mean(list(got)), expected) <= bound, path
    scaled = [objective.scaled_surprise(part.surprise, piece) for part, piece in zip(parts, pieces, strict=True)]
    for layer, tap in enumerate(objective.scaled_surprise(one.surprise, whole)):
        neurons = torch.stack([part[layer]["neuron"] for part in scaled]).sum(dim=0)
        assert_close(torch.cat([part[layer]["surprise"] for part in scaled]), tap["surprise"], bound=bound)
        assert_close(neurons, tap["neuron"], bound=bound)


def test_the_order_of_a_batch_changes_nothing_beyond_rounding() -> None:
    state, data = carved_state(), batch(0, size=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = Batch(*(part[order] for part in data))
    (plain, metrics), (got, other) = (train.step(state, part, (), SETTINGS) for part in (data, shuffled))
    bound = tolerance(torch.float32, terms=100)
    assert_close((other.loss, other.tau, other.grad_norm), (metrics.loss, metrics.tau, metrics.grad_norm), bound=bound)
    assert_close(got.optimizer.mean, plain.optimizer.mean, bound=bound)
    assert_same(got.lifetime, plain.lifetime)
    for name in ("surprise", "pi", "surprise_by_expert"):
        assert_close(*(getattr(m.sparse, name) for m in (other, metrics)), bound=bound)


def test_a_batch_of_one_token_is_measured_and_learnt_from() -> None:
    state = carved_state()
    data = batch(0, size=1, length=1)._replace(mask=torch.ones(1, 1, dtype=torch.bool))
    after, metrics = train.step(state, data, (), SETTINGS)
    assert not bool(metrics.skipped)
    assert bool(tree.all_finite((after.model, after.optimizer.mean, after.optimizer.square)))
    assert isinstance(metrics.sparse, objective.SparseMetrics)
    assert 0 < float(metrics.sparse.pi) <= 1
    (surprise,) = objective.measure(state.model, data, config=SETTINGS)[2][:1]
    assert bool((surprise["surprise"] > 0).all())


def test_a_batch_in_which_no_target_counts_has_no_loss_and_no_surprise_and_integrity_one() -> None:
    state, data = carved_state(), batch(0)
    idle = data._replace(mask=torch.zeros_like(data.mask))
    loss, seen, surprise = objective.measure(state.model, idle, config=SETTINGS)
    assert float(loss) == float(seen.tau) == float(seen.accuracy) == 0
    assert not any(tap["surprise"].any() for tap in surprise)
    figures = objective.sparse_metrics(loss, seen, surprise, torch.ones(()), config=SETTINGS)
    assert float(figures.pi) == 1
    assert bool(tree.all_finite(differentiated(state.model, idle).grads))


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_extreme_logits_of_a_model_give_the_loss_the_entropy_and_the_surprise_of_float64(size: float) -> None:
    """The last norm multiplies every logit; at 1e4 all probabilities but one of a position are 0 in float32."""
    narrow = carved_state(dtype=torch.float32).model
    narrow = narrow._replace(norm=narrow.norm * size)
    wide, data = tree.map1(Tensor.double, narrow), batch(0)
    got, exact = (objective.measure(model, data, config=SETTINGS) for model in (narrow, wide))
    logit = float(exact[0]) + math.log(ARCHITECTURE.vocab_size)
    bound = tolerance(torch.float32, terms=100) * max(1.0, logit)  # of a difference of logits of that size
    assert_close(got[0], exact[0], bound=tolerance(torch.float32, terms=100))
    assert float(got[1].tau) == pytest.approx(float(exact[1].tau), abs=bound)
    for one, other in zip(got[2], exact[2], strict=True):
        assert bool(torch.isfinite(one["surprise"]).all())
        assert_close(one["surprise"], other["surprise"], bound=bound)


@given(st.integers(0, 2**20), st.integers(-12, 12))
def test_clipping_and_adamw_do_not_know_the_scale_of_the_loss(seed: int, exponent: int) -> None:
    """Clipped gradients are the same; and so is a step whose eps is on the scale of the gradient."""
    params, grads = ({"a": normal(seed + i, 3, 4, dtype=torch.float32)} for i in range(2))
    factor = 10.0**exponent
    large = tree.map1(lambda g: (g.double() * factor).float(), grads)
    low = 0.1 * float(optim.global_norm(grads)) * min(factor, 1.0)
    clipped = [optim.clip_by_global_norm(g, max_norm=low)[0] for g in (grads, large)]
    rounding = tolerance(torch.float32, terms=16)
    assert_close(clipped[1], clipped[0], bound=rounding)
    learns = tree.map1(lambda leaf: torch.ones((), dtype=torch.bool), params)
    steps = [
        optim.adamw(
            params,
            g,
            optim.adamw_init(params, learns),
            learns,
            (),
            lr=torch.tensor(0.1),
            beta1=0.9,
            beta2=0.99,
            eps=1e-8 * scale,
            weight_decay=0.1,
        )[0]
        for g, scale in ((grads, 1.0), (large, factor))
    ]
    assert_close(steps[1], steps[0], bound=rounding)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e25])
def test_a_norm_beyond_float32_is_infinite_so_that_the_step_is_skipped_and_below_it_is_zero(size: float) -> None:
    """Within 1e-18 and 1e18 it is right; above, `train.step` skips and counts; below, there is nothing to clip."""
    grads = {"a": torch.full((4,), size)}
    clipped, norm = optim.clip_by_global_norm(grads, max_norm=1.0)
    if size > 1e18:
        assert math.isinf(norm)
    elif size < 1e-18:
        assert float(norm) <= 2 * size * (1 + tolerance(torch.float32, terms=4))
        assert_same(clipped, grads)
    else:
        assert float(norm) == pytest.approx(2 * size, rel=tolerance(torch.float32, terms=4))
        assert_close(
            clipped, tree.map1(lambda g: g / max(2 * size, 1.0), grads), bound=tolerance(torch.float32, terms=4)
        )
