"""What the suite shares: tolerances derived from dtypes, seeded tensors, and strategies for banks and routings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn.tree import Tree, leaves, paths


def tolerance(dtype: torch.dtype, *, terms: int, slack: float = 8.0) -> float:
    """The relative error of a sum of `terms` rounded products: the unit roundoff times sqrt(terms), times `slack`."""
    return slack * float(torch.finfo(dtype).eps) * terms**0.5


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The Frobenius norm of the difference relative to that of `expected`, computed in float64."""
    got, expected = got.double(), expected.double()
    scale = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(got - expected) / torch.where(scale > 0, scale, 1))


def assert_close(got: Tree, expected: Tree, *, bound: float) -> None:
    """Every leaf has the shape expected and a relative error of at most `bound`; the message names the leaf."""
    for name, a, b in zip(paths(expected), leaves(got), leaves(expected), strict=True):
        assert a.shape == b.shape, f"{name}: shape {list(a.shape)}, expected {list(b.shape)}"
        assert bool((a.isnan() == b.isnan()).all()), f"{name}: NaN in other places"
        error = relative_error(a.nan_to_num(), b.nan_to_num())
        assert error <= bound, f"{name}: relative error {error:.3e} > {bound:.3e}; got {a}, expected {b}"


def assert_same(got: Tree, expected: Tree) -> None:
    """Every leaf is bit-identical, NaN included."""
    for name, a, b in zip(paths(expected), leaves(got), leaves(expected), strict=True):
        assert a.dtype == b.dtype, f"{name}: dtype {a.dtype}, expected {b.dtype}"
        assert torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)), f"{name}: got {a}, expected {b}"


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case(NamedTuple):
    """One bank with everything around it."""

    experts: F.Experts
    x: Tensor
    weights: Tensor
    dy: Tensor


def make_case(
    seed: int, *, T: int, H: int, E: int, I: int, density: float = 0.5, dtype: torch.dtype = torch.float64
) -> Case:
    """A random bank; about `density` of the combine weights are non-zero, some of them negative."""
    gate, up, down = (normal(seed + i, E, I, H, dtype=dtype) / H**0.5 for i in range(3))
    routed = normal(seed + 3, T, E).abs() < torch.special.ndtri(torch.tensor(0.5 + density / 2, dtype=torch.float64))
    weights = torch.where(routed, normal(seed + 4, T, E), 0).to(dtype)
    return Case(
        experts=F.Experts(gate=gate, up=up, down=down),
        x=normal(seed + 5, T, H, dtype=dtype),
        weights=weights,
        dy=normal(seed + 6, T, H, dtype=dtype),
    )


@st.composite
def cases(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64) -> Case:
    """Banks of every small size: one token, one expert and one neuron included, from no active expert to all."""
    return make_case(
        draw(st.integers(0, 2**20)),
        T=draw(st.integers(1, 9)),
        H=draw(st.integers(1, 9)),
        E=draw(st.integers(1, 7)),
        I=draw(st.integers(1, 5)),
        density=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        dtype=dtype,
    )
