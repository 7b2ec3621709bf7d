"""Arms as numbers: the `Lane` and `Plasticity` of every run, and what its step needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.study.arms import Arm, Centre, Grain
from experiments.study.records import Key, Stage
from experiments.study.state import Lane, Needs, Plasticity
from experiments.study.update import BETA2

BETA1 = 0.9


class Job(NamedTuple):
    """One run to be made."""

    key: Key
    stage: Stage
    arm: Arm


def needs(job: Job) -> Needs:
    """What the job's step has to compute. Rare needs come with moments, so that few kinds of step are compiled."""
    arm = job.arm
    finer = arm.grain not in (Grain.EXPERT, Grain.NEURON)
    penalty = arm.penalty != "none" or (finer and (arm.root > 0 or arm.bounded))
    memory = arm.replay or arm.project
    centred = arm.centre is not Centre.NOTHING
    rare = penalty or memory or arm.dynamic or (centred and not arm.whitened)
    return Needs(
        moments=rare or job.key.optimizer in ("adamw", "adagrad") or arm.momentum > 0,
        penalty=penalty,
        memory=memory,
        dynamic=arm.dynamic,
        features=job.key.regime == "everything" and job.key.family != "text",
        centred=centred,
        whitened=arm.whitened,
    )


def lanes(jobs: Sequence[Job]) -> Lane:
    """The numbers of the jobs, [N] each."""
    found = [_lane(job) for job in jobs]
    return Lane(*(torch.stack(column) for column in zip(*found, strict=True)))


def _lane(job: Job) -> Lane:
    arm, optimizer = job.arm, job.key.optimizer
    adam = optimizer == "adamw"
    numbers: dict[str, float] = {
        "lr": job.key.lr,
        "mean_decay": BETA1 if adam else arm.momentum,
        "square_decay": BETA2 if adam else 1.0,
        "square_gain": 1 - BETA2 if adam else 1.0,
        "adam": adam,
        "adaptive": optimizer in ("adamw", "adagrad"),
        "rule": arm.rule.value,
        "learners": arm.learners,
        "expert_rule": arm.expert_rule.value,
        "expert_share": arm.expert_share,
        "active": arm.active,
        "dynamic": arm.dynamic,
        "teach_surprise": arm.teach_surprise,
        "teach_balance": arm.teach_balance,
        "root": arm.root,
        "bounded": job.key.strength if arm.bounded else 0.0,
        "grain": arm.grain.value,
        "everywhere": float(arm.everywhere),
        "importance_decay": arm.importance_decay,
        "centre": arm.centre.value,
        "split": arm.split,
        "penalty": job.key.strength if arm.penalty != "none" else 0.0,
        "path": arm.penalty == "si",
        "replay": arm.replay,
        "project": arm.project,
    }
    return Lane(**{name: torch.tensor(value) for name, value in numbers.items()})


def plasticity(jobs: Sequence[Job], *, first: bool) -> Plasticity:
    """What learns during the first task, and during the later ones, [N] each."""

    def column(values: Sequence[bool]) -> Tensor:
        return torch.tensor([float(value) for value in values])

    return Plasticity(
        features=column([job.key.regime == "everything" for job in jobs]),
        prototypes=column([first or job.arm.router_moves for job in jobs]),
        experts=column([first or job.arm.experts_move for job in jobs]),
        readout=column([job.key.regime == "everything" or (first and job.key.family != "text") for job in jobs]),
    )
