"""One wrong argument at a time: what is changed in a valid call, and what may come of it.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, M = E I neurons, N a sequence, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from onn import tree
from onn.tree import Tree
from tests.support import normal

SIZES: Mapping[str, int] = {"T": 4, "H": 5, "E": 10, "I": 3, "M": 30, "N": 7, "V": 11, "C": 2}
KINDS = ("bool", "float", "integer", "real")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.bool, torch.int64, *FLOATS, torch.complex64, torch.float8_e4m3fn)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308)
COUNTS = (-1, 0, 10**6, 2**62)

Tensors = Mapping[str, Tensor]
Call = Callable[[Tensors, Mapping[str, float]], Tree]


class Spec(NamedTuple):
    """A public function, arguments that it takes, and the shapes of what it returns."""

    call: Call
    tensors: Mapping[str, str]
    """By name: kind and shape, as `check.shapes` takes them; without a kind any will do."""
    result: tuple[str, ...]
    """The shape of every leaf; a name among the numbers is a size."""
    numbers: Mapping[str, float] = {}
    values: Mapping[str, Tensor] = {}
    """Instead of random ones."""
    free: tuple[str, ...] = ()
    """Tensors that may have any shape."""


def letters(dims: str) -> list[str]:
    return [word for word in dims.split() if word not in KINDS]


def kind(dims: str) -> str:
    first = dims.split()[:1]
    return first[0] if first and first[0] in KINDS else ""


def tensor(dims: str, *, seed: int) -> Tensor:
    """A random tensor of a kind and a shape."""
    shape = [SIZES[letter] if letter.isalpha() else int(letter) for letter in letters(dims)]
    drawn = normal(seed, *shape, dtype=torch.float32)
    return drawn > 0 if kind(dims) == "bool" else (drawn.abs() * 3).long() if kind(dims) == "integer" else drawn


def arguments(spec: Spec) -> dict[str, Tensor]:
    """Valid ones."""
    drawn = {name: tensor(dims, seed=seed) for seed, (name, dims) in enumerate(spec.tensors.items())}
    return drawn | {name: value.clone() for name, value in spec.values.items()}


def sizes(spec: Spec, given: Tensors) -> dict[str, int] | None:
    """Of every letter; `None` where shapes contradict one another."""
    found: dict[str, int] = {}
    for name, dims in spec.tensors.items():
        if given[name].ndim != len(letters(dims)):
            return None
        for letter, size in zip(letters(dims), given[name].shape, strict=True):
            if size != (found.setdefault(letter, size) if letter.isalpha() else int(letter)):
                return None
    return found


def holds(dims: str, dtype: torch.dtype) -> bool:
    match kind(dims):
        case "bool":
            return dtype == torch.bool
        case "float":
            return dtype in FLOATS
        case "integer":
            return dtype in INTEGERS
        case "real":
            return dtype in (*FLOATS, *INTEGERS)
    return True


Change = Callable[[Tensor], Tensor]


def cast_to(dtype: torch.dtype) -> Change:
    return lambda given: given.to(dtype)


def filled(value: float) -> Change:
    return lambda given: torch.full_like(given, value)


def longer(axis: int) -> Change:
    return lambda given: torch.cat([given, given.narrow(axis, 0, 1)], axis)


def empty(axis: int) -> Change:
    return lambda given: given.narrow(axis, 0, 0)


def changes(given: Tensor) -> list[tuple[str, Change]]:
    """Everything that may be wrong with one tensor."""
    found: list[tuple[str, Change]] = [
        ("on meta", lambda given: given.to("meta")),
        ("one dimension more", lambda given: given[None]),
        ("other strides", lambda given: torch.stack([given, given], dim=-1)[..., 0]),
        *((f"of {dtype}", cast_to(dtype)) for dtype in DTYPES if dtype != given.dtype),
    ]
    if given.ndim:
        found.append(("one dimension less", lambda given: given.select(0, 0)))
    if given.is_floating_point():
        found += [(f"all {value}", filled(value)) for value in (math.nan, math.inf)]
    for axis in range(given.ndim):
        found += [(f"longer in {axis}", longer(axis)), (f"empty in {axis}", empty(axis))]
    return found


class Wrong(NamedTuple):
    """One call with one thing changed."""

    what: str
    name: str
    tensors: Tensors
    numbers: Mapping[str, float]


@st.composite
def wrongs(draw: st.DrawFn, spec: Spec) -> Wrong:
    """A valid call with one argument changed."""
    given = arguments(spec)
    name = draw(st.sampled_from([*spec.tensors, *spec.numbers]))
    if name in spec.numbers:
        pool: tuple[float, ...] = COUNTS if isinstance(spec.numbers[name], int) else NUMBERS
        value = draw(st.sampled_from(pool))
        return Wrong(f"{name}={value!r}", name, given, {**spec.numbers, name: value})
    what, change = draw(st.sampled_from(changes(given[name])))
    return Wrong(f"{name} {what}", name, {**given, name: change(given[name])}, spec.numbers)


def attempt(spec: Spec, wrong: Wrong) -> tuple[Tree, Exception | None]:
    try:
        return spec.call(wrong.tensors, wrong.numbers), None
    except Exception as error:  # whatever it is, it is judged by the caller
        return (), error


def assert_handled(spec: Spec, wrong: Wrong, *, accepted: bool = False) -> None:
    """The call returned what it shall, in the right shapes, or raised a `ValueError` that names the argument."""
    found = sizes(spec, wrong.tensors)
    result, error = attempt(spec, wrong)
    if error is not None:
        names = (wrong.name,) if wrong.name in wrong.numbers else (*wrong.tensors, *wrong.numbers)
        named = any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names)
        refused = type(error) is ValueError and named and not accepted
        assert refused, f"{wrong.what}: {type(error).__name__}: {error}"
        return
    assert found is not None or spec.free, f"{wrong.what}: was not refused"
    for name, dims in spec.tensors.items():
        assert holds(dims, wrong.tensors[name].dtype), f"{wrong.what}: was not refused"
    assert len({given.device for given in wrong.tensors.values()}) <= 1, f"{wrong.what}: was not refused"
    if found is None:
        return
    leaves = tree.leaves(result)
    assert len(leaves) == len(spec.result), f"{wrong.what}: {len(leaves)} results"
    known = {**SIZES, **found, **{name: int(n) for name, n in wrong.numbers.items() if isinstance(n, int)}}
    for leaf, dims in zip(leaves, spec.result, strict=True):
        expected = [known[letter] if letter in known else int(letter) for letter in letters(dims)]
        assert list(leaf.shape) == expected, f"{wrong.what}: {list(leaf.shape)}, expected {expected}"
