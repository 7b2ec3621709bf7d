from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.journal import Journal, reborn_experts, stride
from onn import objective, train
from onn.observe import Json, read_jsonl
from onn.qwen3 import Model
from onn.train import Metrics
from tests.support import normal
from tests.test_board import shown
from tests.test_train import SETTINGS, SPARSE, batch, carved_state, sparse

STEPS = 14
FIRST = 4
"""Of the phase `moe`: as many steps of `dense` come before."""


@cache
def history() -> tuple[tuple[Metrics, Model], ...]:
    """Steps of a small carved model."""
    state, found = carved_state(dtype=torch.float32), []
    for position in range(STEPS):
        state, metrics = train.step(state, batch(position), (), SETTINGS)
        found.append((metrics, state.model))
    return tuple(found)


def record(step: int, phase: str) -> dict[str, Json]:
    return {"step": step, "phase": phase, "loss": 2.0 + step / 7, "pi": None if phase == "dense" else 0.3, "bad": "x"}


def write(folder: Path, phase: str, first: int, last: int, *, records: int | None = None) -> None:
    """Steps of a phase from a checkpoint at `first`; dense steps count from 0, the others from `FIRST`."""
    before = {"dense": 0, "moe": 0, "dense_continued": STEPS}[phase]
    lines = before + first if records is None else records
    with Journal(folder, phase=phase, records=lines, step=first) as journal:
        for step in range(first, last):
            metrics, model = history()[step % STEPS]
            seen = metrics._replace(sparse=()) if phase != "moe" else metrics
            journal.write(record(step, phase), seen, model)


def whole(folder: Path) -> Path:
    folder.mkdir()
    write(folder, "dense", 0, FIRST)
    write(folder, "moe", FIRST, STEPS)
    return folder


def contents(folder: Path) -> list[object]:
    boards = [shown(folder / "tensorboard" / phase) for phase in ("dense", "moe")]
    return [(folder / "metrics.jsonl").read_bytes(), (folder / "trace.jsonl").read_bytes(), *boards]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("journal") / "reference")


@settings(max_examples=15)
@given(stop=st.integers(FIRST, STEPS), back=st.integers(0, STEPS), torn=st.binary(max_size=9))
def test_stopped_at_any_step_and_resumed_leaves_the_files_of_a_run_never_stopped(
    reference: Path, tmp_path_factory: pytest.TempPathFactory, stop: int, back: int, torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    write(folder, "dense", 0, FIRST)
    write(folder, "moe", FIRST, stop)
    for name in ("metrics.jsonl", "trace.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(torn.replace(b"\n", b"{"))
    write(folder, "moe", max(FIRST, stop - back), STEPS)
    assert contents(folder) == contents(reference)


def test_the_first_step_of_a_run_without_a_dense_phase_is_where_strides_begin(tmp_path: Path) -> None:
    """It is the number 0."""
    for name, stop in (("whole", STEPS), ("stopped", 5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "moe", 0, stop)
    write(tmp_path / "stopped", "moe", 5, STEPS)
    assert (tmp_path / "stopped" / "trace.jsonl").read_bytes() == (tmp_path / "whole" / "trace.jsonl").read_bytes()


def test_a_whole_record_without_its_newline_is_dropped(reference: Path, tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    for name in ("metrics.jsonl", "trace.jsonl"):
        (folder / name).write_bytes((folder / name).read_bytes().removesuffix(b"\n"))
    lines = len((folder / "metrics.jsonl").read_bytes().split(b"\n"))
    write(folder, "moe", STEPS - 1, STEPS, records=lines - 1)
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [*range(FIRST), *range(FIRST, STEPS)]


@pytest.mark.parametrize("phase", ["dense", "moe"])
def test_a_phase_done_again_drops_what_later_phases_left(reference: Path, tmp_path: Path, phase: str) -> None:
    folder = whole(tmp_path / "run")
    write(folder, "dense_continued", FIRST, FIRST + 3)
    if phase == "dense":
        write(folder, "dense", 2, FIRST)
        assert (folder / "trace.jsonl").read_bytes() == b""
    write(folder, "moe", FIRST, STEPS)
    assert contents(folder) == contents(reference)


def test_a_phase_that_begins_keeps_what_earlier_phases_left(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    before = (folder / "trace.jsonl").read_bytes()
    write(folder, "dense_continued", FIRST, FIRST + 3)
    records = read_jsonl(folder / "metrics.jsonl")
    assert [r["phase"] for r in records] == ["dense"] * FIRST + ["moe"] * (STEPS - FIRST) + ["dense_continued"] * 3
    assert (folder / "trace.jsonl").read_bytes() == before


def test_records_that_are_lost_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "dense", 0, 3)
    assert not capsys.readouterr().err
    write(tmp_path, "dense", 3, 4, records=9)
    assert "holds 3 of 9 records" in capsys.readouterr().err
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_look_holds_every_expert_of_every_layer_as_the_step_saw_it(reference: Path) -> None:
    looks = read_jsonl(reference / "trace.jsonl")
    steps = [FIRST + position for position in range(STEPS - FIRST) if position % stride(position) == 0]
    assert [look["step"] for look in looks] == steps
    for look, step in zip(looks, steps, strict=True):
        metrics, model = history()[step]
        seen = sparse(metrics)
        thresholds = torch.stack([layer.router.thresholds for layer in objective.carved_layers(model)])
        expected = {"surprise": seen.surprise_by_expert, "active": seen.usage.active, "routed": seen.usage.routed}
        for name, table in (expected | {"thresholds": thresholds}).items():
            found = torch.tensor(json.loads(json.dumps(look[name]).replace("null", "NaN")), dtype=torch.float64)
            assert torch.allclose(found, table.double(), rtol=5e-4, atol=0, equal_nan=True), name


def test_tensorboard_gets_every_number_and_nothing_that_is_none(reference: Path) -> None:
    found = shown(reference / "tensorboard" / "moe")
    assert found["loss"] == [(step, pytest.approx(2.0 + step / 7)) for step in range(FIRST, STEPS)]
    assert not {"step", "phase", "bad"} & set(found)
    assert set(found) == {"loss", "pi", "routing", "surprise/layer_00", "surprise/layer_01"}
    assert set(shown(reference / "tensorboard" / "dense")) == {"loss"}


def test_looks_get_rarer_and_never_many() -> None:
    looks = [position for position in range(100_000) if position % stride(position) == 0]
    assert looks[:10] == list(range(10))
    for begin in (10, 100, 1000, 10_000):
        assert sum(begin <= position < 10 * begin for position in looks) == 45
    assert max(b - a for a, b in pairwise(looks) if b <= 1000) == 20


def test_births_are_those_of_the_lifecycle() -> None:
    state = carved_state()
    layers = objective.carved_layers(state.model)
    idle = [(0, 3), (1, 0), (1, 9)]
    usage = [layer.active + 1 for layer in state.usage]
    for layer, expert in idle:
        usage[layer][expert] = 0
    used = state._replace(usage=tuple(c._replace(active=u) for c, u in zip(state.usage, usage, strict=True)))
    noise = tuple(normal(layer, *own.router.prototypes.shape) for layer, own in enumerate(layers))
    after, counts = train.lifecycle(used, noise, config=SPARSE, scale=0.5)
    before, now = ([own.router.prototypes for own in objective.carved_layers(s.model)] for s in (used, after))
    assert reborn_experts(before, now) == [list(pair) for pair in idle]
    assert counts.sum() == len(idle)
    assert reborn_experts(before, before) == []
