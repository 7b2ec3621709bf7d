"""A finished run repeated from its folder, and what came out otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.facts import NAMES, differences, facts
from experiments.keeping import METRICS, PHASES
from experiments.pipeline import finished, run, saved_config
from onn import check, observe, storage
from onn.observe import Json, Record

CLOCKS = ("tokens_per_second",)
"""Figures of a step that no two runs share."""
OF_ONE_RUN = ("command", "seconds", "peak_memory_gib", "resumed_from", "finished", *NAMES)
"""Entries of a summary that say how a run was made, not what came out."""


class Row(NamedTuple):
    """One comparison."""

    what: str
    compared: int
    first: str
    """The first difference; empty where there is none."""


def replay(folder: Path, out: Path) -> list[Row]:
    """Repeat a finished run in another folder, and compare.

    Raises:
        ValueError: the run is not finished, or whatever `run` refuses.
    """
    summary = finished(folder)
    if summary is None:
        raise ValueError(f"{folder}: holds no finished run; --resume finishes one.")
    print(origin(summary))
    changes = differences(summary, facts(str(summary.get("corpus_fingerprint", ""))))
    if changes:
        print(f"not as then, so bits may differ: {'; '.join(changes)}.", file=sys.stderr)
    again = run(saved_config(folder), out)
    moved = differences({"corpus_fingerprint": summary.get("corpus_fingerprint")}, again)
    if moved:
        print(f"not as then: {'; '.join(moved)}.", file=sys.stderr)
    return compare(folder, out)


def origin(summary: Mapping[str, Json]) -> str:
    """What the original run was made with."""
    known = {name: summary.get(name) for name in NAMES}
    return "\n".join(f"{name}: {observe.encode(value, indent=None)}" for name, value in known.items())


def compare(folder: Path, other: Path) -> list[Row]:
    """Two finished runs: their steps, models and figures, but for clocks."""
    rows = [
        _steps(phase, *(_records(path, phase) for path in (folder, other)))
        for phase in PHASES
        if _records(folder, phase) or _records(other, phase)
    ]
    models = (f"{phase}.safetensors" for phase in PHASES)
    rows += [
        _model(folder / name, other / name)
        for name in models
        if any((path / name).exists() for path in (folder, other))
    ]
    return [*rows, _figures(folder, other)]


def table(rows: Sequence[Row]) -> str:
    """One line a comparison."""
    return "\n".join(f"{row.what:<26} {row.compared:>6}  {row.first or 'identical'}" for row in rows)


def _records(folder: Path, phase: str) -> list[dict[str, Json]]:
    path = folder / METRICS
    check.require(path.is_file(), f"{path}: no such file.")
    return [record for record in observe.read_jsonl(path) if record.get("phase") == phase]


def _steps(phase: str, first: Sequence[Record], second: Sequence[Record]) -> Row:
    nothing: Record = {}
    pairs = enumerate(zip_longest(first, second, fillvalue=nothing))
    found = (
        f"step {position}: {name} {one.get(name)!r}, now {two.get(name)!r}"
        for position, (one, two) in pairs
        for name in {**one, **two}
        if name not in CLOCKS and one.get(name) != two.get(name)
    )
    return Row(f"steps of {phase}", len(first), next(found, ""))


def _model(first: Path, second: Path) -> Row:
    for path in (first, second):
        if not path.is_file():
            return Row(first.name, 0, f"{path} is missing")
    one, two = storage.headers([first]), storage.headers([second])

    def differing() -> Iterator[str]:
        for name in {**one, **two}:
            if name not in one or name not in two or one[name][2:] != two[name][2:]:
                yield f"{name}: {one.get(name)}, now {two.get(name)}"
            elif not storage.same_bits(one[name], two[name]):
                apart = storage.read(one[name]) != storage.read(two[name])
                yield f"{name}: {int(torch.count_nonzero(apart))} of {apart.numel()} numbers"

    return Row(first.name, len(one), next(differing(), ""))


def _figures(folder: Path, other: Path) -> Row:
    one, two = (finished(path) or {} for path in (folder, other))
    names = [name for name in {**one, **two} if name not in OF_ONE_RUN]
    found = (f"{name}: {one.get(name)!r}, now {two.get(name)!r}" for name in names if one.get(name) != two.get(name))
    return Row("figures of the summary", len(names), next(found, "")[:200])
