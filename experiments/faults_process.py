"""Runs of the main job as processes that can be sabotaged, killed and looked at, forked from one that has imported all.

A child changes what it likes in itself: no line of the main job knows that it is tested.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from experiments import run
from experiments.keeping import FOLDER, METRICS, PHASES
from experiments.pipeline import finished
from experiments.replay import compare

_CAPABILITY_VERSION, _DAC_OVERRIDE = 0x20080522, 1
"""From Linux's `capability.h`."""
CRASHED = 70
PATIENCE = 300.0
"""Seconds until a run counts as hung: it says where, and ends with 1."""
Sabotage = Callable[[], None]


class Child(NamedTuple):
    """A process and where its output goes."""

    pid: int
    log: Path


class Trial(NamedTuple):
    """What one fault led to."""

    kept: bool
    """Whether everything that is promised was so."""
    lost: int
    """Steps that had to be computed again."""
    outcome: str


def nothing() -> None:
    """Sabotage none."""


def start(arguments: Sequence[str], log: Path, sabotage: Sabotage = nothing) -> Child:
    """`run.py` with these arguments, in a fork of this process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = CRASHED
        with log.open("a", buffering=1, encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=output)
            try:
                sabotage()
                status = run.main(arguments)
            except SystemExit as stopped:
                status = stopped.code if isinstance(stopped.code, int) else CRASHED
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    return Child(pid, log)


def ended(child: Child) -> int:
    """Wait for a child: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def kill(child: Child, number: int = signal.SIGKILL) -> None:
    """Send a signal to a child that has not been waited for."""
    os.kill(child.pid, number)


def running(child: Child) -> bool:
    """Whether a child is still at work; it is not waited for."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def until(there: Callable[[], bool], child: Child) -> bool:
    """Wait for something that a child does; whether it came before the child's end."""
    while not there():
        if not running(child):
            return there()
        time.sleep(0.002)
    return True


def dying_at(flush: int) -> Sabotage:
    """Kill -9 from inside, just before the nth time that something is flushed to the disk: amid a checkpoint."""

    def sabotage() -> None:
        counted, real = itertools.count(1), os.fsync

        def fsync(descriptor: int) -> None:
            if next(counted) == flush:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        mock.patch.object(os, "fsync", fsync).start()

    return sabotage


def counting(path: Path) -> Sabotage:
    """Count what `dying_at` counts, into a file."""

    def sabotage() -> None:
        counted, real = itertools.count(1), os.fsync

        def fsync(descriptor: int) -> None:
            path.write_text(str(next(counted)), encoding="utf-8")
            real(descriptor)

        mock.patch.object(os, "fsync", fsync).start()

    return sabotage


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def without_privilege() -> None:
    """Give up the right of a superuser to write where the permissions of a file or folder forbid it (Linux)."""
    if os.geteuid() != 0:
        return
    library, header, found = ctypes.CDLL(None), _Header(_CAPABILITY_VERSION, 0), (_Capabilities * 2)()
    library.capget(ctypes.byref(header), ctypes.byref(found))
    found[0].effective &= ~(1 << _DAC_OVERRIDE)
    library.capset(ctypes.byref(header), ctypes.byref(found))


class Lab(NamedTuple):
    """Where the trials of one configuration happen."""

    root: Path
    options: tuple[str, ...]
    every: int
    """Steps between two checkpoints."""
    dense_steps: int
    seconds: float
    """Of the reference: a run that nothing happened to."""

    @property
    def reference(self) -> Path:
        """The folder of that run."""
        return self.root / "reference"

    def begin(self, folder: Path, sabotage: Sabotage = nothing, extra: Sequence[str] = ()) -> Child:
        """A new run."""
        return start(["--out", str(folder), *self.options, *extra], self.log(folder), sabotage)

    def again(self, folder: Path, sabotage: Sabotage = nothing) -> Child:
        """A resumed run."""
        return start(["--resume", str(folder)], self.log(folder), sabotage)

    def log(self, folder: Path) -> Path:
        """Where the output of all runs in a folder goes."""
        return self.root / f"{folder.name}.log"

    def said(self, folder: Path) -> str:
        """That output."""
        return self.log(folder).read_text(encoding="utf-8", errors="replace") if self.log(folder).exists() else ""

    def steps(self, folder: Path) -> int:
        """Steps that a run has recorded."""
        path = folder / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def kept_step(self, folder: Path, phase: str, step: int) -> bool:
        """Whether a run has this checkpoint."""
        return (folder / FOLDER / f"{phase}-{step:06d}").is_dir()

    def recovered(self, folder: Path, *, steps: int, sabotage: Sabotage = nothing) -> Trial:
        """Resume a run that had recorded `steps` steps, and hold it against the reference."""
        if not folder.exists():
            return Trial(True, 0, "nothing had begun")
        status = ended(self.again(folder, sabotage))
        if status == 2 and "holds no run" in self.said(folder) and steps == 0:
            return Trial("Traceback" not in self.said(folder), 0, "nothing had begun")
        return self.judged(folder, steps=steps, status=status)

    def judged(self, folder: Path, *, steps: int, status: int) -> Trial:
        """Hold a run that was resumed against the reference."""
        if status != 0 or "Traceback" in self.said(folder):
            return Trial(False, 0, f"resume ended with {status}: {last_line(self.said(folder), folder)}")
        different = [row for row in compare(self.reference, folder) if row.first]
        if different:
            return Trial(False, 0, f"other bits: {different[0].what}: {different[0].first}")
        if (self.reference / "trace.jsonl").read_bytes() != (folder / "trace.jsonl").read_bytes():
            return Trial(False, 0, "another trace.jsonl")
        lost = max(0, steps - self._resumed_at(folder))
        return Trial(lost <= self.every, lost, "resumed to the same bits")

    def _resumed_at(self, folder: Path) -> int:
        """Steps that the last resumption did not compute again."""
        names = (finished(folder) or {}).get("resumed_from")
        assert isinstance(names, list)
        total = int((self.steps(folder) - self.dense_steps) / 2)
        sizes: dict[str, int] = {"dense": self.dense_steps, "moe": total, "dense_continued": total}
        before: dict[str, int] = {
            phase: sum(sizes[earlier] for earlier in PHASES[:place]) for place, phase in enumerate(PHASES)
        }
        reached = [0]
        for phase, _, place in (str(name).partition("-") for name in names):
            if phase in sizes and place != "figures":
                reached.append(before[phase] + (int(place) if place.isdigit() else sizes[phase]))
        return max(reached)


def last_line(text: str, folder: Path) -> str:
    """The last line that is not empty, shortened, with DIR for the folder of the run."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].replace(str(folder), "DIR")[:160] if lines else "no output"
