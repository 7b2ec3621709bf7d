"""What the forgetting study reckons with: scores of a run, paired tests over seeds, and curves at equal learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Vector = NDArray[np.float64]


class Scores(NamedTuple):
    """What a run is judged by; of one task alone, `transfer` and `forgetting` are NaN."""

    accuracy: float
    """ACC: the mean of the tasks' scores at the end."""
    learning: float
    """LA: the mean of every task's score just after it was trained."""
    transfer: float
    """BWT: the mean, over all tasks but the last, of the score at the end less the score just after training."""
    forgetting: float
    """The mean, over all tasks but the last, of the best score since training (the end included) less the one at the
    end; never negative.
    """


class Interval(NamedTuple):
    """A mean, its confidence interval, and how many values it is over; a bound that cannot be had is NaN."""

    mean: float
    low: float
    high: float
    n: int


class Point(NamedTuple):
    """One run on the plane of learning and forgetting."""

    learning: float
    transfer: float


class Predictiveness(NamedTuple):
    """How well one number foretells another."""

    rank: Interval
    """Spearman's correlation; `n` counts the clusters."""
    partial: Interval
    """The same once the controls' ranks are taken out of both."""
    p: float
    """Two-sided, that the partial correlation is 0."""
    p_equivalent: float
    """That the partial correlation is as large as the margin."""


def scores(table: Sequence[Sequence[float]]) -> Scores:
    """The scores of `Run.scores`, [tasks + 1][tasks]: row i after i tasks, row 0 before the first.

    Raises:
        ValueError: the table has another shape.
    """
    tasks = len(table) - 1
    if tasks < 1 or any(len(row) != tasks for row in table):
        found = [len(row) for row in table]
        raise ValueError(f"scores: expected table [tasks + 1][tasks] of at least one task, got rows of {found} scores.")
    values = np.asarray(table, dtype=np.float64)
    final = values[-1]
    learnt = values.diagonal(-1)
    best = np.asarray([values[task + 1 :, task].max() for task in range(tasks)])
    return Scores(
        accuracy=float(final.mean()),
        learning=float(learnt.mean()),
        transfer=_mean(final[:-1] - learnt[:-1]),
        forgetting=_mean(best[:-1] - final[:-1]),
    )


def paired(differences: Sequence[float], *, level: float) -> Interval:
    """The mean of paired differences and its t interval of confidence `level`.

    Bounds are NaN below two differences, the mean is NaN of none, and equal differences have an interval of width 0.

    Raises:
        ValueError: a difference is not finite, or not 0 < level < 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"paired: expected 0 < level={level} < 1.")
    values = _finite("paired", differences)
    mean, error, n = _mean_and_error(values)
    if n < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=n)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def p_value(differences: Sequence[float]) -> float:
    """The two-sided paired t test that the mean difference is 0.

    Equal differences: 1 if they are 0, else 0. NaN below two differences.

    Raises:
        ValueError: a difference is not finite.
    """
    mean, error, n = _mean_and_error(_finite("p_value", differences))
    return math.nan if n < 2 else min(1.0, 2 * _below(-abs(mean), error, n))


def equivalence_p(differences: Sequence[float], *, margin: float) -> float:
    """Two one-sided t tests that the mean difference lies outside of (-margin, margin): the larger of the two p values.

    It is below alpha exactly where the interval of level 1 - 2 alpha lies within the margins. Equal differences: 0 if
    they lie strictly within, else 1. NaN below two differences.

    Raises:
        ValueError: a difference is not finite, or the margin is not positive.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"equivalence_p: expected 0 < margin={margin} < inf.")
    mean, error, n = _mean_and_error(_finite("equivalence_p", differences))
    if n < 2:
        return math.nan
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return max(_below(-(margin + mean), error, n), _below(-(margin - mean), error, n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: the family-wise error of all tests together.

    Raises:
        ValueError: a value is NaN or outside of [0, 1].
    """
    for position, p in enumerate(p_values):
        if not 0 <= p <= 1:
            raise ValueError(f"holm: expected 0 <= p_values[{position}]={p} <= 1.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def frontier(points: Sequence[Point]) -> list[Point]:
    """The corners of the best that can be had, by rising learning: transfer falls, ever more steeply, along it.

    The falling part of the points' concave hull. On the line between two corners lies what a mix of their runs has on
    average; no point lies beyond it. Points that are not finite do not count.
    """
    found: list[Point] = []
    for point in sorted((p for p in points if all(map(math.isfinite, p))), reverse=True):
        if found and point.transfer <= found[-1].transfer:
            continue
        while len(found) > 1 and _steepness(point, found[-1]) >= _steepness(found[-1], found[-2]):
            found.pop()
        found.append(point)
    return found[::-1]


def at_equal_learning(first: Sequence[Point], second: Sequence[Point]) -> float:
    """How much more transfer `first` has than `second` at the same learning: both curves of one seed along a grid.

    A curve's transfer at learning l is the best of any mix of its runs that learns at least l: its `frontier`, constant
    before the first corner. The difference is averaged (exactly, with equal weight on every l) from the larger of the
    two lowest learnings that were run to the smaller of the two highest; where these are equal, it is the difference
    there. Points that are not finite do not count.

    Guarantees: antisymmetric; 0 for equal curves, and for different samples of one line; the order of the points does
    not matter; a point more within the range never lowers its curve; transfer that is higher by c throughout gives c
    more; NaN where the ranges do not overlap or a curve has no point.
    """
    curves = [[p for p in points if all(map(math.isfinite, p))] for points in (first, second)]
    if not all(curves):
        return math.nan
    low = max(min(p.learning for p in points) for points in curves)
    high = min(max(p.learning for p in points) for points in curves)
    if low > high:
        return math.nan
    fronts = [frontier(points) for points in curves]
    inner = {p.learning for front in fronts for p in front if low < p.learning < high}
    at = np.asarray(sorted({low, high} | inner))
    ours, theirs = (np.interp(at, [p.learning for p in front], [p.transfer for p in front]) for front in fronts)
    difference = ours - theirs
    if low == high:
        return float(difference[0])
    return float(((difference[1:] + difference[:-1]) / 2 * np.diff(at)).sum() / (high - low))


def rank_correlation(first: Sequence[float], second: Sequence[float], controls: Sequence[Sequence[float]]) -> float:
    """Spearman's correlation of what is left of the ranks after a linear fit of the controls' ranks; ties share ranks.

    NaN where nothing is left of one of them: it is constant, or a function of the controls' ranks.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    return _partial(_ranks(_columns("rank_correlation", first, second, controls)))


def predictiveness(
    predictor: Sequence[float],
    outcome: Sequence[float],
    controls: Sequence[Sequence[float]],
    clusters: Sequence[int],
    *,
    level: float,
    margin: float,
    draws: int,
    generator: np.random.Generator,
) -> Predictiveness:
    """Rank correlations of a predictor with an outcome, without and with controls, and how sure they are.

    Intervals are percentiles of a bootstrap that draws whole clusters (seeds), so that what a seed's runs share does
    not count as evidence twice; p values are shares of its draws, one-sided at least 1 / (draws + 1), and at least 2^-n
    of n clusters, as in a test of their signs. Percentiles over few clusters are somewhat too narrow. Below two
    clusters, bounds and p values are NaN, as they are where the correlation is. The fit of ranks is linear: where a
    control explains nearly everything, what it misses by a curve is taken for the predictor's.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    columns = _columns("predictiveness", predictor, outcome, controls)
    names = np.asarray(clusters)
    if names.shape != (len(predictor),):
        raise ValueError(f"predictiveness: expected one of clusters for each value, got {names.shape}.")
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    n = len(members)
    plain, partial = _both(columns)
    if n < 2:
        unknown = Interval(mean=plain, low=math.nan, high=math.nan, n=n)
        return Predictiveness(rank=unknown, partial=unknown._replace(mean=partial), p=math.nan, p_equivalent=math.nan)
    drawn = np.asarray(
        [_both(columns[:, np.concatenate([members[i] for i in generator.integers(n, size=n)])]) for _ in range(draws)]
    ).reshape(draws, 2)
    seen = drawn[np.isfinite(drawn[:, 1]), 1]
    known = math.isfinite(partial) and seen.size > 0
    below, above = _share(seen <= 0), _share(seen >= 0)
    outside, least = max(_share(seen <= -margin), _share(seen >= margin)), 2.0**-n
    return Predictiveness(
        rank=_percentiles(plain, drawn[:, 0], level=level, n=n),
        partial=_percentiles(partial, drawn[:, 1], level=level, n=n),
        p=min(1.0, 2 * max(least, min(below, above))) if known else math.nan,
        p_equivalent=max(least, outside) if known else math.nan,
    )


def partial_within(
    predictor: Sequence[float],
    outcome: Sequence[float],
    controls: Sequence[Sequence[float]],
    clusters: Sequence[int],
    groups: Sequence[str],
    *,
    level: float,
    draws: int,
    generator: np.random.Generator,
) -> Interval:
    """`rank_correlation` within each group: the mean over the groups that have one.

    What differs between groups does not count at all. The interval is that of `predictiveness`: a cluster is drawn in
    all groups at once.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    columns = _columns("partial_within", predictor, outcome, controls)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    of_group = np.asarray(groups)
    if not cluster.shape == of_group.shape == columns.shape[1:]:
        raise ValueError(
            f"partial_within: expected one of clusters and of groups for each value, got {cluster.shape} and "
            f"{of_group.shape} for {columns.shape[1:]}."
        )
    n = len(names)
    drawn = generator.multinomial(n, [1 / n] * n, size=draws) if n > 1 else np.empty((0, n))
    times = np.concatenate([np.ones((1, n)), drawn])
    members = [of_group == group for group in np.unique(of_group)]
    found = np.asarray([_weighted_partial(columns[:, own], times[:, cluster[own]]) for own in members])
    found = found.reshape(-1, len(times))
    known = np.isfinite(found)
    count = known.sum(axis=0)
    mean = np.where(count > 0, np.where(known, found, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    return _percentiles(float(mean[0]), mean[1:], level=level, n=n)


def _weighted_partial(columns: Vector, times: Vector) -> Vector:
    """`rank_correlation` of rows [K, n] (predictor, outcome, controls), each value `times` [D, n] over: [D]."""
    mine, other = columns[:, :, None], columns[:, None, :]
    ranks = times @ ((other < mine) + (other == mine) / 2).transpose(0, 2, 1)
    centred = ranks - times.sum(axis=1, keepdims=True) / 2
    moments = np.einsum("dn,kdn,ldn->dkl", times, centred, centred, optimize=True)
    pair, across, given = moments[:, :2, :2], moments[:, :2, 2:], moments[:, 2:, 2:]
    left = pair - across @ np.linalg.pinv(given, rcond=1e-12, hermitian=True) @ across.transpose(0, 2, 1)
    norms, before = (np.diagonal(part, axis1=1, axis2=2) for part in (left, pair))
    known = (norms > 1e-9 * before).all(axis=1)
    scale = np.sqrt(np.where(known, norms.prod(axis=1), 1))
    return np.where(known, np.clip(left[:, 0, 1] / scale, -1, 1), np.nan)


def _steepness(left: Point, right: Point) -> float:
    """How much transfer falls for what learning rises, from one point of a frontier to the next."""
    return (left.transfer - right.transfer) / (right.learning - left.learning)


def _mean(values: Vector) -> float:
    return float(values.mean()) if values.size else math.nan


def _finite(where: str, differences: Sequence[float]) -> Vector:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{where}: expected finite differences, got {list(differences)}.")
    return values


def _mean_and_error(values: Vector) -> tuple[float, float, int]:
    """The mean, its standard error (exactly 0 for equal values) and the number of values."""
    n = len(values)
    if n and values.min() == values.max():
        return float(values[0]), 0.0, n
    return _mean(values), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan, n


def _below(mean: float, error: float, n: int) -> float:
    """P(t <= mean / error) with n - 1 degrees of freedom."""
    if error == 0:
        return 0.5 if mean == 0 else float(mean > 0)
    return float(special.stdtr(n - 1, mean / error))


def _columns(
    where: str, first: Sequence[float], second: Sequence[float], controls: Sequence[Sequence[float]]
) -> Vector:
    lengths = [len(column) for column in (first, second, *controls)]
    if len(set(lengths)) > 1:
        raise ValueError(f"{where}: expected columns of one length, got {lengths}.")
    columns = np.asarray([first, second, *controls], dtype=np.float64)
    if not np.isfinite(columns).all():
        raise ValueError(f"{where}: expected finite values.")
    return columns


def _ranks(columns: Vector) -> Vector:
    """Of every row, ties averaged, with mean 0."""
    if not columns.shape[1]:
        return columns
    ranked: Vector = np.asarray(stats.rankdata(columns, axis=1), dtype=np.float64)
    centred: Vector = ranked - ranked.mean(axis=1, keepdims=True)
    return centred


def _partial(ranks: Vector) -> float:
    """The correlation of the first two rows after a linear fit of the others to each."""
    pair, given = ranks[:2], ranks[2:]
    left = pair - np.linalg.lstsq(given.T, pair.T, rcond=None)[0].T @ given if given.size else pair
    norms, before = np.linalg.norm(left, axis=1), np.linalg.norm(pair, axis=1)
    if (norms <= 1e-9 * before).any():
        return math.nan
    return float(np.clip(left[0] / norms[0] @ (left[1] / norms[1]), -1, 1))


def _both(columns: Vector) -> tuple[float, float]:
    ranks = _ranks(columns)
    return _partial(ranks[:2]), _partial(ranks)


def _percentiles(estimate: float, drawn: Vector, *, level: float, n: int) -> Interval:
    seen = drawn[np.isfinite(drawn)]
    if not seen.size or not math.isfinite(estimate):
        return Interval(mean=estimate, low=math.nan, high=math.nan, n=n)
    low, high = np.quantile(seen, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=estimate, low=float(low), high=float(high), n=n)


def _share(hits: NDArray[np.bool_]) -> float:
    return (int(hits.sum()) + 1) / (len(hits) + 1)
