"""Which experts compute a token: the threshold route of SurpriseMin and the baselines it is measured against.

Shape letters: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from onn import check
from onn.functional.types import Routing, reduction_dtype

Squash = Literal["identity", "sigmoid"]
Combine = Literal["softmax", "uniform", "sum"]


def cosine_affinity(x: Tensor, prototypes: Tensor, *, eps: float) -> Tensor:
    """Cosine of every token and every expert prototype.

    Args:
        x: [T, H].
        prototypes: [E, H].
        eps: floor of both norms, so that a zero vector has affinity 0 with a finite gradient.

    Returns:
        [T, E] in [-1, 1] up to rounding, float32 (float64 for float64 inputs).

    References:
        The gate of DynMoE (Guo et al., 2405.14297).
    """
    check.shapes("cosine_affinity", ("x", x, "float T H"), ("prototypes", prototypes, "float E H"))
    check.positive("cosine_affinity", "eps", eps)
    dtype = reduction_dtype(x.dtype)
    return normalize(x.to(dtype), dim=-1, eps=eps) @ normalize(prototypes.to(dtype), dim=-1, eps=eps).mT


def first_k(keys: Tensor, *, k: int) -> Tensor:
    """Mark the `k` smallest entries of the last dimension; ties go to the lowest index.

    Args:
        keys: [..., E], without NaN.
        k: how many; at least 0, and everything is marked when it is E or more.

    Returns:
        bool, the shape of `keys`.
    """
    check.holds("first_k", "keys", keys, "real")
    check.require(keys.ndim > 0, "first_k: expected keys [..., E], got a scalar.")
    check.whole("first_k", "k", k, 0, 2**62)
    order = torch.sort(keys.detach(), dim=-1, stable=True).indices
    chosen = torch.arange(keys.shape[-1], device=keys.device).expand_as(order) < k
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def threshold_route(
    affinity: Tensor, thresholds: Tensor, *, squash: Squash, fallback_k: int, combine: Combine
) -> Routing:
    """Dynamic-k route: an expert is active where `squash(affinity) > sigmoid(threshold)`.

    Args:
        affinity: [T, E], a cosine.
        thresholds: [E], before the sigmoid.
        squash: `sigmoid` compares `sigmoid(affinity)`, that is `affinity > threshold`; `identity` the cosine itself.
        fallback_k: experts of a token that passes no threshold: its best margins, ties to the lowest index.
        combine: `softmax` of the margins over the active experts, `uniform` 1/k, or `sum`, all 1.

    Returns:
        `Routing`; `scores` is the margin `squash(affinity) - sigmoid(threshold)`. Every token has at least one active
        expert. Before the fallback, `scores > 0` is what was active. A NaN margin is never active, and the last to be
        a fallback.

    Gradient: for `sum` and `uniform` the step from margin to gate passes it straight through (d gate / d margin = 1,
    also for inactive experts); the count k is a constant. `softmax` needs no such help.

    References:
        DynMoE (Guo et al., 2405.14297), equations 5 to 9.
    """
    sizes = check.shapes("threshold_route", ("affinity", affinity, "float T E"), ("thresholds", thresholds, "float E"))
    check.one_of("threshold_route", "squash", squash, get_args(Squash))
    check.one_of("threshold_route", "combine", combine, get_args(Combine))
    check.whole("threshold_route", "fallback_k", fallback_k, 1, sizes["E"])
    squashed = torch.sigmoid(affinity) if squash == "sigmoid" else affinity
    margin = squashed - torch.sigmoid(thresholds.to(affinity.dtype))
    passed = margin > 0
    fallback = first_k(torch.nan_to_num(-margin, nan=torch.inf), k=fallback_k)
    active = torch.where(passed.any(dim=-1, keepdim=True), passed, fallback)
    if combine == "softmax":
        weights = torch.softmax(margin.masked_fill(~active, -torch.inf), dim=-1)
    else:
        straight_through = torch.where(margin.isnan(), 0, margin - margin.detach())
        gate = active.to(margin.dtype) + straight_through
        weights = gate / active.sum(dim=-1, keepdim=True) if combine == "uniform" else gate
    return Routing(scores=margin, active=active, weights=weights)


def share_threshold_shift(affinity: Tensor, thresholds: Tensor, *, squash: Squash, target: Tensor) -> Tensor:
    """What to add to every threshold so that a share `target` of all (token, expert) pairs passes.

    One shift for all experts leaves their differences, and so their specialisation, alone. It is the `1 - target`
    quantile of the distance of each pair from its threshold, so no rate has to be tuned to the spread of the cosines.

    Args:
        affinity: [T, E].
        thresholds: [E].
        squash: as in `threshold_route`.
        target: scalar in (0, 1]; at 1 or above all pass: 0 where they do already, else to just below the farthest.

    Returns:
        Scalar. Adding a fraction of it each step is an integral controller. Pairs that no threshold can open
        (`identity` with a cosine of at most 0) count as far below.

    Raises:
        ValueError: shapes differ, or an unknown squash.
    """
    check.shapes(
        "share_threshold_shift",
        ("affinity", affinity, "float T E"),
        ("thresholds", thresholds, "float E"),
        ("target", target, "float"),
    )
    check.require(affinity.numel() > 0, f"share_threshold_shift: affinity {list(affinity.shape)} is empty.")
    check.one_of("share_threshold_shift", "squash", squash, get_args(Squash))
    eps = torch.finfo(affinity.dtype).eps
    opening = affinity if squash == "sigmoid" else torch.logit(affinity, eps=eps)
    distance = torch.sort((opening - thresholds.to(affinity.dtype)).detach().flatten()).values
    rank = ((1 - target.to(reduction_dtype(target.dtype))) * distance.numel()).round().long() - 1
    shift = distance.gather(0, rank.clamp(0, distance.numel() - 1)[None])[0]
    return torch.where(target >= 1, (distance[0] - eps**0.5).clamp_max(0), shift)


def _route_by_rank(logits: Tensor, keys: Tensor, values: Tensor, *, k: int, normalise: bool) -> Routing:
    chosen = torch.sort(keys.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    top = values.gather(-1, chosen)
    if normalise:
        top = top / top.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(top.dtype).tiny)
    weights = torch.zeros_like(values).scatter(-1, chosen, top)
    active = torch.zeros_like(values, dtype=torch.bool).scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    return Routing(scores=logits, active=active, weights=weights.to(logits.dtype))


def top_k_route(logits: Tensor, *, k: int, normalise: bool) -> Routing:
    """Exactly Qwen3-MoE's route: softmax in float32, the `k` largest, optionally scaled to sum 1.

    Args:
        logits: [T, E].
        k: experts a token.
        normalise: Qwen3-MoE's `norm_topk_prob`.

    Returns:
        `Routing` with `scores` the logits and `weights` in their dtype; ties go to the lowest index (`torch.topk`,
        which transformers uses, promises no order).
    """
    sizes = check.shapes("top_k_route", ("logits", logits, "float T E"))
    check.whole("top_k_route", "k", k, 1, sizes["E"])
    check.instance("top_k_route", "normalise", normalise, bool)
    probabilities = torch.softmax(logits, dim=-1, dtype=reduction_dtype(logits.dtype))
    return _route_by_rank(logits, probabilities, probabilities, k=k, normalise=normalise)


def biased_top_k_route(logits: Tensor, bias: Tensor, *, k: int, normalise: bool) -> Routing:
    """Loss-free balancing: the bias takes part in the choice of experts and not in their weights.

    Args:
        logits: [T, E].
        bias: [E], moved by `balance_bias`, not by gradients.
        k: experts a token.
        normalise: scale the chosen sigmoids to sum 1.

    Returns:
        `Routing` whose weights are the sigmoids of the chosen logits.

    References:
        Wang et al., 2408.15664; the router of DeepSeek-V3.
    """
    sizes = check.shapes("biased_top_k_route", ("logits", logits, "float T E"), ("bias", bias, "float E"))
    check.whole("biased_top_k_route", "k", k, 1, sizes["E"])
    check.instance("biased_top_k_route", "normalise", normalise, bool)
    gates = torch.sigmoid(logits.to(reduction_dtype(logits.dtype)))
    return _route_by_rank(logits, gates + bias.to(gates.dtype), gates, k=k, normalise=normalise)


def balance_bias(bias: Tensor, counts: Tensor, *, rate: float) -> Tensor:
    """One step of loss-free balancing: `bias + rate * sign(mean(counts) - counts)`.

    Args:
        bias: [E].
        counts: [E] tokens that each expert got.
        rate: step size.

    Returns:
        [E], the dtype of `bias`.
    """
    check.shapes("balance_bias", ("bias", bias, "float E"), ("counts", counts, "real E"))
    check.weight("balance_bias", "rate", rate)
    load = counts.to(reduction_dtype(bias.dtype))
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)


def top_p_route(logits: Tensor, *, p: float, normalise: bool) -> Routing:
    """The fewest experts whose probabilities sum to at least `p`.

    Args:
        logits: [T, E].
        p: mass in (0, 1]; at least one expert is always active.
        normalise: scale the chosen probabilities to sum 1.

    Returns:
        `Routing` with `scores` the logits; ties go to the lowest index.

    References:
        Huang et al., 2403.07652.
    """
    check.shapes("top_p_route", ("logits", logits, "float T E"))
    check.positive("top_p_route", "p", p)
    check.between("top_p_route", "p", p, 0, 1)
    check.instance("top_p_route", "normalise", normalise, bool)
    probabilities = torch.softmax(logits, dim=-1, dtype=reduction_dtype(logits.dtype))
    ranked, order = torch.sort(probabilities.detach(), dim=-1, descending=True, stable=True)
    needed = ranked.cumsum(dim=-1) - ranked < p
    active = torch.zeros_like(needed).scatter(-1, order, needed)
    weights = torch.where(active, probabilities, 0)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(scores=logits, active=active, weights=weights.to(logits.dtype))


def relu_route(logits: Tensor) -> Routing:
    """ReMoE: the weights are `relu(logits)`, an expert is active where they are positive; a token may have none.

    Args:
        logits: [T, E].

    Returns:
        `Routing`, fully differentiable.

    References:
        ReMoE (Wang et al., 2412.14711), equation 5.
    """
    check.shapes("relu_route", ("logits", logits, "float T E"))
    return Routing(scores=logits, active=logits > 0, weights=torch.relu(logits))


def sparsity_coefficient(coefficient: Tensor, active_share: Tensor, *, target: float, rate: float) -> Tensor:
    """ReMoE's controller: the L1 coefficient grows by `rate` while more experts than `target` are active, else shrinks.

    Args:
        coefficient: scalar, positive.
        active_share: scalar, k/E of the last step.
        target: wanted share.
        rate: factor above 1 (the paper takes 1.2).

    Returns:
        Scalar `coefficient * rate ** sign(active_share - target)`.

    References:
        ReMoE (Wang et al., 2412.14711), equation 9.
    """
    check.broadcast("sparsity_coefficient", coefficient=coefficient, active_share=active_share)
    check.between("sparsity_coefficient", "target", target, 0, 1)
    check.at_least("sparsity_coefficient", "rate", rate, 1)
    check.positive("sparsity_coefficient", "rate", rate)
    return coefficient * rate ** torch.sign(active_share - target)


def expert_choice_route(logits: Tensor, *, capacity: int) -> Routing:
    """Every expert takes the `capacity` tokens that it has the highest probability for; a token may have none.

    Args:
        logits: [T, E].
        capacity: tokens an expert.

    Returns:
        `Routing` with weights the probabilities (softmax over experts) of the chosen pairs; ties go to the earlier
        token. It looks at the whole batch, later positions included: a baseline, not for generation.

    References:
        Zhou et al., 2202.09368.
    """
    sizes = check.shapes("expert_choice_route", ("logits", logits, "float T E"))
    check.whole("expert_choice_route", "capacity", capacity, 1, sizes["T"])
    probabilities = torch.softmax(logits, dim=-1, dtype=reduction_dtype(logits.dtype))
    active = first_k(-probabilities.mT, k=capacity).mT
    return Routing(scores=logits, active=active, weights=torch.where(active, probabilities, 0).to(logits.dtype))
