"""Who serves which task: what `Specialisation` holds, from the active sets and outputs of one model.

T held-out tokens of all tasks, E experts, H hidden, V classes, P permutations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from onn import check, observe

CHUNK = 2**22
"""Numbers of the largest tensor that `permutation_information` makes at a time, about."""


def usage(active: Tensor, task: Tensor, *, tasks: int) -> Tensor:
    """How many tokens of every task each expert is active on, int64 [tasks, E], from bool [T, E] and the tasks [T]."""
    check.shapes("usage", ("active", active, "bool T E"), ("task", task, "integer T"))
    return _counts(active, _of_task("usage", task, tasks)[None])[0]


def information(usage_counts: Tensor) -> float:
    """I(expert; task) in nats of the active pairs, from the counts [tasks, E] of `usage`; 0 where there are none."""
    return observe.mutual_information(usage_counts)


def permutation_information(active: Tensor, task: Tensor, *, order: Tensor) -> Tensor:
    """`information` once the tasks are permuted over the tokens: the p-th has the task of token `order[p, t]` at t.

    Which experts a token has stays as it is, so that an expert's load and the sets of experts are those measured; only
    their tie to the task is cut.

    Args:
        active: bool [T, E].
        task: [T], from 0.
        order: [P, T], a permutation of the tokens in each row.

    Returns:
        float64 [P], on the CPU; the same numbers for any chunking.
    """
    sizes = check.shapes(
        "permutation_information",
        ("active", active, "bool T E"),
        ("task", task, "integer T"),
        ("order", order, "integer P T"),
    )
    _check_range("permutation_information", "order", order, sizes["T"])
    tasks = int(task.max()) + 1 if task.numel() else 1
    marks = _of_task("permutation_information", task, tasks)
    each = max(1, CHUNK // max(1, tasks * sizes["T"]))
    found = [
        information(table)
        for some in order.long().split(each)
        for table in _counts(active, marks.index_select(0, some.flatten()).unflatten(0, some.shape)).cpu()
    ]
    return torch.tensor(found, dtype=torch.float64)


def vocabulary(active: Tensor, symbol: Tensor) -> Tensor:
    """How far each expert keeps to certain symbols: of all occurrences of those it serves, the share that it serves.

    The mean over the tokens that expert e is active on of `N_xe / N_x`: x is the token's symbol, `N_x` how often that
    occurs, `N_xe` on how many of these the expert is active. That is `sum_x N_xe^2 / N_x / sum_x N_xe`.

    Guarantees: at least the share of all tokens that the expert is active on, and just that where it is active on the
    same share of every symbol; at most 1, where it has all occurrences of its symbols. Rare symbols raise it by chance,
    so compare with permuted symbols.

    Args:
        active: bool [T, E].
        symbol: [T], any integers.

    Returns:
        float64 [E]; NaN for an expert that is never active.

    References:
        Vocabulary specialization of OLMoE (2409.02060), `N_xe / N_x` of a pair, which its authors average over symbols,
        each with the expert that is active on it the most.
    """
    sizes = check.shapes("vocabulary", ("active", active, "bool T E"), ("symbol", symbol, "integer T"))
    _, place, occurrences = symbol.unique(return_inverse=True, return_counts=True)
    token, expert = active.nonzero(as_tuple=True)
    served = torch.bincount(place[token] * sizes["E"] + expert, minlength=len(occurrences) * sizes["E"])
    counts = served.view(len(occurrences), sizes["E"]).double()
    found: Tensor = (counts * counts / occurrences[:, None]).sum(dim=0) / counts.sum(dim=0)
    return found


def saturation(before: Tensor, after: Tensor) -> float:
    """`|A_before and A_after| / |A_after|`, the mean over the tokens that have an active expert after.

    1 where nothing changed, and where experts were only dropped; NaN where no token has an active expert after.

    References:
        Router saturation of OLMoE (2409.02060), whose sets all have k experts.
    """
    check.shapes("saturation", ("before", before, "bool T E"), ("after", after, "bool T E"))
    size = after.sum(dim=1)
    share = (before & after).sum(dim=1).double() / size
    return float(share[size > 0].mean())


def coactivation(active: Tensor) -> float:
    """`P(both active) / min(P(one), P(other))`, the mean over all pairs of distinct experts; 0 for a pair with an
    expert that no token has.

    1 where every token has all experts, `(k - 1) / (E - 1)` where all are in use and the tokens' sets of k are the same
    or disjoint. It does not depend on the order of tokens or experts, or on how often the sample is repeated.
    """
    sizes = check.shapes("coactivation", ("active", active, "bool T E"))
    check.at_least("coactivation", "experts", sizes["E"], 2)
    marks = active.double()
    both = marks.mT @ marks
    alone = both.diagonal()
    rarer = torch.minimum(alone[:, None], alone[None]).clamp(min=1)
    return float((both / rarer).fill_diagonal_(0).sum()) / (sizes["E"] * (sizes["E"] - 1))


def ablation(
    base: Tensor,
    contribution: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    task: Tensor,
    *,
    tasks: int,
) -> Tensor:
    """How much the mean loss of every task rises when one expert is left out and nothing else changes.

    Args:
        base: [T, H], what the head reads: the contributions of all experts in it.
        contribution: [T, E, H], what each expert adds to `base`; 0 where it is not active.
        head: from [T, H] to logits [T, V].
        labels: [T].
        task: [T], from 0.
        tasks: how many there are.

    Returns:
        [E, tasks] in nats, float32 (float64 for float64 inputs); 0 for an expert that contributes nothing, NaN for a
        task without tokens. One expert at a time is computed, without a graph.
    """
    sizes = check.shapes(
        "ablation",
        ("base", base, "float T H"),
        ("contribution", contribution, "float T E H"),
        ("labels", labels, "integer T"),
        ("task", task, "integer T"),
    )
    marks = _of_task("ablation", task, tasks)

    def loss(y: Tensor) -> Tensor:
        logits = head(y)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(wide, labels.long(), reduction="none")

    with torch.no_grad():
        whole = loss(base)
        share = marks.to(whole.dtype) / marks.sum(dim=0)
        rises = [(loss(base - contribution[:, expert]) - whole) @ share for expert in range(sizes["E"])]
    return torch.stack(rises) if rises else whole.new_zeros(0, tasks)


def _of_task(where: str, task: Tensor, tasks: int) -> Tensor:
    """int64 [T, tasks], one 1 in each row."""
    _check_range(where, "task", task, tasks)
    return one_hot(task.long(), tasks)


def _check_range(where: str, name: str, values: Tensor, end: int) -> None:
    low, high = (int(value) for value in torch.aminmax(values)) if values.numel() else (0, end - 1)
    check.require(low >= 0 and high < end, f"{where}: expected {name} from 0 to {end - 1}, got {low} to {high}.")


def _counts(active: Tensor, marks: Tensor) -> Tensor:
    """int64 [P, tasks, E] from [T, E] and [P, T, tasks]; float32 sums of 0 and 1 are exact below 2^24 tokens."""
    found: Tensor = (marks.float().mT @ active.float()).round().long()
    return found
