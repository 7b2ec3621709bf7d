"""Twenty runs of the forgetting study at once against one by one.

`uv run experiments/bench_study.py [--json FILE] [--rounds N]`, a minute or two on two CPU cores. Expected: one by one
takes at least 8 times as long eagerly and 3 times compiled.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from experiments import noise
from experiments.command import exit_status
from experiments.compiling import compiled
from experiments.measure import Run, compare, report
from experiments.memory import keep_freed_memory
from experiments.study.arms import ARMS
from experiments.study.lanes import Job, lanes, needs, plasticity
from experiments.study.net import Examples
from experiments.study.records import Key
from experiments.study.runs import LANES
from experiments.study.state import Lane, Plasticity, init_state
from experiments.study.step import step
from experiments.study.tasks import SCHEDULES, Bank, digits
from onn import tree

TOGETHER = f"{LANES} at once, compiled"
ALONE = ("one by one, eager", "one by one, compiled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to measure."""

    rounds: int = 15
    json: Path | None = None
    """Write the rows to this file."""


def variants(*, arm: str, optimizer: str) -> dict[str, Run]:
    """One step of twenty runs of an arm, each a seed of its own."""
    jobs = [
        Job(Key("digits-rotated", "experts", arm, optimizer, 0.01, 0.0, seed), "tuning", ARMS[arm])
        for seed in range(LANES)
    ]
    kind, draws = needs(jobs[0]), noise.generator(0)
    tokens = SCHEDULES["digits-rotated"].tokens
    tasks = [digits(seed, turned=True, bank=Bank(experts=32, width=8)) for seed in range(LANES)]
    batches = [
        Examples(one.inputs[0, :tokens], one.residual[0, :tokens], one.labels[0, :tokens].contiguous()) for one in tasks
    ]
    uniform = [torch.rand(tokens, len(one.net.prototypes), generator=draws) for one in tasks]
    numbers, plastic = lanes(jobs), plasticity(jobs, first=True)
    single = [
        (
            init_state(one.net, kind),
            batch,
            batch,
            chance,
            Lane(*(number[n].clone() for number in numbers)),
            Plasticity(*(factor[n].clone() for factor in plastic)),
        )
        for n, (one, batch, chance) in enumerate(zip(tasks, batches, uniform, strict=True))
    ]
    columns = zip(*(tree.leaves(arguments) for arguments in single), strict=True)
    whole = tree.unflatten(single[0], [torch.stack(column) for column in columns])
    alone = partial(step, needs=kind)
    together, compiled_alone = compiled(torch.func.vmap(alone)), compiled(alone)

    return {
        TOGETHER: lambda: together(*whole),
        ALONE[0]: lambda: [alone(*arguments) for arguments in single],
        ALONE[1]: lambda: [compiled_alone(*arguments) for arguments in single],
    }


def main(options: Options) -> None:
    """Measure, print the rows, and write them where that was asked for."""
    keep_freed_memory()
    rows = []
    for arm, optimizer in (("root-neuron", "own"), ("all", "adamw")):
        rows += compare(
            variants(arm=arm, optimizer=optimizer),
            [(name, TOGETHER) for name in ALONE],
            suite="study",
            case=f"{arm}, {optimizer}",
            dtype=torch.float32,
            repeats=options.rounds,
        )
    report(rows, options.json)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, prog="bench_study.py", description=__doc__))))
