"""What the router is taught by.

Shape letters: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from onn import check
from onn.functional.types import reduction_dtype


class GateAccuracy(NamedTuple):
    """How often the router prefers the least surprised expert, and how often chance would."""

    accuracy: Tensor
    """Scalar: share of tokens whose best score is their least surprise, both among the active experts."""
    chance: Tensor
    """Scalar: the mean of 1 / k over the same tokens."""


def _masked_softmax(scores: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the active experts, 0 at the others, and which tokens have an active expert at all."""
    some = active.any(dim=-1, keepdim=True)
    dtype = reduction_dtype(scores.dtype)
    masked = scores.to(dtype).masked_fill(~active, -torch.inf)
    log_p = torch.log_softmax(torch.where(some, masked, 0), dim=-1)
    return torch.where(active, log_p, 0), some[..., 0]


def _token_mean(values: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(tokens, values, 0).sum() / tokens.sum().clamp_min(1)


def _countable(surprise: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(surprise)
    return torch.where(finite, surprise, 0).detach(), active & finite


def router_loss(scores: Tensor, surprise: Tensor, active: Tensor, *, w_ce: float, w_kl: float) -> Tensor:
    """The hybrid router loss: `w_ce CE(scores, argmin S) + w_kl KL(softmax(scores) || softmax(-S))`.

    Both terms are over the experts that count and averaged over tokens. Surprise is a target: no gradient reaches it.
    Its scale is the temperature of the second term; surprise is largest in early layers, so normalise it per layer.

    Args:
        scores: [T, E], larger means preferred.
        surprise: [T, E].
        active: [T, E] bool, the experts that count. Entries whose surprise is not finite do not.
        w_ce: weight of the cross-entropy with the least surprised expert (ties to the lowest index).
        w_kl: weight of the divergence from the whole distribution.

    Returns:
        Scalar, at least 0; tokens without an expert that counts are left out. Shifting all scores of a token changes
        nothing.
    """
    check.shapes(
        "router_loss",
        ("scores", scores, "float T E"),
        ("surprise", surprise, "float T E"),
        ("active", active, "bool T E"),
    )
    check.require(scores.shape[1] > 0, f"router_loss: scores {list(scores.shape)} are of no expert.")
    check.weight("router_loss", "w_ce", w_ce)
    check.weight("router_loss", "w_kl", w_kl)
    target, counted = _countable(surprise, active)
    log_p, tokens = _masked_softmax(scores, counted)
    log_q, _ = _masked_softmax(-target, counted)
    best = torch.where(counted, target, torch.inf).argmin(dim=-1, keepdim=True)
    cross_entropy = -log_p.gather(-1, best)[..., 0]
    divergence = torch.where(counted, log_p.exp() * (log_p - log_q), 0).sum(dim=-1)
    return _token_mean(w_ce * cross_entropy + w_kl * divergence, tokens)


def expected_surprise(scores: Tensor, surprise: Tensor, active: Tensor) -> Tensor:
    """`E_p[S]`: the surprise that the router's own distribution over the active experts expects, averaged over tokens.

    Args:
        scores: [T, E].
        surprise: [T, E], a constant.
        active: [T, E] bool; entries whose surprise is not finite do not count.

    Returns:
        Scalar between the mean least and the mean largest active surprise.
    """
    check.shapes(
        "expected_surprise",
        ("scores", scores, "float T E"),
        ("surprise", surprise, "float T E"),
        ("active", active, "bool T E"),
    )
    target, counted = _countable(surprise, active)
    log_p, tokens = _masked_softmax(scores, counted)
    return _token_mean(torch.where(counted, log_p.exp() * target, 0).sum(dim=-1), tokens)


def gate_accuracy(scores: Tensor, surprise: Tensor, active: Tensor) -> GateAccuracy:
    """How often the router's best score is the least surprise, among the active experts, beside its chance level.

    Args:
        scores: [T, E].
        surprise: [T, E].
        active: [T, E] bool.

    Returns:
        `GateAccuracy`. Entries whose surprise is not finite do not count, nor do tokens with fewer than two experts
        left, which have no choice to make; ties go to the lowest index.
    """
    check.shapes(
        "gate_accuracy",
        ("scores", scores, "float T E"),
        ("surprise", surprise, "float T E"),
        ("active", active, "bool T E"),
    )
    check.require(scores.shape[1] > 0, f"gate_accuracy: scores {list(scores.shape)} are of no expert.")
    dtype = reduction_dtype(scores.dtype)
    target, counted = _countable(surprise, active)
    chosen = scores.masked_fill(~counted, -torch.inf).argmax(dim=-1)
    least = torch.where(counted, target, torch.inf).argmin(dim=-1)
    k = counted.sum(dim=-1)
    return GateAccuracy(
        accuracy=_token_mean((chosen == least).to(dtype), k > 1),
        chance=_token_mean(1 / k.clamp_min(1).to(dtype), k > 1),
    )


def load_balance_loss(scores: Tensor, active: Tensor) -> Tensor:
    """Switch's auxiliary loss `E sum_e f_e P_e`, with f the share of assignments and P the mean probability.

    Args:
        scores: [T, E].
        active: [T, E] bool.

    Returns:
        Scalar; 1 for a uniform router, up to E for one that sends everything to one expert, 0 without tokens.

    References:
        Fedus et al., 2101.03961, equation 4.
    """
    check.shapes("load_balance_loss", ("scores", scores, "float T E"), ("active", active, "bool T E"))
    dtype = reduction_dtype(scores.dtype)
    assigned = active.to(dtype).sum(dim=0)
    fraction = assigned / assigned.sum().clamp_min(1)
    probability = torch.softmax(scores, dim=-1, dtype=dtype).sum(dim=0) / max(len(scores), 1)
    return scores.shape[-1] * (fraction * probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss: the mean squared log-partition, which keeps logits small.

    Args:
        logits: [T, E].

    Returns:
        Scalar, at least 0; 0 without tokens.

    References:
        ST-MoE (Zoph et al., 2202.08906), equation 5.
    """
    check.shapes("z_loss", ("logits", logits, "float T E"))
    return torch.logsumexp(logits.to(reduction_dtype(logits.dtype)), dim=-1).square().sum() / max(len(logits), 1)


def diversity_loss(prototypes: Tensor, *, eps: float) -> Tensor:
    """How far the directions of the prototypes are from orthogonal: `||K K^T - I||_F / E` with unit rows K.

    Args:
        prototypes: [E, H].
        eps: floor of the norms.

    Returns:
        Scalar, 0 for orthogonal prototypes.

    References:
        DynMoE (Guo et al., 2405.14297), equation 10.
    """
    sizes = check.shapes("diversity_loss", ("prototypes", prototypes, "float E H"))
    check.require(sizes["E"] > 0, f"diversity_loss: prototypes {list(prototypes.shape)} are of no expert.")
    check.positive("diversity_loss", "eps", eps)
    unit = normalize(prototypes.to(reduction_dtype(prototypes.dtype)), dim=-1, eps=eps)
    excess = unit @ unit.mT - torch.eye(sizes["E"], dtype=unit.dtype, device=unit.device)
    norm: Tensor = torch.linalg.matrix_norm(excess)
    return norm / sizes["E"]


def simplicity_loss(prototypes: Tensor) -> Tensor:
    """The mean squared norm of the prototypes, which keeps the cosine's gradient alive.

    Args:
        prototypes: [E, H].

    Returns:
        Scalar, at least 0.

    References:
        DynMoE (Guo et al., 2405.14297), equation 10.
    """
    check.shapes("simplicity_loss", ("prototypes", prototypes, "float E H"))
    return prototypes.to(reduction_dtype(prototypes.dtype)).square().sum(dim=-1).mean()
