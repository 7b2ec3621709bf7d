"""Errors for users: every message names the argument, its value and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KINDS = ("bool", "float", "integer", "real")
"""What a tensor may hold: the formats that have arithmetic on every device."""
LARGEST = 1e38
"""Of a number that meets tensors: what every format but float16 holds."""
_LONGEST = 80


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def instance(where: str, name: str, value: object, *kinds: type) -> None:
    """Raise `ValueError` unless `value` is of one of the kinds."""
    if not isinstance(value, kinds):
        listed = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: expected {name} of type {listed}, got {_found(value)}.")


def instances(where: str, *expected: tuple[str, object, type]) -> None:
    """`instance` of every `(name, value, kind)`."""
    for name, value, kind in expected:
        instance(where, name, value, kind)


def function(where: str, name: str, value: object) -> None:
    """Raise `ValueError` unless `value` can be called."""
    require(callable(value), f"{where}: expected a function as {name}, got {type(value).__name__}.")


def shapes(where: str, *expected: tuple[str, Tensor, str]) -> dict[str, int]:
    """Check tensors against shapes of named sizes and return the sizes.

    Each entry is `(name, tensor, dims)` with `dims` such as `"T H"` or `"T 2 H"`; a letter has one size throughout. One
    of `bool`, `float`, `integer` and `real` before them says what the tensor must hold: `"float T H"`.

    Raises:
        ValueError: one is no tensor; a rank or a size differs, where the message lists every tensor's shape; a tensor
            holds something else; or they are on several devices.
    """
    for name, tensor, _ in expected:
        instance(where, name, tensor, Tensor)
    sizes: dict[str, int] = {}
    for name, tensor, dims in expected:
        letters = _letters(dims)
        matches = tensor.ndim == len(letters) and all(
            sizes.setdefault(letter, size) == size if letter.isalpha() else int(letter) == size
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not matches:
            found = ", ".join(f"{n} {list(t.shape)} (expected [{', '.join(_letters(d))}])" for n, t, d in expected)
            raise ValueError(f"{where}: shape of {name} does not fit: {found}.")
    for name, tensor, dims in expected:
        for kind in dims.split()[: len(dims.split()) - len(_letters(dims))]:
            holds(where, name, tensor, kind)
    if len({tensor.device for _, tensor, _ in expected}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor, _ in expected)
        raise ValueError(f"{where}: expected one device, got {found}.")
    return sizes


def _letters(dims: str) -> list[str]:
    return [word for word in dims.split() if word not in _KINDS]


def holds(where: str, name: str, tensor: Tensor, kind: str) -> None:
    """Raise `ValueError` unless the tensor's dtype is `kind`, as in `shapes`."""
    instance(where, name, tensor, Tensor)
    allowed = {"bool": (torch.bool,), "float": _FLOATS, "integer": _INTEGERS, "real": _FLOATS + _INTEGERS}
    require(tensor.dtype in allowed[kind], f"{where}: expected {kind} {name}, got {tensor.dtype}.")


def counts(where: str, name: str, tensor: Tensor, dims: str) -> Tensor:
    """A table of numbers >= 0, as `dims` says in the way of `shapes`, in float64 on the CPU.

    Raises:
        ValueError: another shape, no entry, no values, or values that are negative or not finite, also in their sum.
    """
    shapes(where, (name, tensor, f"real {dims}"))
    require(tensor.numel() > 0, f"{where}: {name} {list(tensor.shape)} is empty.")
    require(not tensor.is_meta, f"{where}: expected {name} with values, got them on meta.")
    table = tensor.detach().to("cpu", torch.float64)
    fits = bool((table >= 0).all()) and bool(table.sum().isfinite())
    require(fits, f"{where}: {name} must be finite and >= 0.")
    return table


def at_least(where: str, name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless `value >= least`."""
    _number(where, name, value)
    require(value >= least, f"{where}: expected {name}={shown(value)} >= {least}.")


def positive(where: str, name: str, value: float) -> None:
    """Raise `ValueError` unless `0 < value <= LARGEST`."""
    _number(where, name, value)
    require(0 < value <= LARGEST, f"{where}: expected 0 < {name}={shown(value)} <= {LARGEST:g}.")


def weight(where: str, name: str, value: float) -> None:
    """Raise `ValueError` unless `0 <= value <= LARGEST`."""
    between(where, name, value, 0, LARGEST)


def one_dtype(where: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have one dtype."""
    listed = ", ".join(f"{name} of {tensor.dtype}" for name, tensor in tensors.items())
    require(len({tensor.dtype for tensor in tensors.values()}) <= 1, f"{where}: expected one dtype, got {listed}.")


def broadcast(where: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless floating tensors have shapes that broadcast, and one device."""
    for name, tensor in tensors.items():
        holds(where, name, tensor, "float")
    ranks = max([tensor.ndim for tensor in tensors.values()], default=0)
    sizes = [{t.shape[-place] for t in tensors.values() if t.ndim >= place} - {1} for place in range(1, ranks + 1)]
    listed = ", ".join(f"{name} {list(tensor.shape)} on {tensor.device}" for name, tensor in tensors.items())
    require(all(len(size) <= 1 for size in sizes), f"{where}: shapes do not broadcast: {listed}.")
    require(len({tensor.device for tensor in tensors.values()}) <= 1, f"{where}: expected one device, got {listed}.")


def between(where: str, name: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `low <= value <= high`."""
    _number(where, name, value)
    require(low <= value <= high, f"{where}: expected {low} <= {name}={shown(value)} <= {high}.")


def whole(where: str, name: str, value: int, low: int, high: int) -> None:
    """Raise `ValueError` unless `value` is an integer and `low <= value <= high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: expected {name} as a whole number, got {_found(value)}.")
    between(where, name, value, low, high)


def _number(where: str, name: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise ValueError(f"{where}: expected {name} as a number, got {_found(value)}.")


def one_of(where: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `known`; suggest the nearest name."""
    names = list(known)
    if value not in names:
        listed = shown(", ".join(names), quoted=False, longest=20 * _LONGEST)
        raise ValueError(f"{where}: unknown {name}={shown(value)}{nearest(value, names) or '.'} Known: {listed}.")


def nearest(value: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or an empty string."""
    comparable = isinstance(value, str) and len(value) <= _LONGEST
    short = [name for name in names if len(name) <= _LONGEST]
    close = difflib.get_close_matches(value, short, n=1, cutoff=0.5) if comparable else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _found(value: object) -> str:
    """A tensor by its type alone, since it may be large, or on a device that has to be waited for."""
    return type(value).__name__ if isinstance(value, Tensor) else f"{type(value).__name__} {shown(value)}"


def shown(value: object, *, quoted: bool = True, longest: int = _LONGEST) -> str:
    """What a message says of a value from a file: its `repr` (or, not quoted, its text), cut where it is longer."""
    try:
        text = repr(value) if quoted else str(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more digits than Python prints
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."
