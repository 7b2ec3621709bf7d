"""What is read from the rows of the benchmarks: exponents, goals met and missed, pictures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import bench_figures, bench_goals
from experiments.bench_goals import SPEED_UP, Verdict, judge
from experiments.measure import Row, report

ROW = Row(
    suite="experts",
    case="T1024 H1024 E32 I96 k8",
    dtype="float32",
    variant="grouped_mm",
    baseline="onn auto",
    ratio=1.6,
    ratio_low=1.5,
    ratio_high=1.7,
    peak_ratio=1.0,
    seconds=0.1,
    rounds=7,
    device="cpu",
    note=SPEED_UP,
)


@given(st.floats(-2, 3), st.floats(1e-3, 1e3), st.sets(st.integers(1, 4096), min_size=3, max_size=6))
def test_a_power_law_is_recovered(exponent: float, factor: float, sizes: set[int]) -> None:
    ordered = sorted(sizes)
    found = bench_goals.fit(ordered, [factor * size**exponent for size in ordered])
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.factor == pytest.approx(factor, rel=1e-4)
    assert found.error == pytest.approx(0, abs=1e-6)


@given(st.lists(st.floats(0.1, 10), min_size=4, max_size=8))
def test_the_standard_error_is_that_of_least_squares(costs: list[float]) -> None:
    sizes = [2.0**position for position in range(len(costs))]
    found = bench_goals.fit(sizes, costs)
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    assert found.exponent == pytest.approx(slope, abs=1e-9)
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-6, abs=1e-9)


def test_two_sizes_have_no_standard_error() -> None:
    assert math.isnan(bench_goals.fit([1, 2], [1, 2]).error)


def test_sizes_are_read_from_a_case() -> None:
    assert bench_goals.numbers("T512 H256 E32 I16 k8 skew2 rho0.2500") == {
        "T": 512,
        "H": 256,
        "E": 32,
        "I": 16,
        "k": 8,
        "skew": 2,
        "rho": 0.25,
    }


def scaling(axis: str, exponent: float, *, dtype: str = "float32") -> list[Row]:
    return [
        replace(
            ROW,
            suite="scaling",
            case=f"H256, against {axis}",
            dtype=dtype,
            variant=f"{axis}{size}",
            baseline=f"{axis}32",
            ratio=(size / 32) ** exponent,
        )
        for size in (64, 128, 256)
    ]


def test_a_series_starts_at_its_smallest_size() -> None:
    (one,) = bench_goals.series(scaling("T", 1.5))
    assert (one.axis, one.sizes) == ("T", (32, 64, 128, 256))
    assert one.costs[0] == 1
    assert one.fit.exponent == pytest.approx(1.5)


def verdicts(rows: list[Row]) -> dict[str, Verdict]:
    return {verdict.goal: verdict for verdict in judge(rows)}


def test_no_row_no_verdict() -> None:
    assert judge([]) == []
    assert judge([replace(ROW, ratio=math.nan)]) == []
    assert judge([replace(ROW, note="", baseline="floor")]) == []


def test_the_bank_is_judged_by_its_mean_and_its_worst_cases() -> None:
    tiny = replace(ROW, case="T1024 H1024 E32 I16 k4", ratio=2.5)
    full = replace(ROW, case="T1024 H1024 E32 I96 k16", ratio=1.9)
    found = verdicts([ROW, tiny, full])
    mean = found["transformers / ours, geometric mean"]
    assert mean.measured == pytest.approx((1.6 * 2.5 * 1.9) ** (1 / 3))
    assert mean.met
    assert not found["transformers / ours at k/E >= 0.5, worst"].met
    assert found["transformers / ours at I <= 16, worst"].met
    assert found["transformers / ours anywhere, worst"].measured == 1.6
    behind = verdicts([ROW, replace(ROW, ratio=0.94)])["transformers / ours anywhere, worst"]
    assert not behind.met
    assert "MISSED" in str(behind)
    assert ROW.case in str(behind)


def test_surprise_is_judged_against_the_plain_bank_alone() -> None:
    row = replace(ROW, suite="surprise", variant="surprise", baseline="plain", ratio=1.02)
    (met,) = judge([row, replace(row, baseline="stock autograd", ratio=3.0)])
    assert met.met
    (missed,) = judge([row, replace(row, dtype="bfloat16", ratio=1.03)])
    assert not missed.met
    assert "bfloat16" in missed.where


def test_smk_is_judged_by_the_rows_that_it_keeps() -> None:
    assert bench_goals.smk_bound(0.25) == pytest.approx(0.8)
    assert bench_goals.smk_bound(1.0) == pytest.approx(1.05)
    half = replace(ROW, suite="smk", case="T8 rho0.2500", variant="dense: SMK, min_k 2", baseline="dense: plain")
    whole = replace(half, case="T8 rho1.0000", ratio=1.04)
    assert verdicts([replace(half, ratio=0.79), whole])["SMK / its goal, dense, worst"].met
    assert not verdicts([replace(half, ratio=0.81), whole])["SMK / its goal, dense, worst"].met


def test_a_step_is_judged_by_the_carved_models_alone() -> None:
    row = replace(ROW, suite="step", variant="carved, SMK, eager", baseline="dense, eager", ratio=0.99)
    (met,) = judge([row, replace(row, variant="dense, regional", ratio=3.0)])
    assert met.met
    (missed,) = judge([row, replace(row, variant="carved, regional", ratio=1.01)])
    assert not missed.met


def test_memory_is_judged_by_its_peak_and_not_by_its_time() -> None:
    row = replace(ROW, suite="memory", variant="SMK, func, eager", baseline="plain, func, eager", ratio=9.0)
    (met,) = judge([replace(row, peak_ratio=1.0)])
    assert met.met
    (missed,) = judge([replace(row, peak_ratio=1.01)])
    assert not missed.met
    assert judge([replace(row, peak_ratio=math.nan)]) == []


def test_growth_is_judged_by_the_steepest_series() -> None:
    rows = [*scaling("T", 1.0), *scaling("T", 1.1, dtype="bfloat16"), *scaling("E", 0.2), *scaling("L", 2.0)]
    tokens, experts = judge(rows)
    assert (tokens.met, experts.met) == (False, True)
    assert tokens.measured == pytest.approx(1.1)


def test_pictures_of_several_files_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("onn auto", "onn auto, compiled", "grouped_mm", "per-expert loop")
    speed = [
        replace(ROW, case=f"T8 H8 E{E} I{I} k{k}", variant=name, baseline="floor", note="", ratio=1.0 + k / E)
        for E in (32, 256)
        for I in (16, 96)
        for k in (4, 8)
        for name in names
    ]
    files = (tmp_path / "experts.json", tmp_path / "scaling.json")
    report([ROW, *speed, replace(speed[0], ratio=math.nan)], files[0])
    report(scaling("T", 1.0) + scaling("E", 0.4), files[1])
    assert list(bench_figures.panels(speed)) == [("float32", E, I) for E in (32, 256) for I in (16, 96)]
    path = tmp_path / "both.png"
    bench_figures.main(files, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "MISSED  exponent of the cost in E" in capsys.readouterr().out


def test_nothing_to_draw_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    assert not bench_figures.draw([replace(ROW, suite="smk", note="")], path)
    assert not path.exists()
