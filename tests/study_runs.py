"""Synthetic records of a forgetting study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from experiments.study.records import Key, Run, Series, Specialisation, Stage, Symbols, Vocabulary
from experiments.study.statistics import Vector

Table = tuple[tuple[float, ...], ...]

EFFECTS: Mapping[str, float] = MappingProxyType(
    {
        "all": 0.0,
        "smk-2": -0.05,
        "random-2": -0.04,
        "frozen-experts": -0.02,
        "matched": 0.01,
        "output-2": -0.05,
        "replay": 0.1,
        "surprise-route": 0.0,
        "balance-route": 0.005,
        "root-neuron": 0.09,
    }
)
"""What an arm adds to the score of every task that was left behind."""


def key(
    seed: int = 0,
    *,
    arm: str = "all",
    optimizer: str = "sgd",
    lr: float = 0.1,
    family: str = "digits",
    regime: str = "experts",
) -> Key:
    return Key(
        family=family,
        regime=regime,
        arm=arm,
        optimizer="own" if arm.startswith("root") else optimizer,
        lr=lr,
        strength=1.0 if arm == "ewc" else 0.0,
        seed=seed,
    )


def score_table(source: np.random.Generator, tasks: int, effect: float) -> Table:
    table = np.full((tasks + 1, tasks), 0.1)
    for row in range(1, tasks + 1):
        past = np.arange(row)[::-1]
        table[row, :row] = 0.93 - (0.12 - effect) * past + source.normal(scale=0.01, size=row)
    return rows(table)


def rows(table: Vector) -> Table:
    return tuple(tuple(float(value) for value in row) for row in table)


def run(what: Key, *, stage: Stage = "evaluation", tasks: int = 4, stretches: int = 5) -> Run:
    source = np.random.default_rng([what.seed, len(what.arm), int(1e6 * what.lr)])
    effect = EFFECTS.get(what.arm, 0.0) - 0.02 * abs(math.log10(what.lr) + 1)
    scores = score_table(source, tasks, effect)
    curve = np.tile(np.exp(-np.arange(stretches)), tasks)
    offsets: dict[Series, float] = {"loss": 0.2, "tau": 0.25, "surprise": 1.0, "pi": 0.4}
    series = {
        name: tuple((curve + base + source.normal(scale=0.02, size=curve.size)).tolist())
        for name, base in offsets.items()
    }
    return Run(
        key=what,
        stage=stage,
        scores=scores,
        losses=rows(1 - np.asarray(scores)),
        change=0.3 + effect,
        active=0.125,
        series=series,
    )


def full_study(*, seeds: int = 3, optimizers: Sequence[str] = ("sgd", "adamw")) -> list[Run]:
    """Every stage of ten arms; the rate 0.1 is the best."""
    runs = []
    for arm in EFFECTS:
        for optimizer in optimizers[:1] if arm.startswith("root") else optimizers:
            for lr in (0.01, 0.1, 1.0):
                keys = [key(seed, arm=arm, optimizer=optimizer, lr=lr) for seed in range(seeds)]
                runs += [run(what, stage="frontier") for what in keys]
                runs += [run(what._replace(seed=100 + what.seed), stage="tuning") for what in keys]
                runs += [run(what, stage="evaluation") for what in keys if lr == 0.1]
    density = [key(seed, arm="smk-2", lr=lr) for seed in range(seeds) for lr in (0.2, 0.3)]
    return [*runs, *(run(what, stage="exploration") for what in density)]


def specialisation(what: Key, *, tasks: int = 4, experts: int = 16) -> Specialisation:
    source = np.random.default_rng([what.seed, len(what.arm)])
    usage = source.poisson(20, size=(tasks, experts))
    usage[np.arange(experts) % tasks, np.arange(experts)] += 60
    usage[:, 3] = 0
    return Specialisation(
        key=what,
        usage=tuple(tuple(map(int, row)) for row in usage),
        information=0.21,
        permuted=tuple(source.normal(0.05, 0.01, size=50).tolist()),
        ablation=rows(source.normal(0.01, 0.02, size=(experts, tasks))),
        saturation=tuple(np.linspace(0.4, 1.0, tasks + 1).tolist()),
        coactivation=0.3,
        vocabulary=(vocabulary("input", experts), vocabulary("target", experts)),
        course=tuple(np.linspace(0.19, 0.21, tasks + 1).tolist()),
    )


def vocabulary(symbols: Symbols, experts: int) -> Vocabulary:
    chance = np.linspace(0.25, 0.3, experts)
    above = np.where(np.arange(experts) == 5, 0.4, 0.1)
    return Vocabulary(
        symbols,
        mean=float((chance + above).mean()),
        experts=tuple((chance + above).tolist()),
        chance=tuple(chance.tolist()),
        permuted=tuple(np.linspace(0.27, 0.28, 50).tolist()),
    )
