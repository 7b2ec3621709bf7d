from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments import compare
from experiments.page_blocks import Table, markdown
from tests.runs import write_run
from tests.test_page_folder import assert_self_contained


def tables(*folders: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    """The rows of every table by heading and name."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for heading, pieces in compare.compare(folders):
        rows = [row for piece in pieces if isinstance(piece, Table) for row in piece.rows]
        found[heading] = {row[0]: tuple(row[1:]) for row in rows}
    return found


def words(*folders: Path) -> str:
    return "\n".join(line for _, pieces in compare.compare(folders) for line in markdown(pieces))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, a longer one with other figures, and one that has not finished."""
    home = tmp_path_factory.mktemp("runs")
    first = write_run(home / "first")
    second = write_run(home / "second", {"final_loss": 2.2101, "corpus_fingerprint": "cd34", "threads": 2}, steps=20)
    third = write_run(home / "third", steps=5, finished=False)
    (third / "config.json").write_text('{"version": 2, "seed": 8, "other": {"preset": "x"}}')
    return first, second, third


def test_a_run_is_the_same_as_its_copy(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    found = tables(*folders)
    for heading in ("Figures", "Held-out loss by domain", "Last steps"):
        assert found[heading]
        for row in found[heading].values():
            assert row[1] in (f"{row[0]} (same)", "-"), row
    assert not found["Configuration: what differs"]
    assert not found["Versions and machine: what differs"]
    text = words(*folders)
    assert "a/run | b/run" in text
    assert text.count("Nothing differs.") == 2
    assert "different lengths" not in text


def test_differences_are_to_the_first_run(runs: tuple[Path, ...]) -> None:
    found = tables(*runs[:2])
    assert found["Figures"]["loss: Hyper-SMoE, trained"] == ("2.3101", "2.2101 (-0.1000)")
    assert found["Figures"]["steps recorded"] == ("36", "60 (+24)")
    assert tables(*runs[1::-1])["Figures"]["loss: Hyper-SMoE, trained"] == ("2.2101", "2.3101 (+0.1000)")
    assert found["Held-out loss by domain"]["a|b"] == ("2.7700", "2.7700 (same)")
    assert found["Configuration: what differs"] == {"`train.steps`": ("12", "20")}
    facts = {"`threads`": ("1", "2"), "`corpus_fingerprint`": ("ab12", "cd34")}
    assert found["Versions and machine: what differs"] == facts


def test_what_cannot_be_compared_is_said(runs: tuple[Path, ...]) -> None:
    text = words(*runs)
    assert "**Not finished, so without held-out figures**: third." in text
    assert "**The texts differ**" in text
    assert "third: dense 5, moe 5, dense_continued 5" in text
    assert "only beside the spread between seeds" in text


def test_unfinished_runs_of_other_presets_and_lengths_compare(runs: tuple[Path, ...]) -> None:
    found = tables(runs[2], runs[0])
    assert found["Figures"]["loss: Hyper-SMoE, trained"] == ("-", "2.3101 (-)")
    assert found["Figures"]["steps recorded"] == ("15", "36 (+21)")
    assert found["Configuration: what differs"]["`other.preset`"] == ("x", "-")
    assert found["Configuration: what differs"]["`seed`"] == ("8", "7")
    assert all(value != "-" for value in found["Last steps"]["`loss`"])
    both = [write_run(runs[0].parent / f"open{place}", steps=1, finished=False) for place in range(2)]
    assert "No run has finished." in words(*both)


def test_the_last_steps_are_means_over_the_last_tenth(tmp_path: Path) -> None:
    folders = []
    for name, count in (("a", 20), ("b", 3)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        lines = [json.dumps({"step": step, "phase": "moe", "loss": float(step), "pi": None}) for step in range(count)]
        (folders[-1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert tables(*folders)["Last steps"]["`loss`"] == ("18.5000", "2 (-16.5000)")
    assert tables(*folders)["Last steps"]["`pi`"] == ("-", "-")


def test_the_page_holds_all_it_shows_and_is_the_same_again(
    runs: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "CURVES", compare.CURVES[:2])
    first = compare.write_comparison(runs, tmp_path / "new" / "folder").read_bytes()
    assert compare.write_comparison(runs, tmp_path / "other").read_bytes() == first
    text = assert_self_contained(first.decode()).text
    assert all(name in text for name in ("first", "second", "third", "loss, phase moe", "2.2101 (-0.1000)"))
    assert (tmp_path / "other" / compare.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_more_runs_than_styles_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CURVES", compare.CURVES[:2])
    names = [f"_{place}$x_{place}$<b>" for place in range(len(compare.STYLES) + 1)]
    folders = [write_run(tmp_path / name, steps=1, finished=False) for name in names]
    reader = assert_self_contained(compare.write_comparison(folders, tmp_path).read_text())
    assert all(name in reader.text for name in names)


def test_every_run_is_named_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / home / "x" / "run", steps=1, finished=False) for home in ("a", "b")]
    assert "x/run (1) | x/run (2)" in words(*folders)


def test_errors_are_one_line(runs: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken", steps=1)
    (broken / "summary.json").write_text("{\n\n")
    (tmp_path / "file").write_text("")
    cases = (
        ([runs[0]], "expected two runs or more, got 1"),
        ([runs[0], tmp_path / "none"], "none: no such folder"),
        ([runs[0], tmp_path / "empty"], "empty: holds no run: there is no metrics.jsonl"),
        ([runs[0], broken], r"summary\.json: "),
        ([runs[0], runs[1], runs[0] / ".." / "first"], "first is given twice"),
        ([runs[0], runs[1], Path("--out"), tmp_path / "file"], "file"),
    )
    for arguments, message in cases:
        assert compare.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(f"error: .*{message}.*\n", error), error
