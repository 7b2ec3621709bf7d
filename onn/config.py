"""Frozen dataclasses to JSON and back, strictly: an unknown or missing value is an error that names it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from onn import check

Value: TypeAlias = "str | int | float | bool | dict[str, Value] | None"
Config = TypeVar("Config")


def to_dict(config: object) -> dict[str, Value]:
    """A configuration as plain values: nested dataclasses become mappings, paths strings."""
    check.require(
        dataclasses.is_dataclass(config) and not isinstance(config, type),
        f"to_dict: expected a configuration, got {config!r}.",
    )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> Value:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    check.require(
        value is None or isinstance(value, str | int | float | bool),
        f"to_dict: {value!r} is not a configuration value.",
    )
    return cast("Value", value)


def from_dict(kind: type[Config], values: Mapping[str, Value], *, where: str) -> Config:
    """A configuration from plain values, the inverse of `to_dict`.

    Args:
        kind: a frozen dataclass.
        values: one for every field.
        where: what errors call it, such as a file's name.

    Raises:
        ValueError: a field is unknown (the nearest name is suggested), missing, or of another type.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        check.require(name in names, f"{where}: unknown value {name!r}{check.nearest(name, names) or '.'}")
    missing = [name for name in names if name not in values]
    check.require(not missing, f"{where}: missing {', '.join(map(repr, missing))} of {kind.__name__}.")
    return kind(**{name: _typed(hints[name], values[name], f"{where}: {name}") for name in names})


def _typed(hint: object, value: Value, where: str) -> object:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        (hint,) = (choice for choice in choices if choice is not type(None))
        return _typed(hint, value, where)
    if origin is Literal:
        check.require(value in choices, f"{where}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected the values of {hint.__name__}, got {value!r}.")
        return from_dict(hint, value, where=where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = cast("type", hint)
    check.require(
        isinstance(value, expected) and (expected is bool or not isinstance(value, bool)),
        f"{where}: expected {expected.__name__}, got {value!r}.",
    )
    return value
