"""The study of whole carved models on domains in turn, at a size that is done in seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import whole_model
from experiments.study import store
from experiments.study.records import Run
from experiments.whole_model import ARMS, RATES, STORED, Options, choices, key, settings_of
from onn import data, grain, objective, optim, train, tree
from onn.qwen3 import Model, Moe
from tests.support import assert_close, assert_same, tolerance

NAMES = ("replay", "experts: consolidation")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "BYTES", 20_000)
    monkeypatch.setattr(whole_model, "RATES", {name: pairs[1:3] for name, pairs in RATES.items()})


def small(out: Path, *, arms: tuple[str, ...] = NAMES, seeds: int = 2) -> Options:
    return Options(seeds=seeds, steps=2, arms=arms, dense_steps=2, layers=1, out=out, workers=1)


def told(seed: int, place: int, name: str, *, steps: int = 50) -> torch.Tensor:
    return choices(seed, place, ARMS[name], steps=steps, size=8, domains=4)


def domains(choice: torch.Tensor) -> torch.Tensor:
    return (choice[..., 0] * 4).long()


@pytest.mark.parametrize("seed", range(5))
def test_domains_come_in_the_order_of_a_latin_square(seed: int) -> None:
    found = [domains(told(seed, place, "adamw")).unique().tolist() for place in range(4)]
    assert found == [[(seed + place) % 4] for place in range(4)]


def test_arms_of_a_seed_see_the_same_windows_and_seeds_different_ones() -> None:
    assert torch.equal(told(0, 2, "adamw"), told(0, 2, "experts: consolidation"))
    assert not torch.equal(told(0, 2, "adamw")[..., 1], told(4, 2, "adamw")[..., 1])
    assert set(domains(told(0, 2, "joint")).unique().tolist()) == {0, 1, 2, 3}


def test_half_of_a_batch_of_replay_is_of_the_stored_windows_of_the_domains_before() -> None:
    plain, replayed = (told(1, 3, name, steps=400) for name in ("adamw", "replay"))
    assert torch.equal(replayed[:, :4], plain[:, :4])
    assert set(domains(replayed[:, 4:]).unique().tolist()) == {1, 2, 3}
    assert len(replayed[:, 4:, 1].unique()) == STORED
    assert torch.equal(told(1, 0, "replay"), told(1, 0, "adamw"))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_what_its_step_is_told_at_rates_that_stay(name: str, tmp_path: Path) -> None:
    arm, config = ARMS[name], whole_model.configuration(small(tmp_path))
    rates = RATES[arm.grid][-1]
    settings = settings_of(whole_model.Work(key(name, rates, 0), 2, tmp_path, config))
    own = settings.sparse
    assert own is not None
    assert (own.optimizer, own.regime, own.granularity) == (arm.optimizer, arm.regime, arm.granularity)
    of_experts = own.consolidation.lr if arm.optimizer == "consolidation" else settings.optim.lr
    assert of_experts == rates[arm.grid != "adamw"]
    assert arm.paced or settings.optim.lr == rates[0]
    for at in (0, 1, 1000):
        step = torch.tensor(at)
        peak = optim.warmup_cosine(step, peak=1.0, warmup=settings.optim.warmup, total=10, floor=settings.optim.floor)
        assert float(peak) == pytest.approx(1.0)
        assert float(objective.target_share(step, config=own.density)) == pytest.approx(0.25)


def test_a_step_held_back_is_that_of_a_lower_rate_but_for_experts_and_thresholds(tmp_path: Path) -> None:
    config = whole_model.configuration(small(tmp_path))
    state = train.init_state(whole_model.started(config))
    windows = data.sample_batch(whole_model._windows(config), told(0, 0, "adamw")[0])

    def after(lr: float) -> Model:
        work = whole_model.Work(key("adamw", (lr, 0.0), 0), 2, tmp_path, config)
        return train.step(state, windows, (), settings_of(work))[0].model

    fast, slow = after(0.004), after(0.001)
    held = whole_model.held_back(state.model, fast, share=0.25)
    assert_close(held, grain.with_mlps(slow, with_fast_part(slow, fast)), bound=tolerance(torch.float32, terms=1))
    assert_same(objective.carved_layers(held)[0].experts, objective.carved_layers(fast)[0].experts)


def with_fast_part(slow: Model, fast: Model) -> list[Moe]:
    pairs = zip(objective.carved_layers(slow), objective.carved_layers(fast), strict=True)
    return [
        Moe(experts=other.experts, router=own.router._replace(thresholds=other.router.thresholds))
        for own, other in pairs
    ]


def test_every_arm_is_tried_at_as_many_rates() -> None:
    assert len({len(pairs) for pairs in RATES.values()}) == 1
    assert {arm.grid for arm in ARMS.values()} == set(RATES)


def test_a_study_holds_every_run_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_model.run(small(tmp_path / "whole"))
    runs = store.read_results(tmp_path / "whole" / store.RESULTS).runs
    assert len(runs) == len(NAMES) * 2 * 2
    for run in runs:
        assert len(run.losses) == 5
        assert all(len(row) == 4 and all(map(math.isfinite, row)) for row in run.losses)
        assert 0 < run.active <= 1
        assert run.change > 0
    begun = {run.key.seed: run.losses[0] for run in runs}
    assert begun[1] == (*begun[0][1:], begun[0][0])
    shown = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in shown) for name in NAMES)

    (tmp_path / "part").mkdir()
    for name in ("settings.json", "start.safetensors"):
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    journal = (tmp_path / "whole" / store.RUNS).read_bytes().splitlines(keepends=True)
    (tmp_path / "part" / store.RUNS).write_bytes(b"".join(journal[:5]))
    whole_model.run(small(tmp_path / "part"))
    again = store.read_results(tmp_path / "part" / store.RESULTS).runs
    assert {run.key: run for run in again} == {run.key: run for run in runs}

    with pytest.raises(ValueError, match="holds another study"):
        whole_model.run(replace(small(tmp_path / "part"), steps=3))


def test_the_change_of_experts_is_relative(tmp_path: Path) -> None:
    config = whole_model.configuration(small(tmp_path))
    model = whole_model.started(config)
    assert whole_model._change(model, model) == 0
    twice = tree.map1(lambda leaf: 2 * leaf, model)
    assert whole_model._change(model, twice) == pytest.approx(1.0)


def run_of(name: str, rate: int, seed: int, *, learnt: float, forgotten: float) -> Run:
    scores = ((-3.0, -3.0), (-learnt, -3.0), (-learnt - forgotten, -learnt))
    return Run(key(name, RATES[ARMS[name].grid][rate], seed), "frontier", scores, scores, 0.1, 0.25, {})


SPARED = {
    "adamw": 0.0,
    "adamw, paced": 0.1,
    "consolidation": 0.3,
    "experts: adamw": 0.05,
    "experts: consolidation": 0.25,
}


def test_every_rate_is_told_and_arms_are_held_against_adamw_at_equal_learning() -> None:
    runs = [
        run_of(name, rate, seed, learnt=2.0 - 0.1 * rate, forgotten=0.1 * (rate + seed) - spared)
        for name, spared in SPARED.items()
        for rate in range(3)
        for seed in range(3)
    ]
    head, *rows = whole_model.rates_table(runs).splitlines()
    assert head.startswith("arm ")
    assert len(rows) == 3 * len(SPARED)
    assert rows[0].split() == ["adamw", f"{RATES['adamw'][0][0]:g}", "2.050", "2.000", "0.100", "0.25"]
    found = [line.split("  ") for line in whole_model.contrasts_table(runs).splitlines()[1:]]
    told = [[cell.strip() for cell in line if cell.strip()] for line in found]
    assert told == [
        ["adamw, paced", "adamw", "+0.100 (+0.100, +0.100)", "3"],
        ["consolidation", "adamw", "+0.300 (+0.300, +0.300)", "3"],
        ["consolidation", "adamw, paced", "+0.200 (+0.200, +0.200)", "3"],
        ["experts: adamw", "adamw", "+0.050 (+0.050, +0.050)", "3"],
        ["experts: consolidation", "experts: adamw", "+0.200 (+0.200, +0.200)", "3"],
    ]


def test_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown arm='adam'"):
        whole_model.run(small(tmp_path, arms=("adam",)))
