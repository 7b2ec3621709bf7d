"""Chunks of the forgetting study by several processes: the bits of one, in order, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import forgetting
from experiments.study import crew, runs
from experiments.study.arms import ARMS
from experiments.study.crew import Done, Work
from experiments.study.lanes import Job
from experiments.study.records import Key
from experiments.study.tasks import Schedule, Tasks
from tests.test_study_runs import few

SHORT = Schedule(tokens=8, steps=2)
SEEDS = (0, 1)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in other processes: none of them finds a compiler."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(runs, "compiled", lambda function: function)
    runs._stepper.cache_clear()
    runs._evaluator.cache_clear()


def work(folder: Path) -> list[Work]:
    """One chunk a seed."""
    tasks: dict[int, Tasks] = {seed: few(seed) for seed in SEEDS}
    shared = crew.share(tasks, folder / "tasks")
    keys = [Key("digits-rotated", "experts", "smk-2", "sgd", 0.1, 0.0, seed) for seed in SEEDS]
    return [Work([Job(key, "evaluation", ARMS["smk-2"])], [0], shared, SHORT) for key in keys]


def test_several_processes_give_the_bits_of_one_in_the_order_of_the_work(tmp_path: Path) -> None:
    asked = work(tmp_path)
    found = []
    for workers in (1, 2):
        with crew.crew(workers) as hands:
            found.append(list(hands(asked)))
    assert repr(found[0]) == repr(found[1])
    assert [done.runs[0].key.seed for done in found[0]] == list(SEEDS)
    assert all(len(done.specialisations) == 1 for done in found[0])
    assert multiprocessing.active_children() == []


def test_work_is_done_on_one_thread_and_the_threads_of_the_process_are_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def carried_out(*args: object) -> runs.Trained:
        seen.append(torch.get_num_threads())
        raise ValueError("enough")

    monkeypatch.setattr(crew, "carry_out", carried_out)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="enough"):
            crew.carried_out(work(tmp_path)[0])
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def killed(work: Work) -> Done:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(work)


def test_a_process_that_is_killed_is_told_in_one_line_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "carried_out", killed)
    with pytest.raises(ChildProcessError, match=r"One of 2 processes ended .* fewer workers"), crew.crew(2) as hands:
        list(hands(work(tmp_path)))
    assert multiprocessing.active_children() == []


BEGUN = """
import time
from experiments.study import crew

if __name__ == "__main__":
    with crew.crew(2) as hands:
        pool = hands.func.__self__
        ready = [pool.submit(time.sleep, 0) for _ in range(4)]
        [one.result() for one in ready]
        print(*pool._processes, flush=True)
        time.sleep(600)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return (
        f"{process} (" in Path(f"/proc/{process}/stat").read_text()
        and ") Z " not in Path(f"/proc/{process}/stat").read_text()
    )


def until(met: Callable[[], bool], *, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.05)
    return met()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_no_process_outlives_the_one_that_began_it(tmp_path: Path) -> None:
    script = tmp_path / "begun.py"
    script.write_text(BEGUN)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        workers = [int(number) for number in begun.stdout.readline().split()]
        assert workers
        assert all(map(is_alive, workers))
        begun.kill()
    assert until(lambda: not any(map(is_alive, workers)))


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers"):
        forgetting.run(forgetting.Options(workers=0))
