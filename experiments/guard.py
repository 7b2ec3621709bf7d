"""One run to a folder, and runs that stop when they are asked to."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

INTERRUPTED = 130
NOT_FINITE = 3
LOCK = ".lock"


class Stopped(Exception):  # noqa: N818
    """A run that ended early, as it was asked or told to; `status` is the exit status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets it go when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is at work in this folder.") from error
        yield
    finally:
        os.close(descriptor)


class Signals:
    """Context manager for Ctrl-C and SIGTERM.

    While `patient`, the first asks (`requested`) and the second interrupts at once; otherwise the first does.
    """

    def __init__(self) -> None:
        self.patient = False
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if callable(handler) or isinstance(handler, int) else signal.SIG_DFL)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, a step and its checkpoint are finished first."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.patient:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nStopping after this step; once more stops at once.\n")
