"""Rates that the other seeds choose: no seed has a say in its own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.study import statistics
from experiments.study.rechosen import along, bears_out, rechosen
from experiments.study.records import Run, Stage
from tests.study_runs import key, run
from tests.support import BOUND

SCORES = st.integers(0, 100).map(lambda percent: percent / 100)
TABLES = st.tuples(st.integers(1, 4), st.integers(2, 5)).flatmap(
    lambda size: st.dictionaries(
        st.sampled_from([0.1, 0.2, 0.4, 0.8]),
        st.lists(SCORES, min_size=size[1], max_size=size[1]).map(lambda values: dict(enumerate(values))),
        min_size=size[0],
        max_size=size[0],
    )
)
DIFFERENCES = st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=8)


@given(TABLES)
def test_every_seed_has_the_rate_of_the_highest_mean_of_the_others(table: dict[float, dict[int, float]]) -> None:
    found = rechosen(table)
    assert list(found) == sorted(next(iter(table.values())))
    for seed, value in found.items():
        means = {
            rate: sum(round(100 * score) for other, score in row.items() if other != seed)
            for rate, row in table.items()
        }
        best = min(rate for rate, mean in means.items() if mean == max(means.values()))
        assert value == table[best][seed]


@given(TABLES, st.integers(0, 4), SCORES)
def test_a_seed_has_no_say_in_its_own_rate(table: dict[float, dict[int, float]], seed: int, score: float) -> None:
    """Whatever one seed comes to at one rate: it is judged at the rate at which it was before."""
    seed %= len(next(iter(table.values())))
    marked = {rate: {**row, seed: rate} for rate, row in table.items()}
    changed = {rate: {**row, seed: score + rate} for rate, row in table.items()}
    assert rechosen(changed)[seed] == score + rechosen(marked)[seed]


@given(TABLES)
def test_one_rate_leaves_no_choice(table: dict[float, dict[int, float]]) -> None:
    rate = max(table)
    assert rechosen({rate: table[rate]}) == table[rate]


def test_without_rates_or_with_a_seed_alone_nothing_is_chosen() -> None:
    assert rechosen({}) == {}
    assert rechosen({0.1: {3: 0.5}, 0.2: {3: 0.6}}) == {}


def test_the_rates_are_those_that_every_seed_was_run_at_by_the_same_arm_and_strength() -> None:
    def runs(lr: float, stage: Stage, *seeds: int, arm: str = "all", optimizer: str = "sgd") -> list[Run]:
        return [run(key(seed, arm=arm, optimizer=optimizer, lr=lr), stage=stage) for seed in seeds]

    tuned = {one.key.seed: one for one in runs(0.1, "evaluation", 0, 1, 2)}
    lost = runs(0.8, "neighbour", 0, 1, 2)
    lost[1] = lost[1]._replace(scores=tuple((math.nan,) * len(row) for row in lost[1].scores))
    stronger = [one._replace(key=one.key._replace(strength=3.0)) for one in runs(1.6, "neighbour", 0, 1, 2)]
    others = [
        *runs(0.01, "tuning", 0, 1, 2),
        *runs(0.05, "exploration", 0, 1, 2),
        *runs(0.06, "evaluation", 0, 1, 2, arm="smk-2"),
        *runs(0.07, "evaluation", 0, 1, 2, optimizer="adamw"),
        *runs(0.08, "neighbour", 0, 1),
    ]
    wanted = [*runs(0.2, "frontier", 2, 1, 0), *runs(0.4, "neighbour", 0, 1, 2)]
    found = along([*others, *lost, *stronger, *tuned.values(), *wanted], tuned)
    assert set(found) == {0.1, 0.2, 0.4}
    assert found[0.1] == {seed: statistics.scores(one.scores).accuracy for seed, one in tuned.items()}
    assert all(set(row) == {0, 1, 2} for row in found.values())


@given(DIFFERENCES, st.sampled_from([-0.01, 0.0]))
def test_no_two_opposite_verdicts_are_borne_out(differences: list[float], bound: float) -> None:
    kind = {
        verdict: bears_out(verdict, differences, bound=bound, margin=0.01, alpha=0.05)
        for verdict in ("supported", "refuted")
    }
    seen = statistics.paired([value - bound for value in differences], level=0.95)
    if min(abs(seen.low), abs(seen.high)) > BOUND:
        assert kind == {"supported": seen.low > 0, "refuted": seen.high < 0}


@pytest.mark.parametrize(
    ("verdict", "differences", "expected"),
    [
        ("equivalent", [0.001, -0.002, 0.002, 0.001], True),
        ("equivalent", [0.001, -0.002, 0.002, 0.05], False),
        ("open", [0.5, 0.5, 0.6], True),
        ("supported", [], True),
        ("refuted", [0.1, 0.1, 0.1], False),
        ("refuted", [-0.1, -0.1, -0.1], True),
    ],
)
def test_what_bears_out_a_verdict(verdict: str, differences: list[float], expected: bool) -> None:
    assert bears_out(verdict, differences, bound=0.0, margin=0.01, alpha=0.05) is expected
