"""Traps of torch that this library steps around, each kept shut by a test of what the library guarantees.

A failure here after an upgrade means that torch has changed under the library, not that a formula is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import onn.functional as F
from onn import carve, objective, qwen3, train, tree
from tests.support import (
    BOUND,
    Inputs,
    assert_close,
    assert_same,
    can_compile,
    differentiate,
    inputs_of,
    make_case,
    project,
    record,
    relative_error,
)
from tests.test_qwen3 import MOE, config, parameters

TAPS: tuple[F.TapName, ...] = get_args(F.TapName)
DROPPED = (
    f"torch {torch.__version__} silently drops a custom autograd.Function.backward under "
    "torch.compile(torch.func.grad(f)): a compiled step would measure no surprise and mask no gradient. "
    "Do not train with this torch."
)


def gradient(inputs: Inputs, dy: Tensor, *, min_k: int) -> Inputs:
    return tree.value_and_grad(project, engine="func")(inputs, dy, min_k=min_k)[1]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=can_compile)])
@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_trap_1_a_compiled_gradient_keeps_the_surprise_and_the_mask(transform: str, backend: str) -> None:
    case, other = (make_case(seed, T=7, H=6, E=5, I=3, density=1.0) for seed in (1, 50))
    inputs, dy = inputs_of(case, TAPS), case.dy

    def masked(inputs: Inputs, dy: Tensor) -> Inputs:
        return gradient(inputs, dy, min_k=2)

    function = masked
    if transform == "vmap of grad":
        pairs = zip(tree.leaves(inputs), tree.leaves(inputs_of(other, TAPS)), strict=True)
        inputs, dy = tree.unflatten(inputs, [torch.stack(pair) for pair in pairs]), torch.stack([dy, other.dy])
        function = tree.vmap(masked, (0, 0))
    expected = function(inputs, dy)
    got = torch.compile(function, fullgraph=True, backend=backend)(inputs, dy)
    assert all(bool(tap.any()) for tap in got.taps.values()), DROPPED
    unmasked = differentiate(case, min_k=5).experts.down
    assert relative_error(got.experts.down.view(-1, *unmasked.shape)[0], unmasked) > 0.1, DROPPED
    assert_close(got, expected, bound=BOUND)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own forward mode
def test_trap_2_no_higher_derivative_is_silently_zero() -> None:
    case = make_case(2, T=4, H=5, E=3, I=2)

    def first(x: Tensor) -> Tensor:
        return gradient(inputs_of(case)._replace(x=x), case.dy, min_k=2).x

    for derivative in (
        lambda: torch.func.jacrev(first)(case.x),
        lambda: torch.func.vjp(first, case.x)[1](case.dy),
        lambda: torch.func.hessian(lambda x: project(inputs_of(case)._replace(x=x), case.dy, min_k=2)[0])(case.x),
        lambda: torch.func.jvp(first, (case.x,), (case.dy,)),
    ):
        with pytest.raises(RuntimeError):
            derivative()


def test_trap_2_the_engine_of_training_keeps_no_graph_of_the_gradient() -> None:
    case = make_case(2, T=4, H=5, E=3, I=2)
    got = differentiate(case, min_k=2, taps=TAPS, engine="autograd")
    assert not any(leaf.requires_grad for leaf in tree.leaves(got))


def test_trap_3_checkpointing_measures_surprise_once_or_is_refused() -> None:
    case = make_case(3, T=4, H=5, E=3, I=2)

    def checkpointed(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Tensor]:
        y = checkpoint(lambda x: project(inputs._replace(x=x), dy, min_k=2)[1], inputs.x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return (y * dy).sum(), y

    inputs = inputs_of(case, TAPS)
    got = tree.value_and_grad(checkpointed, engine="autograd")(inputs, case.dy)[1]
    assert_same(got, differentiate(case, min_k=2, taps=TAPS))
    with pytest.raises(RuntimeError):
        tree.value_and_grad(checkpointed, engine="func")(inputs, case.dy)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "grad of vmap"])
def test_trap_4_the_raw_operator_of_smk_runs_under_every_transform(transform: str) -> None:
    case = make_case(4, T=6, H=5, E=4, I=3)
    inputs = inputs_of(case, TAPS)
    expected = differentiate(case, min_k=2, taps=TAPS)

    def alone(inputs: Inputs, dy: Tensor) -> Inputs:
        return gradient(inputs, dy, min_k=2)

    def together(inputs: Inputs, dy: Tensor) -> Inputs:
        def loss(inputs: Inputs) -> Tensor:
            return tree.vmap(lambda i, g: project(i, g, min_k=2)[0], (0, 0))(inputs, dy).sum()

        return tree.grad(loss)(inputs)

    twice, dy = tree.map1(lambda leaf: torch.stack([leaf, leaf]), inputs), torch.stack([case.dy, case.dy])
    transforms: dict[str, Callable[[], Inputs]] = {
        "grad": lambda: tree.map1(lambda leaf: leaf.expand(2, *leaf.shape), alone(inputs, case.dy)),
        "vmap of grad": lambda: tree.vmap(alone, (0, 0))(twice, dy),
        "grad of vmap": lambda: together(twice, dy),
    }
    got = {}

    def work() -> None:
        got[transform] = transforms[transform]()

    assert record(work).operators["onn.segment_outer.default"] > 0
    for position in range(2):
        one = tree.unflatten(expected, [leaf[position] for leaf in tree.leaves(got[transform])])
        assert_close(one, expected, bound=BOUND)


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_trap_6_a_tap_used_twice_returns_the_sum_and_one_for_each_call_the_parts(engine: tree.Engine) -> None:
    case, other = (make_case(seed, T=4, H=5, E=3, I=2) for seed in (5, 60))
    taps = inputs_of(case, TAPS).taps

    def loss(taps: tuple[Mapping[str, Tensor], ...], which: tuple[int, int]) -> tuple[Tensor, tuple[()]]:
        first = project(inputs_of(case)._replace(taps=taps[which[0]]), case.dy, min_k=2)[0]
        second = project(inputs_of(other)._replace(taps=taps[which[1]]), other.dy, min_k=2)[0]
        return first + second, ()

    transformed = tree.value_and_grad(loss, engine=engine)
    parts = transformed((taps, taps), (0, 1))[1]
    assert_same(parts, tuple(differentiate(c, min_k=2, taps=TAPS).taps for c in (case, other)))
    shared, unused = transformed((taps, taps), (0, 0))[1]
    assert_close(shared, tree.map2(torch.add, *parts), bound=BOUND)
    assert not any(leaf.any() for leaf in tree.leaves(unused))


@pytest.mark.parametrize("min_k", [2, 16])
def test_trap_7_the_bank_keeps_its_inputs_and_residuals_and_they_need_no_gradient(min_k: int) -> None:
    T, H, E, I = 24, 32, 16, 4
    case = make_case(6, T=T, H=H, E=E, I=I)
    leaves = [leaf.requires_grad_() for leaf in (*case.experts, case.x, case.weights)]
    saved: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        F.bank(F.Experts(*leaves[:3]), leaves[3], leaves[4], {}, min_k=min_k, backend="dense")
    memory = {leaf.data_ptr() for leaf in leaves}
    residuals = [value for value in saved if value.data_ptr() not in memory]
    assert memory <= {value.data_ptr() for value in saved}
    assert not any(value.requires_grad for value in residuals)
    assert 0 < sum(value.numel() for value in residuals) <= 3 * T * E * I


def trees() -> dict[str, tree.Tree]:
    dense, untied = (parameters(config(tie_word_embeddings=tied)) for tied in (True, False))
    model = carve.carve(untied, num_experts=10)
    case = make_case(7, T=4, H=5, E=3, I=2)
    state = train.init_state(model)
    routing = qwen3.forward(model, torch.zeros(1, 3, dtype=torch.int64), ({}, {}), config=config(), moe=MOE).carved
    return {
        "dense": dense,
        "untied": untied,
        "carved": model,
        "state": (state.model, state.optimizer, state.usage, state.lifetime, state.step),
        "case": case,
        "inputs": inputs_of(case),
        "seen": routing,
        "taps of one name": objective.zero_taps(model, 3, names=("surprise",)),
    }


@pytest.mark.parametrize("name", trees())
def test_trap_9_optree_and_torch_read_our_trees_in_one_order(name: str) -> None:
    ours = trees()[name]
    by_torch, by_optree = pytree.tree_leaves(ours), tree.leaves(ours)
    assert len(tree.paths(ours)) == len(by_torch)
    assert all(a is b for a, b in zip(by_torch, by_optree, strict=True))


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_trap_9_taps_mean_what_their_names_say_in_any_order(engine: tree.Engine) -> None:
    case = make_case(8, T=4, H=5, E=4, I=3)
    expected = differentiate(case, min_k=2, taps=TAPS).taps
    for names in (TAPS, TAPS[::-1], (*TAPS[1:], TAPS[0])):
        got = differentiate(case, min_k=2, taps=names, engine=engine).taps
        assert set(got) == set(TAPS)
        for tap in TAPS:
            assert_same(got[tap], expected[tap])
