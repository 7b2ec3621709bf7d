"""What the benchmarks compare, and that their rows are written; never how fast anything is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import cast

import pytest
import torch

from experiments import bench, measure
from onn import observe, tree
from onn.tree import Tree
from tests.support import assert_close, tolerance

CASE = bench.BankCase(T=6, H=16, E=12, I=4, k=3, min_k=2, per_token=True)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "compiled", lambda function: function)


def test_a_suite_compares_every_variant_and_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SMALL", CASE)
    monkeypatch.setattr(bench, "LARGER", CASE)
    path = tmp_path / "rows.json"
    rows = bench.main(bench.Options(suite="surprise", json=path, repeats=2))
    found = {(row.dtype, row.variant, row.baseline) for row in rows}
    against_plain = [(name, "plain") for name in ("bank", "surprise", "SMK", "SMK + surprise")]
    per_token = [(name, "surprise") for name in ("vmap(grad)", "vmap(grad), compiled")]
    assert found == {(dtype, *pair) for dtype in ("float32", "bfloat16") for pair in against_plain + per_token}
    written = observe.decode(path.read_text())
    assert isinstance(written, list)
    assert [set(row) for row in written if isinstance(row, dict)] == [
        {field.name for field in fields(measure.Row)}
    ] * 24
    assert all(row.ratio > 0 and row.peak_ratio > 0 for row in rows)


def test_the_variants_compute_the_same() -> None:
    """A ratio means something only between ways to the same figures."""
    bank = bench.random_bank(CASE, torch.float64, seed=0)
    plain = tree.leaves(cast("Tree", bench.stock_step(bank)()))
    *got, surprise = tree.leaves(cast("Tree", bench.bank_step(bank, names=("surprise",), min_k=CASE.E)()))
    bound = tolerance(torch.float64, terms=64)
    assert_close(tuple(got), tuple(plain), bound=bound)
    assert_close(bench.per_token_norms(bank)(), surprise, bound=bound)


def test_rounds_run_every_variant_in_turn_and_warm_up_first() -> None:
    ran: list[str] = []
    seconds = measure.interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3)
    assert ran == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    seconds = {"slow": [2.0, 40.0, 3.0, 9.0, 2.5], "fast": [1.0, 10.0, 1.0, 3.0, 1.0]}
    assert measure.ratio(seconds, "slow", "fast").median == pytest.approx(3.0)
    assert measure.ratio(seconds, "fast", "slow").median == pytest.approx(1 / 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device's memory is measured")
def test_the_peak_is_what_is_held_at_a_time() -> None:
    def in_turn() -> None:
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)

    def together() -> None:
        _ = [torch.empty(2**20, dtype=torch.uint8) for _ in range(3)]

    assert measure.peak_bytes(in_turn) == 2**20
    assert measure.peak_bytes(together) == 3 * 2**20
