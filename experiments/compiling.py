"""`torch.compile` where it can work, and one clear line where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one compiled graph of static shapes, or itself on a CPU without a C++ compiler."""
    if not _can_compile():
        return function
    result: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=False)
    return result


@cache
def _can_compile() -> bool:
    if torch.cuda.is_available() or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return True
    print("No C++ compiler found: torch.compile needs one on a CPU. Running eagerly.")
    return False
