"""A compiled run that is stopped and goes on: the same bits as one that never was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from experiments import compiling, guard, pipeline
from tests.resuming import SMALL, assert_same_run, interrupted_after, made_quick, with_train
from tests.support import can_compile

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""torch._dynamo looks at it when a layer's input is the output of another."""


def anew() -> None:
    """What is compiled is forgotten, as in a new process."""
    torch._dynamo.reset()
    compiling._region.cache_clear()


@can_compile
def test_a_compiled_run_stopped_and_resumed_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the carved phase; what goes on compiles its own step, and begins with a state from files."""
    made_quick(monkeypatch)
    config = with_train(SMALL, compile=True, dense_steps=0, dense_continued=False, steps=3)
    anew()
    pipeline.run(config, tmp_path / "reference")
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(guard.Stopped, match="Stopped after step 1 of moe"):
            pipeline.run(config, tmp_path / "run")
    anew()
    before = counters["stats"]["unique_graphs"]
    summary = pipeline.resume(tmp_path / "run")
    assert counters["stats"]["unique_graphs"] > before
    assert "moe-000001" in str(summary["resumed_from"])
    assert_same_run(tmp_path / "run", tmp_path / "reference")
