"""How a bank is computed, as a text for configurations: a backend's name, or `loop` or `native` with numbers."""

from __future__ import annotations

import math
from typing import get_args

from onn import check
from onn.functional.experts import Backend
from onn.functional.kernels.tilings import NATIVE, Tiling


def tiling_name(tiling: Tiling) -> str:
    """The text of a tiling: `loop:ENTRIES:SHARE`, as in `loop:1048576:0.55`, or `native:SHARE`, as in `native:0.85`.

    Raises:
        ValueError: numbers that no text stands for: negative, but for the entries of native code, or without end.
    """
    check.require(
        isinstance(tiling, Tiling) and _has_a_name(tiling),
        f"tiling_name: expected a Tiling of finite numbers >= 0, or entries={NATIVE}, got {check.shown(tiling)}.",
    )
    share = float(tiling.whole_from)
    return f"native:{share}" if tiling.entries == NATIVE else f"loop:{tiling.entries}:{share}"


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
    if not name.startswith(("loop:", "native:")):
        check.one_of("MoeConfig", "backend", name, get_args(Backend))
    tiling = _tiling(name)
    if tiling is None or tiling_name(tiling) != name:
        raise ValueError(
            f"MoeConfig: expected backend={check.shown(name)} as loop:ENTRIES:SHARE or native:SHARE, such as "
            "'loop:1048576:0.55' or 'native:0.85'."
        )
    return tiling


def _tiling(name: str) -> Tiling | None:
    kind, *sizes, share = name.split(":")
    try:
        (entries,) = sizes if kind == "loop" else (str(NATIVE), *sizes)
        tiling = Tiling(entries=int(entries), whole_from=float(share))
    except ValueError:
        return None
    return tiling if _has_a_name(tiling) else None


def _has_a_name(tiling: Tiling) -> bool:
    return (tiling.entries == NATIVE or tiling.entries >= 0) and 0 <= tiling.whole_from < math.inf
