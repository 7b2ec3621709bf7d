"""How a bank is computed, as a text for configurations: a backend's name, alone or with numbers."""

from __future__ import annotations

import math
from typing import get_args

from onn import check
from onn.functional.kernels.backends import Backend, Bounded, Groupable
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


def backend_of(name: str) -> Backend | Tiling | Bounded:
    """What `onn.functional.bank` takes as its `backend`.

    Args:
        name: a backend's, that of a tiling (`tiling_name`), or `grouped` or `auto` with a bound of the experts of a
            token, as in `grouped:8`.

    Raises:
        ValueError: none of these, or a tiling that is not written as `tiling_name` writes it.
    """
    check.require(isinstance(name, str), f"MoeConfig: expected backend={check.shown(name)} as a text, such as 'auto'.")
    backend: Backend
    for backend in get_args(Backend):
        if backend == name:
            return backend
    known: Groupable
    for known in get_args(Groupable):
        if name.startswith(f"{known}:"):
            return Bounded(known, _bound(name))
    if not name.startswith(("loop:", "native:")):
        check.one_of("MoeConfig", "backend", name, get_args(Backend))
    tiling = _tiling(name)
    if tiling is None or tiling_name(tiling) != name:
        raise ValueError(
            f"MoeConfig: expected backend={check.shown(name)} as loop:ENTRIES:SHARE or native:SHARE, such as "
            "'loop:1048576:0.55' or 'native:0.85'."
        )
    return tiling


def _bound(name: str) -> int:
    kind, bound = name.split(":", maxsplit=1)
    check.require(
        bound.isascii() and bound.isdecimal() and bound[0] != "0" and len(bound) <= 10,
        f"MoeConfig: expected backend={check.shown(name)} as {kind}:EXPERTS, such as '{kind}:8'.",
    )
    return int(bound)


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
