"""The study's primary contrasts: claims made before the runs, what would have refuted each, and what was found.

Differences are paired by seed. Holm's method covers all primary contrasts of one place together: of one family of tasks
in one regime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from experiments.study import statistics
from experiments.study.arms import OPTIMIZERS
from experiments.study.rechosen import along, bears_out, rechosen
from experiments.study.records import Run
from experiments.study.statistics import Interval, Point

OURS = ("root-neuron", "whitened-neuron")
"""Arms that are held against the strongest baselines."""
JOINT = "joint"
"""The arm that has all tasks at once: nothing of it tells of forgetting."""
CANDIDATES = (*OPTIMIZERS, "own")
LEVEL = 0.95
ALPHA = 0.05
MARGIN = 0.01
"""Of accuracy, or of nats: a smaller difference does not matter."""
CORRELATION_MARGIN = 0.1
DRAWS = 2000
"""Of the bootstrap; its generator is seeded with 0, so that the same runs give the same findings."""

Verdict = Literal["supported", "refuted", "equivalent", "open", "unsteady"]
"""`unsteady`: decided at the rates that tuning took, and not borne out at those that the other seeds choose."""
Measure = Literal["ACC", "BWT at equal LA", "partial rank correlation"]
Choice = Literal["best", "same"]
"""Of the optimizer: the arm's best in tuning; that of the other arm."""
V = TypeVar("V")


class Finding(NamedTuple):
    """What became of a claim."""

    claim: str
    family: str
    regime: str
    optimizer: str
    """Of both arms, or `one against other`."""
    measure: str
    falsifier: str
    """`Would have been refuted by ...`."""
    interval: Interval
    """Of the paired difference; of the correlation where that is the measure."""
    p: float
    """Two-sided: that the difference is 0, or minus `MARGIN` where the claim is `not below`."""
    p_holm: float
    """Adjusted for all primary contrasts of the place; NaN where `p` is."""
    p_equivalent: float
    """Of two one-sided tests: that the difference is outside of the margin. Not adjusted."""
    verdict: Verdict
    rechosen: Interval | None = None
    """Of the paired difference with each seed at the rates that the other seeds choose; of ACC alone, where an arm was
    run at several rates.
    """


class Side(NamedTuple):
    arm: str
    optimizer: str
    """A name, or a `Choice`."""


class Contrast(NamedTuple):
    """A claim that the first arm has more of the measure than the second."""

    claim: str
    falsifier: str
    measure: Measure
    first: Side
    second: Side
    bound: float = 0.0
    """What the difference must exceed."""


def pick(runs: Iterable[Run], family: str, regime: str, arm: str, optimizer: str) -> dict[int, Run]:
    """The evaluation runs of an arm, by seed; empty where there are none.

    Raises:
        ValueError: a seed was evaluated at two settings.
    """
    found: dict[int, Run] = {}
    for run in _of(runs, family, regime, arm, optimizer):
        if run.stage == "evaluation":
            other = found.setdefault(run.key.seed, run)
            if other.key != run.key:
                raise ValueError(f"pick: seed {run.key.seed} was evaluated twice: {other.key} and {run.key}.")
    return found


def curves(runs: Iterable[Run], family: str, regime: str, arm: str, optimizer: str) -> dict[int, list[Point]]:
    """The frontier runs of an arm as points of learning and transfer, by seed."""
    found: dict[int, list[Point]] = {}
    for run in _of(runs, family, regime, arm, optimizer):
        if run.stage == "frontier":
            seen = statistics.scores(run.scores)
            found.setdefault(run.key.seed, []).append(Point(learning=seen.learning, transfer=seen.transfer))
    return found


def best(runs: Sequence[Run], family: str, regime: str, arm: str, optimizers: Sequence[str]) -> str | None:
    """The optimizer of the highest mean ACC over the tuning seeds, each at its best setting; ties go to the first.

    A mean that is not finite is never best. Without tuning runs, the only optimizer that was evaluated or has a
    frontier; None where there is no such one.
    """
    tuned: dict[str, float] = {}
    for optimizer in optimizers:
        settings: dict[tuple[float, float], list[float]] = {}
        for run in _of(runs, family, regime, arm, optimizer):
            if run.stage == "tuning":
                accuracy = statistics.scores(run.scores).accuracy
                settings.setdefault((run.key.lr, run.key.strength), []).append(accuracy)
        means = [sum(found) / len(found) for found in settings.values()]
        if finite := [mean for mean in means if math.isfinite(mean)]:
            tuned[optimizer] = max(finite)
    if tuned:
        return max(tuned, key=lambda name: tuned[name])
    later = [name for name in optimizers if any(r.stage != "tuning" for r in _of(runs, family, regime, arm, name))]
    return later[0] if len(later) == 1 else None


def primary() -> list[Contrast]:
    """The contrasts between two arms, in the order of the report."""
    frontier = [
        _more("BWT at equal LA", Side("smk-2", name), Side("random-2", name), "SMK forgets less than a random choice")
        for name in OPTIMIZERS
    ]
    smk = Side("smk-2", "best")
    accuracy = [
        _more("ACC", smk, Side("frozen-experts", "best"), "SMK is better than not training the experts"),
        _more("ACC", smk, Side("matched", "same"), "SMK is better than a learning rate that changes as much"),
        _more(
            "ACC",
            Side("surprise-route", "best"),
            Side("balance-route", "best"),
            "Routing by surprise is better than routing by load balance",
        ),
        _more("ACC", smk, Side("output-2", "best"), "The expert's own surprise is better than the output's"),
    ]
    return [*frontier, *accuracy, *(contrast for arm in OURS for contrast in _ours(arm))]


def findings(runs: Sequence[Run]) -> tuple[list[Finding], list[str]]:
    """What the runs say of every primary contrast, place by place, and the contrasts that could not be made.

    A claim is supported where Holm's p is below `ALPHA` and the difference exceeds its bound, refuted where it is below
    and falls short; else equivalent where the difference lies within the margin by two one-sided tests; else open. One
    on ACC that is decided so must be borne out at the rates that the other seeds choose, and is unsteady otherwise.

    Raises:
        ValueError: two arms of a contrast were run on different seeds, or a seed at two settings.
    """
    found: list[Finding] = []
    not_run: list[str] = []
    for place in sorted({run.key[:2] for run in runs}):
        outcomes = [(c.claim, _compared(runs, place, c)) for c in primary()]
        outcomes.append((PREDICTION.claim, _predicted(runs, place)))
        found += _judged([outcome for _, outcome in outcomes if not isinstance(outcome, str)])
        not_run += [f"{', '.join(place)}: {claim}: {reason}" for claim, reason in outcomes if isinstance(reason, str)]
    return found, not_run


def decide(*, excess: float, p_holm: float, p_equivalent: float) -> Verdict:
    """The verdict on a claim whose difference exceeds its bound by `excess`; a NaN decides nothing."""
    if p_holm < ALPHA and excess != 0:
        return "supported" if excess > 0 else "refuted"
    return "equivalent" if p_equivalent < ALPHA else "open"


class _Tested(NamedTuple):
    finding: Finding
    bound: float
    rechosen: Sequence[float] = ()
    """The differences of `Finding.rechosen`."""


class _Prediction(NamedTuple):
    claim: str
    falsifier: str


PREDICTION = _Prediction(
    claim="PI at the end of a task foretells how much of it is kept, beyond the loss and the task's place",
    falsifier="Would have been refuted by a higher PI going with more forgetting at the same rank of loss and place.",
)


def _more(measure: Measure, first: Side, second: Side, claim: str) -> Contrast:
    by = f" with {first.optimizer}" if first.optimizer in OPTIMIZERS else ""
    what = "transfer at equal learning" if measure == "BWT at equal LA" else "final accuracy"
    return Contrast(
        claim=f"{claim}{by}",
        falsifier=f"Would have been refuted by less {what} of {first.arm} than of {second.arm}, "
        f"and shown idle by a difference within {MARGIN}.",
        measure=measure,
        first=first,
        second=second,
    )


def _ours(arm: str) -> list[Contrast]:
    us = Side(arm, "best")
    return [
        _more("ACC", us, Side("all", "best"), f"{arm} is better than updating everything"),
        _more("BWT at equal LA", us, Side("random-2", "best"), f"{arm} forgets less than a random choice"),
        Contrast(
            claim=f"{arm} is not below Adagrad by {MARGIN}",
            falsifier=f"Would have been refuted by a final accuracy more than {MARGIN} below that of all with adagrad.",
            measure="ACC",
            first=us,
            second=Side("all", "adagrad"),
            bound=-MARGIN,
        ),
        _more("ACC", us, Side("replay", "best"), f"{arm} is better than replay"),
    ]


def _of(runs: Iterable[Run], family: str, regime: str, arm: str, optimizer: str) -> list[Run]:
    return [run for run in runs if run.key[:4] == (family, regime, arm, optimizer)]


def _compared(runs: Sequence[Run], place: tuple[str, str], contrast: Contrast) -> _Tested | str:
    """What is found, or why nothing is."""
    first = _optimizer(runs, place, contrast.first, "")
    second = _optimizer(runs, place, contrast.second, first)
    sides = ((contrast.first.arm, first), (contrast.second.arm, second))
    of_curves = contrast.measure != "ACC"
    for arm, optimizer in sides:
        if not (curves if of_curves else pick)(runs, *place, arm, optimizer):
            by = f" with {optimizer}" if optimizer else ""
            return f"no {'frontier' if of_curves else 'evaluation'} runs of {arm}{by}."
    differences = (_at_equal_learning if of_curves else _in_accuracy)(runs, place, *sides)
    if not differences:
        return "no seed has a common range of learning."
    if not all(map(math.isfinite, differences)):
        return "a score is not finite."
    again = () if of_curves else _at_rechosen_rates(runs, place, *sides)
    finding = Finding(
        claim=contrast.claim,
        family=place[0],
        regime=place[1],
        optimizer=first if first == second else f"{first} against {second}",
        measure=contrast.measure,
        falsifier=contrast.falsifier,
        interval=statistics.paired(differences, level=LEVEL),
        p=statistics.p_value([value - contrast.bound for value in differences]),
        p_holm=math.nan,
        p_equivalent=statistics.equivalence_p(differences, margin=MARGIN),
        verdict="open",
        rechosen=statistics.paired(again, level=LEVEL) if again else None,
    )
    return _Tested(finding, contrast.bound, again)


def _optimizer(runs: Sequence[Run], place: tuple[str, str], side: Side, other: str) -> str:
    """An empty name where none can be chosen."""
    if side.optimizer == "same":
        return other
    if side.optimizer == "best":
        return best(runs, *place, side.arm, CANDIDATES) or ""
    return side.optimizer


def _in_accuracy(runs: Sequence[Run], place: tuple[str, str], *sides: tuple[str, str]) -> list[float]:
    picked = [pick(runs, *place, *side) for side in sides]
    accuracy = [{seed: statistics.scores(run.scores).accuracy for seed, run in own.items()} for own in picked]
    return [ours - theirs for ours, theirs in _pairs(sides, accuracy)]


def _at_rechosen_rates(runs: Sequence[Run], place: tuple[str, str], *sides: tuple[str, str]) -> list[float]:
    """None where there was nothing to choose."""
    tables = [along(runs, pick(runs, *place, *side)) for side in sides]
    if all(len(table) < 2 for table in tables):
        return []
    return [ours - theirs for ours, theirs in _pairs(sides, [rechosen(table) for table in tables])]


def _at_equal_learning(runs: Sequence[Run], place: tuple[str, str], *sides: tuple[str, str]) -> list[float]:
    """Of the seeds whose curves have a common range of learning."""
    pairs = _pairs(sides, [curves(runs, *place, *side) for side in sides])
    found = [statistics.at_equal_learning(ours, theirs) for ours, theirs in pairs]
    return [value for value in found if not math.isnan(value)]


def _pairs(sides: Sequence[tuple[str, str]], found: Sequence[Mapping[int, V]]) -> list[tuple[V, V]]:
    first, second = found
    if alone := sorted(first.keys() ^ second.keys()):
        where = " and ".join(f"{arm} with {optimizer}" for arm, optimizer in sides)
        raise ValueError(f"findings: expected the same seeds of {where}, only one has {alone}.")
    return [(first[seed], second[seed]) for seed in sorted(first)]


class _Kept(NamedTuple):
    pi: float
    kept: float
    loss: float
    place: float
    seed: int
    group: str
    """Arm and optimizer."""


def _kept(run: Run) -> list[_Kept]:
    """PI and loss at the end of every task but the last, and what of its best score is left at the end of all."""
    pi, loss = run.series.get("pi", ()), run.series.get("loss", ())
    tasks = len(run.scores) - 1
    each = len(pi) // tasks
    if not each or len(pi) != tasks * each or len(loss) != len(pi):
        return []
    found = []
    for task in range(tasks - 1):
        end = (task + 1) * each - 1
        lost = max(row[task] for row in run.scores[task + 1 :]) - run.scores[-1][task]
        if all(map(math.isfinite, (pi[end], lost, loss[end]))):
            group = f"{run.key.arm}, {run.key.optimizer}"
            found.append(_Kept(pi=pi[end], kept=-lost, loss=loss[end], place=task, seed=run.key.seed, group=group))
    return found


def _all_kept(runs: Sequence[Run], place: tuple[str, str]) -> list[_Kept]:
    """Of all evaluation runs that had the tasks in order."""
    evaluated = [run for run in runs if run.key[:2] == place and run.stage == "evaluation"]
    return [one for run in evaluated if run.key.arm != JOINT for one in _kept(run)]


def within_arms(runs: Sequence[Run], place: tuple[str, str]) -> Interval:
    """The correlation of `PREDICTION` within each arm and optimizer of a family and regime, mean over these: no claim
    rests on it.
    """
    kept = _all_kept(runs, place)
    return statistics.partial_within(
        [one.pi for one in kept],
        [one.kept for one in kept],
        [[one.loss for one in kept], [one.place for one in kept]],
        [one.seed for one in kept],
        [one.group for one in kept],
        level=LEVEL,
        draws=DRAWS,
        generator=np.random.default_rng(0),
    )


def _predicted(runs: Sequence[Run], place: tuple[str, str]) -> _Tested | str:
    kept = _all_kept(runs, place)
    if not kept:
        return "no evaluation runs with a series of PI and of loss."
    found = statistics.predictiveness(
        [one.pi for one in kept],
        [one.kept for one in kept],
        [[one.loss for one in kept], [one.place for one in kept]],
        [one.seed for one in kept],
        level=LEVEL,
        margin=CORRELATION_MARGIN,
        draws=DRAWS,
        generator=np.random.default_rng(0),
    )
    finding = Finding(
        claim=PREDICTION.claim,
        family=place[0],
        regime=place[1],
        optimizer="all runs",
        measure="partial rank correlation",
        falsifier=PREDICTION.falsifier,
        interval=found.partial,
        p=found.p,
        p_holm=math.nan,
        p_equivalent=found.p_equivalent,
        verdict="open",
    )
    return _Tested(finding, 0.0)


def _judged(tested: Sequence[_Tested]) -> list[Finding]:
    """With Holm's p over those that have a p at all, and the verdict."""
    adjusted = iter(statistics.holm([one.finding.p for one in tested if not math.isnan(one.finding.p)]))
    found = []
    for finding, bound, again in tested:
        p_holm = math.nan if math.isnan(finding.p) else next(adjusted)
        excess = finding.interval.mean - bound
        verdict = decide(excess=excess, p_holm=p_holm, p_equivalent=finding.p_equivalent)
        if not bears_out(verdict, again, bound=bound, margin=MARGIN, alpha=ALPHA):
            verdict = "unsteady"
        found.append(finding._replace(p_holm=p_holm, verdict=verdict))
    return found
