"""Folders of runs, as the main job leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from onn.observe import Json, MetricsWriter, write_json
from tests.test_observe import run_records, usage_counts
from tests.test_report import full_summary

LAYERS, EXPERTS = 2, 12


def write_run(
    folder: Path, changes: Mapping[str, Json] = MappingProxyType({}), *, steps: int = 12, finished: bool = True
) -> Path:
    """A run's folder; `changes` go into its summary."""
    folder.mkdir(parents=True)
    config: dict[str, Json] = {"version": 3, "seed": 7, "model": {"hidden_size": 128}, "train": {"steps": steps}}
    write_json(folder / "config.json", config)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        for record in run_records(steps):
            metrics.write(record)
    with MetricsWriter(folder / "trace.jsonl") as trace:
        for step in range(steps, 2 * steps, 2):
            trace.write(look(step))
    if finished:
        usage: list[Json] = usage_counts(LAYERS, 2, EXPERTS).tolist()
        surprise: list[Json] = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2)).tolist()
        write_json(folder / "experts.json", {"domains": ["code", "a|b"], "usage": usage, "surprise": surprise})
        more: dict[str, Json] = {"corpus_fingerprint": "ab12", "threads": 1, "seconds": {"dense": 100.25, "all": 120.5}}
        write_json(folder / "summary.json", {**full_summary(), **more, **changes})
    return folder


def look(step: int) -> dict[str, Json]:
    """A line of `trace.jsonl` with a silent expert and one that is always open."""
    source = torch.Generator().manual_seed(step)
    active = torch.randint(1, 50, (LAYERS, EXPERTS), generator=source)
    active[1, 4] = 0
    surprise = torch.rand(LAYERS, EXPERTS, generator=source).where(active > 0, torch.nan)
    thresholds = torch.randn(LAYERS, EXPERTS, generator=source)
    thresholds[0, 2] = -torch.inf
    place: dict[str, Json] = {"phase": "moe", "step": step}
    tables = {"surprise": surprise, "routed": active, "active": active, "thresholds": thresholds}
    return place | {name: table.tolist() for name, table in tables.items()}
