"""Errors for users: every message names the argument, its value and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def shapes(where: str, *expected: tuple[str, Tensor, str]) -> dict[str, int]:
    """Check tensors against shapes of named sizes and return the sizes.

    Each entry is `(name, tensor, dims)` with `dims` such as `"T H"` or `"T 2 H"`; a letter has one size throughout.

    Raises:
        ValueError: a rank or a size differs; the message lists every tensor's shape.
    """
    sizes: dict[str, int] = {}
    for name, tensor, dims in expected:
        letters = dims.split()
        matches = tensor.ndim == len(letters) and all(
            sizes.setdefault(letter, size) == size if letter.isalpha() else int(letter) == size
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not matches:
            found = ", ".join(f"{n} {list(t.shape)} (expected [{', '.join(d.split())}])" for n, t, d in expected)
            raise ValueError(f"{where}: shape of {name} does not fit: {found}.")
    return sizes


def at_least(where: str, name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless `value >= least`."""
    require(value >= least, f"{where}: expected {name}={value!r} >= {least}.")


def between(where: str, name: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `low <= value <= high`."""
    require(low <= value <= high, f"{where}: expected {low} <= {name}={value!r} <= {high}.")


def one_of(where: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `known`; suggest the nearest name."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{where}: unknown {name}={value!r}{nearest(value, names) or '.'} Known: {', '.join(names)}.")


def nearest(value: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(value, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
