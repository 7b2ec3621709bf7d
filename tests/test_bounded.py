"""Grouped products with room for as many pairs as there may be: numbers, too little room, and nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import onn.functional as F
from onn import tree
from onn.functional.kernels.backends import choose
from onn.qwen3 import Moe, moe_forward
from tests.support import (
    BOUND,
    Case,
    Chosen,
    Inputs,
    assert_close,
    cases,
    differentiate,
    inputs_of,
    make_case,
    normal,
    project,
    record,
    stacked,
)
from tests.test_backends import ENGINES, TAPS, of_active
from tests.test_qwen3 import MOE


def most_of(weights: Tensor) -> int:
    """Active experts of a token, at most."""
    return int((weights != 0).sum(dim=1).max())


@given(cases(), st.sampled_from(ENGINES), st.data())
def test_with_room_for_all_pairs_the_numbers_are_those_of_the_dense_bank(
    case: Case, engine: tree.Engine, data: st.DataObject
) -> None:
    E = case.weights.shape[1]
    known = F.Bounded("grouped", data.draw(st.integers(max(1, most_of(case.weights)), E)))
    min_k = data.draw(st.integers(1, E))
    (_, y), gradient = tree.value_and_grad(project, engine="autograd")(inputs_of(case, TAPS), case.dy, min_k=min_k)
    (_, got), gradients = tree.value_and_grad(project, engine=engine)(
        inputs_of(case, TAPS), case.dy, min_k=min_k, backend=known
    )
    assert_close((got, gradients), (y, of_active(gradient, case)), bound=BOUND)


@given(cases(), st.data())
def test_too_little_room_is_told_by_an_output_that_is_nan(case: Case, data: st.DataObject) -> None:
    E = case.weights.shape[1]
    room = data.draw(st.integers(1, E))
    for min_k in (1, E):
        y = project(inputs_of(case), case.dy, min_k=min_k, backend=F.Bounded("grouped", room))[1]
        assert bool(y.isnan().all()) == (room < most_of(case.weights))
        assert y.isnan().any() == y.isnan().all()
        differentiate(case, min_k=min_k, taps=TAPS, backend=F.Bounded("grouped", room))


def everything(inputs: Inputs, dy: Tensor, *, backend: Chosen, min_k: int) -> tuple[Tensor, Inputs]:
    (_, y), gradient = tree.value_and_grad(project, engine="func")(inputs, dy, min_k=min_k, backend=backend)
    return y, gradient


def on(device: str, case: Case) -> tuple[Inputs, Tensor]:
    moved = tree.map1(lambda leaf: leaf.to(device), case)
    return inputs_of(moved, TAPS), moved.dy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("min_k", [1, 4])
def test_no_number_is_waited_for(min_k: int, dtype: torch.dtype) -> None:
    """On `meta` there are no numbers: a shape that hangs on one, a branch or a copy to the host is an error."""
    case = make_case(3, T=5, H=8, E=4, I=8, dtype=dtype)

    def run(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        return everything(inputs, dy, backend=F.Bounded("grouped", 4), min_k=min_k)

    inputs, dy = on("meta", case)
    y, gradient = run(inputs, dy)
    assert (y.shape, y.dtype) == (case.dy.shape, dtype)
    expected = tree.leaves(run(*on("cpu", case))[1])
    for got, known in zip(tree.leaves(gradient), expected, strict=True):
        assert (got.device.type, got.shape, got.dtype) == ("meta", known.shape, known.dtype)
    many = tree.vmap(run, (0, 0))(stacked([inputs, inputs]), torch.stack([dy, dy]))
    assert [leaf.shape[1:] for leaf in tree.leaves(many)] == [leaf.shape for leaf in tree.leaves((y, gradient))]


@pytest.fixture
def memory_holds_nan() -> Iterator[None]:
    """What is not written yet is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("memory_holds_nan")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("min_k", [1, 4])
def test_what_the_rows_of_nobody_hold_reaches_nothing(min_k: int, dtype: torch.dtype) -> None:
    case = make_case(3, T=5, H=8, E=4, I=8, density=0.3, dtype=dtype)
    assert torch.empty(3).isnan().all()
    assert (case.weights != 0).sum() < 20
    got = differentiate(case, min_k=min_k, taps=TAPS, backend=F.Bounded("grouped", 4))
    y = project(inputs_of(case), case.dy, min_k=min_k, backend=F.Bounded("grouped", 4))[1]
    assert all(bool(leaf.isfinite().all()) for leaf in tree.leaves((y, got)))


def test_where_the_number_is_not_known_it_is_waited_for() -> None:
    inputs, dy = on("meta", make_case(3, T=5, H=8, E=4, I=8))
    with pytest.raises(RuntimeError, match=r"ragged_forward.* data-dependent shape"):
        everything(inputs, dy, backend="grouped", min_k=1)


def test_on_a_gpu_a_bank_of_many_neurons_is_grouped_and_one_of_few_is_dense() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        for E, known in ((42, None), (43, F.Bounded("auto", 8))):
            gate = torch.empty(E, 96, 16)
            assert choose(F.Bounded("auto", 8), gate, tokens=5, counterfactual=False) == known
            assert choose(F.Bounded("auto", 8), gate, tokens=5, counterfactual=True) is None
        assert choose(F.Bounded("grouped", 8), gate[:9], tokens=5, counterfactual=False) == F.Bounded("grouped", 8)
        assert isinstance(choose("auto", gate, tokens=5, counterfactual=False), F.Tiling)


@pytest.mark.parametrize("min_k", [1, 8])
def test_the_products_are_of_the_room_and_not_of_all_pairs(min_k: int) -> None:
    T, H, E, K = 16, 24, 32, 8
    case = make_case(1, T=T, H=H, E=E, I=4, density=0.1)
    assert 1 < most_of(case.weights) <= K
    gradients: list[Inputs] = []
    recorded = record(
        lambda: gradients.append(differentiate(case, min_k=min_k, taps=TAPS, backend=F.Bounded("grouped", K)))
    )
    assert 0 < recorded.largest < T * E * H
    assert_close(gradients[0], of_active(differentiate(case, min_k=min_k, taps=TAPS), case), bound=BOUND)


def test_the_top_k_route_tells_a_layer_how_much_room_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    E, I, H = MOE.num_experts, 3, 8
    experts = F.Experts(*(normal(seed, E, I, H) for seed in range(3)))
    moe = Moe(experts=experts, router=F.Router(prototypes=normal(3, E, H), thresholds=normal(4, E)))
    taken: list[object] = []

    def watched(*args: object, backend: object, min_k: int) -> Tensor:
        taken.append(backend)
        return normal(6, 7, H)

    monkeypatch.setattr("onn.qwen3.bank", watched)
    for route in ("threshold", "top_k"):
        for backend in ("auto", "grouped", "dense", "grouped:5"):
            moe_forward(moe, normal(5, 7, H), {}, config=replace(MOE, route=route, top_k=3, backend=backend))
    room = F.Bounded("grouped", 5)
    assert taken == ["auto", "grouped", "dense", room, F.Bounded("auto", 3), F.Bounded("grouped", 3), "dense", room]
