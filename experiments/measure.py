"""Time and peak memory of functions against one another: interleaved, paired, medians."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from onn import observe

Run = Callable[[], object]

LEAST_ROUNDS = 7
"""However slow a case is."""
LEAST_OF_SLOW = 3
SLOW = 3.0
"""How many times the second fastest variant a slow one takes: it may run `LEAST_OF_SLOW` rounds where time is short."""


class Ratio(NamedTuple):
    """How much longer one function takes than another, from paired runs."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int
    """In which both ran."""


class Measurement(NamedTuple):
    """What variants took in the same rounds."""

    seconds: Mapping[str, list[float]]
    """Of every round; a slow variant runs only in the first ones."""
    peaks: Mapping[str, float]
    """Bytes; NaN where they were not looked for."""


def rounds_of(typical: Mapping[str, float], *, repeats: int, budget: float) -> dict[str, int]:
    """How many rounds each variant runs, from the seconds that one run takes, so that all take about `budget` seconds.

    At most `repeats`, at least `LEAST_ROUNDS`. Where these take longer than the budget, a variant that is `SLOW`
    against the second fastest (the fastest may be a floor that nobody reaches) runs as often as its equal share of the
    budget allows, at least `LEAST_OF_SLOW` times.
    """
    fitting = budget / max(sum(typical.values()), 1e-9)
    rounds = int(min(max(fitting, LEAST_ROUNDS), repeats))
    if fitting >= rounds:
        return dict.fromkeys(typical, rounds)
    slow = SLOW * sorted(typical.values())[:2][-1]
    share = budget / len(typical)
    return {
        name: min(rounds, max(LEAST_OF_SLOW, int(share / one))) if one > slow else rounds
        for name, one in typical.items()
    }


def interleaved(
    variants: Mapping[str, Run], *, repeats: int, budget: float = math.inf, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every variant in each of `repeats` rounds; a round runs each variant once, so that noise hits all.

    `warm_up` rounds before the first, which compile, do not count; the last of them tells how many rounds fit into
    `budget` seconds (see `rounds_of`).
    """
    typical = dict.fromkeys(variants, 0.0)
    for _ in range(warm_up):
        typical = {name: _timed(run) for name, run in variants.items()}
    planned = rounds_of(typical, repeats=repeats, budget=budget)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for position in range(max(planned.values())):
        for name, run in variants.items():
            if position < planned[name]:
                seconds[name].append(_timed(run))
    return seconds


def ratio(seconds: Mapping[str, list[float]], variant: str, baseline: str) -> Ratio:
    """The ratio of two variants of `interleaved`, round by round, over the rounds in which both ran."""
    found = [a / b for a, b in zip(seconds[variant], seconds[baseline], strict=False)]
    low, median, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return Ratio(median=median, low=low, high=high, rounds=len(found))


def peak_bytes(run: Run, *, warm: bool = False) -> int:
    """The most memory that one call holds at a time beyond what was there before, after a call unless it is `warm`.

    What earlier calls left in cycles goes first: freed in between it would be taken off.
    """
    if not warm:
        run()
    gc.collect()
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
    """Median of the paired ratios of time; NaN, like all figures, where the variant did not run (see `note`)."""
    ratio_low: float
    """First quartile."""
    ratio_high: float
    """Third quartile."""
    peak_ratio: float
    """Of the peak memory."""
    seconds: float = math.nan
    """Median of the variant's own time: comparable within one run alone."""
    rounds: int = 0
    """In which both ran."""
    device: str = ""
    note: str = ""
    """Why there is no figure, or what is special about this one."""


def measured(
    variants: Mapping[str, Run],
    *,
    repeats: int,
    budget: float = math.inf,
    warm_up: int = 2,
    memory: bool = True,
) -> Measurement:
    """Time all variants in the same rounds, then look for the peak of each, once."""
    seconds = interleaved(variants, repeats=repeats, budget=budget, warm_up=warm_up)
    peaks = {name: float(peak_bytes(run, warm=True)) if memory else math.nan for name, run in variants.items()}
    return Measurement(seconds=seconds, peaks=peaks)


def fastest(found: Measurement, names: Iterable[str]) -> str:
    """The variant of least median time."""
    return min(names, key=lambda name: statistics.median(found.seconds[name]))


def row(
    found: Measurement, variant: str, baseline: str, *, suite: str, case: str, dtype: torch.dtype, note: str = ""
) -> Row:
    """One comparison of what was measured."""
    times = ratio(found.seconds, variant, baseline)
    return Row(
        suite=suite,
        case=case,
        dtype=_name(dtype),
        variant=variant,
        baseline=baseline,
        ratio=times.median,
        ratio_low=times.low,
        ratio_high=times.high,
        peak_ratio=found.peaks[variant] / max(found.peaks[baseline], 1.0),
        seconds=statistics.median(found.seconds[variant]),
        rounds=times.rounds,
        device=device_name(),
        note=note,
    )


def missing(variant: str, baseline: str, *, suite: str, case: str, dtype: torch.dtype, note: str) -> Row:
    """The row of a variant that did not run."""
    return Row(
        suite=suite,
        case=case,
        dtype=_name(dtype),
        variant=variant,
        baseline=baseline,
        ratio=math.nan,
        ratio_low=math.nan,
        ratio_high=math.nan,
        peak_ratio=math.nan,
        device=device_name(),
        note=note,
    )


def compare(
    variants: Mapping[str, Run],
    pairs: Sequence[tuple[str, str]],
    *,
    suite: str,
    case: str,
    dtype: torch.dtype,
    repeats: int,
    budget: float = math.inf,
) -> list[Row]:
    """One row for each pair of a variant and its baseline, all variants measured in the same rounds."""
    found = measured(variants, repeats=repeats, budget=budget)
    return [row(found, variant, baseline, suite=suite, case=case, dtype=dtype) for variant, baseline in pairs]


def working(variants: Mapping[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The variants that run, after they ran once, and why the others do not."""
    failed: dict[str, str] = {}
    for name, run in variants.items():
        try:
            run()
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            failed[name] = f"failed: {type(error).__name__}: {first[:120]}"
    return {name: run for name, run in variants.items() if name not in failed}, failed


def device_name() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def table(rows: list[Row]) -> str:
    """The rows as aligned plain text; rows without a figure say why."""
    lines = [("case", "dtype", "variant", "against", "time", "(quartiles)", "peak memory", "")]
    lines += [(row.case, row.dtype, row.variant, row.baseline, *_figures(row), row.note) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _figures(row: Row) -> tuple[str, str, str]:
    if math.isnan(row.ratio):
        return "-", "", ""
    memory = "-" if math.isnan(row.peak_ratio) else f"{row.peak_ratio:.3g}"
    return f"{row.ratio:.3g}", f"({row.ratio_low:.3g} to {row.ratio_high:.3g}, {row.rounds})", memory


def report(rows: list[Row], path: Path | None) -> list[Row]:
    """Print rows, and write them as JSON where there is a path; the rows."""
    print(table(rows))
    if path is not None:
        observe.write_json(path, [asdict(row) for row in rows])
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a file of `report`.

    Raises:
        ValueError: it holds something else.
    """
    found = observe.decode(path.read_text(encoding="utf-8"))
    if not isinstance(found, list):
        raise ValueError(f"read: {path} holds no list of rows.")
    return [_row_of(values, f"read: {path}, row {position}") for position, values in enumerate(found)]


def _row_of(values: observe.Json, where: str) -> Row:
    names = {field.name for field in fields(Row)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"{where}: expected the values {sorted(names)}, got {values!r}.")

    def figure(name: str) -> float:
        found = observe.number(values, name)
        return math.nan if found is None else found

    def text(name: str) -> str:
        return str(values[name])

    return Row(
        suite=text("suite"),
        case=text("case"),
        dtype=text("dtype"),
        variant=text("variant"),
        baseline=text("baseline"),
        ratio=figure("ratio"),
        ratio_low=figure("ratio_low"),
        ratio_high=figure("ratio_high"),
        peak_ratio=figure("peak_ratio"),
        seconds=figure("seconds"),
        rounds=int(figure("rounds")),
        device=text("device"),
        note=text("note"),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _timed(run: Run) -> float:
    _wait()
    before = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - before


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
