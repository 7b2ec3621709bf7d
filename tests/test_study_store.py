"""The study's journal and results: what was written comes back, and damage is told from being cut off."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.study import store
from experiments.study.records import Key, Run, Specialisation, Stage, Vocabulary
from experiments.study.store import Results, append, load_runs, load_specialisations, read_results, write_results
from tests.study_runs import key, run, specialisation

FLOATS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2])
ROWS = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=3).map(tuple)
KEYS = st.builds(
    Key,
    family=st.text(),
    regime=st.text(),
    arm=st.sampled_from(["inf", "-inf", "null", ""]) | st.text(),
    optimizer=st.text(),
    lr=FLOATS,
    strength=FLOATS,
    seed=st.integers(),
)
STAGES: st.SearchStrategy[Stage] = st.sampled_from(get_args(Stage))
RUNS = st.builds(
    Run,
    key=KEYS,
    stage=STAGES,
    scores=ROWS,
    losses=ROWS,
    change=FLOATS,
    active=FLOATS,
    series=st.dictionaries(st.sampled_from(["loss", "tau", "surprise", "pi"]), st.lists(FLOATS, max_size=3).map(tuple)),
)
VOCABULARIES = st.builds(
    Vocabulary,
    symbols=st.sampled_from(["input", "target", "class"]),
    mean=FLOATS,
    experts=st.lists(FLOATS, max_size=3).map(tuple),
    chance=st.lists(FLOATS, max_size=3).map(tuple),
    permuted=st.lists(FLOATS, max_size=3).map(tuple),
)
SPECIALISATIONS = st.builds(
    Specialisation,
    key=KEYS,
    usage=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
    information=FLOATS,
    permuted=st.lists(FLOATS, max_size=3).map(tuple),
    ablation=ROWS,
    saturation=st.lists(FLOATS, max_size=3).map(tuple),
    coactivation=FLOATS,
    vocabulary=st.lists(VOCABULARIES, max_size=2).map(tuple),
)


def bits(value: object) -> str:
    """Equal for equal types and values, NaN and the sign of 0 included."""
    return repr(value)


@given(st.lists(st.lists(RUNS, max_size=3), max_size=3))
def test_runs_come_back_to_the_bit_however_they_were_appended(tmp_path: Path, batches: list[list[Run]]) -> None:
    path = tmp_path / "runs.jsonl"
    path.unlink(missing_ok=True)
    for batch in batches:
        append(path, batch)
    assert bits(load_runs(path)) == bits([one for batch in batches for one in batch])


@given(st.lists(RUNS, max_size=3), st.lists(SPECIALISATIONS, max_size=3))
def test_results_come_back_to_the_bit(tmp_path: Path, runs: list[Run], found: list[Specialisation]) -> None:
    path = tmp_path / "results.json"
    results = Results({"threads": 1, "versions": {"torch": "2"}}, {"seeds": [0, 1], "name": 'a"\n'}, runs, found)
    write_results(path, results)
    assert bits(read_results(path)) == bits(results)


def test_a_specialisation_comes_back_and_is_not_taken_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "specialisation.jsonl"
    append(path, [specialisation(key(3))])
    assert load_specialisations(path) == [specialisation(key(3))]
    with pytest.raises(ValueError, match="of Run"):
        load_runs(path)


def test_a_specialisation_from_before_vocabularies_were_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "specialisation.jsonl"
    record = json.loads(store._line(specialisation(key(3))))
    del record["vocabulary"]
    path.write_text(json.dumps(record) + "\n")
    assert load_specialisations(path) == [specialisation(key(3))._replace(vocabulary=())]


@pytest.mark.parametrize("damage", [{"symbols": "word"}, {"experts": 0.5}, {"more": 1}, {"mean": "0.5"}])
def test_a_damaged_vocabulary_is_named_by_its_place(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "specialisation.jsonl"
    record = json.loads(store._line(specialisation(key(3))))
    record["vocabulary"][0] |= damage
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"specialisation\.jsonl, line 1: vocabulary: "):
        load_specialisations(path)


def test_a_journal_that_has_not_begun_is_empty(tmp_path: Path) -> None:
    assert load_runs(tmp_path / "runs.jsonl") == []
    assert load_specialisations(tmp_path / "runs.jsonl") == []


def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    runs = [run(key(seed), tasks=1, stretches=1) for seed in range(3)]
    append(path, runs[:2])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = [runs[0]] if size >= first else []
        assert load_runs(path) == kept
        if size % 50 == 0 or size in (first - 1, first, len(whole) - 1):
            append(path, [runs[2]])
            assert load_runs(path) == [*kept, runs[2]]


def changed(what: str, value: object) -> str:
    record = json.loads(store._line(run(key(), tasks=1, stretches=1)))
    if what in record["key"]:
        record["key"][what] = value
    else:
        record[what] = value
    return json.dumps(record)


DAMAGE = {
    "not JSON": "{",
    "not an object": "[]",
    "another record": '{"a": 1}',
    "unknown field": changed("more", 1),
    "missing fields": '{"stage": "tuning"}',
    "text for a number": changed("change", "0.1"),
    "a truth value for a number": changed("change", True),
    "a number for a text": changed("arm", 1),
    "a fraction for a seed": changed("seed", 1.5),
    "a truth value for a seed": changed("seed", True),
    "unknown stage": changed("stage", "rehearsal"),
    "unknown series": changed("series", {"gain": []}),
    "no table": changed("scores", 1.0),
    "text for a row": changed("scores", ["inf"]),
    "list for a series": changed("series", []),
    "a key that is none": changed("key", None),
    "a number that no float holds": changed("change", 1).replace('"change": 1', '"change": 1e999'),
    "an integer that no float holds": changed("change", 10**400),
    "an infinity that JSON has not": changed("change", math.inf),
    "a key that lacks its seed": changed("key", {"family": "a"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_names_file_and_line_wherever_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, [run(key())])
    good = path.read_text()
    for text, line in ((good + DAMAGE[damage] + "\n", 2), (DAMAGE[damage] + "\n" + good, 1)):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"runs\.jsonl, line {line}: "):
            load_runs(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1}', '{"version": 1, "facts": {}, "settings": {}, "runs": {}}'],
)
def test_damaged_results_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: "):
        read_results(path)
    with pytest.raises(ValueError, match="nowhere"):
        read_results(tmp_path / "nowhere")


def test_a_damaged_run_of_the_results_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, Results({}, {}, [run(key(0)), run(key(1))], []))
    path.write_text(path.read_text().replace('"seed": 1}', '"seed": null}'))
    with pytest.raises(ValueError, match=r"results\.json: runs\[1\]: key: seed: "):
        read_results(path)


def test_what_no_record_may_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, [run(key(0))])
    strange = Run._make([*run(key(1))[:-1], {"loss": ({1, 2},)}])
    with pytest.raises(TypeError, match="holds"):
        append(path, [run(key(2)), strange])
    assert load_runs(path) == [run(key(0))]


def test_a_line_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, real = tmp_path / "runs.jsonl", [], os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        seen.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    append(path, [run(key(0)), run(key(1))])
    assert seen[0] == 2


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_results(path, Results({}, {}, [run(key(0))], []))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_results(path, Results({}, {}, [run(key(1))], []))
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]
