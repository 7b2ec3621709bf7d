"""What a run draws: new windows for every batch of a phase, and of another phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import run
from onn import data
from onn.data import Batch, Pool
from tests.test_run import SIZES


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What batches are drawn by."""
    drawn: list[Tensor] = []

    def heard(pool: Pool, choice: Tensor) -> Batch:
        drawn.append(choice)
        return sample_batch(pool, choice)

    sample_batch = data.sample_batch
    monkeypatch.setattr(data, "sample_batch", heard)
    return drawn


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dense_model_trained_on_reads_what_the_carved_one_reads(
    drawn: list[Tensor], tmp_path: Path, dtype: str
) -> None:
    few = ("--train.dense-steps", "1", "--train.steps", "3", "--train.rebirth-every", "2", "--train.dtype", dtype)
    assert run.main(["--out", str(tmp_path / "run"), *SIZES, *few]) == 0
    assert len(drawn) == 1 + 3 + 3
    for carved, dense in zip(drawn[1:4], drawn[4:], strict=True):
        assert torch.equal(carved, dense)


def test_every_batch_is_drawn_anew(drawn: list[Tensor], tmp_path: Path) -> None:
    few = ("--train.dense-steps", "3", "--train.steps", "4", "--train.no-dense-continued", "--train.rebirth-every", "0")
    assert run.main(["--out", str(tmp_path / "run"), *SIZES, *few]) == 0
    choices = [tuple(choice.flatten().tolist()) for choice in drawn]
    assert len(choices) == 3 + 4
    assert len(set(choices)) == len(choices)
    windows = [value for choice in choices for value in choice]
    assert len(set(windows)) == len(windows)
