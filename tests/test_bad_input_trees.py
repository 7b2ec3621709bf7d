"""Wrong structures, kinds and engines, to every public function of `onn.tree`, `onn.region` and `onn.recompute`; and
arguments of another kind than said, to every function of `onn.functional`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, ModuleType
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import recompute, region, tree
from onn.functional.kernels.backends import Groupable
from onn.region import Kind, inline
from onn.tree import Engine, Flat, Tree
from tests.bad_calls import Anything, Refusal, assert_all_tried, refused, wrong_kinds
from tests.support import make_case
from tests.test_laws import LAWS, material, public_functions

LEAF, WHOLE = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)
ONE, YES = {"a": LEAF}, torch.tensor(True)
COMPLEX, EIGHTHS = LEAF.to(torch.complex64), LEAF.to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Unregistered:
    """One leaf to a library of trees, which would go unseen."""

    leaf: Tensor


class Pair(NamedTuple):
    """A part."""

    a: Tree
    b: Tree


NO_TREES: Mapping[str, tuple[object, str]] = {
    "None": (None, "NoneType"),
    "a number": (3, "int"),
    "a text": ("text", "str"),
    "an array": (LEAF.numpy(), "ndarray"),
    "a set": ({1}, "set"),
    "None in a part": (Pair(LEAF, cast("Tree", None)), "NoneType"),
    "None in a mapping": ({"a": (LEAF, None)}, "NoneType"),
    "a number in a part": ((LEAF, {"a": 0.5}), "float"),
    "a dataclass": ((Unregistered(LEAF),), "Unregistered"),
    "a view of a mapping in a mapping": ({"a": MappingProxyType({"b": None})}, ""),
}


def wrong(value: object) -> Tree:
    return cast("Tree", value)


def square(leaf: Tensor) -> tuple[Tensor, tuple[()]]:
    return leaf.square().sum(), ()


def gradient(engine: str, at: object = LEAF, *, of: object = square) -> object:
    function = cast("Callable[[Tree], tuple[Tensor, Tree]]", of)
    return tree.value_and_grad(function, engine=cast("Engine", engine))(wrong(at))


def alone(of: object, at: object) -> object:
    return tree.grad(cast("Callable[[Tree], Tensor]", of))(wrong(at))


def again(engine: str, *, of: object, at: object = LEAF) -> object:
    function = cast("Callable[[Tree], Tree]", of)
    return recompute.recomputed(function, engine=cast("Engine", engine))(wrong(at))


def mapped(of: object, in_dims: object, *given: Tensor) -> object:
    function = cast("Callable[[Tensor], Tensor]", of)
    return tree.vmap(function, cast("tuple[int | None, ...]", in_dims))(*given)


def chosen(condition: object = YES, other: object = ONE) -> object:
    return tree.where(cast("Tensor", condition), ONE, cast("Mapping[str, Tensor]", other))


def layers(region: object = inline, *, engine: str = "func", of: object = square, kind: str = "layer") -> object:
    made = recompute.recomputing_layers(cast("region_module.Region", region), engine=cast("Engine", engine))
    return made(cast("Callable[[Tensor], Tree]", of), kind=cast("Kind", kind))


def part(of: object = square, kind: str = "layer") -> object:
    return inline(cast("Callable[[Tensor], Tree]", of), kind=cast("Kind", kind))


region_module = region
ON_TREES: Mapping[str, Callable[[Tree], object]] = {
    "leaves": tree.leaves,
    "paths": tree.paths,
    "detach": tree.detach,
    "zeros_like": tree.zeros_like,
    "all_finite": tree.all_finite,
    "map1": partial(tree.map1, Tensor.neg),
    "map2": lambda made: tree.map2(torch.add, made, made),
    "where": lambda made: tree.where(YES, made, made),
    "unflatten": lambda made: tree.unflatten(made, [LEAF]),
    "grad": partial(alone, lambda made: LEAF.sum()),
    "value_and_grad": partial(gradient, "autograd", of=lambda made: (LEAF.sum(), ())),
    "Flat": lambda made: Flat(square, cast("Tensor", made)),
}
"""What each says where it is given no tree."""
RESULTS: Mapping[str, tuple[object, str]] = {
    "nothing": (None, "NoneType"),
    "a value alone": (LEAF.sum(), "Tensor"),
    "three results": ((LEAF.sum(), (), ()), "3 results"),
    "no value": ((1.0, ()), "value"),
    "a value with a shape": ((LEAF, ()), "value [2, 3]"),
    "a value that is whole": ((WHOLE.sum(), ()), "float the function's value"),
    "a tree that is none": ((LEAF.sum(), None), "auxiliary tree"),
}
ENGINES: tuple[Engine, ...] = ("autograd", "func")
REFUSALS: dict[str, Refusal] = {
    **{
        f"{function}, {name}": Refusal(partial(call, wrong(value)), (function, words))
        for function, call in ON_TREES.items()
        for name, (value, words) in NO_TREES.items()
        if function != "paths" or "view" not in name
    },
    "paths, keys": Refusal(lambda: tree.paths(cast("Tree", {"a": LEAF, 1: LEAF})), ("paths", "key", "int 1")),
    "map1, no function": Refusal(
        lambda: tree.map1(cast("Callable[[Tensor], Tensor]", None), LEAF), ("map1", "function")
    ),
    "map2, no function": Refusal(
        lambda: tree.map2(cast("Callable[[Tensor, Tensor], Tensor]", 3), LEAF, LEAF), ("map2", "function", "int")
    ),
    **{
        f"map2, {name}": Refusal(
            partial(tree.map2, torch.add, Pair(LEAF, LEAF), wrong(other)), ("map2", "second", words)
        )
        for name, other, words in (
            ("fewer", (LEAF,), "tuple with leaves ['0']"),
            ("keys", {"a": LEAF, "b": LEAF}, "dict with leaves ['a', 'b']"),
            ("a leaf", LEAF, "Tensor with leaves ['']"),
            ("None", Pair(LEAF, cast("Tree", None)), "NoneType"),
            ("a part in the place of a leaf", Pair(LEAF, (LEAF,)), "tuple"),
        )
    },
    "unflatten, too few": Refusal(lambda: tree.unflatten((LEAF, LEAF), [LEAF]), ("unflatten", "leaves, 2, got 1")),
    "unflatten, no values": Refusal(
        lambda: tree.unflatten(ONE, cast("list[Tensor]", None)), ("unflatten", "values", "NoneType")
    ),
    "unflatten, no tensors": Refusal(
        lambda: tree.unflatten(ONE, cast("list[Tensor]", [None])), ("unflatten", "values", "NoneType")
    ),
    "shapes, an unknown parameter": Refusal(
        lambda: tree.shapes("here", {"a": {"b": LEAF}}, {"a": "T H", "c": "T H"}), ("no parameter is called a.b.",)
    ),
    "shapes, no names": Refusal(
        lambda: tree.shapes("here", ONE, cast("Mapping[str, str]", ["a"])), ("shapes", "dims", "list ['a']")
    ),
    "shapes, no dims": Refusal(
        lambda: tree.shapes("here", ONE, cast("Mapping[str, str]", {"a": 2})), ("shapes", "dims of a", "int 2")
    ),
    "shapes, a tree that is none": Refusal(lambda: tree.shapes("here", wrong({"a": None}), {"a": ""}), ("NoneType",)),
    **{
        f"where, a condition {name}": Refusal(partial(chosen, c), ("where", "condition", words))
        for name, c, words in (
            ("of numbers", LEAF, "torch.float32"),
            ("that is no tensor", True, "bool True"),
            ("too long", torch.ones(3, 3, dtype=torch.bool), "[3, 3]"),
            ("on meta", torch.ones((), dtype=torch.bool, device="meta"), "meta"),
        )
    },
    **{
        f"where, another leaf {name}": Refusal(partial(chosen, YES, {"a": other}), ("where", "chosen", "other", words))
        for name, other, words in (
            ("that broadcasts", LEAF[:1], "[1, 3]"),
            ("of another dtype", LEAF.double(), "torch.float64"),
            ("on meta", LEAF.to("meta"), "meta"),
        )
    },
    "where, another structure": Refusal(partial(chosen, YES, (LEAF,)), ("where", "chosen", "other")),
    "all_finite, eighths": Refusal(lambda: tree.all_finite((LEAF, EIGHTHS)), ("all_finite", "float8")),
    "all_finite, complex": Refusal(lambda: tree.all_finite((LEAF, COMPLEX)), ("all_finite", "complex64")),
    "all_finite, devices": Refusal(
        lambda: tree.all_finite((LEAF, LEAF.to("meta"))), ("all_finite", "one device", "cpu", "meta")
    ),
    **{
        f"{function}, {name}": Refusal(partial(call, at={"a": (leaf,)}), (function, "leaf a.0", str(leaf.dtype)))
        for name, leaf in (("integers", WHOLE), ("complex", COMPLEX), ("eighths", EIGHTHS), ("truths", LEAF > 0))
        for function, call in (
            ("grad", partial(alone, lambda made: LEAF.sum())),
            *(("value_and_grad", partial(gradient, engine, of=lambda made: (LEAF.sum(), ()))) for engine in ENGINES),
        )
    },
    **{
        f"value_and_grad, {engine}, {name}": Refusal(
            partial(gradient, engine, of=lambda leaf, result=result: result), ("value_and_grad", words)
        )
        for engine in ENGINES
        for name, (result, words) in RESULTS.items()
    },
    "value_and_grad, an engine": Refusal(partial(gradient, "autograds"), ("engine='autograds'", "did you mean")),
    "value_and_grad, no engine": Refusal(partial(gradient, cast("str", None)), ("value_and_grad", "engine=None")),
    "value_and_grad, no function": Refusal(partial(gradient, "func", of=3), ("value_and_grad", "function", "int")),
    "grad, no function": Refusal(partial(alone, None, LEAF), ("grad", "function", "NoneType")),
    "grad, a shape": Refusal(partial(alone, Tensor.neg, LEAF), ("grad", "value [2, 3]")),
    "grad, no tensor": Refusal(partial(alone, lambda leaf: 1.0, LEAF), ("grad", "value", "float 1.0")),
    "vmap, no function": Refusal(partial(mapped, None, (0,), LEAF), ("vmap", "function", "NoneType")),
    "vmap, a number": Refusal(partial(mapped, Tensor.neg, 0, LEAF), ("vmap", "in_dims", "int 0")),
    "vmap, no number": Refusal(partial(mapped, Tensor.neg, ("0",), LEAF), ("vmap", "in_dims", "str '0'")),
    "vmap, too many": Refusal(partial(mapped, Tensor.neg, (0, 0), LEAF), ("vmap", "in_dims=(0, 0)")),
    "vmap, out of reach": Refusal(partial(mapped, Tensor.neg, (2,), LEAF), ("vmap", "in_dims")),
    "vmap, sizes": Refusal(partial(mapped, torch.add, (0, 0), LEAF, LEAF[:1]), ("vmap", "2", "1")),
    "Flat, no function": Refusal(lambda: Flat(cast("Callable[[], Tensor]", None)), ("Flat", "function", "NoneType")),
    "Flat, other inputs": Refusal(lambda: Flat(square, LEAF)([LEAF, LEAF]), ("unflatten", "values", "1, got 2")),
    "Flat, a result that is none": Refusal(
        lambda: Flat(cast("Callable[[Tensor], Tensor]", lambda leaf: 3), LEAF)([LEAF]), ("Flat", "result", "int")
    ),
    "recomputed, an engine": Refusal(partial(again, "fun", of=square), ("recomputed", "engine='fun'", "'func'")),
    "recomputed, no function": Refusal(partial(again, "func", of=None), ("recomputed", "function", "NoneType")),
    **{
        f"recomputed, {engine}, {name}": Refusal(
            partial(again, engine, of=lambda leaf, result=result: result), ("result", words)
        )
        for engine in ENGINES
        for name, result, words in (
            ("no tensor", (), "without one"),
            ("a number", 3, "int"),
            ("a number first", (1.0, LEAF), "float"),
            ("whole numbers first", (WHOLE, LEAF), "torch.int64"),
            ("truths first", (LEAF > 0, LEAF), "torch.bool"),
        )
    },
    "recomputed, no tree": Refusal(partial(again, "func", of=square, at=3), ("arguments", "int")),
    "recomputing_layers": Refusal(partial(layers, None), ("recomputing_layers", "region", "NoneType")),
    "recomputing_layers, an engine": Refusal(partial(layers, engine="fun"), ("recomputing_layers", "engine='fun'")),
    "recomputing_layers, a kind": Refusal(partial(layers, kind="layers"), ("kind='layers'", "did you mean 'layer'")),
    "recomputing_layers, no function": Refusal(partial(layers, of=3), ("recomputing_layers", "function", "int")),
    "inline": Refusal(partial(part, None), ("inline", "function", "NoneType")),
    "inline, a kind": Refusal(partial(part, kind="lessons"), ("inline", "kind='lessons'", "did you mean 'lesson'")),
    "check_part": Refusal(
        lambda: region.check_part("here", square, kind=cast("Kind", "losses")), ("here", "kind='losses'", "'loss'")
    ),
}


CASE = make_case(0, T=4, H=5, E=3, I=2)
RESIDUALS = F.bank_forward(CASE.experts, CASE.x, CASE.weights)[1]


TAP_SHAPES: Mapping[str, tuple[int, ...]] = {
    "surprise": (4, 3),
    "counterfactual": (4, 3),
    "neuron": (3, 2),
    "matrix": (3, 3, 2),
    "bias": (2, 3, 2),
}


def banked(tap: object = WHOLE, backend: object = "dense") -> object:
    taps = cast("Mapping[str, Tensor]", {"surprise": torch.zeros(4, 3)} if tap is WHOLE else tap)
    return F.bank(CASE.experts, CASE.x, CASE.weights, taps, min_k=2, backend=cast("F.Backend", backend))


def selected(keep: object) -> object:
    select = cast("Callable[[Tensor, Tensor], Tensor]", keep)
    return F.bank_vjp(CASE.experts, CASE.x, CASE.weights, RESIDUALS, CASE.dy, select=select)


def tapped(tokens: object = 4, names: object = ("surprise",), experts: F.Experts = CASE.experts) -> object:
    return F.zero_taps(cast("tuple[F.TapName, ...]", names), tokens=cast("int", tokens), experts=experts)


def surprised(tap: object) -> object:
    taps = cast("tuple[Mapping[str, Tensor], ...]", (tap,))
    return F.surprise_and_grad(lambda leaf, batch, taps: square(LEAF), taps=taps, engine="func")(LEAF, ())


FUNCTIONAL: dict[str, Refusal] = {
    **{
        f"zero_taps, {tokens!r} tokens": Refusal(partial(tapped, tokens), ("zero_taps", "tokens", repr(tokens)))
        for tokens in (-1, 2.0, True, "4", None, 2**62, 10**30)
    },
    "zero_taps, a name": Refusal(partial(tapped, names=("surprises",)), ("zero_taps", "did you mean 'surprise'")),
    "zero_taps, a text": Refusal(partial(tapped, names="surprise"), ("zero_taps", "names", "str 'surprise'")),
    **{
        f"zero_taps, experts {name}": Refusal(partial(tapped, experts=experts), ("zero_taps", "gate", words))
        for name, experts, words in (
            ("of two dimensions", F.Experts(*(w[0] for w in CASE.experts)), "[2, 5]"),
            ("of integers", F.Experts(*(w.long() for w in CASE.experts)), "torch.int64"),
            ("of eighths", F.Experts(*(w.to(torch.float8_e4m3fn) for w in CASE.experts)), "float8"),
            ("of two sizes", CASE.experts._replace(up=CASE.experts.up[:1]), "up [1, 2, 5]"),
        )
    },
    **{
        f"bank, a {name} tap of {kind}": Refusal(
            partial(banked, {name: torch.zeros(shape).to(kind)}), ("bank", f"float tap {name}", str(kind))
        )
        for name, shape in TAP_SHAPES.items()
        for kind in (torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)
    },
    **{
        f"bank, a {name} tap of {changed}": Refusal(
            partial(banked, {name: torch.zeros(changed)}), ("bank", "does not fit", f"tap {name} {changed}")
        )
        for name, shape in TAP_SHAPES.items()
        for changed in ([1, *shape], [*shape[:-1], 9], [9, *shape[1:]])
    },
    "bank, a tap that is none": Refusal(partial(banked, {"surprise": None}), ("bank", "tap surprise", "NoneType")),
    "bank, a tap of a list": Refusal(partial(banked, [LEAF]), ("bank", "tap", "list")),
    **{
        f"bank, {tiling}": Refusal(partial(banked, backend=tiling), ("bank", "backend"))
        for tiling in (F.Tiling(-2, 0.5), F.Tiling(cast("int", 0.5), 0.5), F.Tiling(1, -0.5), F.Tiling(1, torch.nan))
    },
    **{
        f"bank, {known}": Refusal(partial(banked, backend=known), ("bank", "backend."))
        for known in (
            *(F.Bounded("grouped", bound) for bound in (0, -1, 99, cast("int", 1.0))),
            F.Bounded(cast("Groupable", "loop"), 1),
        )
    },
    **{
        f"bank_vjp, {name}": Refusal(partial(selected, lambda s, a, keep=keep: keep), ("bank_vjp", "select", words))
        for name, keep, words in (
            ("nothing kept", None, "NoneType"),
            ("numbers kept", torch.ones(4, 3), "torch.float32"),
            ("an expert too few", torch.ones(4, 2, dtype=torch.bool), "[4, 2]"),
        )
    },
    "surprise_and_grad, a tap of no bank": Refusal(partial(surprised, LEAF), ("surprise_and_grad", "taps", "Tensor")),
    "surprise_and_grad, a tap that is none": Refusal(partial(surprised, {"surprise": None}), ("NoneType",)),
    "surprise_and_grad, integers": Refusal(partial(surprised, {"surprise": WHOLE}), ("surprise", "torch.int64")),
    "reduction_dtype": Refusal(
        lambda: F.reduction_dtype(cast("torch.dtype", "float32")), ("reduction_dtype", "dtype", "str 'float32'")
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_what_a_function_cannot_take_is_refused_with_what_was_wrong(name: str) -> None:
    refused(FUNCTIONAL[name].call, *FUNCTIONAL[name].words)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_wrong(name: str) -> None:
    refused(REFUSALS[name].call, *REFUSALS[name].words)


def test_what_a_mapped_function_raises_is_not_taken_for_a_wrong_tree() -> None:
    def fails(*leaves: Tensor) -> Tensor:
        raise ValueError("its own")

    for call in (partial(tree.map1, fails, ONE), partial(tree.map2, fails, ONE, ONE)):
        with pytest.raises(ValueError, match=r"^its own$"):
            call()


MODULES = (tree, region, recompute)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_every_public_function_is_tried_with_wrong_arguments(module: ModuleType) -> None:
    assert_all_tried((name for name in REFUSALS if not name.startswith("Flat")), module, MODULES)


def valid_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Those of the function's law."""
    function, seen = public_functions()[name], list[dict[str, object]]()

    def recorded(*args: object, **kwargs: object) -> object:
        seen.append(dict(inspect.signature(function).bind(*args, **kwargs).arguments))
        return cast("Callable[[], object]", partial(function, *args, **kwargs))()

    with monkeypatch.context() as patch:
        patch.setattr(F, name, recorded)
        LAWS[name].call(material(0, torch.float32))
    return seen[0]


@pytest.mark.parametrize("name", LAWS)
def test_an_argument_of_another_kind_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, given, problems = cast("Anything", public_functions()[name]), valid_arguments(name, monkeypatch), []
    for argument, value, arguments in wrong_kinds(public_functions()[name], given):
        try:
            result = function(**arguments)
            problems.append(f"{argument}={type(value).__name__} {value}: {type(result).__name__}")
        except ValueError as error:
            if argument.removesuffix("s") not in str(error) or type(error) is not ValueError:
                problems.append(f"{argument}={type(value).__name__}: {error}")
        except Exception as error:  # all that are raw are listed
            problems.append(f"{argument}={type(value).__name__}: {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)
