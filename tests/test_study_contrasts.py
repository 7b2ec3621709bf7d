"""The study's findings on runs with planted differences: what is compared with what, and what is concluded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.study import contrasts, statistics
from experiments.study.arms import ARMS, OPTIMIZERS
from experiments.study.contrasts import Finding, Side
from experiments.study.records import Key, Run, Series, Stage
from tests.support import BOUND

SEEDS = range(8)
NOISE = (0.3, -1.1, 0.8, 0.1, -0.6, 1.3, -0.9, 0.1)
"""Of mean 0."""
MEANS: Mapping[str, float] = {
    "all": 0.70,
    "random-2": 0.70,
    "smk-2": 0.70,
    "frozen-experts": 0.60,
    "matched": 0.80,
    "surprise-route": 0.701,
    "balance-route": 0.70,
    "output-2": 0.70,
    "replay": 0.85,
    "root-neuron": 0.80,
}
SPREAD: Mapping[str, float] = {"output-2": 0.1}
COUNT = len(contrasts.primary()) + 1
MADE = sum("whitened-neuron" not in contrast.claim for contrast in contrasts.primary())
"""Contrasts of the arms above; the other arm of ours is in no study here."""


def made(
    arm: str,
    *,
    seed: int,
    learning: float,
    transfer: float,
    optimizer: str = "sgd",
    stage: Stage = "evaluation",
    lr: float = 0.1,
    family: str = "digits-permuted",
    regime: str = "experts",
    series: Mapping[Series, tuple[float, ...]] | None = None,
) -> Run:
    """Two tasks; LA and BWT are those given, ACC is `learning + transfer / 2`."""
    table = ((0.1, 0.1), (learning, 0.1), (learning + transfer, learning))
    key = Key(family=family, regime=regime, arm=arm, optimizer=optimizer, lr=lr, strength=0.0, seed=seed)
    return Run(key, stage, table, table, 0.1, 0.125, dict(series or {}))


def frontier_of(arm: str, *, optimizer: str, more: float, family: str = "digits-permuted") -> list[Run]:
    """Curves on one line, `more` above the others', with a seed's own noise."""
    return [
        made(
            arm,
            seed=seed,
            learning=learning,
            transfer=0.4 - learning + more + 0.001 * NOISE[seed],
            optimizer=optimizer,
            stage="frontier",
            lr=learning,
            family=family,
        )
        for seed in SEEDS
        for learning in (0.5, 0.6, 0.8)
    ]


def optimizers_of(arm: str) -> Sequence[str]:
    return ARMS[arm].optimizers


def study(means: Mapping[str, float] = MEANS, *, family: str = "digits-permuted") -> list[Run]:
    """Every arm and optimizer; adamw is the best of every arm in tuning, and the mean is its own."""
    runs = []
    for arm, mean in means.items():
        for optimizer in optimizers_of(arm):
            worse = 0.0 if optimizer in ("adamw", "own") else 0.05
            for seed in SEEDS:
                noise = SPREAD.get(arm, 0.004) * NOISE[(seed + len(arm)) % len(NOISE)]
                found = mean - worse + noise
                runs.append(made(arm, seed=seed, learning=found, transfer=0.0, optimizer=optimizer, family=family))
                for lr in (0.01, 0.1):
                    tuned = found - (0.02 if lr == 0.01 else 0.0)
                    runs.append(
                        made(
                            arm,
                            seed=100 + seed,
                            learning=tuned,
                            transfer=0.0,
                            optimizer=optimizer,
                            stage="tuning",
                            lr=lr,
                            family=family,
                        )
                    )
    for optimizer, more in (("sgd", 0.05), ("adamw", -0.05), ("adagrad", 0.0)):
        runs += frontier_of("smk-2", optimizer=optimizer, more=more, family=family)
        runs += frontier_of("random-2", optimizer=optimizer, more=0.0, family=family)
    return runs + frontier_of("root-neuron", optimizer="own", more=0.1, family=family)


def by_claim(found: Sequence[Finding]) -> Callable[[str], Finding]:
    def one(words: str) -> Finding:
        (match,) = (finding for finding in found if words in finding.claim)
        return match

    return one


def test_planted_differences_are_found_and_judged() -> None:
    found, not_run = contrasts.findings(study())
    one = by_claim(found)
    expected = {
        "not training the experts": ("supported", 0.1, "adamw"),
        "changes as much": ("refuted", -0.1, "adamw"),
        "load balance": ("equivalent", 0.001, "adamw"),
        "output's": ("open", 0.0, "adamw"),
        "updating everything": ("supported", 0.1, "own against adamw"),
        "not below Adagrad": ("supported", 0.15, "own against adagrad"),
        "better than replay": ("refuted", -0.05, "own against adamw"),
        "random choice with sgd": ("supported", 0.05, "sgd"),
        "random choice with adamw": ("refuted", -0.05, "adamw"),
        "random choice with adagrad": ("equivalent", 0.0, "adagrad"),
        "root-neuron forgets less": ("supported", 0.1, "own against adamw"),
    }
    for words, (verdict, mean, optimizer) in expected.items():
        finding = one(words)
        assert (finding.verdict, finding.optimizer) == (verdict, optimizer), words
        assert finding.interval.mean == pytest.approx(mean, abs=BOUND), words
        assert finding.interval.n == len(SEEDS)
        assert finding.falsifier.startswith("Would have been refuted by ")
    assert len(found) == len(expected) == MADE
    *others, missing = not_run
    assert all("whitened-neuron" in other for other in others)
    assert "digits-permuted" in missing
    assert "PI" in missing


def moved(runs: Sequence[Run], family: str, regime: str) -> list[Run]:
    return [run._replace(key=run.key._replace(family=family, regime=regime)) for run in runs]


@pytest.mark.parametrize("place", [("text", "experts"), ("digits-permuted", "everything")])
def test_holm_covers_all_contrasts_of_a_family_and_regime_and_of_no_other(place: tuple[str, str]) -> None:
    alone, not_run = contrasts.findings(study())
    assert [finding.p_holm for finding in alone] == statistics.holm([finding.p for finding in alone])
    both, neither = contrasts.findings([*moved(study(), *place), *study()])
    own = [finding for finding in both if (finding.family, finding.regime) == place]
    assert [finding for finding in both if finding not in own] == alone
    assert [finding._replace(family="digits-permuted", regime="experts") for finding in own] == alone
    assert sorted(neither) == sorted([*not_run, *(f"{', '.join(place)}:{why.split(':', 1)[1]}" for why in not_run)])


def test_findings_do_not_depend_on_the_order_of_the_runs_or_on_other_regimes() -> None:
    runs = study()
    swap = {"smk-2": "random-2", "random-2": "smk-2"}
    other = moved(study({"all": 0.1, "root-neuron": 0.9}), "digits-permuted", "everything")
    other = [run._replace(key=run.key._replace(arm=swap.get(run.key.arm, run.key.arm))) for run in other]
    mixed = [*runs, *other]
    random.Random(0).shuffle(mixed)
    expected = [contrasts.findings(alone) for alone in (other, runs)]
    assert contrasts.findings(mixed) == tuple(first + second for first, second in zip(*expected, strict=True))


def test_swapped_arms_swap_the_verdict() -> None:
    swap = {"smk-2": "frozen-experts", "frozen-experts": "smk-2"}
    swapped = [run._replace(key=run.key._replace(arm=swap.get(run.key.arm, run.key.arm))) for run in study()]
    finding = by_claim(contrasts.findings(swapped)[0])("not training the experts")
    assert finding.interval.mean == pytest.approx(-0.1, abs=BOUND)
    assert finding.verdict == "refuted"


def test_only_the_optimizer_that_won_in_tuning_counts() -> None:
    runs = study()
    finding = by_claim(contrasts.findings(runs)[0])("not training the experts")
    others = [
        run._replace(scores=((0.1, 0.1), (1.0, 0.1), (1.0, 1.0)))
        if run.stage == "evaluation" and run.key.optimizer in ("sgd", "adagrad") and run.key.arm == "smk-2"
        else run
        for run in runs
    ]
    assert by_claim(contrasts.findings(others)[0])("not training the experts") == finding


def test_matched_is_compared_under_the_optimizer_of_smk() -> None:
    better = [made("matched", seed=100, learning=0.99, transfer=0.0, optimizer="adagrad", stage="tuning")]
    assert by_claim(contrasts.findings([*study(), *better])[0])("changes as much").optimizer == "adamw"


@settings(max_examples=15)
@given(st.sets(st.sampled_from(sorted(MEANS))), st.sets(st.sampled_from([*OPTIMIZERS, "own"])))
def test_absent_arms_and_optimizers_are_named_and_the_others_stay(arms: set[str], optimizers: set[str]) -> None:
    whole = {finding.claim: finding for finding in contrasts.findings(study())[0]}
    left = [run for run in study() if run.key.arm not in arms and run.key.optimizer not in optimizers]
    found, not_run = contrasts.findings(left)
    assert len(found) + len(not_run) == (COUNT if left else 0)
    for finding in found:
        if finding.optimizer == whole[finding.claim].optimizer:
            assert (finding.interval, finding.p) == (whole[finding.claim].interval, whole[finding.claim].p)
            assert finding.p_holm <= whole[finding.claim].p_holm
    if left and "replay" in arms and "root-neuron" not in arms and "own" not in optimizers:
        assert any("root-neuron is better than replay: no evaluation runs of replay" in text for text in not_run)


def test_one_seed_leaves_everything_open() -> None:
    found, _ = contrasts.findings([run for run in study() if run.key.seed in (0, 100)])
    assert len(found) == MADE
    assert all(finding.verdict == "open" and math.isnan(finding.p_holm) for finding in found)
    assert all(finding.interval.n == 1 and math.isnan(finding.interval.low) for finding in found)


def test_unpaired_seeds_are_refused() -> None:
    runs = [run for run in study() if run.key[2:4] != ("all", "adagrad") or run.key.seed != 3]
    message = r"the same seeds of root-neuron with own and all with adagrad, only one has \[3\]"
    with pytest.raises(ValueError, match=message):
        contrasts.findings(runs)


def test_a_score_that_is_not_finite_is_no_finding() -> None:
    lost = made("replay", seed=2, learning=math.nan, transfer=0.0, optimizer="adamw")
    runs = [lost if (run.key, run.stage) == (lost.key, lost.stage) else run for run in study()]
    found, not_run = contrasts.findings(runs)
    assert not any("replay" in finding.claim for finding in found)
    assert any("better than replay: a score is not finite" in text for text in not_run)


def test_seeds_without_a_common_range_of_learning_do_not_count() -> None:
    def moved(run: Run) -> Run:
        if run.stage == "frontier" and run.key[2:4] == ("smk-2", "sgd") and run.key.seed < 3:
            return run._replace(scores=((0.1, 0.1), (0.2, 0.1), (0.2, 0.2)))
        return run

    found, _ = contrasts.findings([moved(run) for run in study()])
    finding = by_claim(found)("random choice with sgd")
    assert finding.interval.n == len(SEEDS) - 3
    assert finding.interval.mean == pytest.approx(0.05, abs=BOUND)


@given(st.floats(-0.03, 0.03))
def test_not_below_is_an_interval_above_the_margin(shift: float) -> None:
    runs = study({"all": 0.7, "root-neuron": 0.65 + shift})
    finding = by_claim(contrasts.findings(runs)[0])("not below")
    assert finding.interval.mean == pytest.approx(shift, abs=BOUND)
    above, below = (bound + contrasts.MARGIN for bound in (finding.interval.low, finding.interval.high))
    if min(abs(above), abs(below)) > BOUND:
        assert (finding.p < contrasts.ALPHA) == (above > 0 or below < 0)
    if finding.verdict == "supported":
        assert finding.interval.low > -contrasts.MARGIN
    if finding.verdict == "refuted":
        assert finding.interval.high < -contrasts.MARGIN


@pytest.mark.parametrize(
    ("excess", "p_holm", "p_equivalent", "verdict"),
    [
        (0.1, 0.01, 1.0, "supported"),
        (-0.1, 0.01, 1.0, "refuted"),
        (0.1, 0.05, 0.04, "equivalent"),
        (0.1, 0.2, 0.05, "open"),
        (0.005, 0.01, 0.01, "supported"),
        (0.1, math.nan, math.nan, "open"),
        (math.nan, math.nan, 0.01, "equivalent"),
    ],
)
def test_the_rule_of_verdicts(excess: float, p_holm: float, p_equivalent: float, verdict: str) -> None:
    assert contrasts.decide(excess=excess, p_holm=p_holm, p_equivalent=p_equivalent) == verdict


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.0, "supported"), (0.04, "supported"), (0.1, "unsteady"), (0.2, "unsteady")]
)
def test_a_verdict_that_a_better_rate_of_the_other_arm_takes_back_is_unsteady(gain: float, verdict: str) -> None:
    """`frozen-experts` is 0.1 below `smk-2` as tuned, and `gain` better at a rate next to that."""
    runs = study()
    nearby = [
        made(
            "frozen-experts", seed=run.key.seed, learning=statistics.scores(run.scores).accuracy + gain, transfer=0.0
        )._replace(stage="neighbour", key=run.key._replace(lr=0.2))
        for run in contrasts.pick(runs, "digits-permuted", "experts", "frozen-experts", "adamw").values()
    ]
    before, after = (by_claim(contrasts.findings(kept)[0])("not training") for kept in (runs, [*runs, *nearby]))
    assert before.rechosen is not None
    assert before.rechosen.mean == pytest.approx(before.interval.mean, abs=BOUND)
    assert after.rechosen is not None
    assert after.rechosen.mean == pytest.approx(0.1 - gain, abs=BOUND)
    assert after._replace(rechosen=None, verdict=before.verdict) == before._replace(rechosen=None)
    assert after.verdict == verdict


def test_pick_gives_the_evaluation_runs_of_an_arm_by_seed() -> None:
    found = contrasts.pick(study(), "digits-permuted", "experts", "smk-2", "sgd")
    assert sorted(found) == list(SEEDS)
    assert all(run.key[2:4] == ("smk-2", "sgd") and run.stage == "evaluation" for run in found.values())
    assert not contrasts.pick(study(), "text", "experts", "smk-2", "sgd")
    twice = [*study(), made("smk-2", seed=1, learning=0.5, transfer=0.0, lr=0.3)]
    with pytest.raises(ValueError, match="seed 1 was evaluated twice"):
        contrasts.pick(twice, "digits-permuted", "experts", "smk-2", "sgd")


tuning = st.lists(
    st.tuples(
        st.sampled_from(OPTIMIZERS),
        st.sampled_from([0.1, 1.0]),
        st.integers(0, 3),
        st.sampled_from([0.2, 0.5, math.nan]),
    ),
    max_size=12,
    unique_by=lambda row: row[:3],
)


@given(tuning)
def test_best_is_the_optimizer_of_the_highest_mean_over_seeds(rows: list[tuple[str, float, int, float]]) -> None:
    runs = [
        made("all", seed=seed, learning=score, transfer=0.0, optimizer=optimizer, lr=lr, stage="tuning")
        for optimizer, lr, seed, score in rows
    ]
    means: dict[tuple[str, float], float] = {}
    for optimizer, lr, *_ in rows:
        own = [score for name, rate, _, score in rows if (name, rate) == (optimizer, lr)]
        means[optimizer, lr] = math.fsum(own) / len(own)
    found = contrasts.best(runs, "digits-permuted", "experts", "all", OPTIMIZERS)
    finite = {setting: mean for setting, mean in means.items() if not math.isnan(mean)}
    if not finite:
        assert found is None
        return
    assert found is not None
    highest = max(finite.values())
    assert max(mean for (name, _), mean in finite.items() if name == found) == pytest.approx(highest)


def test_best_without_tuning_is_the_only_one_that_was_run() -> None:
    one, other = (made("all", seed=0, learning=0.5, transfer=0.0, optimizer=name) for name in ("sgd", "adamw"))
    assert contrasts.best([one], "digits-permuted", "experts", "all", OPTIMIZERS) == "sgd"
    assert contrasts.best([one, other], "digits-permuted", "experts", "all", OPTIMIZERS) is None
    assert contrasts.best([], "digits-permuted", "experts", "all", OPTIMIZERS) is None


def predicting(*, by_pi: float) -> list[Run]:
    """Four tasks: what is kept of a task follows its loss, its place, and PI by `by_pi`; three stretches a task."""
    runs = []
    source = random.Random(1)
    for seed in SEEDS:
        for arm in ("all", "smk-2", contrasts.JOINT):
            loss = [source.gauss(0, 1) for _ in range(4)]
            own = [source.gauss(0, 1) for _ in range(4)]
            pi = [-one + 0.5 * other for one, other in zip(loss, own, strict=True)]
            sign = -1 if arm == contrasts.JOINT else 1
            drop = [
                0.3 + 0.02 * (loss[task] - task - sign * by_pi * own[task] + source.gauss(0, 1)) for task in range(4)
            ]
            rows = [[0.9 if task < row else 0.1 for task in range(4)] for row in range(4)]
            rows.append([0.9 - drop[task] for task in range(3)] + [0.9])
            stretches: dict[Series, list[float]] = {"pi": pi, "loss": loss}
            series = {
                name: tuple(value for last in ends for value in (source.gauss(0, 9), source.gauss(0, 9), last))
                for name, ends in stretches.items()
            }
            key = Key("digits-permuted", "experts", arm, "sgd", 0.1, 0.0, seed)
            table = tuple(tuple(row) for row in rows)
            runs.append(Run(key, "evaluation", table, table, 0.1, 0.125, series))
    return runs


@pytest.mark.parametrize(("by_pi", "verdict"), [(1.0, "supported"), (-1.0, "refuted"), (0.0, "open")])
def test_pi_counts_only_beyond_loss_and_place(by_pi: float, verdict: str) -> None:
    found = by_claim(contrasts.findings(predicting(by_pi=by_pi))[0])("PI at the end")
    assert found.verdict == verdict
    assert found.interval.n == len(SEEDS)
    assert found.interval.low < found.interval.mean < found.interval.high


def test_every_arm_that_is_compared_exists() -> None:
    for contrast in contrasts.primary():
        for arm, optimizer in (contrast.first, contrast.second):
            assert arm in ARMS
            assert optimizer in ("best", "same") or optimizer in ARMS[arm].optimizers
    assert Side("all", "adagrad") in [contrast.second for contrast in contrasts.primary()]
    assert contrasts.JOINT in ARMS
    assert len({contrast.claim for contrast in contrasts.primary()}) == COUNT - 1
