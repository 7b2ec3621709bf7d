"""What a run's folder holds, finished or not. Shape letters: N looks, L layers, D domains, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.evaluate import Evaluation
from experiments.journal import TRACE, parsed
from experiments.keeping import METRICS
from onn import check
from onn.observe import Json, Record, decode, number, read_jsonl, write_json

EXPERTS = "experts.json"


class Looks(NamedTuple):
    """What `trace.jsonl` says of every expert over time."""

    steps: tuple[int, ...]
    surprise: Tensor
    """[N, L, E]; NaN where an expert was active on no token."""
    routed: Tensor
    active: Tensor
    thresholds: Tensor
    """[N, L, E]; NaN for an expert that is always open."""


class Experts(NamedTuple):
    """The held-out figures of every expert of the trained model."""

    domains: tuple[str, ...]
    usage: Tensor
    """[L, D, E]"""
    surprise: Tensor
    """[L, E]"""


class Run(NamedTuple):
    """The contents of one folder."""

    name: str
    folder: Path
    config: Mapping[str, Json]
    summary: Mapping[str, Json]
    """Empty before the run has finished."""
    records: Sequence[Record]
    looks: Looks | None
    experts: Experts | None
    damaged: int
    """Lines of `trace.jsonl` that could not be read."""


def write_experts(folder: Path, evaluation: Evaluation) -> None:
    """Keep what a page shows of the experts beside what `summary.json` says of the domains."""
    usage: list[Json] = evaluation.usage().tolist()
    surprise: list[Json] = evaluation.surprise_by_expert().tolist()
    write_json(folder / EXPERTS, {"domains": list(evaluation.domains), "usage": usage, "surprise": surprise})


def read_run(folder: Path) -> Run:
    """Read a run's folder; only `metrics.jsonl` must be there.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged; the message names it.
    """
    check.require(folder.is_dir(), f"{folder}: no such folder.")
    check.require((folder / METRICS).is_file(), f"{folder}: holds no run: there is no {METRICS}.")
    trace = [parsed(line) for line in (folder / TRACE).read_bytes().split(b"\n")] if (folder / TRACE).is_file() else []
    looks = _looks(trace)
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=_object(folder / "config.json"),
        summary=_object(folder / "summary.json"),
        records=read_jsonl(folder / METRICS),
        looks=looks,
        experts=_experts(folder / EXPERTS),
        damaged=sum(not row for row in trace[:-1]),
    )


def _object(path: Path) -> Mapping[str, Json]:
    if not path.is_file():
        return {}
    try:
        value = decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected an object.")
    return value


def _looks(rows: Sequence[Record]) -> Looks | None:
    own = [row for row in rows if row.get("phase") == "moe"]
    if not own:
        return None
    names = ("surprise", "routed", "active", "thresholds")
    tables = [
        [_tensor(row.get(name), f"{TRACE}, look {place}, {name}") for place, row in enumerate(own)] for name in names
    ]
    shapes = {tuple(table.shape) for column in tables for table in column}
    check.require(len(shapes) == 1 and len(min(shapes)) == 2, f"{TRACE}: expected tables [L][E], got {sorted(shapes)}.")
    return Looks(tuple(int(number(row, "step") or 0) for row in own), *map(torch.stack, tables))


def _experts(path: Path) -> Experts | None:
    found = _object(path)
    if not found:
        return None
    names = found.get("domains")
    usage, surprise = (_tensor(found.get(name), f"{path}, {name}") for name in ("usage", "surprise"))
    domains = tuple(str(name) for name in names) if isinstance(names, Sequence) and not isinstance(names, str) else ()
    check.shapes(str(path), ("usage", usage, "L D E"), ("surprise", surprise, "L E"))
    check.require(len(domains) == usage.shape[1], f"{path}: expected {usage.shape[1]} domains, got {len(domains)}.")
    return Experts(domains, usage, surprise)


def _tensor(value: Json, where: str) -> Tensor:
    try:
        return torch.tensor(_numbers(value), dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected a table of numbers.") from error


def _numbers(value: Json) -> list[Json] | float:
    """Lists of floats, null as NaN."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_numbers(child) for child in value]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)
