"""Birth and death of experts: usage, rebirth of the unused, growth and pruning.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onn import check
from onn.functional.types import Experts, Router, Routing, reduction_dtype


class Usage(NamedTuple):
    """How many tokens each expert got; counts of several batches add up."""

    routed: Tensor
    """[E] int64: passed the threshold, before the fallback."""
    active: Tensor
    """[E] int64: after the fallback."""


class Heirs(NamedTuple):
    """Which experts are born again, and from whom: state that belongs to experts can follow."""

    donor: Tensor
    """[E] int64: whose state each expert takes; itself where nothing happens."""
    reborn: Tensor
    """[E] bool"""
    halved: Tensor
    """[E] bool: the reborn and their donors."""


def _layer(where: str, experts: Experts, router: Router) -> list[tuple[str, Tensor, str]]:
    """What `check.shapes` needs to know of a carved layer."""
    check.instance(where, "experts", experts, Experts)
    check.instance(where, "router", router, Router)
    matrices = [(name, w, "float E I H") for name, w in zip(Experts._fields, experts, strict=True)]
    return [*matrices, ("prototypes", router.prototypes, "float E H"), ("thresholds", router.thresholds, "float E")]


def usage(routing: Routing) -> Usage:
    """Tokens an expert, before and after the fallback.

    Args:
        routing: of `threshold_route`, whose scores are margins.

    Returns:
        Counts [E] each.
    """
    check.instance("usage", "routing", routing, Routing)
    check.shapes("usage", ("scores", routing.scores, "float T E"), ("active", routing.active, "bool T E"))
    return Usage(routed=(routing.scores > 0).sum(dim=0), active=routing.active.sum(dim=0))


def heirs(counts: Tensor) -> Heirs:
    """Pair every unused expert with a used one: the i-th unused with the i-th most used.

    Args:
        counts: [E] tokens an expert got.

    Returns:
        `Heirs`; each donor gives once, so with fewer used than unused experts the last ones stay dead. Ties go to the
        lowest index. Static shapes, no host sync.
    """
    sizes = check.shapes("heirs", ("counts", counts, "integer E"))
    itself = torch.arange(sizes["E"], device=counts.device)
    by_use = torch.sort(counts, descending=True, stable=True).indices
    dead = counts == 0
    rank = (dead.long().cumsum(dim=0) - 1).clamp_min(0)
    candidate = by_use.gather(0, rank)
    reborn = dead & ~dead.gather(0, candidate)
    donor = torch.where(reborn, candidate, itself)
    gives = torch.zeros_like(counts).scatter_add(0, donor, reborn.to(counts.dtype)) > 0
    return Heirs(donor=donor, reborn=reborn, halved=reborn | gives)


def rebirth(
    experts: Experts, router: Router, plan: Heirs, noise: Tensor, *, scale: float, share: float
) -> tuple[Experts, Router]:
    """Give every reborn expert its donor's weights and threshold, and a prototype beside the donor's.

    Args:
        experts: [E, I, H] each.
        router: prototypes [E, H] and thresholds [E].
        plan: of `heirs`.
        noise: [E, H] standard normal, moves the prototypes of the reborn apart from their donors'.
        scale: length of that move relative to the donor's prototype.
        share: what donor and reborn keep of `down`: 0.5 under combine `sum`, where a token that chooses both then gets
            exactly what the donor gave it, and one that chooses only one of them half of it; 1 where the weights sum to
            1 anyway.

    Returns:
        New experts and router, in their dtypes; experts outside the plan are bit-identical.
    """
    check.instance("rebirth", "plan", plan, Heirs)
    check.shapes(
        "rebirth",
        *_layer("rebirth", experts, router),
        ("noise", noise, "float E H"),
        ("donor", plan.donor, "integer E"),
        ("reborn", plan.reborn, "bool E"),
        ("halved", plan.halved, "bool E"),
    )
    check.weight("rebirth", "scale", scale)
    check.between("rebirth", "share", share, 0, 1)
    moved = Experts(*(w.index_select(0, plan.donor) for w in experts))
    down = torch.where(plan.halved[:, None, None], moved.down * share, moved.down)
    dtype = reduction_dtype(router.prototypes.dtype)
    inherited = router.prototypes.index_select(0, plan.donor).to(dtype)
    length = torch.linalg.vector_norm(inherited, dim=-1, keepdim=True)
    step = noise.to(dtype) / noise.shape[-1] ** 0.5 * length * scale
    prototypes = torch.where(plan.reborn[:, None], inherited + step, inherited).to(router.prototypes.dtype)
    return (
        Experts(gate=moved.gate, up=moved.up, down=down),
        Router(prototypes=prototypes, thresholds=router.thresholds.index_select(0, plan.donor)),
    )


def forget_reborn(state: Tensor, plan: Heirs) -> Tensor:
    """Optimizer state of experts after a rebirth: zero for the reborn, which start anew.

    Args:
        state: [E, ...].
        plan: of `heirs`.

    Returns:
        [E, ...].
    """
    check.instance("forget_reborn", "state", state, Tensor)
    check.instance("forget_reborn", "plan", plan, Heirs)
    check.shapes("forget_reborn", ("reborn", plan.reborn, "bool E"))
    check.require(
        state.shape[:1] == plan.reborn.shape,
        f"forget_reborn: state {list(state.shape)} is not of {len(plan.reborn)} experts.",
    )
    check.require(
        state.device == plan.reborn.device,
        f"forget_reborn: expected one device, got state on {state.device}, reborn on {plan.reborn.device}.",
    )
    return torch.where(plan.reborn.view(-1, *(1,) * (state.ndim - 1)), 0, state)


def grow(
    experts: Experts, router: Router, x: Tensor, unrouted: Tensor, noise: Experts, *, threshold: float, scale: float
) -> tuple[Experts, Router]:
    """Add one expert for the tokens that nobody took: its prototype is their mean.

    Args:
        experts: [E, I, H] each.
        router: of the same layer.
        x: [T, H], the tokens.
        unrouted: [T] bool, those that passed no threshold.
        noise: standard normal, [1, I, H] each: the new weights.
        threshold: of the new expert.
        scale: of the new gate and up weights; `down` starts at 0.

    Returns:
        Experts and router of E + 1; the first E are untouched. The new expert writes 0: under combine `sum` a token
        that had an expert above its threshold gets what it got before; under `softmax` and `uniform` it shares its
        weights, and a token that only the fallback served loses that expert if it passes the new one. Without unrouted
        tokens the prototype is 0, which has cosine 0 with every token.

    References:
        The adaptive tuning of DynMoE (Guo et al., 2405.14297).
    """
    check.instance("grow", "noise", noise, Experts)
    check.shapes(
        "grow",
        *_layer("grow", experts, router),
        ("x", x, "float T H"),
        ("unrouted", unrouted, "bool T"),
        *((f"noise.{name}", part, "float 1 I H") for name, part in zip(Experts._fields, noise, strict=True)),
    )
    check.between("grow", "threshold", threshold, -check.LARGEST, check.LARGEST)
    check.weight("grow", "scale", scale)
    mean = torch.where(unrouted[:, None], x, 0).to(reduction_dtype(x.dtype)).sum(dim=0) / unrouted.sum().clamp_min(1)
    added = Experts(gate=noise.gate * scale, up=noise.up * scale, down=torch.zeros_like(noise.down))
    return (
        Experts(*(torch.cat([w, new.to(w.dtype)]) for w, new in zip(experts, added, strict=True))),
        Router(
            prototypes=torch.cat([router.prototypes, mean[None].to(router.prototypes.dtype)]),
            thresholds=torch.cat([router.thresholds, torch.full_like(router.thresholds[:1], threshold)]),
        ),
    )


def prune(experts: Experts, router: Router, lifetime: Tensor, *, keep: int) -> tuple[Experts, Router]:
    """Keep the `keep` experts with the largest lifetime usage, in their old order.

    Args:
        experts: [E, I, H] each.
        router: of the same layer.
        lifetime: [E] tokens each expert ever got.
        keep: how many stay.

    Returns:
        Experts and router of `keep`; ties go to the lowest index.
    """
    sizes = check.shapes("prune", *_layer("prune", experts, router), ("lifetime", lifetime, "real E"))
    check.whole("prune", "keep", keep, 1, sizes["E"])
    stays = torch.sort(torch.sort(lifetime, descending=True, stable=True).indices[:keep]).values
    return Experts(*(w.index_select(0, stays) for w in experts)), Router(*(r.index_select(0, stays) for r in router))
