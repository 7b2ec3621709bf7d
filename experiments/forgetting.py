"""Do surprise and its uses make experts specialise, or forget less? Every claim beside the figure that would refute it.

`uv run experiments/forgetting.py [--family digits-permuted digits-rotated text] [--seeds 20] [--out DIR]`: the two
families of digits, 26 to 34 minutes on two CPU cores. Every arm of `experiments/study/arms.py` under every
optimizer: rates and strengths are tuned on three seeds of their own, then twenty paired seeds are run, then SMK and its
controls along the whole grid of rates and every other arm of a claim next to its own: a verdict on accuracy counts only
where the rates that the other seeds choose bear it out. A study that was stopped goes on in its folder. `--regime
everything` trains features and read-out too, `--experts` and `--width` set the size of the bank, `--explore` changes
one number of surprise consolidation at a time: verdicts hold for the regime and the bank that were run. Expected:
`report.html` with verdicts, tables and figures, `results.json` with every run; `experiments/LOG.md` has the figures of
the last one.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import tyro

from experiments.command import exit_status
from experiments.facts import facts
from experiments.memory import keep_freed_memory
from experiments.progress import progress
from experiments.study import store
from experiments.study.arms import (
    ARMS,
    EXPLORATIONS,
    FRONTIER,
    SPECIALISED,
    Arm,
    Optimizer,
    rates,
)
from experiments.study.contrasts import best, primary
from experiments.study.crew import Crew, Work, carried_out, share
from experiments.study.lanes import Job
from experiments.study.records import Key, Run, Stage
from experiments.study.report import write_report
from experiments.study.runs import chunks
from experiments.study.statistics import scores
from experiments.study.tasks import SCHEDULES, Bank, Family, Tasks, digits
from experiments.study.text import text, trunk
from experiments.workers import processors, workers
from onn import check
from onn.architecture import MAX_EXPERT_SIZE, MIN_EXPERTS
from onn.observe import Json
from onn.settings import Regime

TUNING_SEEDS = (1000, 1001, 1002)
LOOKED_AT = 5
"""Seeds whose experts are looked at one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to study.

    With another number of experts these stay the same: the tasks, the order of their examples, the share of the experts
    that a token has active (a quarter, unless an arm says otherwise), and how many of these learn (2 under smk-2: of 10
    experts 2 are active, so that nothing is left out). For text another dense model is trained, as wide as the bank.
    """

    family: tuple[Family, ...] = ("digits-permuted", "digits-rotated")
    regime: Regime = "experts"
    """Whether experts and router hold all plasticity after the first task, or everything is trained."""
    experts: int = 32
    """Of the bank, at least 10."""
    width: int = 8
    """Neurons of each expert, at most 96."""
    seeds: int = 20
    arms: tuple[str, ...] = ()
    """Names of arms; all where none is given."""
    explore: bool = False
    """Variations of surprise consolidation as well, of densities those of at least one expert; for a folder, settled
    when it is begun.
    """
    out: Path | None = None
    """Folder; an unfinished study in it goes on. A new one under `runs/` where none is given."""
    workers: int = field(default_factory=processors)
    """Processes at once, of one thread and some 1.4 GiB each; results do not depend on how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One family on the way."""

    options: Options
    family: Family
    folder: Path
    tasks: Path
    """Those of every seed, of `share`."""
    crew: Crew
    runs: dict[tuple[Stage, Key], Run] = field(default_factory=dict)

    def key(self, name: str, optimizer: Optimizer, rate: float, strength: float, seed: int) -> Key:
        return Key(self.family, self.options.regime, name, optimizer, rate, strength, seed)

    def tune(self, arms: Mapping[str, Arm]) -> None:
        """Every rate and strength of every arm under every optimizer, on the seeds of tuning."""
        self._make(
            Job(self.key(name, optimizer, rate, strength, seed), "tuning", arm)
            for name, arm in arms.items()
            if not arm.matched
            for optimizer in arm.optimizers
            for rate in rates(optimizer)
            for strength in arm.strengths
            for seed in TUNING_SEEDS
        )

    def evaluate(self, arms: Mapping[str, Arm], stage: Stage) -> None:
        """Every arm under every optimizer as tuned, on all seeds."""
        self._make(
            Job(self.key(name, optimizer, *self._tuned(name, arm, optimizer), seed), stage, arm)
            for name, arm in arms.items()
            for optimizer in arm.optimizers
            for seed in range(self.options.seeds)
        )

    def trace(self, arms: Mapping[str, Arm]) -> None:
        """The arms of the frontier at every rate, on all seeds, under the optimizers that a claim names.

        What was evaluated is not run again.
        """
        keys = [
            self.key(name, optimizer, rate, 0.0, seed)
            for name in FRONTIER
            if name in arms
            for optimizer in arms[name].optimizers
            if optimizer in self._claimed(name, arms[name])
            for rate in rates(optimizer)
            for seed in range(self.options.seeds)
        ]
        evaluated = [self.runs["evaluation", key]._replace(stage="frontier") for key in keys if self._is_evaluated(key)]
        self._keep([run for run in evaluated if ("frontier", run.key) not in self.runs])
        self._make(Job(key, "frontier", arms[key.arm]) for key in keys if not self._is_evaluated(key))

    def look_around(self, arms: Mapping[str, Arm]) -> None:
        """Every other arm of a claim on ACC at the rates next to that of its best optimizer as tuned, on all seeds."""
        claimed = {side.arm for one in primary() if one.measure == "ACC" for side in (one.first, one.second)}
        self._make(
            Job(self.key(name, optimizer, near, strength, seed), "neighbour", arm)
            for name, arm in arms.items()
            if name in claimed.difference(FRONTIER) and not arm.matched
            if (optimizer := self._best(name, arm)) is not None
            for rate, strength in [self._tuned(name, arm, optimizer)]
            for near in rates(optimizer)
            if near in (rate / 2, rate * 2)
            for seed in range(self.options.seeds)
        )

    def _claimed(self, name: str, arm: Arm) -> set[str | None]:
        """The optimizers of the claims on an arm."""
        named = {side.optimizer for one in primary() for side in (one.first, one.second) if side.arm == name}
        return {self._best(name, arm) if optimizer == "best" else optimizer for optimizer in named}

    def _best(self, name: str, arm: Arm) -> Optimizer | None:
        tried = list(self.runs.values())
        found = best(tried, self.family, self.options.regime, name, arm.optimizers)
        return next((optimizer for optimizer in arm.optimizers if optimizer == found), None)

    def _tuned(self, name: str, arm: Arm, optimizer: Optimizer) -> tuple[float, float]:
        """The rate and strength of highest mean ACC; ties go to the lower rate."""
        if arm.matched:
            return self._matching(arm.matched, optimizer), 0.0

        def accuracy(rate: float, strength: float) -> float:
            found = [self._accuracy(name, optimizer, rate, strength, seed) for seed in TUNING_SEEDS]
            mean = sum(found) / len(found)
            return mean if math.isfinite(mean) else -math.inf

        grid = [(rate, strength) for rate in rates(optimizer) for strength in arm.strengths]
        return max(grid, key=lambda point: accuracy(*point))

    def _accuracy(self, name: str, optimizer: Optimizer, rate: float, strength: float, seed: int) -> float:
        run = self.runs["tuning", self.key(name, optimizer, rate, strength, seed)]
        return scores(run.scores).accuracy if math.isfinite(run.change) else -math.inf

    def _matching(self, other: str, optimizer: Optimizer) -> float:
        """The rate at which updating everything changes the experts as much as another arm does as tuned.

        By linear interpolation of logarithms between the rates of the grid; within it.
        """
        target = self._change(other, optimizer, *self._tuned(other, ARMS[other], optimizer))
        points = [(self._change("all", optimizer, rate, 0.0), rate) for rate in rates(optimizer)]
        points = sorted(point for point in points if math.isfinite(point[0]) and point[0] > 0)
        below = [point for point in points if point[0] <= target]
        above = [point for point in points if point[0] > target]
        if not below or not above:
            return (points[0] if not below else points[-1])[1]
        (low, first), (high, second) = below[-1], above[0]
        share = math.log(target / low) / math.log(high / low)
        return math.exp(math.log(first) + share * math.log(second / first))

    def _change(self, name: str, optimizer: Optimizer, rate: float, strength: float) -> float:
        keys = [self.key(name, optimizer, rate, strength, seed) for seed in TUNING_SEEDS]
        return sum(self.runs["tuning", key].change for key in keys) / len(keys)

    def _make(self, jobs: Iterator[Job]) -> None:
        """Carry out what is not yet done, chunk by chunk; each is on the disk before the next begins."""
        planned = chunks(list(jobs))
        if not planned:
            return
        stage = planned[0][0].stage
        schedule = SCHEDULES[self.family]
        missing = [chunk for chunk in planned if any((stage, job.key) not in self.runs for job in chunk)]
        work = [Work(chunk, self._looked_at(chunk), self.tasks, schedule) for chunk in missing]
        done, left = self.crew(work), len(planned) - len(work)
        with progress(done, desc=f"{self.family}, {stage}", unit="chunk", total=len(planned), initial=left) as bar:
            for chunk in bar:
                store.append(self.folder / store.SPECIALISATIONS, chunk.specialisations)
                self._keep([run for run in chunk.runs if (stage, run.key) not in self.runs])

    def _keep(self, new: Sequence[Run]) -> None:
        store.append(self.folder / store.RUNS, new)
        self.runs.update(((run.stage, run.key), run) for run in new)

    def _is_evaluated(self, key: Key) -> bool:
        return ("evaluation", key) in self.runs

    def _looked_at(self, chunk: Sequence[Job]) -> list[int]:
        """The lanes whose experts are looked at one by one."""
        return [n for n, job in enumerate(chunk) if self._is_looked_at(job)]

    def _is_looked_at(self, job: Job) -> bool:
        key = job.key
        if job.stage != "evaluation" or key.arm not in SPECIALISED or key.seed >= LOOKED_AT:
            return False
        return self._best(key.arm, job.arm) == key.optimizer


def run(options: Options) -> Path:
    """Carry out a study, and return its page.

    Raises:
        ValueError: an unknown arm, a bank out of bounds, no workers, or a folder of another study.
        ChildProcessError: a worker ended before its work did.
    """
    check.at_least("forgetting", "workers", options.workers, 1)
    keep_freed_memory()
    arms, bank = chosen_arms(options.arms), bank_of(options)
    explored = explorations(bank) if options.explore else {}
    folder = options.out or Path("runs") / f"forgetting-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Json] = {
        "family": list(options.family),
        "regime": options.regime,
        **bank._asdict(),
        "seeds": options.seeds,
        "tuning_seeds": list(TUNING_SEEDS),
        "schedules": {family: SCHEDULES[family]._asdict() for family in options.family},
        "rates": {optimizer: list(rates(optimizer)) for optimizer in get_args(Optimizer)},
        "arms": {name: arm.told() for name, arm in {**arms, **explored}.items()},
    }
    store.require_same(folder / "settings.json", settings)
    known = {(run.stage, run.key): run for run in store.load_runs(folder / store.RUNS)}
    began = time.monotonic()
    with workers(options.workers) as each, TemporaryDirectory() as scratch:
        hands = partial(each, carried_out)
        for family in options.family:
            tasks = share(tasks_of(family, options.seeds, bank), Path(scratch) / family)
            study = Study(options=options, family=family, folder=folder, tasks=tasks, crew=hands, runs=dict(known))
            study.tune(arms)
            study.evaluate(arms, "evaluation")
            study.trace(arms)
            study.look_around(arms)
            study.tune(explored)
            study.evaluate(explored, "exploration")
            known |= study.runs
    looked_at = {one.key: one for one in store.load_specialisations(folder / store.SPECIALISATIONS)}
    results = store.Results(
        facts={**facts(""), "threads": 1},
        settings=settings,
        runs=list(known.values()),
        specialisations=list(looked_at.values()),
    )
    store.write_results(folder / store.RESULTS, results)
    print(f"{len(known)} runs, {time.monotonic() - began:.0f} seconds of this session.")
    return write_report(folder, results)


def chosen_arms(names: Sequence[str]) -> Mapping[str, Arm]:
    """The arms of these names, and those that they are matched to.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        check.one_of("forgetting", "arm", name, ARMS)
    wanted = set(names or ARMS)
    for name in list(wanted):
        wanted |= {ARMS[name].matched, "all"} if ARMS[name].matched else set()
    return {name: arm for name, arm in ARMS.items() if name in wanted}


def bank_of(options: Options) -> Bank:
    """The size of the bank.

    Raises:
        ValueError: it is none of very many, very small experts.
    """
    check.at_least("forgetting", "experts", options.experts, MIN_EXPERTS)
    check.between("forgetting", "width", options.width, 1, MAX_EXPERT_SIZE)
    return Bank(options.experts, options.width)


def explorations(bank: Bank) -> Mapping[str, Arm]:
    """Those under which a token has at least one active expert of this bank."""
    return {name: arm for name, arm in EXPLORATIONS.items() if arm.active * bank.experts >= 1}


def tasks_of(family: Family, seeds: int, bank: Bank) -> Mapping[int, Tasks]:
    """Of the seeds of tuning and of evaluation."""
    wanted = (*TUNING_SEEDS, *range(seeds))
    if family == "text":
        shared = trunk(bank)
        return {seed: text(shared, shared.tuning if seed in TUNING_SEEDS else shared.test, seed) for seed in wanted}
    return {seed: digits(seed, turned=family == "digits-rotated", bank=bank) for seed in wanted}


def main(options: Options) -> int:
    """Run one study; the exit status."""
    return exit_status(lambda: print(f"Report: {run(options)}"))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="forgetting.py", description=__doc__)))
