"""What a run draws: new windows for every batch of a phase, and of another phase."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from experiments import run
from onn import data
from onn.data import Batch, Pool
from tests.test_run import SIZES


def test_every_batch_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def heard(pool: Pool, choice: Tensor) -> Batch:
        drawn.append(choice)
        return sample_batch(pool, choice)

    sample_batch = data.sample_batch
    monkeypatch.setattr(data, "sample_batch", heard)
    few = ("--train.dense-steps", "3", "--train.steps", "4", "--train.no-dense-continued")
    assert run.main(["--out", str(tmp_path / "run"), *SIZES, *few]) == 0
    choices = [tuple(choice.flatten().tolist()) for choice in drawn]
    assert len(choices) == 3 + 4
    assert len(set(choices)) == len(choices)
    windows = [value for choice in choices for value in choice]
    assert len(set(windows)) == len(windows)
