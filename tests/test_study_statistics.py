"""The study's arithmetic against definitions by brute force, against scipy's own tests, and by its laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats

from experiments.study import statistics
from experiments.study.statistics import Point

ROUNDING = 1e-9
"""Sums of a few dozen numbers of about 1 in float64, with room for cancellation."""
values = st.floats(-1, 1).map(lambda value: round(value, 6))
differences = st.lists(values, min_size=2, max_size=20).filter(lambda found: np.std(found) > 1e-3)
shares = st.integers(0, 1000).map(lambda value: value / 1000)
curves = st.lists(st.builds(Point, shares, st.floats(-1, 0.2)), min_size=1, max_size=8)


def test_scores_of_a_table_worked_by_hand() -> None:
    table = [(0.1, 0.1, 0.1), (0.9, 0.2, 0.1), (0.95, 0.8, 0.3), (0.5, 0.6, 0.7)]
    found = statistics.scores(table)
    assert found.accuracy == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert found.learning == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert found.transfer == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_scores_agree_with_loops_over_tasks(tasks: int, seed: int) -> None:
    table = np.random.default_rng(seed).random((tasks + 1, tasks)).tolist()
    learnt = [table[task + 1][task] for task in range(tasks)]
    lost = [max(table[row][task] for row in range(task + 1, tasks + 1)) - table[-1][task] for task in range(tasks)]
    found = statistics.scores(table)
    assert found.learning == pytest.approx(sum(learnt) / tasks)
    if tasks == 1:
        assert math.isnan(found.transfer)
        assert math.isnan(found.forgetting)
        return
    old = range(tasks - 1)
    assert found.transfer == pytest.approx(sum(table[-1][task] - learnt[task] for task in old) / (tasks - 1))
    assert found.forgetting == pytest.approx(sum(lost[task] for task in old) / (tasks - 1))
    assert found.forgetting >= max(0, -found.transfer) - ROUNDING
    assert found.accuracy == pytest.approx(found.learning + found.transfer * (tasks - 1) / tasks)


@pytest.mark.parametrize("table", [[], [()], [(0.1,)], [(0.1, 0.2), (0.1, 0.2)], [(0.1,), (0.1, 0.2)]])
def test_a_table_of_another_shape_is_refused(table: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="scores: expected table"):
        statistics.scores(table)


@given(differences, st.sampled_from([0.5, 0.9, 0.95]))
def test_intervals_and_p_values_agree_with_scipy(found: list[float], level: float) -> None:
    oracle = stats.ttest_1samp(found, 0.0)
    interval = statistics.paired(found, level=level)
    low, high = oracle.confidence_interval(level)
    assert interval == pytest.approx((np.mean(found), low, high, len(found)), abs=ROUNDING)
    assert statistics.p_value(found) == pytest.approx(oracle.pvalue, abs=ROUNDING)


@given(differences, st.floats(0.01, 1))
def test_equivalence_agrees_with_two_one_sided_tests_of_scipy(found: list[float], margin: float) -> None:
    above = stats.ttest_1samp(found, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(found, margin, alternative="less").pvalue
    assert statistics.equivalence_p(found, margin=margin) == pytest.approx(max(above, below), abs=ROUNDING)


@given(differences)
def test_a_test_and_its_interval_decide_alike(found: list[float]) -> None:
    interval, p = statistics.paired(found, level=0.95), statistics.p_value(found)
    assume(abs(p - 0.05) > ROUNDING)
    assert (p < 0.05) == (interval.low > 0 or interval.high < 0)


@given(differences, st.floats(0.01, 1))
def test_equivalent_is_what_has_its_interval_within_the_margin(found: list[float], margin: float) -> None:
    interval, p = statistics.paired(found, level=0.9), statistics.equivalence_p(found, margin=margin)
    assume(abs(p - 0.05) > ROUNDING)
    assert (p < 0.05) == (-margin < interval.low and interval.high < margin)


@given(differences)
def test_swapping_the_arms_negates_the_interval_and_keeps_the_p_values(found: list[float]) -> None:
    swapped = [-value for value in found]
    interval, mirrored = statistics.paired(found, level=0.9), statistics.paired(swapped, level=0.9)
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx(
        (-interval.mean, -interval.high, -interval.low), abs=ROUNDING
    )
    assert statistics.p_value(swapped) == pytest.approx(statistics.p_value(found))
    assert statistics.equivalence_p(swapped, margin=0.1) == pytest.approx(statistics.equivalence_p(found, margin=0.1))


def test_few_and_equal_differences() -> None:
    assert statistics.paired([], level=0.95) == pytest.approx((math.nan, math.nan, math.nan, 0), nan_ok=True)
    assert statistics.paired([0.3], level=0.95) == pytest.approx((0.3, math.nan, math.nan, 1), nan_ok=True)
    assert statistics.paired([0.1] * 7, level=0.95) == (0.1, 0.1, 0.1, 7)
    for few in ([], [0.3]):
        assert math.isnan(statistics.p_value(few))
        assert math.isnan(statistics.equivalence_p(few, margin=0.01))
    assert [statistics.p_value([value] * 7) for value in (0.0, 0.1, -0.1)] == [1, 0, 0]
    assert [statistics.equivalence_p([value] * 7, margin=0.2) for value in (0.0, 0.1, 0.2, -0.3)] == [0, 0, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_differences_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="paired: expected finite differences"):
        statistics.paired([0.1, bad], level=0.95)
    with pytest.raises(ValueError, match="p_value: expected finite differences"):
        statistics.p_value([0.1, bad])
    with pytest.raises(ValueError, match="equivalence_p: expected finite differences"):
        statistics.equivalence_p([0.1, bad], margin=0.1)


def test_levels_and_margins_are_checked() -> None:
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match="level="):
            statistics.paired([0.1, 0.2], level=level)
    for margin in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin="):
            statistics.equivalence_p([0.1, 0.2], margin=margin)


def by_closed_testing(p_values: Sequence[float]) -> list[float]:
    """A hypothesis's adjusted p value: the largest Bonferroni p value of any set of hypotheses that it belongs to."""
    m = range(len(p_values))
    sets = [chosen for size in m for chosen in itertools.combinations(m, size + 1)]
    bonferroni = {chosen: min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets}
    return [max(p for chosen, p in bonferroni.items() if i in chosen) for i in m]


@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.02, 1.0])), max_size=6))
def test_holm_is_closed_testing_by_bonferroni(p_values: list[float]) -> None:
    assert statistics.holm(p_values) == pytest.approx(by_closed_testing(p_values))


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_p_value(bad: float) -> None:
    with pytest.raises(ValueError, match=r"p_values\[1\]"):
        statistics.holm([0.1, bad])


def transfer_at(points: Sequence[Point], learning: float) -> float:
    """By definition: the best of all points that learn as much, and of all mixes of two that learn just as much."""
    best = max(p.transfer for p in points if p.learning >= learning)
    for left, right in itertools.product(points, points):
        if left.learning < learning < right.learning:
            share = (learning - left.learning) / (right.learning - left.learning)
            best = max(best, left.transfer + share * (right.transfer - left.transfer))
    return best


@given(curves, curves)
def test_at_equal_learning_is_the_mean_gap_between_the_best_mixes(first: list[Point], second: list[Point]) -> None:
    low = max(min(p.learning for p in points) for points in (first, second))
    high = min(max(p.learning for p in points) for points in (first, second))
    found = statistics.at_equal_learning(first, second)
    if low > high:
        assert math.isnan(found)
        return
    if high - low < 1e-6:
        return
    knots = sorted({low, high, *(p.learning for p in [*first, *second] if low < p.learning < high)})
    total = sum(
        integrate.fixed_quad(np.vectorize(lambda l: transfer_at(first, l) - transfer_at(second, l)), a, b, n=3)[0]
        for a, b in itertools.pairwise(knots)
    )
    assert found == pytest.approx(total / (high - low), abs=1e-6)


@given(curves, curves)
def test_at_equal_learning_is_antisymmetric_and_blind_to_order(first: list[Point], second: list[Point]) -> None:
    found = statistics.at_equal_learning(first, second)
    assert statistics.at_equal_learning(second, first) == pytest.approx(-found, nan_ok=True, abs=ROUNDING)
    assert statistics.at_equal_learning(first, first) == 0
    assert statistics.at_equal_learning(first[::-1], sorted(second)) == pytest.approx(found, nan_ok=True, abs=0)


@given(curves, st.floats(-0.5, 0.5))
def test_more_transfer_throughout_is_that_much_more(points: list[Point], more: float) -> None:
    lifted = [Point(p.learning, p.transfer + more) for p in points]
    assert statistics.at_equal_learning(lifted, points) == pytest.approx(more, abs=ROUNDING)


@given(st.lists(shares, min_size=2, max_size=6), st.lists(shares, min_size=2, max_size=6))
def test_different_samples_of_one_line_do_not_differ(first: list[float], second: list[float]) -> None:
    """Steps in the place of lines would favour the curve that learns less."""
    ours, theirs = ([Point(l, 0.3 - l) for l in sampled] for sampled in (first, second))
    found = statistics.at_equal_learning(ours, theirs)
    assert math.isnan(found) or found == pytest.approx(0, abs=ROUNDING)


@given(curves, curves, shares, st.floats(-1, 0.2))
def test_a_point_more_within_the_range_never_lowers_its_curve(
    first: list[Point], second: list[Point], share: float, transfer: float
) -> None:
    low, high = min(p.learning for p in first), max(p.learning for p in first)
    more = Point(min(high, low + share * (high - low)), transfer)
    found = statistics.at_equal_learning(first, second)
    raised = statistics.at_equal_learning([*first, more], second)
    assert math.isnan(found) == math.isnan(raised)
    assert math.isnan(found) or raised >= found - ROUNDING


@given(curves)
def test_a_frontier_falls_ever_more_steeply_and_no_point_lies_beyond_it(points: list[Point]) -> None:
    corners = statistics.frontier(points)
    assert set(corners) <= set(points)
    slopes = [(b.transfer - a.transfer) / (b.learning - a.learning) for a, b in itertools.pairwise(corners)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)
    for p in points:
        height = np.interp(p.learning, [c.learning for c in corners], [c.transfer for c in corners])
        assert p.transfer <= height + ROUNDING


def test_what_is_bettered_or_not_finite_does_not_count() -> None:
    ours = [Point(0.5, 0.0), Point(0.9, -0.1)]
    theirs = [Point(0.4, -0.1), Point(0.8, -0.3)]
    found = statistics.at_equal_learning(ours, theirs)
    noise = [Point(0.6, -0.9), Point(0.9, -0.2), Point(math.nan, 0.5), Point(0.95, math.nan)]
    assert statistics.at_equal_learning([*ours, *noise], theirs) == found > 0
    assert statistics.frontier([*noise, *ours]) == ours
    assert math.isnan(statistics.at_equal_learning(noise[2:], theirs))
    assert math.isnan(statistics.at_equal_learning([], theirs))


def test_one_point_that_betters_a_curve_is_compared_with_all_of_it_that_it_reaches() -> None:
    other = [Point(0.4, 0.0), Point(0.8, -0.4)]
    assert statistics.at_equal_learning([Point(0.9, 0.0), Point(0.4, -0.2)], other) == pytest.approx(0.2)
    assert statistics.at_equal_learning([Point(0.6, 0.1)], other) == pytest.approx(0.3)
    assert math.isnan(statistics.at_equal_learning([Point(0.9, 0.0)], other))


columns = st.integers(4, 30).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 9).map(float), min_size=n, max_size=n) for _ in range(4)))
)


@given(columns)
def test_rank_correlations_agree_with_scipy_and_with_the_textbook(
    found: tuple[list[float], list[float], list[float], list[float]],
) -> None:
    x, y, z, _ = found
    assume(all(len(set(column)) > 1 for column in (x, y, z)))
    xy, xz, yz = (float(stats.spearmanr(*pair).statistic) for pair in ((x, y), (x, z), (y, z)))
    assert statistics.rank_correlation(x, y, []) == pytest.approx(xy, abs=ROUNDING)
    assume(max(abs(xz), abs(yz)) < 0.999)
    textbook = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert statistics.rank_correlation(x, y, [z]) == pytest.approx(textbook, abs=ROUNDING)


@given(columns)
def test_only_ranks_matter_and_a_control_twice_is_a_control(
    found: tuple[list[float], list[float], list[float], list[float]],
) -> None:
    x, y, z, w = found
    expected = statistics.rank_correlation(x, y, [z, w])
    cubed, falling = [value**3 for value in x], [-math.exp(value) for value in z]
    again = statistics.rank_correlation(cubed, y, [falling, w, w])
    assert again == pytest.approx(expected, nan_ok=True, abs=1e-6)


def test_what_the_controls_explain_leaves_nothing() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]
    assert statistics.rank_correlation(x, y, []) == pytest.approx(0.6)
    assert math.isnan(statistics.rank_correlation(x, y, [[1.0, 4.0, 9.0, 16.0]]))
    assert math.isnan(statistics.rank_correlation(x, [5.0] * 4, []))
    assert math.isnan(statistics.rank_correlation([], [], []))
    with pytest.raises(ValueError, match="one length"):
        statistics.rank_correlation(x, y[1:], [])
    with pytest.raises(ValueError, match="finite"):
        statistics.rank_correlation(x, [*y[1:], math.nan], [])


class Sample(NamedTuple):
    predictor: list[float]
    outcome: list[float]
    control: list[float]
    clusters: list[int]


def sample(*, direct: float, clusters: int = 8, each: int = 10) -> Sample:
    """The control drives both; the predictor drives the outcome by `direct`, and every cluster has its own level."""
    rng = np.random.default_rng(3)
    names = np.repeat(np.arange(clusters), each)
    control = rng.normal(size=names.size) + rng.normal(size=clusters)[names]
    predictor = control + rng.normal(size=names.size)
    outcome = control + direct * predictor + rng.normal(size=names.size)
    return Sample(predictor.tolist(), outcome.tolist(), control.tolist(), names.tolist())


def predict(found: Sample, *, margin: float = 0.1, draws: int = 300) -> statistics.Predictiveness:
    return statistics.predictiveness(
        found.predictor,
        found.outcome,
        [found.control],
        found.clusters,
        level=0.95,
        margin=margin,
        draws=draws,
        generator=np.random.default_rng(0),
    )


def test_a_predictor_counts_only_beyond_its_control() -> None:
    idle, useful = predict(sample(direct=0.0, clusters=12)), predict(sample(direct=1.0, clusters=12))
    assert idle.rank.low > 0.3
    assert idle.partial.low < 0 < idle.partial.high
    assert idle.p > 0.05
    assert predict(sample(direct=0.0, clusters=12), margin=0.6).p_equivalent == 1 / 301
    assert useful.partial.low > 0.3
    assert useful.p == 2 / 301
    assert useful.p_equivalent == 1
    for found in (idle, useful):
        assert found.partial.low < found.partial.mean < found.partial.high
        assert found.rank.n == found.partial.n == 12


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_few_clusters_prove_no_more_than_their_signs_could(clusters: int) -> None:
    found = sample(direct=9.0, clusters=clusters, each=40)
    assert predict(found).partial.low > 0.5
    assert predict(found).p == 2.0 ** (1 - clusters)
    assert predict(found, margin=1.5).p_equivalent == 2.0**-clusters


def test_estimates_are_the_correlations_of_the_whole_sample() -> None:
    found = sample(direct=0.5)
    by_rank = statistics.rank_correlation(found.predictor, found.outcome, [])
    partial = statistics.rank_correlation(found.predictor, found.outcome, [found.control])
    assert (predict(found).rank.mean, predict(found).partial.mean) == (by_rank, partial)


def test_what_a_cluster_repeats_is_no_further_evidence() -> None:
    found = sample(direct=0.5)
    repeated = Sample(found.predictor * 2, found.outcome * 2, found.control * 2, found.clusters * 2)
    once, twice = predict(found), predict(repeated)
    assert twice.partial == pytest.approx(once.partial, abs=ROUNDING)
    assert (twice.p, twice.p_equivalent) == (once.p, once.p_equivalent)


def test_the_sign_turns_with_the_predictor() -> None:
    found = sample(direct=0.5)
    once, turned = predict(found), predict(found._replace(predictor=[-value for value in found.predictor]))
    mirrored = (-once.partial.mean, -once.partial.high, -once.partial.low, 8)
    assert turned.partial == pytest.approx(mirrored, abs=ROUNDING)
    assert turned.p == once.p


def test_one_cluster_or_a_constant_tells_nothing() -> None:
    alone = predict(sample(direct=1.0, clusters=1))
    assert alone.partial.mean > 0
    assert alone.partial.n == 1
    assert all(map(math.isnan, (alone.partial.low, alone.rank.high, alone.p, alone.p_equivalent)))
    constant = predict(sample(direct=1.0)._replace(predictor=[1.0] * 80))
    assert all(map(math.isnan, (constant.partial.mean, constant.partial.low, constant.p, constant.p_equivalent)))
    with pytest.raises(ValueError, match="clusters"):
        predict(sample(direct=1.0)._replace(clusters=[1, 2]))
