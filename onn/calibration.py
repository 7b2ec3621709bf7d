"""How to cut a bank up on this machine: measured once, kept in a file."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import torch

import onn.functional as F
from onn import check
from onn.functional.kernels import native
from onn.functional.kernels.tilings import NATIVE
from onn.observe import Json, decode, write_json
from onn.tree import value_and_grad

ENTRIES = (2**19, 2**20, 2**21, 2**22)
DENSITIES = (0.125, 0.25, 0.4, 0.55, 0.7, 0.85)
NEVER = 2.0
"""More than all tokens."""


class Sizes(TypedDict):
    """What a tiling is measured for."""

    num_experts: int
    width: int
    hidden: int
    tokens: int
    dtype: torch.dtype


def calibrated(
    path: Path, *, num_experts: int, width: int, hidden: int, tokens: int, dtype: torch.dtype, repeats: int
) -> F.Tiling:
    """The tiling for banks of this size, from a file or, the first time on this kind of machine, by `calibrate`.

    Args:
        path: JSON, made where there is none; other sizes and machines in it are kept.
        num_experts: E.
        width: I.
        hidden: H.
        tokens: T of a step.
        dtype: of the parameters.
        repeats: see `calibrate`.

    Returns:
        For `bank(..., backend=tiling)`. Speed alone depends on it, so a file from elsewhere does no harm.

    Raises:
        ValueError: the file is not such a file, or a size is not positive.
    """
    sizes = Sizes(num_experts=num_experts, width=width, hidden=hidden, tokens=tokens, dtype=dtype)
    known = _read(path)
    found = _found(known, sizes, path)
    if found is not None:
        return found
    measured = calibrate(**sizes, repeats=repeats)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**known, _key(sizes): measured._asdict()})
    return measured


def kept(path: Path, sizes: Sizes) -> F.Tiling:
    """The tiling for banks of this size that `calibrated` left in a file on this kind of machine.

    Raises:
        ValueError: there is no such file or it holds none for them; the message names size and machine.
    """
    found = _found(_read(path), sizes, path)
    if found is None:
        raise ValueError(f"{path}: no tiling for {_key(sizes)}.")
    return found


def calibrate(*, num_experts: int, width: int, hidden: int, tokens: int, dtype: torch.dtype, repeats: int) -> F.Tiling:
    """The fastest tiling of forward and backward passes, by measurement: seconds to a minute.

    Args:
        num_experts: E.
        width: I.
        hidden: H.
        tokens: T.
        dtype: of the parameters.
        repeats: interleaved rounds, of which the median counts.

    Returns:
        First the size of a part, or native code where there is any, at a quarter of the pairs, then the least share of
        the tokens (of the pairs for native code) at which computing all of them is faster.

    Raises:
        ValueError: a size is not positive, or a dtype without fractions.
    """
    check.require(
        min(num_experts, width, hidden, tokens, repeats) > 0,
        f"calibrate: expected positive sizes, got E={num_experts}, I={width}, H={hidden}, T={tokens}, {repeats=}.",
    )
    check.holds("calibrate", "dtype", torch.empty((), dtype=dtype, device="meta"), "float")

    def fastest(density: float, *tilings: F.Tiling) -> F.Tiling:
        steps = [_step(tiling, density, (num_experts, width, hidden), tokens=tokens, dtype=dtype) for tiling in tilings]
        seconds = zip(*([_seconds(step) for step in steps] for _ in range(repeats + 1)), strict=True)
        medians = [statistics.median(column[1:]) for column in seconds]
        return tilings[medians.index(min(medians))]

    sizes = (NATIVE, *ENTRIES) if native.available(dtype, device="cpu") else ENTRIES
    entries = fastest(0.25, *(F.Tiling(size, NEVER) for size in sizes)).entries
    for density in DENSITIES:
        if fastest(density, F.Tiling(entries, 0.0), F.Tiling(entries, NEVER)).whole_from == 0:
            return F.Tiling(entries, density)
    return F.Tiling(entries, 1.0)


def _step(
    tiling: F.Tiling, density: float, shape: tuple[int, int, int], *, tokens: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward and backward of a bank whose tokens each use the same number of experts, evenly."""
    E, _, H = shape
    size = max(1, round(density * E))
    chosen = (torch.arange(tokens)[:, None] + torch.arange(size)) % E
    weights = torch.zeros(tokens, E, dtype=dtype).scatter(1, chosen, 1 / size)
    experts = F.Experts(*(torch.full(shape, 1 / H, dtype=dtype) for _ in F.Experts._fields))

    def loss(inputs: tuple[F.Experts, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, tuple[()]]:
        return F.bank(*inputs, {}, min_k=E, backend=tiling).sum(), ()

    step = value_and_grad(loss, engine="autograd")
    return lambda: step((experts, torch.ones(tokens, H, dtype=dtype), weights))


def _seconds(step: Callable[[], object]) -> float:
    before = time.perf_counter()
    step()
    return time.perf_counter() - before


def _key(sizes: Sizes) -> str:
    shape = f"E {sizes['num_experts']}, I {sizes['width']}, H {sizes['hidden']}, T {sizes['tokens']}"
    return ", ".join((shape, str(sizes["dtype"]), *_machine(sizes["dtype"])))


def _found(known: Mapping[str, Json], sizes: Sizes, path: Path) -> F.Tiling | None:
    found = known.get(_key(sizes))
    return _tiling(found, f"{path}: {_key(sizes)}") if isinstance(found, Mapping) else None


def _machine(dtype: torch.dtype) -> tuple[str, ...]:
    extra = ("native code",) if native.available(dtype, device="cpu") else ()
    return (platform.machine(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", *extra)


def _read(path: Path) -> Mapping[str, Json]:
    if not path.exists():
        return {}
    check.require(path.is_file(), f"{path}: not a calibration: expected a file.")
    try:
        known = decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a calibration: {error}.") from error
    if not isinstance(known, Mapping):
        raise ValueError(f"{path}: not a calibration: expected an object, got {str(known)[:40]!r}.")
    return known


def _tiling(values: Mapping[str, Json], where: str) -> F.Tiling:
    entries, whole_from = values.get("entries"), values.get("whole_from")
    if (
        type(entries) is not int
        or not isinstance(whole_from, float)
        or not (entries >= NATIVE and 0 <= whole_from < math.inf)
    ):
        raise ValueError(
            f"{where}: expected entries, a whole number, and whole_from, a number, neither of them negative but for "
            f"entries={NATIVE}, which is native code; got {dict(values)!r}."
        )
    return F.Tiling(entries=entries, whole_from=whole_from)
