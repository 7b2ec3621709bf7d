"""The universal step: one pure function that is every arm of the study, by the numbers in its `Lane`.

What differs in kind and costs time is static, in `Needs`. Shape letters as in `net`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import onn.functional as F
from experiments.study.arms import ExpertRule, Rule
from experiments.study.net import EPS, Examples, Learnt, Net, Seen, learn, rank
from experiments.study.state import Figures, Lane, Ledger, Needs, Penalties, Plasticity, State
from experiments.study.update import direction, hardening, masked, rates, where_learns
from onn import tree

WEIGHT_DECAY = 0.01
FAST, SLOW = 0.95, 0.999
"""Memories of the usage of now and of the level of surprise."""
GAIN = 0.1
"""Of the thresholds, towards the target density."""
ALPHA, GAMMA, TAU_FLOOR = 1.0, 0.2, 0.1
"""Of predictive integrity."""


def activate(affinity: Tensor, thresholds: Tensor, lane: Lane, needs: Needs) -> Tensor:
    """The active experts of every token."""
    best = rank(-affinity) < (lane.active * affinity.shape[-1]).round()
    if not needs.dynamic:
        return best
    routed = F.threshold_route(affinity, thresholds, squash="sigmoid", fallback_k=1, combine="uniform")
    return torch.where(lane.dynamic, routed.active, best)


def step(
    state: State, batch: Examples, memory: Examples, noise: Tensor, lane: Lane, plastic: Plasticity, *, needs: Needs
) -> tuple[State, Figures]:
    """One step of one lane.

    Args:
        state: of `init_state`, the last step or `end_task`.
        batch: of the task.
        memory: stored examples; of lanes that store none anything, and not read unless `needs` it.
        noise: uniform [T, E], for the random rule.
        lane: the arm.
        plastic: what learns how much in this task.
        needs: static.
    """
    net, ledger = state.net, state.ledger

    def learnt_from(examples: Examples) -> Learnt:
        return learn(
            net,
            examples,
            activate=lambda affinity: activate(affinity, ledger.thresholds, lane, needs),
            select=lambda seen, surprise, output: _selected(seen, surprise, output, noise, ledger, lane),
            teach=lambda scores, surprise, active: _taught(scores, surprise, active, lane),
            centre=lane.centre if needs.centred else None,
            by_weight=needs.penalty,
            features=needs.features,
            whitened=needs.whitened,
        )

    learnt = learnt_from(batch)
    grads, rows = learnt.grads, learnt.rows
    ledger, steps = _entered(ledger, learnt, lane, needs), rates(net, plastic, lane)
    if needs.memory:
        grads = _remembered(grads, learnt_from(memory).grads, steps, lane)
    norms = F.expert_norms(grads.experts)
    keep = _experts_that_learn(norms, ledger, lane)
    grads = grads._replace(experts=masked(grads.experts, keep))
    importance = tree.map2(
        lambda old, new: lane.importance_decay * old + new,
        state.importance,
        rows._replace(experts=rows.experts * keep[:, None]),
    )
    learns = keep & (norms != 0)
    penalties, penalised = state.penalties, grads
    if isinstance(penalties, Penalties) and isinstance(learnt.squares, Net):
        squares = learnt.squares._replace(experts=masked(learnt.squares.experts, keep))
        penalties = penalties._replace(fisher=tree.map2(torch.add, penalties.fisher, squares))
        pull = tree.map2(torch.sub, net, penalties.anchor)
        pull = tree.map2(torch.mul, penalties.omega, pull)
        penalised = tree.map2(lambda g, pulled: g + lane.penalty * pulled, grads, pull)
        learns = F.expert_norms(penalised.experts) != 0
    ledger = ledger._replace(turns=ledger.turns + learns, steps=ledger.steps + 1)
    moments, course = direction(state.moments, penalised, ledger, learns, lane)
    shrink = where_learns(tree.map2(lambda p, rate: rate * WEIGHT_DECAY * lane.adam * p, net, steps), learns)
    moved = tree.map2(
        torch.mul, tree.map2(torch.mul, course, hardening(importance, learnt.shares, penalties, net, lane)), steps
    )
    new = tree.map2(torch.sub, net, tree.map2(torch.add, moved, shrink))
    if isinstance(penalties, Penalties):
        change = tree.map2(torch.sub, new, net)
        worked = tree.map2(torch.mul, grads, change)
        penalties = penalties._replace(path=tree.map2(torch.sub, penalties.path, worked))
    return State(new, importance, ledger, moments, penalties), _figures(learnt)


def _selected(seen: Seen, surprise: Tensor, output: Tensor, noise: Tensor, ledger: Ledger, lane: Lane) -> Tensor:
    keys = surprise
    for rule, other in (
        (Rule.MOST_SURPRISE, -surprise),
        (Rule.RANDOM, noise),
        (Rule.NORMALISED, F.normalised_surprise(surprise, seen.weights)),
        (Rule.OUTPUT, output),
        (Rule.RELATIVE, surprise / ledger.level.clamp_min(EPS)),
    ):
        keys = torch.where(lane.rule == rule.value, other, keys)
    keys = torch.where(seen.active & torch.isfinite(keys), keys, torch.inf)
    return seen.active & (rank(keys) < lane.learners)


def _taught(scores: Tensor, surprise: Tensor, active: Tensor, lane: Lane) -> Tensor:
    level = torch.where(active, surprise, 0).sum() / active.sum()
    by_surprise = F.router_loss(scores, surprise / level.clamp_min(EPS), active, w_ce=1.0, w_kl=1.0)
    return lane.teach_surprise * by_surprise + lane.teach_balance * F.load_balance_loss(scores, active)


def _entered(ledger: Ledger, learnt: Learnt, lane: Lane, needs: Needs) -> Ledger:
    """Usage and surprise of this batch written down, and the thresholds moved towards the target density."""
    active = learnt.seen.active.to(learnt.surprise.dtype)
    share, served = active.mean(dim=0), active.sum(dim=0)
    mean = (learnt.surprise * active).sum(dim=0) / served.clamp_min(1)
    first = ledger.level == 0
    blended = torch.where(first, mean, torch.lerp(mean, ledger.level, SLOW**served))
    thresholds = ledger.thresholds
    if needs.dynamic:
        shift = F.share_threshold_shift(learnt.seen.affinity, thresholds, squash="sigmoid", target=lane.active)
        thresholds = thresholds + GAIN * shift
    return ledger._replace(
        thresholds=thresholds,
        now=torch.lerp(share, ledger.now, FAST),
        before=ledger.before + share,
        level=torch.where(served > 0, blended, ledger.level),
    )


def _remembered(grads: Net, stored: Net, steps: Net, lane: Lane) -> Net:
    """The gradients with those of stored examples: their mean (replay) or projected (A-GEM, 1812.00420).

    Projected is what learns alone: where `steps` are 0 there is nothing to forget by.
    """
    moving = tree.map2(lambda g, rate: torch.where(rate != 0, g, 0), stored, steps)
    dot, norm = _inner(moving, grads), _inner(moving, moving)
    against = torch.where(lane.project & (dot < 0), dot / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)
    return tree.map2(lambda g, old: torch.where(lane.replay, (g + old) / 2, g - against * old), grads, stored)


def _inner(first: Net, second: Net) -> Tensor:
    products = tree.leaves(tree.map2(torch.mul, first, second))
    return torch.stack([product.sum() for product in products]).sum()


def _experts_that_learn(norms: Tensor, ledger: Ledger, lane: Lane) -> Tensor:
    """Which experts may learn from this batch, bool [E], by the norms of their gradients."""
    contrast = ledger.now / (ledger.before / (ledger.steps + 1)).clamp_min(EPS)
    keys = torch.where(lane.expert_rule == ExpertRule.BATCH_SURPRISE.value, norms, -contrast)
    keys = torch.where(norms != 0, keys, torch.inf)
    chosen = rank(keys) < (lane.expert_share * len(norms)).round()
    return chosen | (lane.expert_rule == ExpertRule.EVERY.value)


def _figures(learnt: Learnt) -> Figures:
    active = learnt.seen.active
    surprise = torch.where(active, learnt.surprise, 0).sum() / active.sum()
    return Figures(
        loss=learnt.loss,
        tau=learnt.tau,
        surprise=surprise,
        pi=F.predictive_integrity(learnt.loss, learnt.tau, surprise, alpha=ALPHA, gamma=GAMMA, tau_floor=TAU_FLOOR),
        active=active.sum(dim=-1).to(surprise.dtype).mean(),
    )
