"""Calibration: a valid tiling, measured once for each size and machine, kept in a strict file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import onn.functional as F
from onn import calibration
from onn.calibration import DENSITIES, ENTRIES, calibrate, calibrated


def small(path: Path, *, width: int = 2) -> F.Tiling:
    return calibrated(path, num_experts=4, width=width, hidden=8, tokens=6, dtype=torch.float32, repeats=1)


def test_a_tiling_is_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "calibration.json"
    first = small(path)
    assert first.entries in ENTRIES
    assert first.whole_from in (*DENSITIES, 1.0)
    other = small(path, width=3)
    assert len(json.loads(path.read_text())) == 2
    monkeypatch.setattr(calibration, "calibrate", lambda **sizes: pytest.fail("measured again"))
    assert small(path) == first
    assert small(path, width=3) == other


def test_the_fastest_of_each_comparison_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[F.Tiling, float]] = []

    def step(tiling: F.Tiling, density: float, *args: object, **sizes: object) -> object:
        asked.append((tiling, density))
        return tiling, density

    def seconds(step: tuple[F.Tiling, float]) -> float:
        tiling, density = step
        if tiling.whole_from == 0:
            return 0.5 if density >= 0.5 else 2.0
        return 1.0 + abs(tiling.entries - ENTRIES[1])

    monkeypatch.setattr(calibration, "_step", step)
    monkeypatch.setattr(calibration, "_seconds", seconds)
    sizes = {"num_experts": 4, "width": 2, "hidden": 8, "tokens": 6, "repeats": 3}
    assert calibrate(**sizes, dtype=torch.float32) == F.Tiling(ENTRIES[1], 0.55)
    assert {tiling.entries for tiling, _ in asked} == set(ENTRIES)


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"a": NaN}'])
def test_a_file_that_is_no_calibration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: not a calibration"):
        small(path)


@pytest.mark.parametrize("entry", ['{"entries": 1.5, "whole_from": 0.5}', '{"entries": 3}', '{"entries": true}'])
def test_an_entry_that_is_no_tiling_is_named(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "calibration.json"
    small(path)
    (key,) = json.loads(path.read_text())
    path.write_text(f'{{"{key}": {entry}}}')
    with pytest.raises(ValueError, match="expected entries, a whole number"):
        small(path)


def test_sizes_are_positive() -> None:
    with pytest.raises(ValueError, match="calibrate: expected positive sizes, got E=0"):
        calibrate(num_experts=0, width=1, hidden=1, tokens=1, dtype=torch.float32, repeats=1)
