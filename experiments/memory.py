"""What the parts of a run cost in time and memory, and whether the allocator gives memory back."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LARGE_BLOCK = 2**22
KEPT_BLOCK = 2**25
"""The most that glibc lets a threshold of mapping be."""
KEPT_HEAP = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's `malloc.h`: how much may lie free at the heap's end, and the least size of a block mapped by itself."""


class Meter:
    """Seconds and peak memory by part."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}
        """The most memory that the process had held so far when a part ended."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything inside is a part of this name; parts of one name add up."""
        before = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - before
        self.peak_gib[name] = peak_gib()


def peak_gib() -> float:
    """The most memory that this process has held so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_large_blocks() -> None:
    """Let every block of 4 MiB or more go back to the system when it is freed, for the life of the process.

    glibc learns to keep blocks of up to 32 MiB, and cannot fit an aligned tensor into the hole that one of its own size
    left: two steps of Qwen3-0.6B leave 2 GiB of holes. Costs a small model some percent of its speed. Other C libraries
    are left alone.
    """
    _set(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of what is freed for the next step, in blocks of up to 32 MiB, for the life of the process.

    Otherwise the kernel may map and zero the arrays of every step anew, which in a step of twenty small models under
    AdamW took half of the time. Other C libraries are left alone.
    """
    _set(_M_MMAP_THRESHOLD, KEPT_BLOCK)
    _set(_M_TRIM_THRESHOLD, KEPT_HEAP)


def _set(parameter: int, value: int) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(parameter, value)
