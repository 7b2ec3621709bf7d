"""Every wrong call that `tests.bad_arguments` knows of one function, and what came of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType

import pytest

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


def assert_valid(spec: Spec) -> None:
    """The call that is changed is answered in the shapes said."""
    nothing = Wrong("nothing", next(iter(spec.tensors)), arguments(spec), spec.numbers)
    assert_handled(spec, nothing, accepted=True)


def assert_all_handled(spec: Spec) -> None:
    """Every wrong call is refused by name or makes no difference to the shapes; all that are not are listed."""
    problems = []
    for wrong in every_wrong(spec):
        try:
            assert_handled(spec, wrong)
        except AssertionError as error:
            problems.append(str(error).splitlines()[0])
    assert not problems, "\n".join(problems)


def refused(call: Callable[[], object], *words: str) -> None:
    """A plain `ValueError` that holds the words: the function, the argument, its value."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are looked for below
        call()
    assert type(caught.value) is ValueError, caught.value
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
