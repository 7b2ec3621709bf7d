"""Predictive integrity: one live health figure from loss, output entropy and surprise."""

from __future__ import annotations

import torch
from torch import Tensor

from onn import check
from onn.functional.types import reduction_dtype


def token_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the output distribution of every position, in nats.

    Args:
        logits: [..., V].

    Returns:
        [...] in [0, log V], float32 (float64 for float64 inputs). A probability of 0 (logit -inf) adds nothing.
    """
    check.holds("token_entropy", "logits", logits, "float")
    check.require(logits.ndim > 0, "token_entropy: expected logits [..., V], got a scalar.")
    log_p = torch.log_softmax(logits, dim=-1, dtype=reduction_dtype(logits.dtype))
    p = log_p.exp()
    possible = p != 0
    return -torch.where(possible, p * torch.where(possible, log_p, 0), 0).sum(dim=-1)


def predictive_integrity(
    error: Tensor, tau: Tensor, surprise: Tensor, *, alpha: float, gamma: float, tau_floor: float
) -> Tensor:
    """`PI = exp(-alpha ((1 - gamma) error / max(tau, tau_floor) + gamma surprise))`.

    PI measures calibration more than skill: where the loss equals tau it is a constant, and it collapses as tau goes to
    0. Log `error / tau` and `surprise` beside it, always.

    Args:
        error: main loss in nats, not negative; any shape, broadcast with the others.
        tau: mean output entropy in nats (`token_entropy`).
        surprise: mean over layers and active pairs.
        alpha: overall sensitivity, at least 0.
        gamma: share of surprise against error, in [0, 1].
        tau_floor: lower bound of tau, above 0.

    Returns:
        In (0, 1] up to underflow for inputs that are not negative; falls with error and surprise, rises with tau.
        float32 (float64 for float64 inputs).
    """
    check.weight("predictive_integrity", "alpha", alpha)
    check.between("predictive_integrity", "gamma", gamma, 0, 1)
    check.positive("predictive_integrity", "tau_floor", tau_floor)
    check.broadcast("predictive_integrity", error=error, tau=tau, surprise=surprise)
    error, tau, surprise = (value.to(reduction_dtype(value.dtype)) for value in (error, tau, surprise))
    by_error = _times(1 - gamma, error) / tau.clamp_min(tau_floor)
    return torch.exp(_times(-alpha, by_error + _times(gamma, surprise)))


def _times(factor: float, value: Tensor) -> Tensor:
    """What has no weight does not count, be it infinite."""
    return factor * value if factor else torch.zeros_like(value)


def integrity_integral(pi: Tensor, *, delta: float) -> Tensor:
    """Integrity over a run: `mean(PI) exp(-delta var(PI))`, the variance being that of the population.

    Args:
        pi: [N], one value a step.
        delta: penalty of unsteadiness, at least 0.

    Returns:
        Scalar, at most `mean(PI)`, and equal to it for a constant run.
    """
    sizes = check.shapes("integrity_integral", ("pi", pi, "float N"))
    check.require(sizes["N"] > 0, "integrity_integral: pi is empty.")
    check.weight("integrity_integral", "delta", delta)
    return pi.mean() * torch.exp(-delta * pi.var(correction=0))


def adaptive_mix(pi: Tensor, *, sensitivity: float, threshold: float) -> Tensor:
    """`lambda = 1 - sigmoid(sensitivity (PI - threshold))`: near 1 for a model in trouble, near 0 for a healthy one.

    Args:
        pi: predictive integrity.
        sensitivity: steepness, at least 0.
        threshold: the PI at which lambda is one half.

    Returns:
        In [0, 1], the shape of `pi`.
    """
    check.holds("adaptive_mix", "pi", pi, "float")
    check.weight("adaptive_mix", "sensitivity", sensitivity)
    check.between("adaptive_mix", "threshold", threshold, -check.LARGEST, check.LARGEST)
    return torch.sigmoid(sensitivity * (threshold - pi))
