"""What the suite shares: tolerances derived from dtypes, comparisons, seeded tensors and banks, and their oracles."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

import onn.functional as F
from onn.functional.kernels import native
from onn.functional.kernels.tilings import NATIVE
from onn.tree import Engine, T, Tree, grad, leaves, map1, paths, unflatten, value_and_grad, vmap


def tolerance(dtype: torch.dtype, *, terms: int, slack: float = 8.0) -> float:
    """The relative error of a sum of `terms` rounded products: the unit roundoff times sqrt(terms), times `slack`."""
    return slack * torch.finfo(dtype).eps * math.sqrt(terms)


BOUND = tolerance(torch.float64, terms=64, slack=512)
"""1e-12: the sums of `cases` have at most 64 terms; the slack leaves room for cancellation in banks of one neuron."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The Frobenius norm of the difference relative to that of `expected`, computed in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(got - expected) / torch.where(scale > 0, scale, 1))


def assert_close(got: Tree, expected: Tree, *, bound: float) -> None:
    """Every leaf has the shape expected, NaN and infinities in the same places and, over all the other entries, a
    relative error of at most `bound`; the message names the leaf.
    """
    for name, a, b in zip(paths(expected), leaves(got), leaves(expected), strict=True):
        assert a.shape == b.shape, f"{name}: shape {list(a.shape)}, expected {list(b.shape)}"
        finite = torch.isfinite(b)
        for kind, marked in (("NaN", torch.isnan), ("infinities", torch.isposinf), ("infinities", torch.isneginf)):
            assert torch.equal(marked(a), marked(b)), f"{name}: {kind} in other places; got {a}, expected {b}"
        error = relative_error(torch.where(finite, a, 0), torch.where(finite, b, 0))
        assert error <= bound, f"{name}: relative error {error:.3e} > {bound:.3e}; got {a}, expected {b}"


def assert_same(got: Tree, expected: Tree) -> None:
    """Every leaf has the same dtype, shape and values; NaN equals NaN."""
    for name, a, b in zip(paths(expected), leaves(got), leaves(expected), strict=True):
        assert a.dtype == b.dtype, f"{name}: dtype {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"{name}: shape {list(a.shape)}, expected {list(b.shape)}"
        assert bool(((a == b) | (a.isnan() & b.isnan())).all()), f"{name}: got {a}, expected {b}"


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


Chosen: TypeAlias = "F.Backend | F.Tiling | F.Bounded"
_NO_NATIVE = native.why_not(torch.float64, device="cpu")
needs_native = pytest.mark.skipif(bool(_NO_NATIVE), reason=f"no native code: {_NO_NATIVE}")


def _is_native(backend: Chosen) -> bool:
    return backend.entries == NATIVE if isinstance(backend, F.Tiling) else backend == "native"


def each_backend(*backends: Chosen) -> pytest.MarkDecorator:
    """Parameters; native ones are skipped where there is no native code."""
    return pytest.mark.parametrize(
        "backend", [pytest.param(one, marks=needs_native if _is_native(one) else ()) for one in backends], ids=str
    )


def there_are(*backends: Chosen) -> list[Chosen]:
    """Those of these backends that run here."""
    return [one for one in backends if not (_NO_NATIVE and _is_native(one))]


SHARES = st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0])
CUTS = st.builds(F.Tiling, st.integers(1, 60), SHARES)
"""Tilings that cut a bank into parts."""
TILINGS = CUTS | st.builds(F.Tiling, st.just(0) if _NO_NATIVE else st.sampled_from([0, NATIVE]), SHARES)


def listed_pairs(weights: Tensor) -> native.Active:
    """The active pairs of combine weights [T, E] by native code."""
    return native.listed(weights, native.counted(weights))


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


can_compile = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="the inductor backend needs a C++ compiler and Python's headers",
)


class Inputs(NamedTuple):
    """Everything `bank` is differentiated with respect to; a gradient has the same fields."""

    experts: F.Experts
    x: Tensor
    weights: Tensor
    taps: Mapping[str, Tensor]


def inputs_of(case: Case, taps: tuple[F.TapName, ...] = ()) -> Inputs:
    """The bank's arguments, with zero taps of these names."""
    zeros = F.zero_taps(taps, tokens=len(case.x), experts=case.experts)
    return Inputs(experts=case.experts, x=case.x, weights=case.weights, taps=zeros)


def project(inputs: Inputs, dy: Tensor, *, min_k: int, backend: Chosen = "dense") -> tuple[Tensor, Tensor]:
    """A scalar whose gradient with respect to the bank's output is `dy`, and that output."""
    y = F.bank(inputs.experts, inputs.x, inputs.weights, inputs.taps, min_k=min_k, backend=backend)
    return (y * dy).sum(), y


def differentiate(
    case: Case,
    *,
    min_k: int,
    taps: tuple[F.TapName, ...] = (),
    engine: Engine = "autograd",
    backend: Chosen = "dense",
) -> Inputs:
    """The gradient that `bank` gives to everything, when its output has the gradient `case.dy`."""
    return value_and_grad(project, engine=engine)(inputs_of(case, taps), case.dy, min_k=min_k, backend=backend)[1]


def stacked(models: Sequence[T]) -> T:
    """An ensemble: the trees of its members, leaf by leaf."""
    return unflatten(models[0], [torch.stack(column) for column in zip(*map(leaves, models), strict=True)])


def measures(case: Case) -> dict[str, Tensor]:
    """By name, what each tap shall say where all pairs learn."""
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    local, _ = F.bank_local(case.experts, residuals, case.dy)
    return {
        "surprise": F.parameter_surprise(local, case.x, case.weights, case.dy),
        "counterfactual": F.counterfactual_surprise(local, case.x, case.dy),
        "neuron": F.neuron_surprise(local, case.x, case.weights, case.dy),
        "matrix": F.matrix_surprise(local, case.x, case.weights, case.dy),
        "bias": F.bias_gradients(local, case.weights),
    }


def untied(experts: F.Experts, *, tokens: int) -> F.Experts:
    """A copy of the experts for each token: [T, E, I, H] each."""
    return map1(lambda w: w.expand(tokens, *w.shape).clone(), experts)


def untied_forward(experts: F.Experts, x: Tensor, weights: Tensor) -> Tensor:
    """The bank of experts [T, E, I, H], in which no two tokens share a weight."""
    h1, h3 = (torch.einsum("teih,th->tei", w, x) for w in (experts.gate, experts.up))
    return torch.einsum("tei,teih,te->th", silu(h1) * h3, experts.down, weights)


def pair_gradients(case: Case) -> F.Experts:
    """What each token gives to each expert: [T, E, I, H] each; they sum to the gradient of the bank."""

    def loss(experts: F.Experts) -> Tensor:
        return (untied_forward(experts, case.x, case.weights) * case.dy).sum()

    return grad(loss)(untied(case.experts, tokens=len(case.x)))


def pair_bias_gradients(case: Case) -> Tensor:
    """What each token gives to a bias on every pre-activation of gate and up: [T, 2, E, I]."""

    def loss(biases: Tensor, x_H: Tensor, w_E: Tensor, g_H: Tensor) -> Tensor:
        h1, h3 = torch.stack(case.experts[:2]) @ x_H + biases
        return torch.einsum("ei,eih,e,h->", silu(h1) * h3, case.experts.down, w_E, g_H)

    nothing = torch.zeros(2, *case.experts.gate.shape[:2], dtype=case.x.dtype)
    return vmap(grad(loss), (None, 0, 0, 0))(nothing, case.x, case.weights, case.dy)


def pair_norms(pairs: F.Experts) -> Tensor:
    """The norm of each token's gradient of each expert over its three matrices, [T, E]."""
    norms: Tensor = torch.linalg.vector_norm(torch.stack(pairs), dim=(0, -2, -1))
    return norms


def least_pairs(norms: Tensor, weights: Tensor, *, min_k: int) -> Tensor:
    """SMK from its definition, a loop over tokens: bool [T, E]."""
    keep = torch.zeros_like(weights, dtype=torch.bool)
    for token, (norms_E, weights_E) in enumerate(zip(norms.tolist(), weights.tolist(), strict=True)):
        ranked = sorted((norm, expert) for expert, norm in enumerate(norms_E) if weights_E[expert] != 0)
        for _, expert in ranked[:min_k]:
            keep[token, expert] = True
    return keep


def kept_sum(pairs: F.Experts, keep: Tensor) -> F.Experts:
    """The gradient of the experts from the pairs kept, [E, I, H] each."""
    return map1(lambda pair: torch.where(keep[..., None, None], pair, 0).sum(dim=0), pairs)


class _Operator(Protocol):
    is_view: bool

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class Recorded(NamedTuple):
    """What a computation did."""

    operators: Counter[str]
    """How often each operator ran that is more than a view."""
    largest: int
    """The most elements that one of them returned."""


def record(work: Callable[[], object]) -> Recorded:
    """Run `work` and note every operator that reaches a backend."""
    operators: Counter[str] = Counter()
    sizes = [0]

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: _Operator,
            types: tuple[type, ...],
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            result = func(*args, **(kwargs or {}))
            operators[str(func)] += not func.is_view
            values = result if isinstance(result, tuple | list) else (result,)
            sizes.extend(value.numel() for value in values if isinstance(value, Tensor))
            return result

    with Mode():  # type: ignore[no-untyped-call]  # torch does not annotate its constructor
        work()
    return Recorded(operators=operators, largest=max(sizes))
