"""What float32 and bfloat16 may make of the bank: a running error analysis whose bounds come from eps and the number of
summed terms alone.

Every number is carried with a bound on the distance between its exact value and what a narrow dtype may make of it,
whatever the order of its sums (Higham, Accuracy and Stability of Numerical Algorithms, 3.1 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

import onn.functional as F
from onn import tree
from onn.functional.kernels.backends import Backend
from tests.support import Case, inputs_of

BACKENDS: list[Backend] = [name for name in get_args(Backend) if name != "auto"]
SPARSE_TAPS: tuple[F.TapName, ...] = ("surprise", "neuron", "matrix", "bias")
"""What backends measure that compute active pairs alone."""
STEEPEST_SIGMOID, STEEPEST_SILU = 0.25, 1.1
"""Upper bounds of the derivatives."""
SIGMOID, SILU, HYPOT = 4, 5, 4
"""Units that functions of the library may be off: an elementary function of two, and the operations around it."""


def computed(case: Case, *, min_k: int, backend: Backend) -> dict[str, Tensor]:
    """The bank's output, the gradient of everything where the output's is `case.dy`, and what every tap says.

    That of a combine weight of 0 is left out: only the dense backend knows it.
    """
    taps: tuple[F.TapName, ...] = get_args(F.TapName) if backend == "dense" else SPARSE_TAPS
    inputs = tree.map1(lambda leaf: leaf.detach().clone().requires_grad_(), inputs_of(case, taps))
    y = F.bank(inputs.experts, inputs.x, inputs.weights, inputs.taps, min_k=min_k, backend=backend)
    got = tree.unflatten(inputs, torch.autograd.grad(y, tree.leaves(inputs), case.dy))
    weights = torch.where(case.weights != 0, got.weights, 0)
    return {"y": y.detach(), **got.experts._asdict(), "x": got.x, "weights": weights, **got.taps}


class Rounded(NamedTuple):
    """A value and what a narrow computation of it may be off."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude that the narrow computation can have."""
        return self.value.abs() + self.error

    def over(self, function: Callable[[Tensor], Tensor]) -> Rounded:
        """After a change of shape or place."""
        return Rounded(function(self.value), function(self.error))


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Sums in the dtype of reductions, results stored in `dtype`."""

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    def gamma(self, terms: int) -> float:
        """Of a sum of `terms` rounded products: `n u / (1 - n u)`."""
        nu = terms * torch.finfo(F.reduction_dtype(self.dtype)).eps / 2
        return nu / (1 - nu)

    def exactly(self, value: Tensor) -> Rounded:
        return Rounded(value.double(), torch.zeros_like(value, dtype=torch.float64))

    def stored(self, value: Tensor, error: Tensor, *, units: float = 1) -> Rounded:
        """A result rounded `units` times on its way into memory."""
        return Rounded(value, error + units * self.unit * (value.abs() + error))

    def times(self, a: Rounded, b: Rounded) -> Rounded:
        product = a.value * b.value
        return self.stored(product, a.size * b.size - product.abs())

    def plus(self, a: Rounded, b: Rounded) -> Rounded:
        return self.stored(a.value + b.value, a.error + b.error)

    def hypot(self, a: Rounded, b: Rounded) -> Rounded:
        return self.stored(torch.hypot(a.value, b.value), torch.hypot(a.error, b.error), units=HYPOT)

    def through(self, function: Callable[[Tensor], Tensor], a: Rounded, *, steepest: float, units: int) -> Rounded:
        return self.stored(function(a.value), steepest * a.error, units=units)

    def contraction(self, equation: str, a: Rounded, b: Rounded, *, terms: int) -> Rounded:
        """A matrix product: sums of `terms` products, in any order."""
        largest = torch.einsum(equation, a.size, b.size)
        inherited = largest - torch.einsum(equation, a.value.abs(), b.value.abs())
        return self.stored(torch.einsum(equation, a.value, b.value), inherited + self.gamma(terms) * largest)

    def total(self, a: Rounded, *, dim: int) -> Rounded:
        value, inherited = a.value.sum(dim=dim), a.error.sum(dim=dim)
        return self.stored(value, inherited + self.gamma(a.value.shape[dim]) * a.size.sum(dim=dim))

    def norm(self, a: Rounded) -> Rounded:
        """Over the last dimension; as a column."""
        value, inherited = (vector_norm(part, dim=-1, keepdim=True) for part in a)
        return self.stored(value, inherited + self.gamma(a.value.shape[-1]) * (value + inherited))


def analysed(case: Case, dtype: torch.dtype) -> dict[str, Rounded]:
    """Everything that `computed` gives with every expert kept, by the bank's formulas, operation by operation."""
    at, wide = Arithmetic(dtype=dtype), Arithmetic(dtype=F.reduction_dtype(dtype))
    (T, H), (E, I) = case.x.shape, case.experts.gate.shape[:2]
    gate, up, down, x, w, g = (at.exactly(leaf) for leaf in (*case.experts, case.x, case.weights, case.dy))
    one, each = at.exactly(torch.ones(())), w.over(lambda part: part[..., None])
    h1, h3, u = (
        at.contraction("th,eih->tei", rows, matrix, terms=H) for rows, matrix in ((x, gate), (x, up), (g, down))
    )
    gated = at.through(silu, h1, steepest=STEEPEST_SILU, units=SILU)
    sigmoid = at.through(torch.sigmoid, h1, steepest=STEEPEST_SIGMOID, units=SIGMOID)
    rest = at.plus(one, Rounded(-sigmoid.value, sigmoid.error))
    slope = at.times(sigmoid, at.plus(one, at.times(h1, rest)))
    c1, c3, a = at.times(at.times(u, h3), slope), at.times(u, gated), at.times(gated, h3)
    d1, d3, weighted = (at.times(part, each) for part in (c1, c3, a))
    to_x = (at.contraction("tei,eih->th", rows, matrix, terms=E * I) for rows, matrix in ((d1, gate), (d3, up)))
    results = {
        "y": at.contraction("tei,eih->th", weighted, down, terms=E * I),
        "gate": at.contraction("tei,th->eih", d1, x, terms=T),
        "up": at.contraction("tei,th->eih", d3, x, terms=T),
        "down": at.contraction("tei,th->eih", weighted, g, terms=T),
        "x": at.plus(*to_x),
        "weights": at.total(at.times(a, u), dim=-1).over(lambda part: torch.where(case.weights != 0, part, 0)),
    }
    x_norm, g_norm = wide.norm(x), wide.norm(g)
    inner, outer = (
        wide.times(norm.over(lambda part: part[..., 0]), source)
        for norm, source in ((wide.hypot(wide.norm(c1), wide.norm(c3)), x_norm), (wide.norm(a), g_norm))
    )
    results["counterfactual"] = wide.hypot(inner, outer)
    results["surprise"] = wide.times(results["counterfactual"], Rounded(w.value.abs(), w.error))
    roots = [
        wide.times(part, wide.times(w, norm).over(lambda column: column[..., None]))
        for part, norm in ((c1, x_norm), (c3, x_norm), (a, g_norm))
    ]
    results["matrix"] = together([wide.total(wide.times(root, root), dim=0) for root in roots])
    results["neuron"] = wide.total(results["matrix"], dim=0)
    results["bias"] = together([wide.total(rows, dim=0) for rows in (d1, d3)])
    return results


def together(parts: Sequence[Rounded]) -> Rounded:
    return Rounded(*(torch.stack(column) for column in zip(*parts, strict=True)))


def assert_within(got: Mapping[str, Tensor], bounds: Mapping[str, Rounded], *, times: float = 1) -> None:
    """Every result is at most `times` its bound away from its exact value."""
    for name, value in got.items():
        exact, error = bounds[name]
        slack = times * error + torch.finfo(value.dtype).tiny
        excess = float(((value.double() - exact).abs() / slack).max()) if value.numel() else 0.0
        assert excess <= 1, f"{name}: off by {excess:.3g} times its bound"
