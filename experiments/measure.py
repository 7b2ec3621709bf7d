"""Time and peak memory of functions against one another: interleaved, paired, medians."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

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


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
