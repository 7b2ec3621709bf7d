"""What a phase of training writes while it runs: metrics.jsonl, trace.jsonl and TensorBoard events.

A line of `trace.jsonl` is a look at every expert of every layer in one step: `phase`, `step`, and tables [L][E] of
`surprise` (mean over the tokens the expert was active on; null without any), `routed` and `active` (tokens before and
after the fallback) and `thresholds`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from experiments.keeping import METRICS, PHASES
from onn.board import Board, routing_image
from onn.objective import SparseMetrics, carved_layers
from onn.observe import Json, MetricsWriter, Record, decode, number
from onn.qwen3 import Model
from onn.train import Metrics

TRACE = "trace.jsonl"
BOARD = "tensorboard"


class Journal:
    """Context manager for the files of one phase; each step has reached them all when `write` returns.

    Opened again after a run was stopped, it takes back what was written after the checkpoint that the run continues
    from. The files are then those of a run that was never stopped, but for clocks.
    """

    def __init__(self, folder: Path, *, phase: str, records: int, step: int) -> None:
        """Open the files of a run's folder for one phase.

        Args:
            folder: of the run; it exists.
            phase: `dense`, `moe` or `dense_continued`.
            records: lines of metrics.jsonl that come before, those of earlier phases included.
            step: the first that will be written, as the records of the phase count (`record["step"]`).
        """
        kept = _rewind(folder / METRICS, phase, step, limit=records)
        if kept < records:
            print(f"journal: {folder / METRICS} holds {kept} of {records} records; the rest is lost.", file=sys.stderr)
        _rewind(folder / TRACE, phase, step, limit=None)
        with ExitStack() as stack:
            self._metrics = stack.enter_context(MetricsWriter(folder / METRICS))
            self._begin = _first_step(folder / METRICS, phase, step)
            self._trace = stack.enter_context(MetricsWriter(folder / TRACE))
            self._board = stack.enter_context(Board(folder / BOARD / phase, step=step, seconds=time.time()))
            self._files = stack.pop_all()

    def write(self, record: dict[str, Json], metrics: Metrics, model: Model) -> None:
        """Append one step.

        Args:
            record: the line of metrics.jsonl, with `step` and `phase`; its numbers become TensorBoard scalars. Births
                stand in `born`, pairs [layer, expert].
            metrics: of the step.
            model: after the step.
        """
        self._metrics.write(record)
        numbers = {name: value for name in record if (value := number(record, name)) is not None}
        step = int(numbers.pop("step"))
        histograms: dict[str, Tensor] = {}
        images: dict[str, Tensor] = {}
        if isinstance(metrics.sparse, SparseMetrics) and (step - self._begin) % stride(step - self._begin) == 0:
            seen = metrics.sparse
            thresholds = torch.stack([layer.router.thresholds for layer in carved_layers(model)])
            tables = {
                "surprise": seen.surprise_by_expert,
                "routed": seen.usage.routed,
                "active": seen.usage.active,
                "thresholds": thresholds,
            }
            place: dict[str, Json] = {"phase": record["phase"], "step": step}
            self._trace.write(place | {name: _rounded(table) for name, table in tables.items()})
            histograms = {f"surprise/layer_{layer:02d}": row for layer, row in enumerate(seen.surprise_by_expert)}
            images = {"routing": routing_image(seen.usage.active)}
        self._board.write(step, seconds=time.time(), scalars=numbers, histograms=histograms, images=images)

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._files.close()


def stride(position: int) -> int:
    """Steps between two looks at every expert, a look at each of the first ten and 45 in each tenfold after them."""
    return int(max(1, 10 ** (len(str(position)) - 1) // 5))


def reborn_experts(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Json]:
    """Pairs [layer, expert] of those whose prototypes, [E, H] of each layer, a rebirth has changed."""
    changed = [(was != now).any(dim=1).nonzero().flatten().tolist() for was, now in zip(before, after, strict=True)]
    return [[layer, expert] for layer, experts in enumerate(changed) for expert in experts]


def _rounded(table: Tensor) -> list[Json]:
    rows: list[list[float]] = table.detach().tolist()
    return [[value if isinstance(value, int) else float(f"{value:.4g}") for value in row] for row in rows]


def _rewind(path: Path, phase: str, step: int, *, limit: int | None) -> int:
    """Cut off the lines after `limit`, and all from the first on that is damaged, or not before `step` of the phase.

    Returns:
        Lines kept.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = list(takewhile(lambda line: _is_before(line, phase, step), content.split(b"\n")[:-1][:limit]))
    size = sum(len(line) + 1 for line in lines)
    if size < len(content):
        os.truncate(path, size)
    return len(lines)


def _is_before(line: bytes, phase: str, step: int) -> bool:
    record = parsed(line)
    begin, own = number(record, "step"), record.get("phase")
    if begin is None or own == phase:
        return begin is not None and begin < step
    return own not in PHASES[[*PHASES, phase].index(phase) :]


def _first_step(path: Path, phase: str, step: int) -> int:
    """The step of the first record of the phase, or `step` where it has none."""
    with path.open("rb") as lines:
        records = (record for line in lines if (record := parsed(line)).get("phase") == phase)
        first = number(next(records, {}), "step")
        return step if first is None else int(first)


def parsed(line: bytes) -> Record:
    """The object of a line, empty where it is damaged."""
    try:
        value = decode(line.decode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
