"""A folder holds one study: what it was begun with is what it goes on with, down to every number of every arm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import forgetting
from experiments.forgetting import Options
from experiments.study import store
from experiments.study.arms import ARMS, EXPLORATIONS, Arm
from experiments.study.tasks import Bank, Family, Tasks
from onn.observe import Json


class BegunError(Exception):
    """The settings were accepted, and the work begins."""


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(family: str, seeds: int, bank: Bank) -> Mapping[int, Tasks]:
        raise BegunError

    monkeypatch.setattr(forgetting, "tasks_of", begun)


def asked(
    folder: Path,
    *arms: str,
    seeds: int = 2,
    family: tuple[Family, ...] = ("digits-rotated",),
    explore: bool = False,
    experts: int = 32,
    width: int = 8,
) -> Options:
    return Options(
        family=family,
        seeds=seeds,
        arms=arms or ("root-neuron", "matched"),
        explore=explore,
        experts=experts,
        width=width,
        out=folder,
    )


def begin(options: Options) -> None:
    with pytest.raises(BegunError):
        forgetting.run(options)


def refused(options: Options, pattern: str) -> None:
    assert options.out is not None
    before = (options.out / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=pattern):
        forgetting.run(options)
    assert (options.out / "settings.json").read_bytes() == before


def other(value: Json) -> Json:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return value * 2
    return "another" if isinstance(value, str) else 0.75


def test_a_study_goes_on_where_nothing_differs(tmp_path: Path) -> None:
    for explore in (False, True):
        options = asked(tmp_path / str(explore), explore=explore)
        begin(options)
        begin(options)
        assert isinstance(options.out, Path)
        arms = json.loads((options.out / "settings.json").read_text())["arms"]
        assert set(arms) == {"root-neuron", "matched", "smk-2", "all"} | (set(EXPLORATIONS) if explore else set())


@pytest.mark.parametrize("field", [field.name for field in fields(Arm)])
def test_one_number_of_one_arm_is_another_study(tmp_path: Path, field: str) -> None:
    begin(asked(tmp_path))
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    settings["arms"]["smk-2"][field] = other(settings["arms"]["smk-2"][field])
    path.write_text(json.dumps(settings))
    refused(asked(tmp_path), rf"holds another study.*settings\.json: arms\.smk-2\.{field} was [^;]*\.$")


def test_all_that_differs_is_named_as_far_as_it_is_little(tmp_path: Path) -> None:
    begin(asked(tmp_path, "root-neuron"))
    few = "seeds was 2, 3 is asked for; arms.root-neuron is not asked for; arms.all is new."
    refused(asked(tmp_path, "all", seeds=3), re.escape(few))
    refused(asked(tmp_path, "root-neuron", explore=True), f"{len(EXPLORATIONS) - store.NAMED} more")
    refused(
        asked(tmp_path, "root-neuron", family=("digits-permuted",)),
        r'family was \["digits-rotated"\], \["digits-permuted"\] is asked for; schedules\.digits-rotated is not',
    )


def test_another_grid_of_rates_is_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(asked(tmp_path))
    monkeypatch.setattr(forgetting, "rates", lambda optimizer: (0.5,))
    refused(asked(tmp_path), r"settings\.json: rates\.sgd was \[0\.05, .*\], \[0\.5\] is asked for; rates\.adamw was")


def test_another_bank_is_another_study(tmp_path: Path) -> None:
    begin(asked(tmp_path))
    refused(asked(tmp_path, experts=10), r"settings\.json: experts was 32, 10 is asked for\.$")
    refused(asked(tmp_path, width=9), r"settings\.json: width was 8, 9 is asked for\.$")


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        (Bank(9, 8), "expected experts=9 >= 10"),
        (Bank(-32, 8), "expected experts=-32 >= 10"),
        (Bank(10, 97), "expected 1 <= width=97 <= 96"),
        (Bank(10, 0), "expected 1 <= width=0 <= 96"),
    ],
)
def test_a_bank_out_of_bounds_is_refused_before_anything_is_written(tmp_path: Path, bank: Bank, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forgetting.run(asked(tmp_path / "study", experts=bank.experts, width=bank.width))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("bank", [Bank(10, 96), Bank(10, 1), Bank(256, 96)])
def test_banks_up_to_the_bounds_are_begun_and_handed_on(
    tmp_path: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Bank] = []

    def begun(family: str, seeds: int, handed: Bank) -> Mapping[int, Tasks]:
        seen.append(handed)
        raise BegunError

    monkeypatch.setattr(forgetting, "tasks_of", begun)
    begin(asked(tmp_path, experts=bank.experts, width=bank.width))
    assert seen == [bank]


@given(st.integers(10, 200))
def test_every_arm_and_exploration_of_a_bank_has_an_active_expert(experts: int) -> None:
    explored = forgetting.explorations(Bank(experts, 8))
    assert all(round(arm.active * experts) >= 1 for arm in (*ARMS.values(), *explored.values()))
    assert {arm.active for arm in EXPLORATIONS.values() if arm not in explored.values()} == {
        density for density in (1 / 16, 1 / 32) if density * experts < 1
    }


def test_every_grid_of_strengths_has_values_that_are_not_on_its_edge() -> None:
    grids = {arm.strengths for arm in ARMS.values()} - {(0.0,)}
    assert len(grids) == 3
    assert all(list(grid) == sorted(set(grid)) and len(grid) >= 3 for grid in grids)


@pytest.mark.parametrize(
    ("text", "words"), [("[1]", "earlier version"), ('{"seeds": 2}', "earlier version"), ("{", r"settings\.json: ")]
)
def test_a_folder_of_an_earlier_version_or_with_damaged_settings_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "settings.json").write_text(text)
    refused(asked(tmp_path), words)


def test_unknown_arms_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smk-3"):
        forgetting.run(asked(tmp_path, "smk-3"))


def test_an_arm_tells_every_field_and_its_choices_by_name() -> None:
    told = {name: arm.told() for name, arm in {**ARMS, **EXPLORATIONS}.items()}
    assert all(list(one) == [field.name for field in fields(Arm)] for one in told.values())
    assert [told["random-2"][name] for name in ("rule", "grain", "expert_rule")] == ["RANDOM", "NEURON", "EVERY"]
    assert json.loads(json.dumps(told["ewc"]))["strengths"] == [1.0, 10.0, 100.0]
    assert len({json.dumps(one) for one in told.values()}) == len(ARMS) + len(EXPLORATIONS)
