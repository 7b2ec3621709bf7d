"""Chunks of the forgetting study by several processes: the bits of one, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import forgetting
from experiments.study import crew, runs
from experiments.study.arms import ARMS
from experiments.study.crew import Work
from experiments.study.lanes import Job
from experiments.study.records import Key
from experiments.study.tasks import Schedule, Tasks
from experiments.workers import workers
from tests.test_study_runs import few, nothing_compiled

SHORT = Schedule(tokens=8, steps=2)
SEEDS = (0, 1)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also in other processes: none of them finds a compiler."""
    monkeypatch.setenv("PATH", "")
    with nothing_compiled(monkeypatch):
        yield


def work(folder: Path) -> list[Work]:
    """One chunk a seed."""
    tasks: dict[int, Tasks] = {seed: few(seed) for seed in SEEDS}
    shared = crew.share(tasks, folder / "tasks")
    keys = [Key("digits-rotated", "experts", "smk-2", "sgd", 0.1, 0.0, seed) for seed in SEEDS]
    return [Work([Job(key, "evaluation", ARMS["smk-2"])], [0], shared, SHORT) for key in keys]


def test_several_processes_give_the_bits_of_one_in_the_order_of_the_work(tmp_path: Path) -> None:
    asked = work(tmp_path)
    found = []
    for count in (1, 2):
        with workers(count) as each:
            found.append(list(each(crew.carried_out, asked)))
    assert repr(found[0]) == repr(found[1])
    assert [done.runs[0].key.seed for done in found[0]] == list(SEEDS)
    assert all(len(done.specialisations) == 1 for done in found[0])


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


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers"):
        forgetting.run(forgetting.Options(workers=0))
