"""Progress and remaining time of a long job: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines of a log."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


class _Lines:
    """A stream for tqdm whose every writing is a line, without carriage returns and the spaces that wipe a bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(
    items: Iterable[T],
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    stream: TextIO | None = None,
    every: float = EVERY,
) -> tqdm[T]:
    """A tqdm, to be iterated over or updated by hand, on `stream` (standard error).

    Where the stream is no terminal it writes a line at the start, one at the end, and one every `every` seconds
    between them.
    """
    out = stream or sys.stderr
    if out.isatty():
        return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, file=out, dynamic_ncols=True)
    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        file=_Lines(out),
        mininterval=every,
        maxinterval=every,
        miniters=1,
        bar_format=LINE,
    )
