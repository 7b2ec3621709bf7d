"""Grouping the neurons of a dense MLP into experts of one size, without training.

A partition is [E, I] int64: row `e` holds the neurons of expert `e`, and every neuron occurs once.

Shape letters: M neurons, E experts, I = M / E neurons an expert, D features of a point, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from onn import check
from onn.functional.routing import first_k
from onn.functional.types import reduction_dtype

TOLERANCE = 1e-4
"""How far, relative to the spread of the benefits, a point of `balanced_assignment` may be from its best place."""
FINEST = 1e-12
"""Smallest tolerance: below it a raise would be lost in the rounding of float64, and the bidding would not end."""
STEPS = 20
"""Lloyd steps of k-means; it ends earlier where nothing changes any more."""


def cut(order: Tensor, *, num_experts: int) -> Tensor:
    """Cut a permutation of the neurons into experts.

    Args:
        order: [M], a permutation: `arange(M)` for contiguous experts, a random one for random experts.
        num_experts: E, a divisor of M.

    Returns:
        The partition [E, M / E], a view of `order`.

    Raises:
        ValueError: `num_experts` does not divide M, or `order` is no permutation.
    """
    sizes = check.shapes("cut", ("order", order, "M"))
    check.require(order.dtype == torch.int64, f"cut: expected int64 order, got {order.dtype}.")
    _check_divides("cut", "order", sizes["M"], num_experts)
    _check_values("cut", "order", order)
    partition: Tensor = order.unflatten(0, (num_experts, -1))
    check_partition("cut", partition)
    return partition


def check_partition(where: str, partition: Tensor) -> None:
    """Raise `ValueError` unless `partition` is [E, I] int64 and holds every number below E I once."""
    check.shapes(where, ("partition", partition, "E I"))
    check.require(partition.dtype == torch.int64, f"{where}: expected int64 partition, got {partition.dtype}.")
    _check_values(where, "partition", partition)
    found, size = torch.sort(partition.flatten()).values, partition.numel()
    check.require(
        torch.equal(found, torch.arange(size, device=found.device)),
        f"{where}: expected in partition every neuron from 0 to {size - 1} once; missing "
        f"{sorted(set(range(size)) - set(found.tolist()))[:5]}, smallest {int(found[0])}, largest {int(found[-1])}.",
    )


def _check_divides(where: str, name: str, points: int, groups: int, *, what: str = "neurons", into: str = "") -> None:
    check.require(
        groups >= 1 and points >= 1 and points % groups == 0,
        f"{where}: {name}: {points} {what} do not divide into {into or f'num_experts={groups}'}.",
    )


def _check_values(where: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor without entries, without values, or with one that is not finite."""
    check.require(tensor.numel() > 0 and not tensor.is_meta, f"{where}: {name} {list(tensor.shape)} has no values.")
    check.require(bool(torch.isfinite(tensor).all()), f"{where}: expected finite {name}.")


def groups(labels: Tensor, *, num_groups: int) -> Tensor:
    """The members of every group, in order, [K, N / K], from the label [N] of every point; all groups of one size."""
    sizes = check.shapes("groups", ("labels", labels, "integer N"))
    _check_divides("groups", "labels", sizes["N"], num_groups, what="points", into=f"num_groups={num_groups}")
    members: Tensor = torch.argsort(labels, stable=True).unflatten(0, (num_groups, -1))
    return members


def balanced_assignment(benefit: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """Give every point to a group so that all groups have N / K points and the benefits sum to nearly the most.

    The auction of Bertsekas and Castanon for classes of similar objects: every point without a place bids for the group
    it gains most from at the present prices, up to where the next best group is as good; a group keeps its highest
    bids, and its price is the lowest of them. Bidding starts with large steps (epsilon scaling). A constant added to a
    row or to a column changes nothing.

    Args:
        benefit: [N, K], finite; K divides N.
        tolerance: smallest raise of a bid, relative to the spread of `benefit`.

    Returns:
        Labels [N] int64. Their sum of benefits is within `N * tolerance * (max - min of benefit)` of the best balanced
        assignment: the best itself where benefits are integers and that is below 1. Deterministic.

    References:
        Bertsekas and Castanon, The auction algorithm for the transportation problem, 1989.
    """
    sizes = check.shapes("balanced_assignment", ("benefit", benefit, "float N K"))
    N, K = sizes["N"], sizes["K"]
    _check_divides("balanced_assignment", "benefit", N, K, what="points", into=f"{K} groups")
    _check_values("balanced_assignment", "benefit", benefit)
    check.at_least("balanced_assignment", "tolerance", tolerance, FINEST)
    wide = benefit.detach().double()
    low, spread = wide.min(), float(wide.max() - wide.min())
    check.require(math.isfinite(spread), f"balanced_assignment: expected a finite spread of benefit, got {spread}.")
    labels, price = torch.zeros(N, dtype=torch.int64, device=wide.device), wide.new_zeros(K)
    if K == 1:
        return labels
    gain = (wide - low) / (spread or 1.0)
    step, last = 0.25, False
    while not last:
        step, last = max(step / 5, tolerance), step / 5 <= tolerance
        labels, price = _auction(gain, price, step)
    return labels


def _auction(gain: Tensor, price: Tensor, raised: float) -> tuple[Tensor, Tensor]:
    """One round of bidding to its end; `raised` is what a bid goes beyond indifference."""
    N, K = gain.shape
    size = N // K
    labels, bids = torch.full((N,), -1, device=gain.device), gain.new_zeros(N)
    free = torch.arange(N, device=gain.device)
    while len(free):
        offers = gain[free] - price
        best, group = offers.max(dim=1)
        second = offers.scatter(1, group[:, None], -torch.inf).amax(dim=1)
        labels[free], bids[free] = group, price[group] + best - second + raised
        by_bid = torch.argsort(bids, descending=True, stable=True)
        order = by_bid[torch.argsort(labels[by_bid], stable=True)]
        counts = torch.bincount(labels, minlength=K)
        first = counts.cumsum(0) - counts
        full = counts >= size
        price = torch.where(full, bids[order[(first + size - 1).clamp(max=N - 1)]], price)
        free = order[torch.arange(N, device=gain.device) - first[labels[order]] >= size]
        labels[free] = -1
    return labels, price


def spread_centres(points: Tensor, uniform: Tensor) -> Tensor:
    """Starting centres by k-means++: each is drawn in proportion to its squared distance from the nearest before it.

    Args:
        points: [N, D].
        uniform: [K] noise in [0, 1), one number a centre.

    Returns:
        [K, D] rows of `points`; distinct ones as long as there are any.

    References:
        Arthur and Vassilvitskii, k-means++, 2007.
    """
    sizes = check.shapes("spread_centres", ("points", points, "float N D"), ("uniform", uniform, "float K"))
    check.require(
        min(*sizes.values()) > 0,
        f"spread_centres: points {list(points.shape)} or uniform {list(uniform.shape)} have no entries.",
    )
    wide = points.to(reduction_dtype(points.dtype))
    nearest = torch.full_like(wide[:, 0], torch.inf, dtype=torch.float64)
    chosen: list[Tensor] = []
    for draw in uniform.double():
        weight = torch.where(torch.isfinite(nearest) & (nearest.sum() > 0), nearest, 1)
        mass = weight.cumsum(0)
        chosen.append(torch.searchsorted(mass, draw * mass[-1], right=True).clamp(max=sizes["N"] - 1))
        nearest = torch.minimum(nearest, (wide - wide[chosen[-1]]).square().sum(dim=1).double())
    return points[torch.stack(chosen)]


def balanced_kmeans(points: Tensor, centres: Tensor, *, steps: int = STEPS) -> Tensor:
    """k-means whose groups all have N / K points.

    Each step assigns the points by `balanced_assignment` and moves every centre to the mean of its group. In a balanced
    assignment the squared distance to a centre may be replaced by the scalar product with it, since the norms add the
    same to every assignment; between binary points and their means so may the L1 distance of CMoE.

    Args:
        points: [N, D].
        centres: [K, D] to start from.
        steps: at most; it ends earlier where no point moves.

    Returns:
        The partition [K, N / K], neurons of a group in ascending order.

    References:
        Malinen and Franti, Balanced k-means for clustering, 2014; MoEfication (Zhang et al., 2110.01786) groups rows of
        the first matrix by it.
    """
    sizes = check.shapes("balanced_kmeans", ("points", points, "float N D"), ("centres", centres, "float K D"))
    _check_divides("balanced_kmeans", "points", sizes["N"], sizes["K"], what="rows", into=f"{sizes['K']} centres")
    for name, given in (("points", points), ("centres", centres)):
        _check_values("balanced_kmeans", name, given)
    check.at_least("balanced_kmeans", "steps", steps, 1)
    wide = points.to(reduction_dtype(points.dtype))
    found, means = None, centres.to(wide.dtype)
    for _ in range(steps):
        members = groups(balanced_assignment(wide @ means.mT), num_groups=sizes["K"])
        if found is not None and torch.equal(members, found):
            break
        found, means = members, wide[members].mean(dim=1)
    assert found is not None
    return found


def most_active(strength: Tensor, *, k: int) -> Tensor:
    """Which neurons count as active on a token: its `k` strongest, as in CMoE (2502.04416).

    SwiGLU has no zeros to tell active from idle neurons by, as ReLU has.

    Args:
        strength: [T, M], at least 0.
        k: active neurons of a token.

    Returns:
        bool [T, M]; ties go to the lowest index.
    """
    sizes = check.shapes("most_active", ("strength", strength, "float T M"))
    check.between("most_active", "k", k, 1, sizes["M"])
    return first_k(-strength, k=k)


def by_gate_rows(gate: Tensor, uniform: Tensor) -> Tensor:
    """Balanced k-means on the directions of the gate rows: neurons that open for like tokens. It needs no data.

    Args:
        gate: [M, H].
        uniform: [E] noise in [0, 1).

    Returns:
        The partition [E, M / E].

    References:
        The parameter clustering of MoEfication (Zhang et al., 2110.01786).
    """
    check.shapes("by_gate_rows", ("gate", gate, "float M H"), ("uniform", uniform, "float E"))
    _check_values("by_gate_rows", "gate", gate)
    return _by_points("by_gate_rows", "gate", normalize(gate.to(reduction_dtype(gate.dtype)), dim=1), uniform)


def by_coactivation(active: Tensor, uniform: Tensor) -> Tensor:
    """Balanced k-means on which tokens activate a neuron: neurons that are active together.

    Args:
        active: [T, M] bool of `most_active` on calibration text.
        uniform: [E] noise in [0, 1).

    Returns:
        The partition [E, M / E].

    References:
        The co-activation graph of MoEfication (Zhang et al., 2110.01786), cut there by METIS; here its edges, the joint
        counts, are divided by the geometric mean of the two neurons' own and are the scalar products of the points.
    """
    check.shapes("by_coactivation", ("active", active, "bool T M"), ("uniform", uniform, "float E"))
    _check_values("by_coactivation", "active", active)
    return _by_points("by_coactivation", "active", normalize(active.mT.float(), dim=1), uniform)


def by_contribution(norms: Tensor, uniform: Tensor) -> Tensor:
    """Balanced k-means on how much a neuron writes on each token: like tokens and like strength.

    An expert is switched as a whole, so its neurons shall matter on the same tokens, and as much: nothing is scaled,
    and strong neurons weigh most.

    Args:
        norms: [T, M] of `onn.carve.neuron_norms` on calibration text.
        uniform: [E] noise in [0, 1).

    Returns:
        The partition [E, M / E].
    """
    check.shapes("by_contribution", ("norms", norms, "float T M"), ("uniform", uniform, "float E"))
    _check_values("by_contribution", "norms", norms)
    return _by_points("by_contribution", "norms", norms.mT, uniform)


def _by_points(where: str, name: str, points: Tensor, uniform: Tensor) -> Tensor:
    _check_divides(where, name, len(points), len(uniform), into=f"the {len(uniform)} experts of uniform")
    return balanced_kmeans(points, spread_centres(points, uniform))


def shared_and_routed(active: Tensor, *, num_experts: int, shared: int, steps: int = STEPS) -> Tensor:
    """CMoE's split: the neurons that are active most often come first, the rest is grouped by when it is active.

    Args:
        active: [T, M] of `most_active` on calibration text.
        num_experts: E, a divisor of M.
        shared: how many experts the most active neurons fill, below E; they are meant to be always on.
        steps: of `balanced_kmeans` on the rest, which starts from its most active neurons.

    Returns:
        The partition [E, M / E]: the first `shared` rows are the shared experts. Ties go to the lowest index.

    References:
        CMoE (Pei et al., 2502.04416), which ranks neurons by their rate of activation and clusters the columns of
        `active`.
    """
    sizes = check.shapes("shared_and_routed", ("active", active, "bool T M"))
    _check_divides("shared_and_routed", "active", sizes["M"], num_experts)
    _check_values("shared_and_routed", "active", active)
    check.between("shared_and_routed", "shared", shared, 0, num_experts - 1)
    size = sizes["M"] // num_experts
    by_rate = torch.argsort(active.sum(dim=0), descending=True, stable=True)
    always, rest = by_rate[: shared * size], torch.sort(by_rate[shared * size :]).values
    starts = by_rate[shared * size :][: num_experts - shared]
    columns = active.mT.float()
    routed = rest[balanced_kmeans(columns[rest], columns[starts], steps=steps)]
    return torch.cat([torch.sort(always).values.unflatten(0, (shared, size)), routed])


def representatives(points: Tensor, partition: Tensor) -> Tensor:
    """The neuron of every expert that is nearest to the mean of its expert's points (CMoE, 2502.04416).

    Args:
        points: [M, D], numbers or bool.
        partition: [E, I].

    Returns:
        [E] neurons; ties go to the first of the expert.
    """
    sizes = check.shapes("representatives", ("points", points, "M D"), ("partition", partition, "integer E I"))
    check.require(not points.is_complex(), f"representatives: expected real or bool points, got {points.dtype}.")
    check_partition("representatives", partition)
    check.require(
        partition.numel() == sizes["M"],
        f"representatives: a partition {list(partition.shape)} does not fit {sizes['M']} points.",
    )
    members = points.to(reduction_dtype(points.dtype))[partition]
    nearest = (members - members.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmin(dim=1)
    return partition.gather(1, nearest[:, None])[:, 0]
