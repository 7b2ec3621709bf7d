"""Chunks of runs for several processes at once, each on one thread: small models gain more from that than from threads.

What a chunk comes to does not depend on how many processes there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import onn.functional as F
from experiments.study.lanes import Job
from experiments.study.net import Net
from experiments.study.records import Run, Specialisation
from experiments.study.runs import carry_out
from experiments.study.specialisation import specialisations
from experiments.study.tasks import Schedule, Tasks
from experiments.workers import one_thread
from onn import storage, tree


class Work(NamedTuple):
    """One chunk for a process that knows nothing else."""

    jobs: Sequence[Job]
    looked_at: Sequence[int]
    """Lanes whose experts are looked at one by one."""
    tasks: Path
    """Of `share`."""
    schedule: Schedule


class Done(NamedTuple):
    """What is kept of a chunk."""

    runs: list[Run]
    specialisations: list[Specialisation]


_NOTHING = torch.empty(0)
_LIKE = Tasks(
    *(_NOTHING, _NOTHING, _NOTHING),
    *(_NOTHING, _NOTHING, _NOTHING, _NOTHING),
    Net(_NOTHING, _NOTHING, F.Experts(_NOTHING, _NOTHING, _NOTHING), _NOTHING),
)
"""The structure of the tasks of a seed."""

Crew = Callable[[Sequence[Work]], Iterator[Done]]


def share(tasks: Mapping[int, Tasks], path: Path) -> Path:
    """Write the tasks of all seeds down, for every process of a crew."""
    named = {f"{seed}/{place}": leaf for seed, one in tasks.items() for place, leaf in enumerate(tree.leaves(one))}
    storage.write(named, path, {})
    return path


def carried_out(work: Work) -> Done:
    """One chunk, on one thread."""
    with one_thread():
        tasks = _shared(work.tasks)
        trained = carry_out(work.jobs, tasks, work.schedule)
        return Done(trained.runs, specialisations(work.jobs, work.looked_at, trained, tasks))


@lru_cache(maxsize=1)
def _shared(path: Path) -> Mapping[int, Tasks]:
    leaves: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for name, leaf in load_file(path).items():
        seed, place = map(int, name.split("/"))
        leaves[seed][place] = leaf
    return {seed: tree.unflatten(_LIKE, [found[place] for place in sorted(found)]) for seed, found in leaves.items()}
