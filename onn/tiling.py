"""How a bank is computed, as a text for configurations: a backend's name, or `loop` with measured numbers."""

from __future__ import annotations

import math
from typing import get_args

from onn import check
from onn.functional.experts import Backend
from onn.functional.kernels.tilings import Tiling


def tiling_name(tiling: Tiling) -> str:
    """The text of a tiling, `loop:ENTRIES:SHARE`, as in `loop:1048576:0.55`.

    Raises:
        ValueError: numbers that no text stands for: negative, or without end.
    """
    fits = isinstance(tiling, Tiling) and tiling.entries >= 0 and 0 <= tiling.whole_from < math.inf
    check.require(fits, f"tiling_name: expected a Tiling of finite numbers >= 0, got {check.shown(tiling)}.")
    return f"loop:{tiling.entries}:{float(tiling.whole_from)}"


def backend_of(name: str) -> Backend | Tiling:
    """What `onn.functional.bank` takes as its `backend`, from a backend's name or that of a tiling.

    Raises:
        ValueError: neither, or not written as `tiling_name` writes it.
    """
    check.require(isinstance(name, str), f"MoeConfig: expected backend={check.shown(name)} as a text, such as 'auto'.")
    backend: Backend
    for backend in get_args(Backend):
        if backend == name:
            return backend
    if not name.startswith("loop:"):
        check.one_of("MoeConfig", "backend", name, get_args(Backend))
    tiling = _tiling(name)
    if tiling is None or tiling_name(tiling) != name:
        raise ValueError(
            f"MoeConfig: expected backend={check.shown(name)} as loop:ENTRIES:SHARE, such as 'loop:1048576:0.55'."
        )
    return tiling


def _tiling(name: str) -> Tiling | None:
    _, *numbers = name.split(":")
    try:
        entries, whole_from = numbers
        tiling = Tiling(entries=int(entries), whole_from=float(whole_from))
    except ValueError:
        return None
    return tiling if tiling.entries >= 0 and 0 <= tiling.whole_from < math.inf else None
