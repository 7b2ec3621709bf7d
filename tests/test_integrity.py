"""Predictive integrity and its parts: formulas, monotone laws, limits, entropy and the integral over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

import onn.functional as F
from tests.support import assert_close, assert_same, normal, tolerance

BOUND = tolerance(torch.float64, terms=64)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NATS = st.floats(0, 12)
SHARE = st.floats(0, 1)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def integrity(
    error: float, tau: float, surprise: float, *, alpha: float = 0.7, gamma: float = 0.3, tau_floor: float = 0.1
) -> float:
    return float(
        F.predictive_integrity(
            scalar(error), scalar(tau), scalar(surprise), alpha=alpha, gamma=gamma, tau_floor=tau_floor
        )
    )


@given(NATS, NATS, NATS, st.floats(0, 3), SHARE, st.floats(1e-3, 2))
def test_integrity_is_its_formula_in_zero_to_one(
    error: float, tau: float, surprise: float, alpha: float, gamma: float, tau_floor: float
) -> None:
    exponent = alpha * ((1 - gamma) * error / max(tau, tau_floor) + gamma * surprise)
    got = integrity(error, tau, surprise, alpha=alpha, gamma=gamma, tau_floor=tau_floor)
    assert got == pytest.approx(math.exp(-exponent), rel=BOUND * (1 + exponent), abs=1e-300)
    assert 0 <= got <= 1
    assert got > 0 or exponent > 700


@given(NATS, NATS, NATS, NATS, NATS, NATS, SHARE)
def test_integrity_falls_with_error_and_surprise_and_rises_with_tau(
    low: float, error: float, few: float, tau: float, calm: float, surprise: float, gamma: float
) -> None:
    (low, error), (few, tau), (calm, surprise) = sorted([low, error]), sorted([few, tau]), sorted([calm, surprise])
    got = integrity(low, tau, calm, gamma=gamma)
    slack = 1 + BOUND
    assert integrity(error, tau, calm, gamma=gamma) <= got * slack
    assert integrity(low, few, calm, gamma=gamma) <= got * slack
    assert integrity(low, tau, surprise, gamma=gamma) <= got * slack


def test_integrity_falls_and_rises_strictly() -> None:
    assert integrity(1.0, 1.0, 1.0) > integrity(1.1, 1.0, 1.0)
    assert integrity(1.0, 1.0, 1.0) > integrity(1.0, 0.9, 1.0)
    assert integrity(1.0, 1.0, 1.0) > integrity(1.0, 1.0, 1.1)
    assert integrity(1.0, 1.0, 1.0) > integrity(1.0, 1.0, 1.0, alpha=0.8)


@given(st.floats(0.1, 12), st.floats(0.1, 12), NATS, SHARE)
def test_integrity_measures_calibration_it_is_constant_where_the_loss_equals_tau(
    one: float, other: float, surprise: float, gamma: float
) -> None:
    got = integrity(one, one, surprise, gamma=gamma)
    assert got == pytest.approx(integrity(other, other, surprise, gamma=gamma), rel=BOUND)
    assert got == pytest.approx(math.exp(-0.7 * (1 - gamma + gamma * surprise)), rel=100 * BOUND)


@given(NATS, NATS, st.floats(0.1, 12), st.floats(0.1, 12), NATS, NATS)
def test_gamma_is_the_share_of_surprise(
    error: float, worse: float, tau: float, wider: float, surprise: float, other: float
) -> None:
    assert integrity(error, tau, surprise, gamma=0.0) == integrity(error, tau, other, gamma=0.0)
    assert integrity(error, tau, surprise, gamma=1.0) == integrity(worse, wider, surprise, gamma=1.0)
    assert integrity(error, tau, surprise, alpha=0.0) == integrity(0.0, tau, 0.0) == 1


@given(NATS, st.floats(0, 0.5), st.floats(0, 0.5))
def test_tau_below_its_floor_is_the_floor(error: float, tau: float, other: float) -> None:
    got = integrity(error, tau, 0.0, tau_floor=0.5)
    assert got == integrity(error, other, 0.0, tau_floor=0.5) == integrity(error, 0.5, 0.0, tau_floor=0.5)


def test_integrity_broadcasts_and_is_differentiable() -> None:
    error, tau, surprise = normal(0, 3, 1).square(), normal(1, 4).square(), normal(2, 2, 1, 1).square()
    got = F.predictive_integrity(error, tau, surprise, alpha=0.7, gamma=0.3, tau_floor=0.1)
    assert got.shape == (2, 3, 4)
    for i, j, k in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        expected = integrity(float(error[j, 0]), float(tau[k]), float(surprise[i, 0, 0]))
        assert float(got[i, j, k]) == pytest.approx(expected, rel=BOUND)
    leaf = error.requires_grad_()
    value = F.predictive_integrity(leaf, tau, surprise, alpha=0.7, gamma=0.3, tau_floor=0.1)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert_close(gradient, (value * -0.7 * 0.7 / tau.clamp_min(0.1)).sum(dim=(0, 2))[:, None].detach(), bound=BOUND)


def test_integrity_of_bfloat16_is_computed_in_float32() -> None:
    values = [normal(seed, 8, dtype=torch.bfloat16).abs() for seed in range(3)]
    got, expected = (
        F.predictive_integrity(*inputs, alpha=0.7, gamma=0.3, tau_floor=0.1)
        for inputs in (values, [value.float() for value in values])
    )
    assert_same(got, expected)


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 9), st.floats(0, 20))
def test_entropy_is_its_definition_that_of_torch_and_between_zero_and_log_v(
    seed: int, N: int, V: int, spread: float
) -> None:
    logits = normal(seed, N, V) * spread
    got = F.token_entropy(logits)
    for value, row in zip(got.tolist(), logits.tolist(), strict=True):
        exponentials = [math.exp(logit - max(row)) for logit in row]
        shares = [x / math.fsum(exponentials) for x in exponentials]
        assert value == pytest.approx(-math.fsum(p * math.log(p) for p in shares if p > 0), abs=BOUND)
        assert -BOUND <= value <= math.log(V) + BOUND
    assert torch.allclose(got, Categorical(logits=logits).entropy(), rtol=0, atol=BOUND)


@given(st.integers(0, 2**20), st.floats(-100, 100))
def test_entropy_does_not_change_with_a_shift_or_an_order_of_the_logits(seed: int, shift: float) -> None:
    logits = normal(seed, 3, 7)
    got, order = F.token_entropy(logits), normal(seed, 7).argsort()
    assert torch.allclose(F.token_entropy(logits + shift), got, rtol=0, atol=100 * BOUND)
    assert torch.allclose(F.token_entropy(logits[:, order]), got, rtol=0, atol=BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 1000])
def test_entropy_of_a_uniform_token_is_log_v_and_of_a_certain_one_zero(dtype: torch.dtype, V: int) -> None:
    logits = torch.full((2, V), 3.0, dtype=dtype)
    logits[1, 0] = 1e30
    uniform, certain = F.token_entropy(logits)
    assert uniform.dtype == F.reduction_dtype(dtype)
    assert float(uniform) == pytest.approx(math.log(V), abs=tolerance(uniform.dtype, terms=V))
    assert float(certain) == 0


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    logits = normal(0, 3, 5)
    barred = torch.cat([logits, torch.full((3, 2), -torch.inf, dtype=torch.float64)], dim=1)
    assert_close(F.token_entropy(barred), F.token_entropy(logits), bound=BOUND)


@pytest.mark.parametrize("logit", [-math.inf, -200.0])
def test_the_gradient_of_the_entropy_is_finite_where_a_probability_is_zero(logit: float) -> None:
    logits = torch.tensor([0.5, 0.0, logit], requires_grad=True)
    (gradient,) = torch.autograd.grad(F.token_entropy(logits), logits)
    likely = torch.tensor([0.5, 0.0], requires_grad=True)
    (expected,) = torch.autograd.grad(F.token_entropy(likely), likely)
    assert torch.allclose(gradient, torch.cat([expected, torch.zeros(1)]), atol=tolerance(torch.float32, terms=3))


def test_entropy_of_bfloat16_is_computed_in_float32() -> None:
    logits = normal(0, 2, 3, 500, dtype=torch.bfloat16)
    assert F.token_entropy(logits).shape == (2, 3)
    assert_same(F.token_entropy(logits), F.token_entropy(logits.float()))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.floats(0, 9), st.integers(0, 2**20))
def test_the_integral_is_the_mean_times_the_penalty_of_the_populations_variance(
    values: list[float], delta: float, seed: int
) -> None:
    pi, mean = torch.tensor(values, dtype=torch.float64), math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    got = float(F.integrity_integral(pi, delta=delta))
    assert got == pytest.approx(mean * math.exp(-delta * variance), rel=BOUND)
    assert got <= mean * (1 + BOUND)
    shuffled = pi[normal(seed, len(values)).argsort()]
    assert float(F.integrity_integral(shuffled, delta=delta)) == pytest.approx(got, rel=BOUND)
    assert float(F.integrity_integral(pi, delta=0.0)) == pytest.approx(mean, rel=BOUND)


@given(st.floats(0.01, 1), st.integers(1, 50), st.floats(0, 9))
def test_the_integral_of_a_constant_run_is_its_value(value: float, steps: int, delta: float) -> None:
    run = torch.full((steps,), value, dtype=torch.float64)
    assert float(F.integrity_integral(run, delta=delta)) == pytest.approx(value, rel=BOUND)


@given(SHARE, SHARE, st.floats(0, 50), SHARE)
def test_the_mix_is_one_minus_the_sigmoid_and_falls_as_integrity_rises(
    pi: float, better: float, sensitivity: float, threshold: float
) -> None:
    def mix(value: float) -> float:
        return float(F.adaptive_mix(scalar(value), sensitivity=sensitivity, threshold=threshold))

    pi, better = sorted([pi, better])
    assert mix(pi) == pytest.approx(1 - 1 / (1 + math.exp(-sensitivity * (pi - threshold))), abs=BOUND)
    assert 0 <= mix(better) <= mix(pi) <= 1
    assert mix(threshold) == 0.5
    assert mix(0.0) > mix(1.0) or sensitivity < BOUND


ONE = torch.ones(3)
REFUSED: dict[str, Callable[[], object]] = {
    "alpha=-1": partial(F.predictive_integrity, ONE, ONE, ONE, alpha=-1, gamma=0.5, tau_floor=1),
    "gamma=1.5 <= 1": partial(F.predictive_integrity, ONE, ONE, ONE, alpha=1, gamma=1.5, tau_floor=1),
    "gamma=nan": partial(F.predictive_integrity, ONE, ONE, ONE, alpha=1, gamma=math.nan, tau_floor=1),
    "tau_floor=0": partial(F.predictive_integrity, ONE, ONE, ONE, alpha=1, gamma=0.5, tau_floor=0),
    "pi .*expected": partial(F.integrity_integral, ONE[None], delta=1),
    "delta=-1": partial(F.integrity_integral, ONE, delta=-1),
    "sensitivity=-1": partial(F.adaptive_mix, ONE, sensitivity=-1, threshold=0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
