"""Several processes at work on the items of one list."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from experiments.memory import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """`map`."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """What the function makes of every item, in their order."""
        ...


def processors() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int) -> Iterator[Each]:
    """A `map` by so many processes, which end with this one, or by this one where it is one.

    Raises:
        ChildProcessError: a process ended before its work did.
    """
    if count == 1:
        yield _here
        return
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)

    def each(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return pool.map(function, items)

    try:
        yield each
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"One of {count} processes ended before its work did, perhaps for want of memory: try fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: small models gain more from several processes than from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _here(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    return map(function, items)


def _begin() -> None:
    """Of a process: it ends at once with Ctrl-C, and with the process that began it."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()


def _end_with(wait: Callable[[], None]) -> None:
    wait()
    os._exit(1)
