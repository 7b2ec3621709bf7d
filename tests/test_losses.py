"""What the router is taught by, against torch's losses token by token and against transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, one_hot
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import onn.functional as F
from tests.support import assert_close, assert_same, normal, tolerance

BOUND = tolerance(torch.float64, terms=64)
ROUNDING = tolerance(torch.float32, terms=64)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Lesson(NamedTuple):
    scores: Tensor
    surprise: Tensor
    active: Tensor


@st.composite
def lessons(draw: st.DrawFn, *, broken: bool = True) -> Lesson:
    """Scores and surprise; tokens without an active expert, ties, and (if `broken`) surprise that is not finite."""
    seed, T, E = draw(st.integers(0, 2**20)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    surprise = normal(seed + 1, T, E).abs()
    if draw(st.booleans()):
        surprise = surprise.round()
    if broken:
        surprise = torch.where(normal(seed + 2, T, E) > 1, draw(st.sampled_from([math.nan, math.inf])), surprise)
    active = normal(seed + 3, T, E) > draw(st.sampled_from([-9.0, 0.0, 1.0]))
    return Lesson(scores=normal(seed, T, E), surprise=surprise, active=active)


def rows(lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """Scores and surprise of the experts that count, for every token that has one."""
    counted = lesson.active & lesson.surprise.isfinite()
    found = [(s[c], v[c]) for s, v, c in zip(lesson.scores, lesson.surprise, counted, strict=True)]
    return [row for row in found if len(row[0])]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def near(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.detach(), expected.detach(), rtol=BOUND, atol=BOUND)


@given(lessons(), st.floats(0, 3), st.floats(0, 3))
def test_router_loss_is_the_cross_entropy_and_the_divergence_of_torch_token_by_token(
    lesson: Lesson, w_ce: float, w_kl: float
) -> None:
    expected = [
        w_ce * cross_entropy(scores[None], surprise.argmin()[None])
        + w_kl
        * kl_div(
            torch.log_softmax(-surprise, dim=0), torch.log_softmax(scores, dim=0), reduction="sum", log_target=True
        )
        for scores, surprise in rows(lesson)
    ]
    got = F.router_loss(*lesson, w_ce=w_ce, w_kl=w_kl)
    assert near(got, mean(expected))
    assert float(got) >= -BOUND


@given(lessons())
def test_router_loss_teaches_scores_and_never_surprise(lesson: Lesson) -> None:
    scores, surprise = lesson.scores.requires_grad_(), lesson.surprise.requires_grad_()
    for loss in (F.router_loss(scores, surprise, lesson.active, w_ce=1.0, w_kl=1.0), F.expected_surprise(*lesson)):
        gradient, to_surprise = torch.autograd.grad(loss, (scores, surprise), allow_unused=True, materialize_grads=True)
        assert gradient.isfinite().all()
        assert not gradient[~(lesson.active & surprise.isfinite())].any()
        assert not to_surprise.any()


@given(lessons(), st.integers(0, 2**20))
def test_router_losses_do_not_change_when_the_scores_of_a_token_are_shifted(lesson: Lesson, seed: int) -> None:
    shifted = lesson._replace(scores=lesson.scores + normal(seed, len(lesson.scores), 1))
    assert near(F.router_loss(*shifted, w_ce=1.0, w_kl=1.0), F.router_loss(*lesson, w_ce=1.0, w_kl=1.0))
    assert near(F.expected_surprise(*shifted), F.expected_surprise(*lesson))


@given(lessons(), st.integers(0, 2**20))
def test_the_divergence_is_least_where_the_scores_are_minus_surprise(lesson: Lesson, seed: int) -> None:
    target = torch.where(lesson.surprise.isfinite(), -lesson.surprise, 0)
    best = (target + normal(seed, len(target), 1)).requires_grad_()
    loss = F.router_loss(best, lesson.surprise, lesson.active, w_ce=0.0, w_kl=1.0)
    assert near(loss, torch.zeros_like(loss))
    (gradient,) = torch.autograd.grad(loss, best)
    assert near(gradient, torch.zeros_like(gradient))
    other = F.router_loss(*lesson, w_ce=0.0, w_kl=1.0)
    assert float(other) > 0 or all(len(scores) == 1 for scores, _ in rows(lesson))


@given(lessons())
def test_what_does_not_count_may_be_anything(lesson: Lesson) -> None:
    counted = lesson.active & lesson.surprise.isfinite()
    for junk in (-1e30, 0.0, math.nan):
        changed = lesson._replace(scores=torch.where(counted, lesson.scores, junk))
        silent = changed._replace(surprise=torch.where(lesson.active, lesson.surprise, junk))
        assert_same(F.router_loss(*silent, w_ce=1.0, w_kl=1.0), F.router_loss(*lesson, w_ce=1.0, w_kl=1.0))
        assert_same(F.expected_surprise(*silent), F.expected_surprise(*lesson))


@given(lessons())
def test_expected_surprise_is_the_mean_under_the_routers_distribution_and_between_its_bounds(lesson: Lesson) -> None:
    found = rows(lesson)
    got = F.expected_surprise(*lesson)
    assert near(got, mean([torch.softmax(scores, dim=0) @ surprise for scores, surprise in found]))
    low, high = (mean([bound(surprise) for _, surprise in found]) for bound in (torch.min, torch.max))
    assert low - BOUND <= got <= high + BOUND


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float32_router_losses_are_those_of_float64_at_every_scale_of_surprise(scale: float) -> None:
    lesson = Lesson(normal(0, 16, 8), normal(1, 16, 8).abs() * scale, normal(2, 16, 8) > 0)
    narrow = Lesson(lesson.scores.float(), lesson.surprise.float(), lesson.active)
    wide = Lesson(narrow.scores.double(), narrow.surprise.double(), lesson.active)
    for got, expected in [
        (F.router_loss(*part, w_ce=1.0, w_kl=1.0) for part in (narrow, wide)),
        (F.expected_surprise(*part) for part in (narrow, wide)),
    ]:
        assert got.dtype == torch.float32
        assert_close(got, expected, bound=ROUNDING)


@given(lessons(broken=False))
def test_gate_accuracy_is_the_loop_over_tokens_that_have_a_choice(lesson: Lesson) -> None:
    hits, chances = [], []
    for scores, surprise in rows(lesson):
        if len(scores) > 1:
            hits.append((scores.argmax() == surprise.tolist().index(surprise.min())).double())
            chances.append(torch.tensor(1 / len(scores), dtype=torch.float64))
    got = F.gate_accuracy(*lesson)
    assert near(got.accuracy, mean(hits))
    assert near(got.chance, mean(chances))


@pytest.mark.parametrize("active", [(True, True, True, True), (True, False, True, True), (False, True, True, False)])
def test_chance_is_the_accuracy_of_every_order_of_scores_in_turn(active: tuple[bool, ...]) -> None:
    scores = torch.tensor(list(permutations([0.0, 1.0, 2.0, 3.0])))
    surprise = torch.tensor([0.4, 0.1, 0.3, 0.2]).expand_as(scores)
    got = F.gate_accuracy(scores, surprise, torch.tensor(active).expand_as(scores))
    assert_close(got.accuracy, got.chance, bound=ROUNDING)
    assert float(got.chance) == pytest.approx(1 / sum(active))


def test_surprise_that_is_nan_is_never_the_least_surprise() -> None:
    scores, surprise = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[math.nan, 0.5, 2.0]])
    assert not F.gate_accuracy(scores, surprise, torch.ones(1, 3, dtype=torch.bool)).accuracy


@pytest.mark.parametrize("k", [1, 2, 5])
@given(seed=st.integers(0, 2**20), T=st.integers(1, 9))
def test_load_balance_is_that_of_transformers_over_k(k: int, seed: int, T: int) -> None:
    """Theirs counts k assignments a token, so that it is k for a balanced router; ours counts shares."""
    logits = normal(seed, T, 5, dtype=torch.float32)
    got = F.load_balance_loss(logits, F.top_k_route(logits, k=k, normalise=True).active)
    theirs = load_balancing_loss_func((logits,), num_experts=5, top_k=k)
    assert isinstance(theirs, Tensor)
    assert_close(k * got, theirs, bound=ROUNDING)


@given(lessons())
def test_load_balance_is_its_formula_and_one_for_a_balanced_choice(lesson: Lesson) -> None:
    E = lesson.scores.shape[1]
    got = F.load_balance_loss(lesson.scores, lesson.active)
    probabilities = [torch.softmax(row, dim=0).tolist() for row in lesson.scores]
    total = sum(
        float(lesson.active[:, e].sum()) * math.fsum(row[e] for row in probabilities) / len(probabilities)
        for e in range(E)
    )
    assert float(got) == pytest.approx(E * total / max(int(lesson.active.sum()), 1), abs=BOUND)
    everything = torch.ones_like(lesson.active)
    assert near(F.load_balance_loss(lesson.scores, everything), torch.ones_like(got))
    assert near(F.load_balance_loss(torch.zeros_like(lesson.scores), everything), torch.ones_like(got))
    first = one_hot(torch.zeros(len(everything), dtype=torch.int64), E)
    assert near(F.load_balance_loss(1e3 * first.double(), first.bool()), torch.full_like(got, E))


def test_load_balance_pushes_the_overloaded_down() -> None:
    scores = torch.zeros(4, 3, requires_grad=True)
    active = torch.tensor([[True, False, False]] * 3 + [[False, True, False]])
    (gradient,) = torch.autograd.grad(F.load_balance_loss(scores, active), scores)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 2] < 0).all()


@given(st.integers(0, 2**20), st.floats(-50, 50))
def test_z_loss_is_the_mean_squared_log_partition(seed: int, shift: float) -> None:
    logits = normal(seed, 4, 5) + shift
    partitions = [math.log(math.fsum(math.exp(value) for value in row)) for row in logits.tolist()]
    expected = math.fsum(value**2 for value in partitions) / 4
    assert float(F.z_loss(logits)) == pytest.approx(expected, rel=BOUND, abs=BOUND)
    assert near(F.z_loss(torch.log_softmax(logits, dim=-1)), torch.zeros(()).double())


@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(-20, 20))
def test_diversity_is_zero_for_orthogonal_prototypes_of_any_length_and_largest_for_one_direction(
    seed: int, E: int, power: int
) -> None:
    basis = torch.linalg.qr(normal(seed, 6, 6)).Q[:E]
    lengths = normal(seed + 1, E, 1).abs() + 0.1
    orthogonal = (basis * lengths).requires_grad_()
    loss = F.diversity_loss(orthogonal, eps=1e-12)
    assert near(loss, torch.zeros_like(loss))
    assert torch.autograd.grad(loss, orthogonal)[0].isfinite().all()
    exact = torch.eye(E, 6).requires_grad_()
    assert not torch.autograd.grad(F.diversity_loss(exact, eps=1e-12), exact)[0].any()
    prototypes = normal(seed + 2, E, 6)
    unit = prototypes / prototypes.norm(dim=1, keepdim=True)
    cosines = [float(unit[a] @ unit[b]) for a in range(E) for b in range(E) if a != b]
    got = F.diversity_loss(prototypes, eps=1e-12)
    assert float(got) == pytest.approx(math.hypot(*cosines) / E, abs=BOUND)
    assert_same(F.diversity_loss(prototypes * 2.0**power, eps=1e-12), got)
    same = F.diversity_loss(basis[:1] * lengths, eps=1e-12)
    assert float(same) == pytest.approx((E * (E - 1)) ** 0.5 / E, abs=BOUND)
    assert float(got) <= float(same) + BOUND


@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 6))
def test_simplicity_is_the_mean_squared_length(seed: int, E: int, H: int) -> None:
    prototypes = normal(seed, E, H)
    expected = math.fsum(math.hypot(*row) ** 2 for row in prototypes.tolist()) / E
    assert float(F.simplicity_loss(prototypes)) == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_of_narrow_inputs_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores, surprise, active = normal(0, 9, 5, dtype=dtype), normal(1, 9, 5).abs().float(), normal(2, 9, 5) > 0
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda s: F.router_loss(s, surprise.to(s.dtype), active, w_ce=1.0, w_kl=1.0),
        lambda s: F.expected_surprise(s, surprise.to(s.dtype), active),
        lambda s: F.gate_accuracy(s, surprise, active).accuracy,
        lambda s: F.gate_accuracy(s, surprise, active).chance,
        lambda s: F.load_balance_loss(s, active),
        F.z_loss,
        partial(F.diversity_loss, eps=1e-12),
        F.simplicity_loss,
    ]
    surprise = surprise.to(torch.bfloat16).float()
    wide = F.reduction_dtype(dtype)
    for loss in losses:
        assert_same(loss(scores), loss(scores.to(wide)))
        assert loss(scores).dtype == wide


def test_a_batch_without_any_expert_that_counts_teaches_nothing() -> None:
    scores = normal(0, 3, 4).requires_grad_()
    nothing, surprise = torch.zeros(3, 4, dtype=torch.bool), normal(1, 3, 4).abs()
    for loss in (
        F.router_loss(scores, surprise, nothing, w_ce=1.0, w_kl=1.0),
        F.router_loss(scores, surprise * torch.nan, ~nothing, w_ce=1.0, w_kl=1.0),
        F.expected_surprise(scores, surprise, nothing),
        F.load_balance_loss(scores, nothing),
    ):
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, scores)[0].any()
    assert_same(F.gate_accuracy(scores, surprise, nothing), F.GateAccuracy(*torch.zeros(2, dtype=torch.float64)))
    for of_no_token in (F.z_loss(scores[:0]), F.load_balance_loss(scores[:0], nothing[:0])):
        assert float(of_no_token.detach()) == 0


SCORES, ACTIVE = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
REFUSED: dict[str, Callable[[], object]] = {
    "router_loss: shape of surprise": partial(F.router_loss, SCORES, SCORES[:1], ACTIVE, w_ce=1.0, w_kl=1.0),
    "expected_surprise: shape of active": partial(F.expected_surprise, SCORES, SCORES, ACTIVE[:1]),
    "gate_accuracy: shape of surprise": partial(F.gate_accuracy, SCORES, SCORES[:, :1], ACTIVE),
    "load_balance_loss: shape of active": partial(F.load_balance_loss, SCORES, ACTIVE[:1]),
    "z_loss: shape of logits": partial(F.z_loss, SCORES[0]),
    "diversity_loss: shape of prototypes": partial(F.diversity_loss, SCORES[0], eps=1e-6),
    "simplicity_loss: shape of prototypes": partial(F.simplicity_loss, SCORES[0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_tensors_that_do_not_fit_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
