from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ParamSpec, TypeVar

import pytest
import torch
from torch.nn.functional import rms_norm

from experiments import forgetting
from experiments.forgetting import Options
from experiments.noise import generator
from experiments.study import crew, runs, store, tasks, text
from experiments.study.arms import ARMS, EXPLORATIONS, OPTIMIZERS, rates
from experiments.study.lanes import Job, needs
from experiments.study.net import EPS
from experiments.study.records import Key, Run
from experiments.study.runs import carry_out, chunks
from experiments.study.setting import idle
from experiments.study.tasks import Bank, Schedule, Tasks, digits
from onn import qwen3, tree
from onn.functional import Experts
from tests.support import assert_close, assert_same, normal, tolerance

P = ParamSpec("P")
R = TypeVar("R")
SHORT = Schedule(tokens=8, steps=5)
BANK = Bank(experts=32, width=8)


@contextmanager
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps run as they are, and none of them is left behind."""

    def as_it_is(function: Callable[P, R]) -> Callable[P, R]:
        return function

    monkeypatch.setattr(runs, "compiled", as_it_is)
    cached = (runs._stepper, runs._evaluator)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled, and nothing long."""
    monkeypatch.setattr(runs, "LANES", 4)
    for family in tasks.SCHEDULES:
        monkeypatch.setitem(tasks.SCHEDULES, family, SHORT)
    with nothing_compiled(monkeypatch):
        yield


def few(seed: int, *, turned: bool = True, bank: Bank = BANK) -> Tasks:
    """Three tasks of few examples."""
    return cut(digits(seed, turned=turned, bank=bank), tasks=3, size=40)


def cut(whole: Tasks, *, tasks: int, size: int) -> Tasks:
    return Tasks(
        inputs=whole.inputs[:tasks, :size],
        residual=whole.residual[:tasks, :size],
        labels=whole.labels[:tasks, :size],
        held_inputs=whole.held_inputs[:tasks, :size],
        held_residual=whole.held_residual[:tasks, :size],
        held_labels=whole.held_labels[:tasks, :size],
        held_tokens=whole.held_tokens[:tasks, :size],
        net=whole.net,
    )


def jobs(*names: str, seed: int = 0) -> list[Job]:
    keys = [Key("digits-rotated", "experts", name, "sgd", 0.2, 1.0, seed) for name in names]
    return [Job(key, "tuning", ARMS[key.arm]) for key in keys]


def test_a_run_is_the_same_whatever_runs_beside_it_and_whenever_it_runs() -> None:
    data = {seed: few(seed) for seed in (0, 1)}
    alone = carry_out(jobs("smk-2"), data, SHORT).runs
    beside = carry_out([*jobs("all", "random-2", seed=1), *jobs("smk-2")], data, SHORT).runs
    assert alone[0] == beside[2] == carry_out(jobs("smk-2"), data, SHORT).runs[0]
    assert beside[0].scores != beside[1].scores


def test_what_is_frozen_after_the_first_task_stays_and_the_read_out_with_it() -> None:
    data = {0: few(0)}
    done = carry_out(jobs("all", "frozen-experts", "frozen-router"), data, SHORT)
    assert [run.change > 0 for run in done.runs] == [True, False, True]
    shorter = {0: cut(data[0], tasks=1, size=40)}
    first = carry_out(jobs("all", "frozen-experts", "frozen-router"), shorter, SHORT)
    assert_same(done.net.readout, first.net.readout)
    assert_same(done.net.features[0], data[0].net.features)
    assert_same(done.net.experts.gate[1], first.net.experts.gate[1])
    assert_same(done.net.prototypes[2], first.net.prototypes[2])
    assert not torch.equal(done.net.prototypes[0], first.net.prototypes[0])


def test_everything_is_trained_where_that_is_the_regime() -> None:
    everything = [job._replace(key=job.key._replace(regime="everything")) for job in jobs("all")]
    done = carry_out(everything, {0: few(0)}, SHORT)
    assert not torch.equal(done.net.features[0], few(0).net.features)


def test_a_run_has_a_row_before_the_first_task_and_one_after_each_and_equal_stretches() -> None:
    run = carry_out(jobs("all"), {0: few(0)}, SHORT).runs[0]
    assert [len(row) for row in run.scores] == [3] * 4
    assert all(0 <= score <= 1 for row in run.scores for score in row)
    assert {len(values) for values in run.series.values()} == {3 * runs.STRETCHES}
    assert run.active == pytest.approx(0.25)


def test_stored_examples_are_a_hundred_of_each_earlier_task_and_the_same_for_every_arm() -> None:
    seen = [runs._Draws.of([3, 5, 3], 2, 4, 400, Schedule(tokens=50, steps=60), experts=4) for _ in range(2)]
    assert_same(seen[0], seen[1])
    draws = seen[0]
    assert torch.equal(draws.stored[:, 0], draws.stored[:, 2])
    assert not torch.equal(draws.stored[:, 0], draws.stored[:, 1])
    assert set(draws.stored_task.unique().tolist()) == {0, 1}
    for earlier in (0, 1):
        kept = draws.stored[:, 0][draws.stored_task[:, 0] == earlier].unique()
        later = runs._Draws.of([3], 3, 4, 400, Schedule(tokens=50, steps=60), experts=4)
        again = later.stored[later.stored_task == earlier].unique()
        assert len(kept) == runs.STORED
        assert torch.equal(kept, again)
    epoch = draws.examples[:8, 0].flatten()
    assert len(epoch.unique()) == 400


def test_chunks_hold_one_kind_of_step_and_every_job_once() -> None:
    wanted = jobs("all", "replay", "smk-1", "smk-2", "smk-4", "ewc", "max-1", "surprise-route")
    found = chunks(wanted)
    assert sorted(job.key for chunk in found for job in chunk) == sorted(job.key for job in wanted)
    assert all(len({needs(job) for job in chunk}) == 1 and len(chunk) <= runs.LANES for chunk in found)
    assert chunks(wanted) == found


def test_the_first_chunks_are_of_different_kinds() -> None:
    wanted = jobs("all", "replay", "smk-1", "smk-2", "smk-4", "ewc", "max-1", "surprise-route")
    kinds = [needs(chunk[0]) for chunk in chunks(wanted * runs.LANES)]
    different = len(set(kinds))
    assert 1 < different < len(kinds)
    assert len(set(kinds[:different])) == different


def test_digits_differ_by_seed_and_turned_images_begin_upright() -> None:
    upright, permuted = few(0), few(0, turned=False)
    assert_same(upright.labels, permuted.labels)
    assert not torch.equal(few(1).inputs, upright.inputs)
    image = upright.inputs[0, 0]
    assert sorted(image.tolist()) != sorted(upright.inputs[1, 0].tolist())
    assert_close(permuted.inputs[0, 0].sort().values, permuted.inputs[1, 0].sort().values, bound=0.0)


@pytest.mark.parametrize("turned", [True, False])
def test_a_model_is_drawn_matrix_by_matrix_and_tasks_and_features_are_those_of_every_bank(turned: bool) -> None:
    found, other = (digits(3, turned=turned, bank=bank) for bank in (BANK, Bank(experts=10, width=3)))
    assert_same(found[:-1], other[:-1])
    assert_same(found.net.features, other.net.features)
    assert other.net.experts.gate.shape == (10, 3, 64)
    draws = generator(3)
    for size in (1797, *[64] * (0 if turned else 5)):
        torch.randperm(size, generator=draws)
    shapes = {(64, 64): 1.0, (32, 64): 1.0}
    _, prototypes = (torch.randn(shape, generator=draws) * scale for shape, scale in shapes.items())
    gate, up, down = (torch.randn(32, 8, 64, generator=draws) * scale for scale in (64**-0.5, 64**-0.5, 8**-0.5))
    readout = torch.randn(10, 64, generator=draws) * 64**-0.5
    assert_same(found.net[1:], (prototypes, Experts(gate, up, down), readout))


def test_the_tasks_of_every_family_have_the_bank_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank(experts=10, width=3)
    made = forgetting.tasks_of("digits-rotated", 1, bank)
    assert set(made) == {*forgetting.TUNING_SEEDS, 0}
    assert {tuple(data.net.experts.gate.shape) for data in made.values()} == {(*bank, tasks.HIDDEN)}
    seen: list[tuple[Bank, str, int]] = []

    def of_text(shared: SimpleNamespace, texts: str, seed: int) -> Tasks:
        seen.append((shared.bank, texts, seed))
        return made[seed]

    def trunk(asked: Bank) -> SimpleNamespace:
        return SimpleNamespace(bank=asked, test="test", tuning="tuning")

    monkeypatch.setattr(forgetting, "trunk", trunk)
    monkeypatch.setattr(forgetting, "text", of_text)
    assert set(forgetting.tasks_of("text", 1, bank)) == set(made)
    assert seen == [(bank, "test" if seed == 0 else "tuning", seed) for seed in made]


def test_an_arm_that_selects_nothing_of_a_small_bank_is_updating_everything_and_told_to_be() -> None:
    bank = Bank(experts=10, width=3)
    all_, one, two, chance = carry_out(jobs("all", "smk-1", "smk-2", "random-2"), {0: few(0, bank=bank)}, SHORT).runs
    assert all_.active == pytest.approx(0.2)
    same = [run._replace(key=all_.key) == all_ for run in (one, two, chance)]
    assert same == [False, True, True]
    runs_of = store.Results({}, {"experts": bank.experts}, [all_, one, two, chance], [])
    assert set(idle(runs_of)) == {"smk-2", "random-2"}


def test_the_last_layer_from_outside_is_that_of_the_dense_model() -> None:
    config = text.dense(BANK)
    template = qwen3.abstract(config)
    noise = [normal(n, *leaf.shape) for n, leaf in enumerate(tree.leaves(template))]
    model = qwen3.init(tree.unflatten(template, noise), config=config, dtype=torch.float64)
    tokens = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs, residual = text.before_last_mlp(model, tokens, config=config)
    last = model.layers[-1].mlp
    assert isinstance(last, qwen3.Mlp)
    y = rms_norm(residual + qwen3.mlp_forward(last, inputs), residual.shape[-1:], eps=EPS)
    got = y @ (qwen3.output_weight(model) * model.norm).mT
    expected = qwen3.forward(model, tokens, (), config=config, moe=None).logits.flatten(0, 1)
    norms_are_rounded_to = torch.float32
    assert_close(got, expected, bound=tolerance(norms_are_rounded_to, terms=config.hidden_size))


def small(folder: Path, **changes: object) -> Options:
    options = Options(family=("digits-rotated",), seeds=2, arms=("root-neuron",), out=folder, workers=1)
    return replace(options, **changes)  # type: ignore[arg-type]


@pytest.fixture
def _small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_family(family: str, seeds: int, bank: Bank) -> dict[int, Tasks]:
        return {seed: few(seed, bank=bank) for seed in (*forgetting.TUNING_SEEDS, *range(seeds))}

    monkeypatch.setattr(forgetting, "tasks_of", of_family)
    monkeypatch.setattr(forgetting, "TUNING_SEEDS", (1000,))


@pytest.mark.usefixtures("_small_digits")
def test_a_study_that_was_stopped_goes_on_to_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = forgetting.run(small(tmp_path / "whole"))
    assert whole.name == "report.html"
    calls: list[int] = []

    asked: set[tuple[str, Key]] = set()

    def stops(jobs: Sequence[Job], *args: object) -> runs.Trained:
        calls.append(1)
        asked.update((job.stage, job.key) for job in jobs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return carry_out(jobs, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(crew, "carry_out", stops)
    monkeypatch.setattr(forgetting, "write_report", lambda folder, _: folder)
    with pytest.raises(KeyboardInterrupt):
        forgetting.run(small(tmp_path / "cut"))
    forgetting.run(small(tmp_path / "cut"))
    before = len(calls)
    forgetting.run(small(tmp_path / "cut"))
    assert len(calls) == before
    results = [store.read_results(tmp_path / name / store.RESULTS) for name in ("whole", "cut")]

    def by_key(found: store.Results) -> dict[tuple[str, Key], Run]:
        return {(run.stage, run.key): run for run in found.runs}

    assert by_key(results[0]) == by_key(results[1])
    made = by_key(results[0])
    shared = {key for stage, key in made if stage == "frontier" and ("evaluation", key) in made}
    assert shared
    assert all(made["frontier", key] == made["evaluation", key]._replace(stage="frontier") for key in shared)
    assert asked == {(stage, key) for stage, key in made if stage != "frontier" or key not in shared}
    assert results[0].specialisations == results[1].specialisations
    seeds = {run.stage: {r.key.seed for r in results[0].runs if r.stage == run.stage} for run in results[0].runs}
    assert seeds == {"tuning": {1000}, "evaluation": {0, 1}, "frontier": {0, 1}}


@pytest.mark.usefixtures("_small_digits")
def test_arms_of_a_claim_on_accuracy_are_run_next_to_their_rate_under_their_best_optimizer(tmp_path: Path) -> None:
    forgetting.run(small(tmp_path, arms=("balance-route", "loss-route", "root-neuron", "matched", "smk-2")))
    made = store.read_results(tmp_path / store.RESULTS).runs
    near = [run.key for run in made if run.stage == "neighbour"]
    (optimizer,) = (name for name in OPTIMIZERS if name in {key.optimizer for key in near})
    tried = [run for run in made if run.stage == "tuning" and run.key.arm == "balance-route"]
    assert max(tried, key=lambda run: sum(run.scores[-1])).key.optimizer == optimizer
    (tuned,) = {
        run.key.lr for run in made if run.stage == "evaluation" and run.key[2:4] == ("balance-route", optimizer)
    }
    assert {(key.arm, key.lr, key.seed) for key in near} == {
        ("balance-route", rate, seed) for rate in rates(optimizer) if rate in (tuned / 2, tuned * 2) for seed in (0, 1)
    }


@pytest.mark.usefixtures("_small_digits")
def test_the_frontier_has_every_rate_under_the_optimizers_that_a_claim_names(tmp_path: Path) -> None:
    forgetting.run(small(tmp_path, seeds=1, arms=("all", "smk-2")))
    made = store.read_results(tmp_path / store.RESULTS).runs
    found = {(run.key.arm, run.key.optimizer, run.key.lr) for run in made if run.stage == "frontier"}
    tried = [run for run in made if run.stage == "tuning" and run.key.arm == "all"]
    best = max(tried, key=lambda run: sum(run.scores[-1])).key.optimizer
    of_all = [optimizer for optimizer in OPTIMIZERS if optimizer in (best, "adagrad")]
    wanted = [("smk-2", optimizer) for optimizer in OPTIMIZERS] + [("all", optimizer) for optimizer in of_all]
    assert found == {(arm, optimizer, rate) for arm, optimizer in wanted for rate in rates(optimizer)}


def test_a_matched_arm_brings_what_it_is_matched_to() -> None:
    assert set(forgetting.chosen_arms(("matched",))) == {"matched", "smk-2", "all"}
    assert forgetting.chosen_arms(()) == dict(ARMS)


def nobody(work: Sequence[crew.Work]) -> Iterator[crew.Done]:
    raise AssertionError(f"{len(work)} chunks were asked for")


def test_the_matched_rate_changes_the_experts_as_much_by_interpolation_and_the_best_rate_is_that_of_tuning(
    tmp_path: Path,
) -> None:
    study = forgetting.Study(
        options=small(tmp_path), family="digits-rotated", folder=tmp_path, tasks=tmp_path / "tasks", crew=nobody
    )
    grid = rates("sgd")
    for place, rate in enumerate(grid):
        for seed in forgetting.TUNING_SEEDS:
            best = place == 3
            for name, score, change in (("all", 0.5, rate**2), ("smk-2", float(best), 0.03 if best else 9.0)):
                key = study.key(name, "sgd", rate, 0.0, seed)
                table = ((0.0,), (score,))
                study.runs["tuning", key] = Run(key, "tuning", table, table, change=change, active=0.25, series={})
    assert study._tuned("smk-2", ARMS["smk-2"], "sgd") == (grid[3], 0.0)
    assert study._tuned("all", ARMS["all"], "sgd") == (grid[0], 0.0)
    assert study._tuned("matched", ARMS["matched"], "sgd")[0] == pytest.approx(0.03**0.5)


def test_every_optimizer_has_a_grid_and_every_exploration_changes_something() -> None:
    for arm in ARMS.values():
        for optimizer in arm.optimizers:
            grid = rates(optimizer)
            assert len(grid) == 6
            assert all(second == 2 * first for first, second in pairwise(grid))
    plain = {replace(arm, note="", optimizers=()) for arm in (ARMS["all"], ARMS["root-neuron"])}
    assert all(replace(arm, note="", optimizers=()) not in plain for arm in EXPLORATIONS.values())
