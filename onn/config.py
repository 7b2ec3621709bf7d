"""Frozen dataclasses to JSON and back, strictly: an unknown or missing value is an error that names it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from onn import check

Value: TypeAlias = "str | int | float | bool | dict[str, Value] | None"
Config = TypeVar("Config")


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is not UTF-8; the message names file and line.
    """
    check.require(os.path.isfile(path), f"{path}: no such file.")
    try:
        data = path.read_bytes()
        return data.decode()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: byte 0x{data[error.start]:02x}, {error.reason}.") from error


def parse_json(text: str, *, where: str) -> object:
    """A JSON value, strictly: a key that comes twice, NaN, or a number that no float64 holds is an error.

    Args:
        text: the whole of it.
        where: what errors call it, such as a file's name and line.

    Raises:
        ValueError: not JSON, or nested deeper than Python reads.
    """
    try:
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}.") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON: nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}.") from error
    return value


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        check.require(name not in values, f"{check.shown(name)} comes twice")
        values[name] = value
    return values


def _finite(text: str) -> float:
    value = float(text)
    check.require(math.isfinite(value), f"{check.shown(text, quoted=False)} is not a finite number")
    return value


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
        value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)),
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
        ValueError: a field is unknown (the nearest name is suggested), missing, of another type, or refused by the
            dataclass itself.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        check.require(name in names, f"{where}: unknown value {check.shown(name)}{check.nearest(name, names) or '.'}")
    missing = [name for name in names if name not in values]
    check.require(not missing, f"{where}: missing {', '.join(map(repr, missing))} of {kind.__name__}.")
    typed = {name: _typed(hints[name], values[name], f"{where}: {name}") for name in names}
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(hint: object, value: Value, where: str) -> object:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        (hint,) = (choice for choice in choices if choice is not type(None))
        return _typed(hint, value, where)
    if origin is Literal:
        listed = ", ".join(map(repr, choices))
        check.require(value in choices, f"{where}: expected one of {listed}, got {check.shown(value)}.")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected the values of {hint.__name__}, got {check.shown(value)}.")
        return from_dict(hint, value, where=where)
    if hint is Path and isinstance(value, str):
        check.require("\0" not in value, f"{where}: expected a path, got {check.shown(value)}.")
        return Path(value)
    expected = cast("type", hint)
    if isinstance(value, float):
        check.require(math.isfinite(value), f"{where}: expected a finite number, got {value!r}.")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        check.require(abs(value) < 2**1023, f"{where}: expected a finite number, got {check.shown(value)}.")
        value = float(value)
    check.require(
        isinstance(value, expected) and (expected is bool or not isinstance(value, bool)),
        f"{where}: expected {expected.__name__}, got {check.shown(value)}.",
    )
    return value
