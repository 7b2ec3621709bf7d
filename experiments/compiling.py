"""`torch.compile` where it can work, and one clear line where it cannot.

A training step is compiled in regions (`by_region`): each part once for all layers, so that 28 layers take about as
long to compile as one. As one graph (`compiled`) every layer is unrolled: for small models, and for studies under
`vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from onn.region import Kind, Region, inline
from onn.tree import Flat

GRAPHS = 64
"""Of one code object at most; torch's own limit is 8."""

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one compiled graph of static shapes, or itself on a CPU without a C++ compiler.

    All wrappers of `torch.func` share one code object, and torch counts their graphs together.
    """
    if not _can_compile():
        return function
    _raise_limit()
    result: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=False)
    return result


def by_region(backend: str = "inductor") -> Region:
    """Every part of a step compiled by itself, or as it is on a CPU without a C++ compiler.

    Only for the engine `autograd`: torch cannot enter a compiled function under `torch.func`. The optimizer's part is
    compiled for matrices of any size, all others for the sizes that they meet; a process may hold the graphs of several
    models.
    """
    if not _can_compile():
        return inline
    _raise_limit()

    def region(function: Callable[P, R], *, kind: Kind) -> Callable[P, R]:
        return _region(function, kind, backend)

    return region


@cache
def _region(function: Callable[P, R], kind: Kind, backend: str) -> Callable[P, R]:
    """One compiled function for each part, so that all calls share its graphs.

    The optimizer's leaves are handed over as tensors of their own: torch compiles anew for other strides, and for views
    of something of another size.
    """
    result: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=kind == "update", backend=backend)
    if kind != "update":
        return result

    def by_sizes_alone(*args: P.args, **kwargs: P.kwargs) -> R:
        call = Flat(result, *args, **kwargs)
        return call.result(call([leaf.contiguous().data for leaf in call.inputs]))

    return by_sizes_alone


def _raise_limit() -> None:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


@cache
def _can_compile() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        print("No C++ compiler found: torch.compile needs one. Running eagerly.")
        return False
    return True
