"""What a parser of files must not do, watched by Python's own audit hooks and, for the native reader, by a wrapper."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from onn import storage

FORBIDDEN = (
    "code.__new__",
    "ctypes.",
    "ftplib.",
    "http.client",
    "import",
    "marshal.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pickle.",
    "pty.",
    "shutil.",
    "smtplib.",
    "socket.",
    "subprocess.",
    "urllib.",
    "webbrowser.",
)
"""Audit events, by their beginnings, that no parser raises: code, processes, pickles, the network."""
COMPILED = ("compile", "exec")
"""Python compiles annotations that a dataclass has; what a valid file does not compile, no file shall."""
PATHS = ("open", "os.chmod", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")
"""Events whose first argument is a path."""


class Escape(BaseException):
    """Something that was forbidden happened; not an `Exception`, so that no parser swallows it."""


class Guard:
    """Refuses, while it is armed, all of `FORBIDDEN`, and paths outside one folder."""

    def __init__(self, folder: Path) -> None:
        """Install the hook, which lasts as long as the process."""
        self.folder = folder
        self._root = os.path.realpath(folder)
        self._armed, self._learning = False, False
        self._known: set[str] = set()
        self.escaped = ""
        """What was refused last."""
        self.watched = 0
        """Events seen while armed."""
        sys.addaudithook(self._hear)
        self._native = safe_open
        setattr(storage, "safe_open", self._safe_open)  # noqa: B010  # a name that is imported there

    @contextmanager
    def armed(self, *, learning: bool) -> Iterator[None]:
        """Watch the block; while learning, on valid input, allow everything and note what is compiled."""
        self._armed, self._learning, self.escaped = True, learning, ""
        try:
            yield
        finally:
            self._armed = False
        if self.escaped:
            raise Escape(self.escaped)

    def _safe_open(self, path: Path, framework: str) -> object:
        self.watched += self._armed
        if self._armed and not self._inside(path):
            self._refuse(f"safe_open {path}")
        return self._native(path, framework=framework)

    def _inside(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        named = os.path.realpath(os.fsdecode(path) if isinstance(path, bytes) else str(path))
        return named == self._root or named.startswith(self._root + os.sep)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self._armed:
            return
        self.watched += 1
        what = f"{event} {getattr(args[0], 'co_code', args[0])!r}" if event in COMPILED else ""
        if self._learning:
            self._known.add(what)
        elif what:
            if what not in self._known:
                self._refuse(what)
        elif event.startswith(FORBIDDEN) or (event in PATHS and not self._inside(args[0])):
            self._refuse(f"{event} {args!r:.200}")

    def _refuse(self, what: str) -> None:
        self.escaped = what
        raise Escape(what)
