"""Parts of a computation that a caller may carry out in a way of its own: compiled by themselves, or recomputed.

Purity makes it safe: whatever stands in the place of a pure function gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, Protocol, TypeVar, get_args

from onn import check

P = ParamSpec("P")
R = TypeVar("R")

Kind = Literal["layer", "loss", "figures", "lesson", "update"]
"""What a part is of a training step: one transformer layer, the head with the losses, the figures of a carved layer,
what its router or its experts make of the surprise, the optimizer on one leaf. All but the last meet the same shapes
again and again."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Region(Protocol):
    """Makes of a pure function one that gives the same numbers."""

    def __call__(self, function: Callable[P, R], *, kind: Kind) -> Callable[P, R]:
        """The function to call in the place of `function`."""
        ...


def inline(function: Callable[P, R], *, kind: Kind) -> Callable[P, R]:
    """The function itself: a part is not set apart.

    Raises:
        ValueError: no function, or an unknown kind.
    """
    check_part("inline", function, kind=kind)
    return function


def check_part(where: str, function: Callable[P, R], *, kind: Kind) -> None:
    """Raise `ValueError` unless this is a function and a kind of part."""
    check.function(where, "function", function)
    check.one_of(where, "kind", kind, KINDS)
