"""Trees as entries of `check.shapes`."""

from __future__ import annotations

from torch import Tensor

from onn import check
from onn.functional.types import Experts, Local


def local_parts(local: Local, *, where: str) -> list[tuple[str, Tensor, str]]:
    """One entry for each part; raises `ValueError` where it is no `Local`."""
    check.instance(where, "local", local, Local)
    return [(name, part, "float T E I") for name, part in zip(Local._fields, local, strict=True)]


def pass_parts(local: Local, x: Tensor, weights: Tensor, dy: Tensor, *, where: str) -> list[tuple[str, Tensor, str]]:
    """One entry for each tensor of a backward pass; raises `ValueError` where `local` is no `Local`."""
    return [
        *local_parts(local, where=where),
        ("x", x, "float T H"),
        ("weights", weights, "float T E"),
        ("dy", dy, "float T H"),
    ]


def bank_parts(experts: Experts, *, where: str, name: str) -> list[tuple[str, Tensor, str]]:
    """One entry for each matrix of a bank or of its gradients, `name`; raises `ValueError` where it is no `Experts`."""
    check.instance(where, name, experts, Experts)
    return [(name, w, "float E I H") for name, w in zip(Experts._fields, experts, strict=True)]


def tap_dims(*, name: str) -> str:
    """The shape of a tap, in letters and numbers."""
    return {"neuron": "E I", "matrix": "3 E I", "bias": "2 E I"}.get(name, "T E")
