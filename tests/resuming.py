"""A run small enough to be stopped and resumed many times, and the comparison of two runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from experiments import pipeline, replay
from experiments.presets import TINY, RunConfig
from onn import observe, train
from onn.observe import Json

P = ParamSpec("P")
R = TypeVar("R")

SMALL = replace(
    TINY,
    model=replace(TINY.model, hidden_size=16, intermediate_size=20, num_hidden_layers=1, head_dim=8),
    sparse=replace(
        TINY.sparse,
        moe=replace(TINY.sparse.moe, num_experts=10, min_k=2),
        density=replace(TINY.sparse.density, ramp_steps=2),
    ),
    data=replace(TINY.data, bytes_per_domain=2000, sequence_length=8, batch_size=2, eval_windows=2),
    train=replace(
        TINY.train, dense_steps=3, steps=4, rebirth_every=2, checkpoint_every=2, checkpoints_kept=2, max_skipped=3
    ),
    sample=replace(TINY.sample, prompt_tokens=4, new_tokens=2),
)
"""All three phases, 11 steps."""


def with_train(config: RunConfig, **values: Json) -> RunConfig:
    return replace(config, train=replace(config.train, **values))  # type: ignore[arg-type]


prepare = pipeline.prepare
prepared_once = cache(prepare)


def made_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is read once, and nothing is drawn: what would be is in the records and the summary."""

    def undrawn(*arguments: object, **settings: object) -> None: ...

    for name in ("curves", "expert_by_domain", "surprise_map"):
        monkeypatch.setattr(observe, name, undrawn)
    monkeypatch.setattr(
        pipeline, "prepare", lambda config: prepared_once(config) if config.data.path is None else prepare(config)
    )


def interrupted_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C in every step of this number, counted from 1 by each process that trains."""
    monkeypatch.setattr(train, "step", _interrupting(train.step, steps))


def _interrupting(step: Callable[P, R], steps: int) -> Callable[P, R]:
    taken = list[int]()

    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        taken.append(1)
        if len(taken) % steps == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    return counted


def assert_same_run(folder: Path, reference: Path) -> None:
    """Models, records, trace and figures are the same to the bit, clocks apart."""
    different = [row for row in replay.compare(reference, folder) if row.first]
    assert not different, different
    assert (folder / "trace.jsonl").read_bytes() == (reference / "trace.jsonl").read_bytes()
