"""Every wrong call that `tests.bad_arguments` knows of one function, every argument of another kind, and what came of
each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Literal, NamedTuple, Protocol, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from tests.bad_arguments import COUNTS, NUMBERS, Spec, Wrong, arguments, assert_handled, changes


def functions_of(module: ModuleType) -> set[str]:
    """The public functions that a module defines."""
    found = inspect.getmembers(module, lambda value: isinstance(value, FunctionType))
    return {name for name, value in found if value.__module__ == module.__name__ and not name.startswith("_")}


def every_wrong(spec: Spec) -> Iterator[Wrong]:
    """A valid call with one argument changed, in all ways."""
    given = arguments(spec)
    for name, tensor in given.items():
        for what, change in changes(tensor):
            yield Wrong(f"{name} {what}", name, {**given, name: change(tensor)}, spec.numbers)
    for name, number in spec.numbers.items():
        for value in COUNTS if isinstance(number, int) else NUMBERS:
            yield Wrong(f"{name}={value!r}", name, given, {**spec.numbers, name: value})


def assert_all_handled(spec: Spec) -> None:
    """The valid call is answered in the shapes said, and every wrong one is refused by name or answered so, too.

    All that are not are listed.
    """
    nothing = Wrong("nothing", next(iter(spec.tensors)), arguments(spec), spec.numbers)
    assert_handled(spec, nothing, accepted=True)
    problems = []
    for wrong in every_wrong(spec):
        try:
            assert_handled(spec, wrong)
        except AssertionError as error:
            problems.append(str(error).splitlines()[0])
    assert not problems, "\n".join(problems)


class Refusal(NamedTuple):
    """A call that is refused, and what the message says."""

    call: Callable[[], object]
    words: tuple[str, ...]


def assert_all_tried(
    names: Iterable[str],
    module: ModuleType,
    modules: Sequence[ModuleType],
    own: Callable[[ModuleType], set[str]] = functions_of,
) -> None:
    """All that a module offers is among the names, each up to its comma, and no name is of none of the modules."""
    tried, offered = {name.split(",")[0] for name in names}, own(module)
    assert offered <= tried, offered - tried
    everything = set[str]().union(*map(own, modules))
    assert tried <= everything, tried - everything


def refused(call: Callable[[], object], *words: str) -> None:
    """A plain `ValueError` that holds the words: the function, the argument, its value."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are looked for below
        call()
    assert type(caught.value) is ValueError, caught.value
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


_LEAF = torch.ones(2, 3)
KINDS: tuple[object, ...] = (
    None,
    2,
    2.5,
    True,
    "2",
    1j,
    _LEAF,
    [_LEAF],
    (_LEAF, _LEAF, _LEAF),
    {"a": _LEAF},
    len,
    10**400,
)
"""One of each; of every argument those that it is not."""


class Anything(Protocol):
    """A function that is given what it does not take."""

    def __call__(self, **arguments: object) -> object: ...


def fits(hint: object, value: object) -> bool:
    """Whether the hint allows the value, as far as its kind goes."""
    if hint is float:
        return isinstance(value, int | float) and abs(value) < 10**300
    if hint is int:
        return type(value) is int and value < 10**300
    if hint is Tensor or hint is bool:
        return isinstance(value, hint)
    if isinstance(hint, type):
        return False
    text, origin = str(hint), get_origin(hint)
    if origin is Literal:
        return False
    return (
        (isinstance(value, Tensor) and "Tensor |" in text)
        or (isinstance(value, dict) and "Mapping" in text and origin is not tuple)
        or (callable(value) and "Callable" in text)
        or (value is None and "None" in text)
    )


def wrong_kinds(
    function: FunctionType, given: Mapping[str, object]
) -> Iterator[tuple[str, object, Mapping[str, object]]]:
    """Valid arguments with one of another kind than its hint says: its name, what it is now, and all of them."""
    hints = get_type_hints(function)
    for argument in given:
        for value in KINDS:
            if not fits(hints[argument], value):
                yield argument, value, {**given, argument: value}
