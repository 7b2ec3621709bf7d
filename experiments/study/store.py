"""The files of the forgetting study: a journal of what is done, from which a stopped study continues, and the results.

`runs.jsonl` and `specialisation.jsonl` hold a record a line, on the disk before `append` returns. `results.json` holds
all of them with the settings and the facts of the run. Floats come back to the bit, NaN (null) and the infinities
(`"inf"`, `"-inf"`) too. A field that a record has a default for may be missing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from experiments.study.records import Key, Run, Specialisation, Vocabulary
from onn import check, storage
from onn.config import read_text
from onn.observe import Json, decode, encode, number, read_jsonl

VERSION = 1
RUNS = "runs.jsonl"
SPECIALISATIONS = "specialisation.jsonl"
RESULTS = "results.json"
NAMED = 5
"""Differences between two studies that a message names."""

R = TypeVar("R")


class Results(NamedTuple):
    """All of a study."""

    facts: Mapping[str, Json]
    """What it was run with, as `experiments.facts` tells it."""
    settings: Mapping[str, Json]
    runs: Sequence[Run]
    specialisations: Sequence[Specialisation]


def append(path: Path, records: Sequence[Run | Specialisation]) -> None:
    """Add a line for each record, and wait until they are on the disk; a last line that was cut off goes first."""
    lines = "".join(f"{_line(record)}\n" for record in records)
    is_new = not path.exists()
    with path.open("ab+") as file:
        file.truncate(_whole(path))
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        storage.flush(path.parent)


def load_runs(path: Path) -> list[Run]:
    """The runs of a journal, none where it has not begun; a last line that was cut off is left out.

    Raises:
        ValueError: anything else is damaged; the message names file and line.
    """
    return _load(Run, path)


def load_specialisations(path: Path) -> list[Specialisation]:
    """The same for a journal of specialisations."""
    return _load(Specialisation, path)


def write_results(path: Path, results: Results) -> None:
    """Write everything; `path` holds the old content or the whole new one, never a part."""
    head: Mapping[str, Json] = {"version": VERSION, "facts": results.facts, "settings": results.settings}
    parts = [f'"{name}": {encode(value, indent=None)}' for name, value in head.items()]
    runs, specialisations = (",\n".join(map(_line, kept)) for kept in (results.runs, results.specialisations))
    parts += [f'"runs": [\n{runs}\n]', f'"specialisations": [\n{specialisations}\n]']
    storage.write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_results(path: Path) -> Results:
    """What `write_results` wrote.

    Raises:
        ValueError: there is no such file, or it is damaged; the message names it and the place.
    """
    try:
        content = _mapping(decode(read_text(path)), "the file")
        version = content.get("version")
        check.require(version == VERSION, f"expected version {VERSION}, got {check.shown(version)}")
        facts, settings = (_mapping(content.get(name), name) for name in ("facts", "settings"))
        runs = _each(Run, content.get("runs"), "runs")
        return Results(facts, settings, runs, _each(Specialisation, content.get("specialisations"), "specialisations"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def require_same(path: Path, settings: Mapping[str, Json]) -> None:
    """Write the settings of a study down, or refuse to go on with another one in their folder.

    Raises:
        ValueError: `path` holds other settings, in words, or is damaged.
    """
    text = encode(settings, indent=2)
    if not path.exists():
        storage.write_text(path, text)
        return
    try:
        before = decode(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check.require(
        isinstance(before, Mapping) and "arms" in before,
        f"{path.parent} holds a study of an earlier version: {path} lacks the table of its arms.",
    )
    found = list(_differences(before, decode(text), ""))
    more = f"; {len(found) - NAMED} more" if len(found) > NAMED else ""
    check.require(not found, f"{path.parent} holds another study, by {path}: {'; '.join(found[:NAMED])}{more}.")


def _differences(before: Json, asked: Json, name: str) -> Iterator[str]:
    """In words, the first of each mapping first."""
    if isinstance(before, Mapping) and isinstance(asked, Mapping):
        for key in dict.fromkeys((*before, *asked)):
            place = f"{name}.{key}" if name else key
            if key not in asked:
                yield f"{place} is not asked for"
            elif key not in before:
                yield f"{place} is new"
            else:
                yield from _differences(before[key], asked[key], place)
    elif before != asked:
        was, now = (check.shown(encode(value, indent=None), quoted=False) for value in (before, asked))
        yield f"{name} was {was}, {now} is asked for"


def _line(record: Run | Specialisation) -> str:
    return encode(_plain(record), indent=None)


def _whole(path: Path) -> int:
    """Bytes up to the end of the last line that has one."""
    return path.read_bytes().rfind(b"\n") + 1


def _load(kind: type[R], path: Path) -> list[R]:
    if not path.exists():
        return []
    records: list[Json] = [*read_jsonl(path)]
    return [_made(kind, record, f"{path}, line {place}") for place, record in enumerate(records, start=1)]


def _each(kind: type[R], values: Json, name: str) -> list[R]:
    listed = _sequence(values, name)
    return [_made(kind, value, f"{name}[{place}]") for place, value in enumerate(listed)]


def _plain(value: object) -> Json:
    if isinstance(value, Key | Run | Specialisation | Vocabulary):
        return {name: _plain(getattr(value, name)) for name in value._fields}
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(child) for name, child in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(child) for child in value]
    if isinstance(value, str | int):
        return value
    raise TypeError(f"a record holds {check.shown(value)}, which no file of the study can hold.")


def _made(kind: type[R], value: Json, where: str) -> R:
    record, hints = _mapping(value, where), get_type_hints(kind)
    unknown = [name for name in record if name not in hints]
    check.require(not unknown, f"{where}: unknown {check.shown(unknown)} of {kind.__name__}.")
    typed = {name: _typed(hints[name], child, f"{where}: {name}") for name, child in record.items()}
    try:
        return kind(**typed)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error


def _typed(hint: object, value: Json, where: str) -> object:
    """A value as a field of a record holds it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Key or hint is Vocabulary:
        return _made(hint, value, where)
    if origin is tuple and inner[1:] == (...,):
        return tuple(_typed(inner[0], child, where) for child in _sequence(value, where))
    if origin is dict:
        entries = _mapping(value, where).items()
        return {_typed(inner[0], name, where): _typed(inner[1], child, f"{where}: {name}") for name, child in entries}
    if origin is Literal:
        check.require(value in inner, f"{where}: expected one of {inner}, got {check.shown(value)}.")
        return value
    if hint is float:
        return _float(value, where)
    if hint in (str, int, bool):
        check.require(type(value) is hint, f"{where}: expected {hint}, got {check.shown(value)}.")
        return value
    raise TypeError(f"{where}: no value of type {hint} can be read.")


def _float(value: Json, where: str) -> float:
    if value is None:
        return math.nan
    if value in ("inf", "-inf"):
        return float(str(value))
    found = None if isinstance(value, bool) else number({"": value}, "")
    if found is None:
        raise ValueError(f"{where}: expected a number, got {check.shown(value)}.")
    return found


def _mapping(value: Json, where: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object, got {check.shown(value)}.")
    return value


def _sequence(value: Json, where: str) -> Sequence[Json]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: expected a list, got {check.shown(value)}.")
    return value
