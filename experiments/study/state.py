"""What one lane of the study is told, remembers and reports. Shape letters as in `net`.

A lane is one training run; twenty run at once under `vmap`, each an arm, a learning rate and a seed of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.study.net import Net, Rows
from onn import tree


class Needs(NamedTuple):
    """What a step computes at all, for the lanes that ask for it."""

    moments: bool
    """Mean and mean square of the gradients."""
    penalty: bool
    """Importance and anchors by weight."""
    memory: bool
    """A second batch, of stored examples."""
    dynamic: bool
    """Thresholds."""
    features: bool
    """The gradient of the features."""
    centred: bool
    """What is taken off the inputs that experts learn from."""
    whitened: bool
    """The gradients of experts and features with their inputs whitened: of all lanes at once."""


class Lane(NamedTuple):
    """An arm as numbers, each a scalar."""

    lr: Tensor
    mean_decay: Tensor
    square_decay: Tensor
    square_gain: Tensor
    adam: Tensor
    """bool: bias correction and weight decay."""
    adaptive: Tensor
    """bool: steps are divided by the root of the mean square."""
    rule: Tensor
    learners: Tensor
    expert_rule: Tensor
    expert_share: Tensor
    active: Tensor
    """Share of the experts."""
    dynamic: Tensor
    teach_surprise: Tensor
    teach_balance: Tensor
    root: Tensor
    bounded: Tensor
    grain: Tensor
    everywhere: Tensor
    importance_decay: Tensor
    centre: Tensor
    split: Tensor
    """bool"""
    penalty: Tensor
    path: Tensor
    """bool: importance by weight is that of synaptic intelligence, else the Fisher information."""
    replay: Tensor
    project: Tensor


class Plasticity(NamedTuple):
    """Factors of the learning rate, scalars."""

    features: Tensor
    prototypes: Tensor
    experts: Tensor
    readout: Tensor


class Moments(NamedTuple):
    mean: Net
    square: Net


class Penalties(NamedTuple):
    omega: Net
    """Importance by weight that the penalty uses."""
    anchor: Net
    """Parameters that it pulls to."""
    path: Net
    """What the weight did for the loss since the last task began (synaptic intelligence)."""
    fisher: Net
    """Accumulated squared gradients."""


class Ledger(NamedTuple):
    """What each expert has been through, [E]."""

    thresholds: Tensor
    now: Tensor
    """Running share of the tokens."""
    before: Tensor
    """Sum over steps of the share of the tokens."""
    level: Tensor
    """Running mean of the surprise while active."""
    turns: Tensor
    """Steps that it learnt in."""
    steps: Tensor
    """Scalar: of all."""


class State(NamedTuple):
    net: Net
    importance: Rows
    ledger: Ledger
    moments: Moments | tuple[()]
    penalties: Penalties | tuple[()]


class Figures(NamedTuple):
    """Of one step, before its update; scalars."""

    loss: Tensor
    tau: Tensor
    surprise: Tensor
    """Mean over active pairs."""
    pi: Tensor
    active: Tensor
    """Mean active experts of a token."""


def init_state(net: Net, needs: Needs) -> State:
    """The state before the first step."""
    E, I, _ = net.experts.gate.shape

    def zeros(*shape: int) -> Tensor:
        return net.prototypes.new_zeros(shape)

    return State(
        net=net,
        importance=Rows(zeros(len(net.features)), zeros(E), zeros(E, I), zeros(len(net.readout))),
        ledger=Ledger(zeros(E), zeros(E), zeros(E), zeros(E), zeros(E), steps=zeros()),
        moments=Moments(tree.zeros_like(net), tree.zeros_like(net)) if needs.moments else (),
        penalties=Penalties(
            omega=tree.zeros_like(net),
            anchor=tree.map1(torch.clone, net),
            path=tree.zeros_like(net),
            fisher=tree.zeros_like(net),
        )
        if needs.penalty
        else (),
    )
