"""The runs of a study by what was run, and their scores over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.study.contrasts import JOINT
from experiments.study.records import Key, Run
from experiments.study.statistics import Interval, Scores, paired, scores

LEVEL = 0.95
ALL = "all"
"""The arm that every other is held against: everything learns."""


class Setup(NamedTuple):
    """A key without its seed."""

    family: str
    regime: str
    arm: str
    optimizer: str
    lr: float
    strength: float

    @property
    def name(self) -> str:
        """`smk-2, adamw`."""
        return self.arm if self.optimizer == "own" else f"{self.arm}, {self.optimizer}"


class Group(NamedTuple):
    """The runs of one setup, and means over the seeds whose ACC is finite."""

    setup: Setup
    runs: Sequence[Run]
    scores: Mapping[int, Scores]
    """By seed; those of finite ACC."""
    accuracy: Interval
    learning: Interval
    transfer: Interval
    forgetting: Interval
    change: Interval
    active: Interval

    @property
    def lost(self) -> int:
        """Seeds that came to no finite ACC."""
        return len(self.runs) - len(self.scores)


def setup(key: Key) -> Setup:
    """What was run, whatever the seed."""
    return Setup(key.family, key.regime, key.arm, key.optimizer, key.lr, key.strength)


def places(keys: Iterable[Key]) -> list[tuple[str, str]]:
    """Every family and regime, in order of appearance."""
    return list(dict.fromkeys((key.family, key.regime) for key in keys))


def of(runs: Sequence[Run], place: tuple[str, str]) -> list[Run]:
    """Those of a family and regime."""
    return [run for run in runs if run.key[:2] == place]


def interval(values: Iterable[float]) -> Interval:
    """The mean of the finite values with its interval of `LEVEL`."""
    return paired([value for value in values if math.isfinite(value)], level=LEVEL)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """By setup, best ACC first; those that lost seeds last. A key that comes twice counts once, as it came last."""
    found: dict[Setup, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(setup(run.key), {})[run.key.seed] = run
    groups = [_group(what, [seeds[seed] for seed in sorted(seeds)]) for what, seeds in found.items()]
    return sorted(groups, key=lambda group: (group.lost > 0, -_or_lowest(group.accuracy.mean)))


def _group(what: Setup, runs: Sequence[Run]) -> Group:
    every = {run.key.seed: scores(run.scores) for run in runs}
    seen = {seed: found for seed, found in every.items() if math.isfinite(found.accuracy)}
    kept = [run for run in runs if run.key.seed in seen]
    found = list(seen.values())
    return Group(
        setup=what,
        runs=runs,
        scores=seen,
        accuracy=interval(one.accuracy for one in found),
        learning=interval(one.learning for one in found),
        transfer=interval(one.transfer for one in found),
        forgetting=interval(one.forgetting for one in found),
        change=interval(run.change for run in kept),
        active=interval(run.active for run in kept),
    )


def _or_lowest(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def difference(first: Group, second: Group) -> Interval:
    """ACC of the first less that of the second, over the seeds that both have."""
    common = sorted(first.scores.keys() & second.scores.keys())
    return interval(first.scores[seed].accuracy - second.scores[seed].accuracy for seed in common)


def baseline(groups: Sequence[Group], optimizer: str) -> Group | None:
    """The best group that updates everything, of one optimizer, or of any (an empty name)."""
    return next((g for g in groups if g.setup.arm == ALL and optimizer in ("", g.setup.optimizer)), None)


def chosen(groups: Sequence[Group], most: int) -> list[Group]:
    """Those that a figure shows: the best of `all`, of SMK, and of every other kind (`root`) but the joint arm."""
    best: dict[str, Group] = {}
    for group in groups:
        if group.scores and group.setup.arm != JOINT:
            best.setdefault(group.setup.arm.split("-")[0], group)
    first = [best.pop(kind) for kind in (ALL, "smk") if kind in best]
    return [*first, *best.values()][:most]


def grid(runs: Sequence[Run], what: Setup) -> tuple[list[float], list[float]]:
    """The learning rates and strengths that were tried in tuning, rising."""
    tried = [r.key for r in runs if r.stage == "tuning" and setup(r.key)[:4] == what[:4]]
    return sorted({key.lr for key in tried}), sorted({key.strength for key in tried})


def on_edge(value: float, tried: Sequence[float]) -> bool:
    """Whether a better value may lie outside of the grid."""
    return len(tried) > 1 and value in (tried[0], tried[-1])
