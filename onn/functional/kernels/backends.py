"""Which of its computations a bank is given, from what was asked for, its sizes and where it is."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from onn import check
from onn.functional.kernels import native
from onn.functional.kernels.tilings import NATIVE, NATIVE_TILING, Tiling, default_tiling

Backend = Literal["auto", "dense", "grouped", "loop", "native"]
Groupable = Literal["auto", "grouped"]
_MOST_ENTRIES = 2**62


class Bounded(NamedTuple):
    """A backend, and what is known of how many experts a token has: then nothing waits for their number on a GPU."""

    backend: Groupable
    per_token: int
    """Active experts of a token, at most; E is always true. The bank's output is NaN where it is not."""


def bounded(backend: Backend | Tiling | Bounded, *, per_token: int) -> Backend | Tiling | Bounded:
    """The backend, told the most experts that a token has where it has a use for it."""
    known: Groupable
    for known in get_args(Groupable):
        if backend == known:
            return Bounded(known, per_token)
    return backend


def choose(
    backend: Backend | Tiling | Bounded, gate: Tensor, *, tokens: int, counterfactual: bool
) -> Tiling | Bounded | None:
    """How the active pairs of experts with these gates [E, I, H] are computed, or `None` where all pairs are.

    There is nothing to group where there is no token.

    Args:
        backend: of `bank`.
        gate: one of the matrices.
        tokens: T.
        counterfactual: whether surprise is asked for where experts are inactive.

    Raises:
        ValueError: as `bank`.
    """
    asked = _checked(backend, experts=len(gate))
    if asked == "dense" or (asked == "auto" and (counterfactual or _dense_is_faster(gate, tokens=tokens))):
        return None
    check.require(
        not counterfactual,
        f"bank: the counterfactual tap needs every expert computed: expected backend='dense', got {backend!r}.",
    )
    tiling = asked if isinstance(asked, Tiling) else _named(asked, gate)
    if tiling.entries == NATIVE:
        why = native.why_not(gate.dtype, device=gate.device.type)
        check.require(not why, f"bank: expected backend={backend!r} where there is native code: {why}.")
    if tiling.entries == 0 and tokens == 0:
        return None
    return backend if tiling.entries == 0 and isinstance(backend, Bounded) else tiling


def _checked(backend: Backend | Tiling | Bounded, *, experts: int) -> Backend | Tiling:
    """What is asked for, whatever is known of the number of active experts."""
    if isinstance(backend, Tiling):
        check.whole("bank", "backend.entries", backend.entries, NATIVE, _MOST_ENTRIES)
        check.at_least("bank", "backend.whole_from", backend.whole_from, 0)
        return backend
    if isinstance(backend, Bounded):
        check.one_of("bank", "backend.backend", backend.backend, get_args(Groupable))
        check.whole("bank", "backend.per_token", backend.per_token, 1, experts)
        return backend.backend
    check.one_of("bank", "backend", backend, get_args(Backend))
    return backend


def _named(backend: Backend, gate: Tensor) -> Tiling:
    """The numbers of a backend that computes active pairs alone."""
    if backend == "grouped" or (backend == "auto" and gate.is_cuda):
        return Tiling(entries=0, whole_from=math.inf)
    if backend == "native" or (backend == "auto" and native.available(gate.dtype, device=gate.device.type)):
        return NATIVE_TILING
    _, width, hidden = gate.shape
    return default_tiling(width=width, hidden=hidden, dtype=gate.dtype)


def _dense_is_faster(gate: Tensor, *, tokens: int) -> bool:
    """By the sizes alone, since how many pairs are active is only known when they are.

    On a CPU where the products are so small that the loop's own work outweighs them; on a GPU up to a few thousand
    neurons.
    """
    products = tokens * gate.numel()
    return gate[..., 0].numel() <= 4096 if gate.is_cuda else products < 2**24
