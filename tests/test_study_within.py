"""Rank correlations within groups, against one group at a time and against samples with values repeated."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.study import contrasts, statistics
from experiments.study.records import Key, Run, Series
from experiments.study.statistics import Interval, Vector
from tests.support import BOUND

DRAWS = 40
ROUNDING = 1e3 * BOUND
"""What is left of ranks after a fit may be a thousandth of them."""


class Sample(NamedTuple):
    columns: Vector
    """Predictor, outcome and two controls, [4, n]."""
    clusters: list[int]
    groups: list[str]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Small whole numbers, with ties; groups of one value and groups without a correlation among them."""
    n, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**20))
    source = np.random.default_rng(seed)
    columns = source.integers(0, draw(st.sampled_from([2, 5, 100])), size=(4, n)).astype(np.float64)
    clusters, groups = (source.integers(0, draw(st.integers(1, 4)), size=n).tolist() for _ in range(2))
    return Sample(columns, clusters, [f"group {group}" for group in groups])


def within(found: Sample, *, draws: int = DRAWS, level: float = 0.9) -> Interval:
    predictor, outcome, *controls = found.columns.tolist()
    generator = np.random.default_rng(0)
    return statistics.partial_within(
        predictor, outcome, controls, found.clusters, found.groups, level=level, draws=draws, generator=generator
    )


def one_by_one(found: Sample, times: Vector) -> float:
    """By definition: every value as often as its cluster was drawn, one group after the other."""
    of_value = times[np.unique(found.clusters, return_inverse=True)[1]].astype(int)
    rows = np.arange(len(of_value)).repeat(of_value)
    seen = []
    for group in sorted(set(found.groups)):
        own = [row for row in rows if found.groups[row] == group]
        predictor, outcome, *controls = found.columns[:, own].tolist()
        seen.append(statistics.rank_correlation(predictor, outcome, controls))
    known = [value for value in seen if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


@given(samples())
def test_it_is_the_mean_of_the_correlations_of_the_groups_and_its_interval_that_of_drawn_clusters(
    found: Sample,
) -> None:
    n = len(set(found.clusters))
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS) if n > 1 else np.empty((0, n))
    estimate = one_by_one(found, np.ones(n))
    seen = [value for times in drawn if math.isfinite(value := one_by_one(found, times))]
    bounds = np.quantile(seen, (0.05, 0.95)).tolist() if seen and math.isfinite(estimate) else [math.nan] * 2
    assert within(found) == pytest.approx((estimate, *bounds, n), nan_ok=True, abs=ROUNDING)


@given(samples())
def test_what_differs_between_groups_does_not_count(found: Sample) -> None:
    level = np.asarray([10.0 * int(group.split()[1]) for group in found.groups])
    moved = found._replace(columns=3 * found.columns + level)
    assert within(moved) == pytest.approx(within(found), nan_ok=True, abs=ROUNDING)


@given(samples())
def test_the_order_of_the_values_does_not_count(found: Sample) -> None:
    turned = Sample(found.columns[:, ::-1], found.clusters[::-1], found.groups[::-1])
    assert within(turned) == pytest.approx(within(found), nan_ok=True, abs=ROUNDING)


def test_values_without_a_cluster_or_a_group_are_refused() -> None:
    found = Sample(np.zeros((4, 3)), [0, 1, 1], ["a", "a", "b"])
    for wrong in (found._replace(clusters=[0, 1]), found._replace(groups=["a"])):
        with pytest.raises(ValueError, match="one of clusters and of groups"):
            within(wrong)


TASKS = 4
PLACE = ("text", "everything")


def runs(*, between: float, inside: float, regime: str = "everything") -> list[Run]:
    """Arms whose PI and what they keep differ by `between`, while in an arm they go together by `inside`."""
    source = np.random.default_rng(0)
    found = []
    for place, arm in enumerate(("all", "smk-2", "random-2", contrasts.JOINT)):
        for seed in range(12):
            shared, loss, chance = source.normal(size=(3, TASKS))
            pi = (between * place + shared).tolist()
            drop = (0.5 - 0.01 * (between * place + inside * shared + chance)).tolist()
            rows = [[0.9 if task < row else 0.1 for task in range(TASKS)] for row in range(TASKS)]
            rows.append([0.9 - drop[task] for task in range(TASKS - 1)] + [0.9])
            table = tuple(map(tuple, rows))
            series: dict[Series, tuple[float, ...]] = {"pi": tuple(pi), "loss": tuple(loss.tolist())}
            key = Key("text", regime, arm, "sgd", 0.1, 0.0, seed)
            found.append(Run(key, "evaluation", table, table, 0.1, 0.125, series))
    return found


def pooled(found: list[Run]) -> Interval:
    (one,) = [finding for finding in contrasts.findings(found)[0] if finding.claim == contrasts.PREDICTION.claim]
    return one.interval


def test_what_only_arms_have_in_common_is_pooled_and_not_within_them() -> None:
    found = runs(between=5.0, inside=0.0)
    kept_apart = contrasts.within_arms(found, PLACE)
    assert pooled(found).low > 0.5
    assert kept_apart.low < 0 < kept_apart.high
    assert kept_apart.n == 12


def test_what_holds_in_every_arm_is_seen_within_them_though_arms_go_the_other_way() -> None:
    found = [
        run._replace(series={**run.series, "pi": tuple(value - 20 * len(run.key.arm) for value in run.series["pi"])})
        for run in runs(between=5.0, inside=3.0)
    ]
    assert contrasts.within_arms(found, PLACE).low > 0.5
    assert pooled(found).mean < 0.3


def test_a_family_or_regime_without_runs_has_no_correlation_within_arms() -> None:
    for place in (("digits-rotated", "everything"), ("text", "experts")):
        nothing = contrasts.within_arms(runs(between=0.0, inside=0.0), place)
        assert math.isnan(nothing.mean)
        assert nothing.n == 0


def test_regimes_are_kept_apart() -> None:
    found = runs(between=5.0, inside=3.0)
    other = runs(between=5.0, inside=-3.0, regime="experts")
    assert contrasts.within_arms([*found, *other], PLACE) == contrasts.within_arms(found, PLACE)
