"""Time and peak memory of functions against one another: interleaved, paired, medians."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from onn import observe

Run = Callable[[], object]


class Ratio(NamedTuple):
    """How much longer one function takes than another, from paired runs."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


def interleaved(variants: Mapping[str, Run], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant in each of `repeats` rounds; a round runs each variant once, so that noise hits all.

    Two rounds before the first, which compile and warm up, do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for position in range(repeats + 2):
        for name, run in variants.items():
            _wait()
            before = time.perf_counter()
            run()
            _wait()
            if position >= 2:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def ratio(seconds: Mapping[str, list[float]], variant: str, baseline: str) -> Ratio:
    """The ratio of two variants of `interleaved`, round by round."""
    pairs = zip(seconds[variant], seconds[baseline], strict=True)
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return Ratio(median=median, low=low, high=high)


def peak_bytes(run: Run) -> int:
    """The most memory that one call holds at a time beyond what was there before, after a call that warms up."""
    run()
    if torch.cuda.is_available():
        _wait()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _wait()
        return torch.cuda.max_memory_allocated() - held
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler's own library writes to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison."""

    suite: str
    case: str
    dtype: str
    variant: str
    baseline: str
    ratio: float
    """Median of the paired ratios of time."""
    ratio_low: float
    """First quartile."""
    ratio_high: float
    """Third quartile."""
    peak_ratio: float
    """Of the peak memory."""


def compare(
    variants: Mapping[str, Run],
    pairs: Sequence[tuple[str, str]],
    *,
    suite: str,
    case: str,
    dtype: torch.dtype,
    repeats: int,
) -> list[Row]:
    """One row for each pair of a variant and its baseline, all variants measured in the same rounds."""
    seconds = interleaved(variants, repeats=repeats)
    peaks = {name: peak_bytes(run) for name, run in variants.items()}
    rows = []
    for variant, baseline in pairs:
        found = ratio(seconds, variant, baseline)
        rows.append(
            Row(
                suite=suite,
                case=case,
                dtype=str(dtype).removeprefix("torch."),
                variant=variant,
                baseline=baseline,
                ratio=found.median,
                ratio_low=found.low,
                ratio_high=found.high,
                peak_ratio=peaks[variant] / max(peaks[baseline], 1),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as aligned plain text."""
    lines = [("case", "dtype", "variant", "against", "time", "(quartiles)", "peak memory")]
    lines += [
        (
            *(row.case, row.dtype, row.variant, row.baseline),
            *(f"{row.ratio:.3g}", f"({row.ratio_low:.3g} to {row.ratio_high:.3g})", f"{row.peak_ratio:.3g}"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def report(rows: list[Row], path: Path | None) -> list[Row]:
    """Print rows, and write them as JSON where there is a path; the rows."""
    print(table(rows))
    if path is not None:
        observe.write_json(path, [asdict(row) for row in rows])
    return rows


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
