"""Chunks of runs carried out by several processes at once, each on one thread: small models gain more from that.

What a chunk comes to does not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import onn.functional as F
from experiments.memory import keep_freed_memory
from experiments.study.lanes import Job
from experiments.study.net import Net
from experiments.study.records import Run, Specialisation
from experiments.study.runs import carry_out
from experiments.study.specialisation import specialisations
from experiments.study.tasks import Schedule, Tasks
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


def processors() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(tasks: Mapping[int, Tasks], path: Path) -> Path:
    """Write the tasks of all seeds down, for every process of a crew."""
    named = {f"{seed}/{place}": leaf for seed, one in tasks.items() for place, leaf in enumerate(tree.leaves(one))}
    storage.write(named, path, {})
    return path


@contextmanager
def crew(workers: int) -> Iterator[Crew]:
    """What carries work out and hands it back in its order, by so many processes; in this one where it is one.

    Raises:
        ChildProcessError: a process ended before its work did.
    """
    if workers == 1:
        yield partial(map, carried_out)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield partial(pool.map, carried_out)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"One of {workers} processes ended before its work did, perhaps for want of memory: try fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def carried_out(work: Work) -> Done:
    """One chunk, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks = _shared(work.tasks)
        trained = carry_out(work.jobs, tasks, work.schedule)
        return Done(trained.runs, specialisations(work.jobs, work.looked_at, trained, tasks))
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _shared(path: Path) -> Mapping[int, Tasks]:
    leaves: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for name, leaf in load_file(path).items():
        seed, place = map(int, name.split("/"))
        leaves[seed][place] = leaf
    return {seed: tree.unflatten(_LIKE, [found[place] for place in sorted(found)]) for seed, found in leaves.items()}


def _begin() -> None:
    """Of a process: it ends at once with Ctrl-C, and with the process that began it."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()


def _end_with(wait: Callable[[], None]) -> None:
    wait()
    os._exit(1)
