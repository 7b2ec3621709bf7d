"""Small nets, examples and lanes for the tests of the study, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import onn.functional as F
from experiments.study import lanes
from experiments.study.arms import Arm
from experiments.study.lanes import Job
from experiments.study.net import Examples, Net
from experiments.study.records import Key
from experiments.study.state import Lane, Needs, Plasticity, State, init_state
from onn import tree
from tests.support import normal

E, I, H, P, C, T = 6, 2, 5, 7, 4, 9


def net(seed: int, *, of_text: bool = False) -> Net:
    return Net(
        features=normal(seed, H, 0 if of_text else P),
        prototypes=normal(seed + 1, E, H),
        experts=F.Experts(*(normal(seed + 2 + i, E, I, H) for i in range(3))),
        readout=normal(seed + 5, C, H),
    )


def examples(seed: int, *, of_text: bool = False, tokens: int = T) -> Examples:
    labels = torch.randint(C, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Examples(
        inputs=normal(seed, tokens, H if of_text else P),
        residual=normal(seed + 1, tokens, H if of_text else 0),
        labels=labels,
    )


def job(optimizer: str = "sgd", *, lr: float = 0.1, strength: float = 0.0, seed: int = 0, **changes: object) -> Job:
    """A run of updating everything, with changes."""
    arm = replace(Arm(note="", active=0.5), **changes)  # type: ignore[arg-type]
    key = Key("digits-permuted", "everything", "tried", optimizer, lr, strength, seed)
    return Job(key, "tuning", arm)


def lane(one: Job) -> Lane:
    """Its numbers."""
    return tree.map1(lambda number: number[0], numbers([one]))


def numbers(jobs: Sequence[Job]) -> Lane:
    """Those of several, [N] each, in float64 where they are not whole or bool."""
    with_default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return lanes.lanes(jobs)
    finally:
        torch.set_default_dtype(with_default)


def plastic(value: float = 1.0) -> Plasticity:
    return Plasticity(*(torch.tensor(value, dtype=torch.float64) for _ in range(4)))


def start(seed: int, one: Job) -> tuple[State, Needs]:
    needs = lanes.needs(one)
    return init_state(net(seed), needs), needs


def uniform(seed: int, *, tokens: int = T) -> Tensor:
    return torch.rand(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def but_the_experts(net: Net) -> tuple[Tensor, ...]:
    return net.features, net.prototypes, net.readout
