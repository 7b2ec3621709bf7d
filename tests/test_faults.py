"""The instruments of `faults.py`: real processes and signals, and that a broken promise would be seen."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from experiments import faults, faults_cases, guard, noise, pipeline, presets, run
from experiments.faults_numbers import LASTING, PASSING, Place, planting
from experiments.faults_process import (
    CRASHED,
    Lab,
    Trial,
    counting,
    dying_at,
    ended,
    kill,
    last_line,
    start,
    until,
    without_privilege,
)
from experiments.keeping import FOLDER, METRICS
from onn import carve, data, objective, observe, qwen3, storage, train, tree
from tests.resuming import SMALL, interrupted_after, made_quick


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The reference, and a run stopped after the third step of `moe`."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        made_quick(patch)
        pipeline.run(SMALL, root / "reference")
        interrupted_after(patch, 6)
        with pytest.raises(guard.Stopped):
            pipeline.run(SMALL, root / "base")
    return Lab(root, (), SMALL.train.checkpoint_every, SMALL.train.dense_steps, 1.0)


@pytest.fixture
def acting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `run.py`: write three files, then do what the argument says."""

    def main(arguments: Sequence[str]) -> int:
        folder, deed = Path(arguments[0]), arguments[1]
        for name in "abc":
            storage.write_text(folder / name, name)
        if deed == "wait":
            signal.pause()
        if deed == "raise":
            raise RuntimeError(deed)
        if deed == "leave":
            raise SystemExit(2)
        print(deed)
        return 5

    monkeypatch.setattr(run, "main", main)


def test_a_child_ends_as_run_would(acting: None, tmp_path: Path) -> None:
    for deed, status, said in (("print", 5, "print"), ("leave", 2, ""), ("raise", CRASHED, "RuntimeError: raise")):
        log = tmp_path / f"{deed}.log"
        assert ended(start([str(tmp_path), deed], log)) == status
        assert last_line(log.read_text() or "", tmp_path) == (said or "no output")


def test_a_child_is_waited_for_and_killed(acting: None, tmp_path: Path) -> None:
    child = start([str(tmp_path), "wait"], tmp_path / "log")
    assert until((tmp_path / "c").exists, child)
    kill(child)
    assert ended(child) == -signal.SIGKILL
    child = start([str(tmp_path), "print"], tmp_path / "log")
    assert not until((tmp_path / "never").exists, child)
    assert ended(child) == 5


def test_a_child_dies_at_the_flush_asked_for(acting: None, tmp_path: Path) -> None:
    """Each file is flushed, renamed, and its folder flushed: two flushes a file."""
    assert ended(start([str(tmp_path), "print"], tmp_path / "log", counting(tmp_path / "flushes"))) == 5
    assert (tmp_path / "flushes").read_text() == "6"
    for flush, files in ((1, ["a.partial"]), (2, ["a"]), (3, ["a", "b.partial"]), (6, ["a", "b", "c"])):
        folder = tmp_path / str(flush)
        folder.mkdir()
        assert ended(start([str(folder), "print"], tmp_path / "log", dying_at(flush))) == -signal.SIGKILL
        assert sorted(path.name for path in folder.iterdir()) == files
    assert ended(start([str(tmp_path), "print"], tmp_path / "log", dying_at(7))) == 5


def test_a_superuser_without_privilege_cannot_write_what_is_read_only(acting: None, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    assert ended(start([str(folder), "print"], tmp_path / "log", without_privilege)) == CRASHED
    assert "PermissionError" in (tmp_path / "log").read_text()
    folder.chmod(0o755)


def judged(lab: Lab, folder: Path, *, steps: int) -> Trial:
    return lab.judged(folder, steps=steps, status=0)


def test_a_resumed_run_is_held_against_the_reference(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_quick(monkeypatch)
    folder = shutil.copytree(lab.root / "base", tmp_path / "run")
    pipeline.resume(folder)
    assert judged(lab, folder, steps=6) == Trial(True, 0, "resumed to the same bits")
    assert judged(lab, folder, steps=8) == Trial(True, 2, "resumed to the same bits")
    assert judged(lab, folder, steps=9) == Trial(False, 3, "resumed to the same bits")
    assert not lab.judged(folder, steps=6, status=2).kept
    records = observe.read_jsonl(folder / METRICS)
    lines = [*records[:4], {**records[4], "loss": 1.0}, *records[5:]]
    (folder / METRICS).write_text("".join(observe.encode(line, indent=None) + "\n" for line in lines))
    trial = judged(lab, folder, steps=6)
    assert not trial.kept
    assert trial.outcome.startswith("other bits: steps of moe: step 1: loss")
    lab.log(folder).write_text("Traceback (most recent call last)")
    assert not judged(lab, folder, steps=6).kept
    lab.log(folder).unlink()


def test_damage_is_done(lab: Lab, tmp_path: Path) -> None:
    folder = shutil.copytree(lab.root / "base", tmp_path / "run")
    source = random.Random(0)
    newest = faults_cases.newest(folder)
    assert newest.name == "moe-000003"
    path = newest / METRICS
    before = path.read_bytes()
    faults_cases.of_newest(faults_cases.flip, METRICS)(folder, source)
    after = path.read_bytes()
    assert sum(bin(a ^ b).count("1") for a, b in zip(before, after, strict=True)) == 1
    faults_cases.of_newest(faults_cases.truncate, METRICS)(folder, source)
    assert after.startswith(path.read_bytes())
    assert len(path.read_bytes()) < len(after)
    faults_cases.of_newest(faults_cases.remove, METRICS)(folder, source)
    assert not path.exists()
    faults_cases.of_finished(faults_cases.remove, "model.safetensors")(folder, source)
    assert not (folder / FOLDER / "dense-model" / "model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [*PASSING, *LASTING])
def test_a_planted_number_arrives(place: Place, value: float) -> None:
    """At its step and at no other; whether the run then does what it promises is for `faults.py` to see."""
    source = noise.generator(0)
    dense = qwen3.init(noise.normal_like(qwen3.abstract(SMALL.model), source), config=SMALL.model, dtype=torch.float32)
    state = train.init_state(carve.carve(dense, num_experts=10))
    tokens = torch.randint(SMALL.model.vocab_size, (2, 9), generator=source)
    batch = data.Batch(
        tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    )
    settings = presets.step_config(SMALL, phase="moe")
    try:
        planting(place, value, 1)()
        state, before = train.step(state, batch, (), settings)
        after, metrics = train.step(state, batch, (), settings)
    finally:
        mock.patch.stopall()
    assert isinstance(before.sparse, objective.SparseMetrics)
    assert isinstance(metrics.sparse, objective.SparseMetrics)
    assert not bool(before.skipped)
    assert not int(before.sparse.non_finite)
    assert bool(tree.all_finite(state.model))
    assert bool(tree.all_finite(after.model)) == (place in (*PASSING, "moment"))
    if place == "moment":
        assert not bool(tree.all_finite(after.optimizer.mean))
    if place in ("batch", "gradient", "weight"):
        assert bool(metrics.skipped)
    if place == "surprise":
        assert int(metrics.sparse.non_finite) > 0


def test_the_table_counts_and_the_kills_add_up(lab: Lab) -> None:
    plan = list(faults.faults(lab, lab.root / "base", kills=50, flushes=9, mounts=True))
    assert sum(fault.times for fault in plan[:2]) == 50
    assert len({fault.name for fault in plan}) == len(plan)
    trials = [Trial(True, 2, "the same bits"), Trial(False, 7, "other bits"), Trial(True, 0, "the same bits")]
    assert faults.row(plan[0], trials)[1:] == ("3", "2", "2", "7", "the same bits; other bits")


def test_folders_of_what_went_wrong_stay(lab: Lab) -> None:
    def attempt(lab: Lab, source: random.Random, position: int) -> Trial:
        (lab.root / f"tried-{position}").mkdir()
        (lab.root / f"tried-{position}.log").touch()
        return Trial(position != 1, 0, "")

    before = set(os.listdir(lab.root))
    trials = faults.tried(lab, faults.Fault("a", 3, attempt), 0)
    assert [trial.kept for trial in trials] == [True, False, True]
    assert set(os.listdir(lab.root)) - before == {"tried-1", "tried-1.log"}
