"""How the benchmarks measure: rounds, ratios, peaks and the rows of what did not run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import measure
from onn import observe


def test_rounds_run_every_variant_in_turn_and_warm_up_first() -> None:
    ran: list[str] = []
    seconds = measure.interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3)
    assert ran == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


@given(
    st.dictionaries(st.text(min_size=1), st.floats(1e-6, 100), min_size=1, max_size=6),
    st.integers(1, 50),
    st.floats(0.01, 1000),
)
def test_every_variant_has_its_least_rounds_and_the_budget_is_kept_beyond_them(
    typical: dict[str, float], repeats: int, budget: float
) -> None:
    rounds = measure.rounds_of(typical, repeats=repeats, budget=budget)
    fastest = min(typical, key=lambda name: typical[name])
    second = sorted(typical.values())[:2][-1]
    most = max(rounds.values())
    assert most == rounds[fastest] <= repeats
    assert most >= min(measure.LEAST_ROUNDS, repeats)
    assert all(count >= min(measure.LEAST_OF_SLOW, repeats) for count in rounds.values())
    assert all(count == most for name, count in rounds.items() if typical[name] <= measure.SLOW * second)
    if most > measure.LEAST_ROUNDS:
        assert most * sum(typical.values()) <= budget * (1 + 1e-9)


def test_a_slow_variant_runs_fewer_rounds_where_time_is_short() -> None:
    typical = {"floor": 0.01, "fast": 0.1, "near": 0.3, "slow": 5.0}
    assert measure.rounds_of(typical, repeats=25, budget=20.0) == {"floor": 7, "fast": 7, "near": 7, "slow": 3}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    seconds = {"slow": [2.0, 40.0, 3.0, 9.0, 2.5], "fast": [1.0, 10.0, 1.0, 3.0, 1.0]}
    assert measure.ratio(seconds, "slow", "fast").median == pytest.approx(3.0)
    assert measure.ratio(seconds, "fast", "slow").median == pytest.approx(1 / 3)


def test_a_ratio_is_over_the_rounds_in_which_both_ran() -> None:
    seconds = {"slow": [2.0, 4.0, 6.0], "fast": [1.0, 1.0, 1.0, 100.0, 100.0], "once": [3.0]}
    assert measure.ratio(seconds, "slow", "fast") == measure.Ratio(median=4.0, low=2.0, high=6.0, rounds=3)
    assert measure.ratio(seconds, "once", "fast") == measure.Ratio(median=3.0, low=3.0, high=3.0, rounds=1)


def test_what_fails_is_named_with_its_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel\nand a long story")

    runs, failed = measure.working({"fine": lambda: None, "broken": fails})
    assert list(runs) == ["fine"]
    assert failed == {"broken": "failed: RuntimeError: no kernel"}


def test_rows_without_figures_survive_the_file_and_say_why(tmp_path: Path) -> None:
    row = measure.missing("a", "b", suite="experts", case="T1", dtype=torch.bfloat16, note="skipped: too large")
    path = tmp_path / "rows.json"
    measure.report([row], path)
    (again,) = measure.read(path)
    assert repr(again) == repr(row)
    assert math.isnan(again.ratio)
    assert "skipped: too large" in measure.table([again])


@pytest.mark.parametrize("content", [{"a": 1}, [1], [{"suite": "experts"}]])
def test_a_file_of_something_else_is_refused(content: observe.Json, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    observe.write_json(path, content)
    with pytest.raises(ValueError, match=r"other\.json"):
        measure.read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device's memory is measured")
def test_the_peak_is_what_is_held_at_a_time() -> None:
    def in_turn() -> None:
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)

    def together() -> None:
        _ = [torch.empty(2**20, dtype=torch.uint8) for _ in range(3)]

    assert measure.peak_bytes(in_turn) == 2**20
    assert measure.peak_bytes(together, warm=True) == 3 * 2**20
