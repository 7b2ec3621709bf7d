"""The benchmark of a training step compares what it says it does; never how fast anything is."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from experiments import bench_step, compiling
from experiments.bench_cases import Options
from experiments.presets import QWEN3_06B
from onn import objective, train
from onn.qwen3 import Route


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: False)


@pytest.mark.parametrize("route", get_args(Route))
def test_a_quarter_of_the_experts_is_active(route: Route) -> None:
    moe = replace(QWEN3_06B.sparse.moe, num_experts=12, top_k=3, min_k=12, route=route)
    work = bench_step.work(bench_step.QUICK, torch.float32, moe, seed=0)
    _, metrics = train.step(work.state, work.batch, work.bits, work.settings)
    assert isinstance(metrics.sparse, objective.SparseMetrics)
    assert float(metrics.sparse.active_share) == pytest.approx(0.25, abs=0.03)


def test_every_form_of_the_carved_step_is_compared_with_the_dense_one() -> None:
    rows = bench_step.step_rows(bench_step.QUICK, torch.float32, options=Options(suite="step", quick=True))
    found = {(row.variant, row.baseline) for row in rows}
    assert ("dense, regional", "dense, eager") in found
    for name in ("carved", "carved, threshold", "carved, SMK"):
        assert {(f"{name}, {form}", f"dense, {form}") for form in ("eager", "regional")} <= found
    assert all(row.ratio > 0 and "tokens/s" in row.note for row in rows)
