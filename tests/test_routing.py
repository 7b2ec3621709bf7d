"""Routing: cosine, threshold route, density controller and the baselines, each against a loop or a peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple, cast, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import onn.functional as F
from onn.functional.routing import Combine, Squash
from tests.support import assert_close, assert_same, normal, tolerance

SQUASHES: tuple[Squash, ...] = get_args(Squash)
COMBINES: tuple[Combine, ...] = get_args(Combine)
STRAIGHT: tuple[Combine, ...] = ("sum", "uniform")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
EPS = 1e-6
BOUND = tolerance(torch.float64, terms=64)


class Gate(NamedTuple):
    affinity: Tensor
    thresholds: Tensor
    fallback_k: int


EITHER = st.booleans()


@st.composite
def gates(draw: st.DrawFn, *, coarse: st.SearchStrategy[bool] = EITHER) -> Gate:
    """Cosines and thresholds: from all over to none over, and a coarse kind with ties and cosines on the threshold."""
    seed, T, E = draw(st.integers(0, 2**20)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    affinity, thresholds = torch.tanh(normal(seed, T, E)), normal(seed + 1, E) + draw(st.sampled_from([-3.0, 0.0, 3.0]))
    if draw(coarse):
        affinity, thresholds = (affinity * 2).round() / 2, thresholds.sign()
    return Gate(affinity=affinity, thresholds=thresholds, fallback_k=draw(st.integers(1, E)))


def route(gate: Gate, *, squash: Squash = "identity", combine: Combine = "sum") -> F.Routing:
    return F.threshold_route(gate.affinity, gate.thresholds, squash=squash, fallback_k=gate.fallback_k, combine=combine)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Numbers of size one: an absolute bound, so that cancellation between them is no error."""
    assert got.shape == expected.shape
    assert torch.allclose(got.detach(), expected.detach(), rtol=0, atol=BOUND), f"got {got}, expected {expected}"


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def first(keys: list[float], count: int) -> list[int]:
    """Positions of the smallest keys, the lowest position first among equals."""
    return sorted(range(len(keys)), key=lambda position: (keys[position], position))[:count]


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_affinity_is_the_cosine_of_torch_and_of_a_loop(seed: int, T: int, E: int, H: int) -> None:
    x, prototypes = normal(seed, T, H), normal(seed + 1, E, H)
    got = F.cosine_affinity(x, prototypes, eps=EPS)
    assert_close(got, cosine_similarity(x[:, None], prototypes[None], dim=-1, eps=EPS), bound=BOUND)
    for t, token in enumerate(x.tolist()):
        for e, prototype in enumerate(prototypes.tolist()):
            product = sum(a * b for a, b in zip(token, prototype, strict=True))
            assert float(got[t, e]) == pytest.approx(product / math.hypot(*token) / math.hypot(*prototype), abs=BOUND)
    assert float(got.abs().max()) <= 1 + BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_vector_has_affinity_zero_and_a_finite_gradient(dtype: torch.dtype) -> None:
    x, prototypes = normal(0, 3, 4, dtype=dtype), normal(1, 2, 4, dtype=dtype)
    x[1], prototypes[0] = 0, 0
    leaves = [x.requires_grad_(), prototypes.requires_grad_()]
    affinity = F.cosine_affinity(*leaves, eps=EPS)
    assert not affinity[1].any()
    assert not affinity[:, 0].any()
    for gradient in torch.autograd.grad(affinity.sum(), leaves):
        assert gradient.isfinite().all()


@given(st.integers(0, 2**20), st.integers(-12, 12), st.integers(-12, 12), st.sampled_from(DTYPES))
def test_affinity_does_not_depend_on_lengths(seed: int, token: int, prototype: int, dtype: torch.dtype) -> None:
    x, prototypes = normal(seed, 4, 5, dtype=dtype), normal(seed + 1, 3, 5, dtype=dtype)
    scaled = F.cosine_affinity(x * 2.0**token, prototypes * 2.0**prototype, eps=1e-12)
    assert_same(scaled, F.cosine_affinity(x, prototypes, eps=1e-12))


def test_affinity_of_bfloat16_is_computed_in_float32() -> None:
    x, prototypes = normal(0, 5, 64, dtype=torch.bfloat16), normal(1, 3, 64, dtype=torch.bfloat16)
    assert_same(F.cosine_affinity(x, prototypes, eps=EPS), F.cosine_affinity(x.float(), prototypes.float(), eps=EPS))


@given(gates(), st.sampled_from(SQUASHES), st.sampled_from(COMBINES))
def test_threshold_route_is_the_loop(gate: Gate, squash: Squash, combine: Combine) -> None:
    got = route(gate, squash=squash, combine=combine)
    limits = [sigmoid(value) for value in gate.thresholds.tolist()]
    for t, row in enumerate(gate.affinity.tolist()):
        heights = [sigmoid(value) if squash == "sigmoid" else value for value in row]
        margins = [height - limit for height, limit in zip(heights, limits, strict=True)]
        passed = [e for e, (height, limit) in enumerate(zip(heights, limits, strict=True)) if height > limit]
        active = passed or sorted(first([-margin for margin in margins], gate.fallback_k))
        assert got.active[t].nonzero().flatten().tolist() == active
        assert (got.scores[t] > 0).nonzero().flatten().tolist() == passed
        assert got.scores[t].tolist() == pytest.approx(margins, abs=BOUND)
        exponentials = [math.exp(margin) if e in active else 0.0 for e, margin in enumerate(margins)]
        weights = {
            "softmax": [value / sum(exponentials) for value in exponentials],
            "uniform": [(e in active) / len(active) for e in range(len(row))],
            "sum": [float(e in active) for e in range(len(row))],
        }
        assert got.weights[t].tolist() == pytest.approx(weights[combine], abs=BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
@given(gate=gates(), squash=st.sampled_from(SQUASHES), combine=st.sampled_from(COMBINES))
def test_every_token_has_an_expert_and_weights_are_zero_exactly_where_inactive(
    dtype: torch.dtype, gate: Gate, squash: Squash, combine: Combine
) -> None:
    gate = gate._replace(affinity=gate.affinity.to(dtype), thresholds=gate.thresholds.to(dtype))
    got = route(gate, squash=squash, combine=combine)
    assert got.active.any(dim=-1).all()
    assert torch.equal(got.weights != 0, got.active)
    assert got.weights.dtype == got.scores.dtype == dtype
    total = got.active.sum(dim=-1) if combine == "sum" else torch.ones(len(got.active))
    assert_close(got.weights.double().sum(dim=-1), total, bound=tolerance(dtype, terms=7, slack=2))
    if combine == "sum":
        assert torch.equal(got.weights, got.active.to(dtype))


@given(gates(), st.integers(0, 2**20))
def test_the_gradient_passes_straight_through_the_step_for_inactive_experts_too(gate: Gate, seed: int) -> None:
    v = normal(seed, *gate.affinity.shape)
    leaves = [gate.affinity.requires_grad_(), gate.thresholds.requires_grad_()]
    limits, heights = (torch.sigmoid(leaf.detach()) for leaf in reversed(leaves))
    for squash, combine in product(SQUASHES, STRAIGHT):
        got = route(gate, squash=squash, combine=combine)
        direct = v / got.active.sum(dim=-1, keepdim=True) if combine == "uniform" else v
        affinity, thresholds = torch.autograd.grad((got.weights * v).sum(), leaves)
        assert_near(affinity, direct * heights * (1 - heights) if squash == "sigmoid" else direct)
        assert_near(thresholds, -(direct * limits * (1 - limits)).sum(dim=0))


@given(gates(), st.integers(0, 2**20))
def test_the_gradient_of_softmax_is_that_of_the_active_experts_alone(gate: Gate, seed: int) -> None:
    v = normal(seed, *gate.affinity.shape)
    leaf = gate.affinity.requires_grad_()
    got = route(gate, combine="softmax")
    (gradient,) = torch.autograd.grad((got.weights * v).sum(), leaf)
    for t, active in enumerate(got.active):
        margin = got.scores[t, active].detach().requires_grad_()
        (expected,) = torch.autograd.grad((torch.softmax(margin, dim=0) * v[t, active]).sum(), margin)
        assert_near(gradient[t, active], expected)
        assert not gradient[t, ~active].any()


@given(gates(coarse=st.just(False)), st.integers(0, 2**20), st.sampled_from(COMBINES))
def test_routes_follow_a_permutation_of_experts_and_of_tokens(gate: Gate, seed: int, combine: Combine) -> None:
    experts, tokens = normal(seed, len(gate.thresholds)).argsort(), normal(seed, len(gate.affinity)).argsort()
    permuted = Gate(gate.affinity[tokens][:, experts], gate.thresholds[experts], gate.fallback_k)
    got, expected = (route(g, combine=combine) for g in (permuted, gate))
    assert torch.equal(got.active, expected.active[tokens][:, experts])
    assert_near(got.scores, expected.scores[tokens][:, experts])
    assert_near(got.weights, expected.weights[tokens][:, experts])


@pytest.mark.parametrize("squash", SQUASHES)
def test_a_nan_margin_is_never_active_and_the_last_fallback(squash: Squash) -> None:
    affinity = torch.tensor([[torch.nan, 0.9, -0.9], [torch.nan, -0.9, -0.5]])
    for fallback_k, fallback in [(1, [False, False, True]), (2, [False, True, True]), (3, [True, True, True])]:
        got = route(Gate(affinity, torch.zeros(3), fallback_k), squash=squash)
        assert got.active.tolist() == [[False, True, False], fallback]
    poisoned = route(Gate(torch.tensor([[0.9, 0.9]]), torch.tensor([torch.nan, 0.0]), 1), squash=squash)
    assert poisoned.active.tolist() == [[False, True]]


@pytest.mark.parametrize("combine", STRAIGHT)
def test_a_nan_margin_has_weight_zero(combine: Combine) -> None:
    got = route(Gate(torch.tensor([[torch.nan, 0.9, -0.9]]), torch.zeros(3), 1), combine=combine)
    assert got.weights.tolist() == [[0, 1, 0]]


@given(gates(coarse=st.just(False)), st.floats(0.01, 0.999), st.sampled_from(SQUASHES))
def test_after_the_share_shift_the_target_share_passes(gate: Gate, target: float, squash: Squash) -> None:
    affinity, pairs = gate.affinity, gate.affinity.numel()
    shift = F.share_threshold_shift(affinity, gate.thresholds, squash=squash, target=torch.tensor(target))
    margin = route(gate._replace(thresholds=gate.thresholds + shift), squash=squash).scores
    passed = int((margin > BOUND).sum())  # without the pair that is on the threshold, where rounding decides
    openable = pairs if squash == "sigmoid" else int((affinity > 0).sum())
    assert abs(passed - min(target * pairs, openable)) <= 1 + pairs * torch.finfo(torch.float32).eps
    assert int((margin.abs() <= BOUND).sum()) <= 1


@given(gates(), st.floats(0.01, 1.5), st.floats(-2.0, 2.0), st.sampled_from(SQUASHES))
def test_the_share_shift_is_the_distance_that_is_left(gate: Gate, target: float, moved: float, squash: Squash) -> None:
    def shift(thresholds: Tensor) -> Tensor:
        return F.share_threshold_shift(gate.affinity, thresholds, squash=squash, target=torch.tensor(target))

    before = shift(gate.thresholds)
    if target < 1:
        assert_near(shift(gate.thresholds + moved), before - moved)
    else:
        assert float(shift(gate.thresholds + 4)) < float(before) <= 0


@given(gates(), st.floats(-2.0, 2.0))
def test_the_share_of_one_opens_every_pair_and_leaves_open_ones_alone(gate: Gate, moved: float) -> None:
    thresholds = gate.thresholds + moved
    shift = F.share_threshold_shift(gate.affinity, thresholds, squash="sigmoid", target=torch.ones(()))
    assert bool(route(gate._replace(thresholds=thresholds + shift), squash="sigmoid").active.all())
    open_ones = thresholds.new_full(thresholds.shape, -9.0)
    assert float(F.share_threshold_shift(gate.affinity, open_ones, squash="sigmoid", target=torch.ones(()))) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_target_decides_no_share(dtype: torch.dtype) -> None:
    affinity, target = torch.linspace(-1, 1, 70_000)[:, None], torch.tensor(0.25, dtype=dtype)
    shift = F.share_threshold_shift(affinity, torch.zeros(1), squash="sigmoid", target=target)
    assert int((affinity > shift).sum()) == 17_500


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 2**20), k=st.integers(1, 6))
def test_top_k_route_is_the_router_of_transformers(normalise: bool, dtype: torch.dtype, seed: int, k: int) -> None:
    config = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=1, num_experts=6, num_experts_per_tok=k, norm_topk_prob=normalise
    )
    router = Qwen3MoeSparseMoeBlock(config).gate.to(dtype)
    router.weight.data.copy_(normal(seed, 6, 16))
    with torch.no_grad():
        logits, weights, indices = router(normal(seed + 1, 9, 16, dtype=dtype))
    got = F.top_k_route(logits, k=k, normalise=normalise)
    assert_same(got.scores, logits)
    assert_same(got.weights.sort(descending=True).values[:, :k], weights)
    tied = (logits.sort().values.diff() == 0).any(dim=-1)  # torch.topk promises no order among equals
    expected = torch.zeros_like(got.active).scatter(-1, indices, torch.ones_like(indices, dtype=torch.bool))
    assert torch.equal(got.active[~tied], expected[~tied])
    assert_same(got.weights.gather(-1, indices)[~tied], weights[~tied])


class Ranked(NamedTuple):
    logits: Tensor
    bias: Tensor


@st.composite
def ranked(draw: st.DrawFn) -> Ranked:
    seed, T, E = draw(st.integers(0, 2**20)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    logits, bias = 2 * normal(seed, T, E), normal(seed + 1, E)
    return Ranked(logits.round(), bias.round()) if draw(st.booleans()) else Ranked(logits, bias)


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def assert_row(got: F.Routing, t: int, chosen: list[int], values: list[float], *, normalise: bool) -> None:
    total = math.fsum(values[e] for e in chosen) if normalise else 1.0
    assert got.active[t].nonzero().flatten().tolist() == sorted(chosen)
    expected = [value / total if e in chosen else 0.0 for e, value in enumerate(values)]
    assert got.weights[t].tolist() == pytest.approx(expected, abs=BOUND)


@given(ranked(), st.data(), st.booleans())
def test_ranked_routes_are_the_loop_with_ties_to_the_lowest_index(
    case: Ranked, data: st.DataObject, normalise: bool
) -> None:
    k = data.draw(st.integers(1, len(case.bias)))
    plain = F.top_k_route(case.logits, k=k, normalise=normalise)
    biased = F.biased_top_k_route(case.logits, case.bias, k=k, normalise=normalise)
    for t, row in enumerate(case.logits.tolist()):
        assert_row(plain, t, first([-value for value in row], k), softmax(row), normalise=normalise)
        gates = [sigmoid(value) for value in row]
        keys = [-(gate + bias) for gate, bias in zip(gates, case.bias.tolist(), strict=True)]
        assert_row(biased, t, first(keys, k), gates, normalise=normalise)


@given(ranked(), st.data())
def test_a_bias_changes_the_choice_and_never_a_weight(case: Ranked, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(case.bias)))
    logits, bias = case.logits.requires_grad_(), case.bias.requires_grad_()
    got = F.biased_top_k_route(logits, bias, k=k, normalise=False)
    assert_near(got.weights, torch.sigmoid(logits) * got.active)
    assert not torch.autograd.grad(got.weights.sum(), bias, allow_unused=True, materialize_grads=True)[0].any()
    pushed = bias.detach().index_fill(0, torch.tensor([len(bias) - 1]), 3 + float(bias.detach().abs().max()))
    assert F.biased_top_k_route(logits, pushed, k=k, normalise=True).active[:, -1].all()


def test_normalised_sigmoids_that_underflow_are_finite() -> None:
    assert (
        F.biased_top_k_route(torch.full((1, 3), -200.0), torch.zeros(3), k=2, normalise=True).weights.isfinite().all()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_of_the_overloaded_falls_and_of_the_idle_rises(dtype: torch.dtype) -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=dtype)
    got = F.balance_bias(bias, torch.tensor([7, 1, 4, 4]), rate=0.125)
    assert_same(got, bias + torch.tensor([-0.125, 0.125, 0, 0], dtype=dtype))
    assert_same(F.balance_bias(bias, torch.full((4,), 3), rate=0.125), bias)


@given(ranked(), st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]), st.booleans())
def test_top_p_route_is_the_loop(case: Ranked, p: float, normalise: bool) -> None:
    got = F.top_p_route(case.logits, p=p, normalise=normalise)
    for t, row in enumerate(case.logits.tolist()):
        chosen: list[int] = []
        values = softmax(row)
        for e in first([-value for value in row], len(row)):
            if math.fsum(values[e] for e in chosen) >= p - BOUND:
                break
            chosen.append(e)
        assert_row(got, t, chosen, values, normalise=normalise)


@given(ranked())
def test_relu_route_is_the_positive_part_and_its_gradient(case: Ranked) -> None:
    logits = case.logits.requires_grad_()
    got = F.relu_route(logits)
    assert torch.equal(got.active, logits > 0)
    assert_same(got.weights.detach(), logits.detach().clamp_min(0))
    (gradient,) = torch.autograd.grad(got.weights.sum(), logits)
    assert torch.equal(gradient != 0, got.active)


@given(st.floats(1e-6, 1e3), st.floats(0, 1), st.floats(0, 1))
def test_the_sparsity_coefficient_grows_while_too_many_are_active(value: float, share: float, target: float) -> None:
    coefficient, active_share = (torch.tensor(v, dtype=torch.float64) for v in (value, share))
    got = F.sparsity_coefficient(coefficient, active_share, target=target, rate=1.2)
    expected = value * 1.2 if share > target else value / 1.2 if share < target else value
    assert float(got) == pytest.approx(expected, rel=BOUND)


@given(ranked(), st.data())
def test_expert_choice_route_is_the_loop_and_fills_every_expert(case: Ranked, data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, len(case.logits)))
    got = F.expert_choice_route(case.logits, capacity=capacity)
    probabilities = [softmax(row) for row in case.logits.tolist()]
    for e, column in enumerate(torch.softmax(case.logits, dim=-1).mT.tolist()):  # torch's own bits decide on ties
        chosen = first([-value for value in column], capacity)
        assert got.active[:, e].nonzero().flatten().tolist() == sorted(chosen)
        expected = [row[e] if t in chosen else 0.0 for t, row in enumerate(probabilities)]
        assert got.weights[:, e].tolist() == pytest.approx(expected, abs=BOUND)
    assert (got.active.sum(dim=0) == capacity).all()


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=7), st.integers(0, 9))
def test_first_k_marks_the_smallest_keys_from_the_lowest_index(keys: list[int], k: int) -> None:
    got = F.first_k(torch.tensor([keys]), k=k)[0]
    assert got.nonzero().flatten().tolist() == sorted(first([float(key) for key in keys], k))


X, ONE = torch.zeros(2, 3), torch.zeros(3)
REFUSED: dict[str, Callable[[], object]] = {
    r"fallback_k=0 <= 3": lambda: route(Gate(X, ONE, 0)),
    r"fallback_k=4 <= 3": lambda: route(Gate(X, ONE, 4)),
    r"squash='sigmoyd'; did you mean 'sigmoid'": lambda: route(Gate(X, ONE, 1), squash=cast("Squash", "sigmoyd")),
    r"unknown combine='sun'": lambda: route(Gate(X, ONE, 1), combine=cast("Combine", "sun")),
    r"thresholds \[2\]": lambda: route(Gate(X, ONE[:2], 1)),
    r"prototypes \[3, 4\]": lambda: F.cosine_affinity(X, torch.zeros(3, 4), eps=EPS),
    r"1 <= k=4 <= 3": lambda: F.top_k_route(X, k=4, normalise=True),
    r"1 <= k=0 <= 3": lambda: F.biased_top_k_route(X, ONE, k=0, normalise=True),
    r"p=1.1 <= 1": lambda: F.top_p_route(X, p=1.1, normalise=True),
    r"capacity=3 <= 2": lambda: F.expert_choice_route(X, capacity=3),
    r"rate=0.9 >= 1": lambda: F.sparsity_coefficient(ONE[0], ONE[0], target=0.5, rate=0.9),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_mass_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="p=0"):
        F.top_p_route(X, p=0.0, normalise=True)
