"""What the benchmarks compare, and that their rows are written; never how fast anything is."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import cast, get_args

import pytest
import torch

import onn.functional as F
from experiments import bench, bench_cases, bench_experts, bench_surprise, compiling, measure
from experiments.bench_cases import BankCase, Options
from experiments.bench_goals import numbers
from experiments.measure import Row
from onn import observe
from onn.functional.kernels.backends import Backend
from onn.tree import Engine, Tree, leaves
from tests.support import assert_close, each_backend, least_pairs, tolerance

CASE = BankCase(T=6, H=16, E=12, I=4, k=3)
BOUND = tolerance(torch.float64, terms=64)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: False)


def run_suite(suite: bench_cases.Suite, tmp_path: Path) -> list[Row]:
    """The rows of a suite, which were read back as they were written."""
    path = tmp_path / "rows.json"
    rows = bench.main(Options(suite=suite, json=path, figure=tmp_path / "rows.png", quick=True, repeats=2))
    assert [repr(row) for row in measure.read(path)] == [repr(row) for row in rows]
    written = observe.decode(path.read_text())
    assert isinstance(written, list)
    assert all(set(row) == {field.name for field in fields(Row)} for row in written if isinstance(row, dict))
    assert {row.suite for row in rows} == {suite}
    assert all(row.device for row in rows)
    for row in rows:
        ran = math.isfinite(row.ratio)
        assert (row.ratio > 0 and row.seconds > 0 and row.rounds == 2) if ran else (row.note and row.rounds == 0)
    return rows


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_surprise, "QUICK", CASE)
    monkeypatch.setattr(bench_experts, "grid", lambda options: [CASE, replace(CASE, k=12)])


@pytest.mark.usefixtures("_small")
def test_experts_holds_everything_against_the_floor_and_the_best_peer_against_ours(tmp_path: Path) -> None:
    rows = run_suite("experts", tmp_path)
    for case in (CASE, replace(CASE, k=12)):
        for dtype in ("float32", "bfloat16"):
            own = [row for row in rows if row.case == str(case) and row.dtype == dtype]
            against_floor = {row.variant for row in own if row.baseline == "floor"}
            compared = {"per-expert loop", "eager", "eager, compiled"}
            compared |= {f"{name}{how}" for name in ("batched_mm", "grouped_mm") for how in ("", ", compiled")}
            compared |= {"onn auto, compiled", "onn dense, compiled"}
            compared |= {f"onn {name}" for name in bench_cases.backends(torch.float32) if name != "dense"}
            assert compared == against_floor
            stock, everybody = (row for row in own if row.baseline != "floor")
            assert stock.baseline == everybody.baseline
            assert stock.baseline.startswith("onn")
            assert stock.variant.split(",")[0] in ("eager", "batched_mm", "grouped_mm")
            assert not everybody.variant.startswith("onn")
            assert everybody.seconds <= stock.seconds
    assert (tmp_path / "rows.png").stat().st_size > 0


@pytest.mark.usefixtures("_small")
def test_surprise_holds_ours_against_the_plain_bank_and_others_against_ours(tmp_path: Path) -> None:
    rows = run_suite("surprise", tmp_path)
    found = {(row.variant, row.baseline) for row in rows if row.dtype == "float32"}
    assert {("surprise", "plain"), ("plain", "stock autograd"), ("SMK", "stock autograd")} <= found
    assert {("vmap(grad)", "surprise"), ("vmap(grad), compiled", "surprise")} <= found


@pytest.mark.usefixtures("_small")
def test_smk_runs_every_backend_and_says_what_share_is_kept(tmp_path: Path) -> None:
    rows = run_suite("smk", tmp_path)
    assert {row.variant.split(":")[0] for row in rows} == set(bench_cases.backends(torch.float32))
    assert all(row.variant.split(":")[0] == row.baseline.split(":")[0] for row in rows)
    assert {"skew" in row.case for row in rows} == {False, True}
    assert all(0 < numbers(row.case)["rho"] <= 1 for row in rows)


@pytest.mark.usefixtures("_small")
def test_memory_compares_within_one_engine(tmp_path: Path) -> None:
    rows = run_suite("memory", tmp_path)
    ways = {row.variant.partition(", ")[2] for row in rows}
    assert ways == {"autograd, eager", "func, eager", "func, compiled"}
    assert all(row.variant.partition(", ")[2] == row.baseline.partition(", ")[2] for row in rows)
    recomputed = [row for row in rows if row.variant.startswith("recomputed")]
    assert {row.baseline.split(",")[0] for row in recomputed} == {"plain 4 banks"}
    assert len(recomputed) == 6
    assert all(math.isfinite(row.ratio) for row in recomputed)
    assert all(row.peak_ratio > 0 for row in rows)


def test_scaling_holds_every_size_against_the_smallest(tmp_path: Path) -> None:
    rows = run_suite("scaling", tmp_path)
    assert {row.baseline for row in rows} == {"T32", "E8", "I8", "L1"}
    assert {row.variant for row in rows if row.baseline == "E8"} == {"E16", "E32"}


@each_backend(*get_args(Backend))
@pytest.mark.parametrize("engine", get_args(Engine))
def test_the_variants_compute_the_same(backend: Backend, engine: Engine) -> None:
    """A ratio means something only between ways to the same figures."""
    bank = bench_cases.random_bank(CASE, torch.float64, seed=0)
    _, gate, up, down, x, weights = leaves(cast("Tree", bench_cases.stock_step(bank, engine=engine)()))
    ours = bench_cases.bank_step(bank, names=("surprise",), min_k=CASE.E, backend=backend, engine=engine)
    _, *got, got_x, got_weights, surprise = leaves(cast("Tree", ours()))
    assert_close((*got, got_x), (gate, up, down, x), bound=BOUND)
    routed = bank.weights != 0
    assert_close(torch.where(routed, got_weights, 0), torch.where(routed, weights, 0), bound=BOUND)
    y, residuals = F.bank_forward(bank.experts, bank.x, bank.weights)
    expected = F.bank_vjp(bank.experts, bank.x, bank.weights, residuals, bank.dy, select=None).surprise
    assert_close(surprise, expected, bound=BOUND)
    layer = bench_cases.bank_layer(bank, k=CASE.k, backend=backend, eager=False)()
    assert_close((layer.y, layer.grads[0], *layer.grads[2:]), (y, x, gate, up, down), bound=BOUND)


@pytest.mark.parametrize("engine", get_args(Engine))
def test_a_stack_recomputed_is_the_stack(engine: Engine) -> None:
    bank = bench_cases.random_bank(CASE, torch.float64, seed=0)
    backend = get_args(Backend)[0]
    found = []
    for recompute in (True, False):
        run = bench_cases.stacked_step(bank, layers=3, backend=backend, engine=engine, eager=True, recompute=recompute)
        found.append(tuple(leaves(cast("Tree", run()))))
    assert_close(found[0], found[1], bound=BOUND)


@pytest.mark.parametrize("skew", [0.0, 2.0])
@pytest.mark.parametrize("min_k", [1, 2, 3, 12])
def test_the_kept_share_is_that_of_the_rows_that_learn(skew: float, min_k: int) -> None:
    bank = bench_cases.random_bank(replace(CASE, T=40, skew=skew), torch.float64, seed=0)
    keep = least_pairs(torch.rand_like(bank.weights), bank.weights, min_k=min_k).sum()
    assert bench_surprise.kept_share(bank, "dense", min_k=min_k) == pytest.approx(int(keep) / (40 * 12))
    for backend in (name for name in get_args(Backend) if name != "dense"):
        assert bench_surprise.kept_share(bank, backend, min_k=min_k) == pytest.approx(int(keep) / (40 * 3))


def test_a_skewed_route_crowds_the_first_experts() -> None:
    even, skewed = (
        (bench_cases.random_bank(replace(CASE, T=200, skew=skew), torch.float32, seed=0).weights != 0).sum(dim=0)
        for skew in (0.0, 2.0)
    )
    assert even.sum() == skewed.sum() == 600
    assert even.max() < 100
    assert skewed[0] > 190 > 20 > skewed[-1]
