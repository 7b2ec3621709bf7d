from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onn import tree
from onn.tree import Engine, Tree
from tests.support import assert_close, assert_same, normal, tolerance

ENGINES: tuple[Engine, ...] = get_args(Engine)


class Pair(NamedTuple):
    """Its fields are not in the order of the alphabet."""

    z: Tree
    a: Tree


class Empty(NamedTuple):
    """A part that is left out."""


def structures() -> st.SearchStrategy[Tree]:
    """Tensors, NamedTuples, tuples and dicts of them, dicts in any order of their keys, empty ones included."""
    scalars: st.SearchStrategy[Tree] = st.just(torch.zeros(()))

    def nested(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        keys = st.text("abz10", min_size=1, max_size=2)
        return st.one_of(
            st.builds(Pair, children, children),
            st.lists(children, max_size=3).map(tuple),
            st.builds(Empty),
            st.dictionaries(keys, children, max_size=4),
        )

    return st.recursive(scalars, nested, max_leaves=10)


def trees() -> st.SearchStrategy[Tree]:
    """The same with leaves that are all different, from 0 on in the order in which they are met."""
    return structures().map(lambda structure: numbered(structure, itertools.count()))


def numbered(structure: Tree, numbers: Iterator[int]) -> Tree:
    if isinstance(structure, Tensor):
        return torch.tensor(float(next(numbers)), dtype=torch.float64)
    if isinstance(structure, Mapping):
        return {name: numbered(child, numbers) for name, child in structure.items()}
    children = [numbered(child, numbers) for child in structure]
    if isinstance(structure, Empty):
        return structure
    return Pair(*children) if isinstance(structure, Pair) else tuple(children)


def at(part: Tree, path: str) -> Tree:
    """Follow a dotted path, by another way than `paths` makes it."""
    for name in path.split(".") if path else ():
        assert not isinstance(part, Tensor)
        if isinstance(part, Mapping):
            part = part[name]
        else:
            part = getattr(part, name) if hasattr(part, "_fields") else part[int(name)]
    return part


def size(part: Tree) -> int:
    if isinstance(part, Tensor):
        return 1
    return sum(map(size, part.values() if isinstance(part, Mapping) else part))


def same_structure(a: Tree, b: Tree) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_structure(a[name], b[name]) for name in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_structure, a, b))
    return isinstance(a, Tensor) and isinstance(b, Tensor)


@given(made=trees())
def test_paths_name_the_leaves_in_their_order_each_once(made: Tree) -> None:
    found, names = tree.leaves(made), tree.paths(made)
    assert len(found) == len(names) == len(set(names)) == size(made)
    for leaf, name in zip(found, names, strict=True):
        assert at(made, name) is leaf


def test_paths_are_dotted_and_the_lone_leaf_has_none() -> None:
    leaf = torch.zeros(())
    assert tree.paths(leaf) == [""]
    assert tree.paths({"b": (leaf, Pair(z=leaf, a=())), "a": Pair(z={"q": leaf}, a=leaf)}) == [
        "a.z.q",
        "a.a",
        "b.0",
        "b.1.z",
    ]


def test_the_order_of_a_dict_is_that_of_its_keys_not_of_their_insertion() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    for mapping in ({"b": two, "a": one}, {"a": one, "b": two}):
        assert [float(leaf) for leaf in tree.leaves(mapping)] == [1.0, 2.0]
        assert tree.paths(mapping) == ["a", "b"]
    assert_same(tree.map2(torch.sub, {"b": two, "a": one}, {"a": one, "b": one}), {"a": one - one, "b": two - one})


@given(made=trees())
def test_unflatten_and_leaves_undo_each_other_and_keep_the_structure(made: Tree) -> None:
    found = tree.leaves(made)
    again = tree.unflatten(made, found)
    assert same_structure(again, made)
    assert all(a is b for a, b in zip(tree.leaves(again), found, strict=True))
    others = [torch.tensor(-1.0 - position) for position in range(len(found))]
    rebuilt = tree.unflatten(made, others)
    assert same_structure(rebuilt, made)
    assert all(a is b for a, b in zip(tree.leaves(rebuilt), others, strict=True))


def test_unflatten_demands_as_many_values_as_leaves() -> None:
    for values in ([], [torch.zeros(())] * 3):
        with pytest.raises(ValueError, match="leaves"):
            tree.unflatten(Pair(z=torch.zeros(()), a=(torch.zeros(()),)), values)


@given(made=trees())
def test_maps_apply_to_every_leaf_in_its_place(made: Tree) -> None:
    before = [leaf.clone() for leaf in tree.leaves(made)]
    doubled = tree.map1(lambda leaf: 2 * leaf, made)
    difference = tree.map2(torch.sub, doubled, made)
    zeros = tree.zeros_like(made)
    for result, factor in ((doubled, 2), (difference, 1), (zeros, 0)):
        assert same_structure(result, made)
        for name in tree.paths(made):
            leaf, expected = at(result, name), at(made, name)
            assert isinstance(leaf, Tensor)
            assert isinstance(expected, Tensor)
            assert leaf.dtype == expected.dtype
            assert float(leaf) == factor * float(expected)
    assert_same(tuple(tree.leaves(made)), tuple(before))


def test_map2_refuses_trees_of_another_structure() -> None:
    leaf = torch.zeros(())
    for other in ((leaf, leaf), {"z": leaf, "a": leaf}, leaf, ()):
        with pytest.raises(ValueError, match="expected first and second alike"):
            tree.map2(torch.add, Pair(z=leaf, a=leaf), other)


@pytest.mark.parametrize("condition", [True, False])
def test_where_takes_all_leaves_from_one_tree_and_lets_no_nan_through(condition: bool) -> None:
    good = Pair(z=torch.ones(2, 3), a={"x": torch.tensor([1, 2])})
    bad = Pair(z=torch.full((2, 3), torch.nan), a={"x": torch.tensor([-1, -1])})
    chosen, other = (good, bad) if condition else (bad, good)
    assert_same(tree.where(torch.tensor(condition), chosen, other), good)


def test_where_broadcasts_its_condition_to_each_leaf() -> None:
    rows = torch.tensor([[True], [False]])
    got = tree.where(rows, (torch.ones(2, 3), torch.ones(2, 1)), (torch.zeros(2, 3), torch.zeros(2, 1)))
    assert_same(got, (rows.expand(2, 3).float(), rows.float()))


@given(
    made=trees().filter(size),
    place=st.integers(0, 9),
    wrong=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_one_value_that_is_not_finite_in_any_leaf_is_found(made: Tree, place: int, wrong: float) -> None:
    wide = tree.map1(lambda leaf: leaf.expand(2, 3).clone(), made)
    finite = tree.all_finite(wide)
    assert (finite.shape, finite.dtype) == ((), torch.bool)
    assert bool(finite)
    tree.leaves(wide)[place % size(made)][1, 2] = wrong
    assert not bool(tree.all_finite(wide))


class Parameters(NamedTuple):
    weight: Tensor
    parts: tuple[Tensor, Mapping[str, Tensor]]
    unused: Tensor


def parameters() -> Parameters:
    mapping = {"z": normal(2, 3), "b": normal(3, 3)}
    return Parameters(weight=normal(0, 4, 3), parts=(normal(1, 4), mapping), unused=normal(4, 2))


def loss(params: Parameters, x: Tensor, *, scale: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Each leaf has another gradient, so that no two can be mistaken for each other."""
    bias, named = params.parts
    residual = params.weight @ x + bias
    value = scale * (residual.square().sum() / 2 + (named["z"] * x).sum() + named["b"].pow(3).sum())
    return value, {"residual": residual, "x": x}


def analytic(params: Parameters, x: Tensor, *, scale: float) -> Parameters:
    residual = params.weight @ x + params.parts[0]
    named = {"b": 3 * scale * params.parts[1]["b"].square(), "z": scale * x}
    return Parameters(
        weight=scale * torch.outer(residual, x), parts=(scale * residual, named), unused=torch.zeros(2).double()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_value_and_gradient_are_the_analytic_ones_and_zero_where_nothing_depends(engine: Engine) -> None:
    params, x = parameters(), normal(9, 3)
    before = tree.map1(Tensor.clone, params)
    (value, aux), gradient = tree.value_and_grad(loss, engine=engine)(params, x, scale=0.5)
    expected, seen = loss(params, x, scale=0.5)
    assert_same((value, aux), (expected, seen))
    assert isinstance(gradient, Parameters)
    assert_close(gradient, analytic(params, x, scale=0.5), bound=tolerance(torch.float64, terms=12))
    assert not gradient.unused.any()
    assert_same(params, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_carry_no_graph_and_parameters_are_not_marked(engine: Engine) -> None:
    params = parameters()
    results = tree.value_and_grad(loss, engine=engine)(params, normal(9, 3), scale=0.5)
    for leaf in tree.leaves(results):
        assert not leaf.requires_grad
        assert leaf.grad_fn is None
    assert not any(leaf.requires_grad for leaf in tree.leaves(params))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_computed_where_autograd_is_switched_off(engine: Engine) -> None:
    with torch.no_grad():
        _, gradient = tree.value_and_grad(loss, engine=engine)(parameters(), normal(9, 3), scale=0.5)
    assert_close(gradient, analytic(parameters(), normal(9, 3), scale=0.5), bound=tolerance(torch.float64, terms=12))


def test_in_inference_mode_only_func_differentiates_and_autograd_says_so() -> None:
    x = normal(9, 3)
    with torch.inference_mode():
        _, gradient = tree.value_and_grad(loss, engine="func")(parameters(), x, scale=0.5)
        with pytest.raises(ValueError, match="inference_mode"):
            tree.value_and_grad(loss, engine="autograd")(parameters(), x, scale=0.5)
    assert_close(gradient, analytic(parameters(), x, scale=0.5), bound=tolerance(torch.float64, terms=12))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keys", list(itertools.permutations("acb")))
def test_gradients_of_a_dict_belong_to_their_keys_in_any_order(engine: Engine, keys: tuple[str, ...]) -> None:
    factors = {"a": 1.0, "b": 10.0, "c": 100.0}

    def weighted(values: dict[str, Tree]) -> tuple[Tensor, tuple[()]]:
        leaves = {name: leaf for name, leaf in values.items() if isinstance(leaf, Tensor)}
        return torch.stack([factors[name] * leaf for name, leaf in leaves.items()]).sum(), ()

    values: dict[str, Tree] = {name: torch.tensor(float(position)) for position, name in enumerate(keys)}
    _, gradient = tree.value_and_grad(weighted, engine=engine)(values)
    assert {
        name: float(leaf) for name, leaf in zip(tree.paths(gradient), tree.leaves(gradient), strict=True)
    } == factors


@pytest.mark.parametrize("engine", ENGINES)
@given(made=trees().filter(size), used=st.integers(1, 10))
def test_both_engines_differentiate_trees_of_any_structure(engine: Engine, made: Tree, used: int) -> None:
    def polynomial(made: Tree) -> tuple[Tensor, Tree]:
        return torch.stack([(place + 1) * leaf**2 for place, leaf in enumerate(tree.leaves(made)[:used])]).sum(), made

    (_, aux), gradient = tree.value_and_grad(polynomial, engine=engine)(made)
    assert same_structure(gradient, made)
    assert_same(aux, made)
    for place, (leaf, value) in enumerate(zip(tree.leaves(gradient), tree.leaves(made), strict=True)):
        assert float(leaf) == (2 * (place + 1) * float(value) if place < used else 0)


def test_grad_and_vmap_are_the_loop_over_rows() -> None:
    params, rows = parameters(), normal(5, 4, 3)

    def value(params: Parameters, x: Tensor) -> Tensor:
        return loss(params, x, scale=2.0)[0]

    per_row: Callable[[Parameters, Tensor], Parameters] = tree.vmap(tree.grad(value), in_dims=(None, 0))
    got = per_row(params, rows)
    expected = [analytic(params, x, scale=2.0) for x in rows]
    stacked = tree.unflatten(params, [torch.stack(column) for column in zip(*map(tree.leaves, expected), strict=True)])
    assert_close(got, stacked, bound=tolerance(torch.float64, terms=12))


def test_detach_cuts_the_graph_and_keeps_the_values() -> None:
    leaf = torch.ones(2, requires_grad=True)
    made = Pair(z=leaf * 2, a=(leaf,))
    cut = tree.detach(made)
    assert not any(part.requires_grad for part in tree.leaves(cut))
    assert_same(cut, Pair(z=torch.full((2,), 2.0), a=(torch.ones(2),)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_value_that_depends_on_nothing_has_gradient_zero(engine: Engine) -> None:
    leaf = torch.ones(3)
    (value, aux), gradient = tree.value_and_grad(lambda _: (torch.tensor(2.0), ()), engine=engine)(leaf)
    assert float(value) == 2
    assert aux == ()
    assert torch.equal(gradient, torch.zeros(3))


def test_paths_of_an_ordered_mapping_are_in_the_order_of_its_leaves() -> None:
    state = OrderedDict(b=torch.tensor(1.0), a=torch.tensor(2.0))
    named = dict(zip(tree.paths(state), tree.leaves(state), strict=True))
    assert {name: float(value) for name, value in named.items()} == {"b": 1, "a": 2}
