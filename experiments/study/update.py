"""What the study's optimizers and penalties make of gradients. Shape letters as in `net`."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

import onn.functional as F
from experiments.study.arms import Grain
from experiments.study.net import Net, Rows
from experiments.study.state import Lane, Ledger, Moments, Penalties, Plasticity, State
from onn import tree
from onn.tree import Tree

T = TypeVar("T", bound=Tree)

BETA2 = 0.999
ADAM_EPS, ADAGRAD_EPS, ROOT_EPS = 1e-8, 1e-10, 1e-10


def masked(experts: F.Experts, keep: Tensor) -> F.Experts:
    """Zeros for the experts that are not kept, bool [E]."""
    return tree.map1(lambda g: torch.where(keep[:, None, None], g, 0), experts)


def where_learns(values: Net, learns: Tensor) -> Net:
    """Zeros for the experts that skip this step."""
    return values._replace(experts=masked(values.experts, learns))


def direction(
    moments: Moments | tuple[()], grads: Net, ledger: Ledger, learns: Tensor, lane: Lane
) -> tuple[Moments | tuple[()], Net]:
    """What the optimizer makes of the gradients, and its moments; experts that skip the step keep theirs."""
    if not isinstance(moments, Moments):
        return (), grads
    mean = tree.map2(lambda old, g: torch.lerp(g, old, lane.mean_decay), moments.mean, grads)
    square = tree.map2(lambda old, g: lane.square_decay * old + lane.square_gain * g * g, moments.square, grads)
    mean = mean._replace(
        experts=tree.map2(lambda new, old: _kept(new, old, learns), mean.experts, moments.mean.experts)
    )
    square = square._replace(
        experts=tree.map2(lambda new, old: _kept(new, old, learns), square.experts, moments.square.experts)
    )
    biases = []
    for decay in (lane.mean_decay, torch.where(lane.adam, lane.square_decay, 0)):
        rest, experts = (
            1 - torch.exp(torch.log(decay) * turn.clamp_min(1)) for turn in (ledger.steps, ledger.turns[:, None, None])
        )
        biases.append(_like(mean, rest, experts))

    def scaled(m: Tensor, s: Tensor, mean_bias: Tensor, square_bias: Tensor) -> Tensor:
        root = (s / square_bias).sqrt() + torch.where(lane.adam, ADAM_EPS, ADAGRAD_EPS)
        return m / mean_bias / torch.where(lane.adaptive, root, 1)

    columns = (tree.leaves(part) for part in (mean, square, *biases))
    direction = tree.unflatten(mean, [scaled(*leaves) for leaves in zip(*columns, strict=True)])
    return Moments(mean, square), where_learns(direction, learns)


def _kept(new: Tensor, old: Tensor, learns: Tensor) -> Tensor:
    return torch.where(learns[:, None, None], new, old)


def _like(net: Net, rest: Tensor, experts: Tensor) -> Net:
    """A tree like `net` with one value for all its leaves but those of the experts."""
    return tree.map1(lambda _: rest, net)._replace(experts=F.Experts(experts, experts, experts))


def hardening(importance: Rows, shares: Tensor, penalties: Penalties | tuple[()], net: Net, lane: Lane) -> Net:
    """What consolidation multiplies the steps with: 1 where it is off.

    Importance is taken by weight, the sum over the weights it stands for divided by their number, so that one learning
    rate suits every grain.
    """
    E, I, H = net.experts.gate.shape
    by_neuron = importance.experts / (3 * H)
    by_expert = by_neuron.mean(dim=1, keepdim=True).expand(E, I)
    whole = (lane.grain == Grain.EXPERT.value) | (lane.grain == Grain.EXPERT_INPUT.value)
    experts = torch.where(whole, by_expert, by_neuron)[..., None]
    gate, up, down = (experts * share for share in torch.where(lane.split, shares, 1))
    rows = Net(
        features=importance.features[:, None] / net.features.shape[1],
        prototypes=importance.prototypes[:, None] / H,
        experts=F.Experts(gate, up, down),
        readout=importance.readout[:, None] / H,
    )
    if isinstance(penalties, Penalties):
        by_weight = lane.grain == Grain.WEIGHT.value
        by_input = (lane.grain == Grain.EXPERT_INPUT.value) | (lane.grain == Grain.NEURON_INPUT.value)
        rows = tree.map2(lambda row, share: torch.where(by_input, row * share, row), rows, _inputs(penalties.fisher))
        rows = tree.map2(lambda fine, coarse: torch.where(by_weight, fine, coarse), penalties.fisher, rows)

    def scale(part: T, root: Tensor, bounded: Tensor) -> T:
        mean = torch.stack([leaf.mean() for leaf in tree.leaves(part)]).mean().clamp_min(ROOT_EPS)
        return tree.map1(lambda leaf: torch.exp(-root * torch.log(leaf + ROOT_EPS)) / (1 + bounded * leaf / mean), part)

    root, bounded = lane.root * lane.everywhere, lane.bounded * lane.everywhere
    return Net(
        features=scale(rows.features, root, bounded),
        prototypes=scale(rows.prototypes, root, bounded),
        experts=scale(rows.experts, lane.root, lane.bounded),
        readout=scale(rows.readout, root, bounded),
    )


def _inputs(fisher: Net) -> Net:
    """The share of every input in the importance, 1 on average: of each matrix, with all experts as one.

    Gate and up read the same, and share theirs: 2 H numbers of state for the bank, H or P for each other matrix.
    """
    gate, up, down = fisher.experts
    read = (gate + up) / 2

    def share(leaf: Tensor) -> Tensor:
        mean = leaf.flatten(0, -2).mean(dim=0)
        return mean / mean.mean().clamp_min(torch.finfo(leaf.dtype).tiny)

    return tree.map1(share, fisher._replace(experts=F.Experts(read, read, down)))


def rates(net: Net, plastic: Plasticity, lane: Lane) -> Net:
    """The learning rate of every leaf, as scalars."""
    experts = lane.lr * plastic.experts
    return Net(
        features=lane.lr * plastic.features,
        prototypes=lane.lr * plastic.prototypes,
        experts=F.Experts(experts, experts, experts),
        readout=lane.lr * plastic.readout,
    )


def end_task(state: State, lane: Lane, *, xi: float = 1e-3) -> State:
    """The anchors of the penalties moved to where the task ended, and its importance added.

    References:
        Online EWC (Schwarz et al., 1805.06370), synaptic intelligence (Zenke et al., 1703.04200).
    """
    penalties = state.penalties
    if not isinstance(penalties, Penalties):
        return state
    change = tree.map2(torch.sub, state.net, penalties.anchor)
    worked = tree.map2(lambda path, moved: path.clamp_min(0) / (moved * moved + xi), penalties.path, change)
    omega = tree.map2(torch.add, penalties.omega, worked)
    return state._replace(
        penalties=penalties._replace(
            omega=tree.map2(lambda si, fisher: torch.where(lane.path, si, fisher), omega, penalties.fisher),
            anchor=tree.map1(torch.clone, state.net),
            path=tree.zeros_like(penalties.path),
        )
    )
