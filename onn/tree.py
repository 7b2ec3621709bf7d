"""Trees of tensors: the `Tree` type and typed maps and transforms over it. The library's only casts live here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate, Generic, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, cast, get_args

import optree
import torch
from torch import Tensor

from onn import check

Tree: TypeAlias = "Tensor | tuple[Tree, ...] | Mapping[str, Tree]"
"""A tensor, or a tuple, NamedTuple or mapping of trees. `None` is never a leaf."""

Engine = Literal["autograd", "func"]
"""Who differentiates: `autograd` frees the graph as it goes but cannot stand under another transform; `func` can."""

T = TypeVar("T", bound=Tree)
Aux = TypeVar("Aux", bound=Tree)
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Untyped(Protocol[R_co]):
    """A function whose arguments have lost their names."""

    def __call__(self, *args: Tree, **kwargs: object) -> R_co: ...


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in a fixed order."""
    return cast("list[Tensor]", optree.tree_leaves(tree))  # type: ignore[arg-type]


def paths(tree: Tree) -> list[str]:
    """A dotted name for every leaf, in the order of `leaves`: `layers.0.attention.q`."""
    return [path for path, _ in _named(tree)]


def _named(tree: Tree) -> list[tuple[str, Tensor]]:
    """Paths and leaves; torch.compile follows it into mappings, which it does not follow optree into."""
    if isinstance(tree, Tensor):
        return [("", tree)]
    if isinstance(tree, Mapping):
        items = list(tree.items()) if isinstance(tree, OrderedDict) else sorted(tree.items())
    else:
        names = getattr(tree, "_fields", None) or [str(position) for position in range(len(tree))]
        items = list(zip(names, tree, strict=True))
    return [(f"{name}.{path}" if path else name, leaf) for name, child in items for path, leaf in _named(child)]


def unflatten(like: T, values: Sequence[Tensor]) -> T:
    """A tree with the structure of `like` and the leaves `values`.

    Raises:
        ValueError: another number of values than leaves.
    """
    return cast("T", optree.tree_unflatten(optree.tree_structure(like), values))  # type: ignore[arg-type]


def map1(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Apply `function` to every leaf."""
    return cast("T", optree.tree_map(function, tree))  # type: ignore[arg-type]


def map2(function: Callable[[Tensor, Tensor], Tensor], first: T, second: Tree) -> T:
    """Apply `function` to the pairs of leaves of two trees of the same structure."""
    return cast("T", optree.tree_map(function, first, second))  # type: ignore[arg-type]


class Flat(Generic[R]):
    """One call of a function of trees as a function of tensors."""

    def __init__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
        """Trees by position, constants by keyword."""
        self._function = cast("_Untyped[Tree]", function)
        self._args = map1(_shell, cast("tuple[Tree, ...]", args))
        self._kwargs = cast("Mapping[str, object]", kwargs)
        self._result: Tree = ()
        self.inputs = leaves(cast("tuple[Tree, ...]", args))
        """The tensors of the arguments."""

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the result."""
        result = self._function(*unflatten(self._args, inputs), **self._kwargs)
        self._result = map1(_shell, result)
        return tuple(leaves(result))

    def result(self, outputs: Sequence[Tensor]) -> R:
        """The result of the last call, with these tensors."""
        return cast("R", unflatten(self._result, outputs))


def _shell(leaf: Tensor) -> Tensor:
    """Something in the place of a leaf that holds no memory."""
    return leaf.new_empty(0)


def shapes(where: str, tree: Tree, dims: Mapping[str, str]) -> dict[str, int]:
    """`check.shapes` of all leaves together, each after what `dims` says of the end of its path."""
    rows = [(path, leaf, _of_end(path, dims)) for path, leaf in zip(paths(tree), leaves(tree), strict=True)]
    return check.shapes(where, *rows)


def _of_end(path: str, dims: Mapping[str, str]) -> str:
    while path not in dims and "." in path:
        path = path.partition(".")[2]
    return dims[path]


def detach(tree: T) -> T:
    """The same values, cut from any graph."""
    return map1(Tensor.detach, tree)


def zeros_like(tree: T) -> T:
    """Zeros of the same structure, shapes, dtypes and devices."""
    return map1(torch.zeros_like, tree)


def where(condition: Tensor, chosen: T, other: T) -> T:
    """`chosen` where `condition` (broadcast to each leaf) holds, else `other`.

    Raises:
        ValueError: `condition` is not bool, or does not broadcast to a leaf.
    """
    check.holds("where", "condition", condition, "bool")
    for leaf in leaves(chosen):
        pairs = zip(reversed(condition.shape), reversed(leaf.shape), strict=False)
        check.require(
            condition.ndim <= leaf.ndim and all(size in (1, whole) for size, whole in pairs),
            f"where: condition {list(condition.shape)} does not broadcast to a leaf {list(leaf.shape)}.",
        )
    return map2(lambda a, b: torch.where(condition, a, b), chosen, other)


def all_finite(tree: Tree) -> Tensor:
    """A scalar bool: no leaf holds a NaN or an infinity; true of a tree without leaves."""
    found = [torch.isfinite(leaf).all() for leaf in leaves(tree)]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)


def value_and_grad(
    function: Callable[Concatenate[T, P], tuple[Tensor, Aux]], *, engine: Engine
) -> Callable[Concatenate[T, P], tuple[tuple[Tensor, Aux], T]]:
    """Gradient with respect to the first argument of a function that returns `(scalar, auxiliary tree)`.

    Returns `((value, auxiliary), gradient)`, detached (under `func` where no leaf requires a gradient already); a leaf
    that the value does not depend on has gradient zero. Both engines give the same numbers. `autograd` needs about a
    third of the memory of `func`, which keeps the graph of the gradient itself (`create_graph=True` is fixed in
    `torch.func.grad`).

    Raises:
        ValueError: an unknown engine; when called, a leaf or value that is not floating, or a value that is no scalar.
    """
    check.one_of("value_and_grad", "engine", engine, get_args(Engine))

    def checked(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Aux]:
        value, aux = function(tree, *args, **kwargs)
        check.shapes("value_and_grad", ("the function's value", value, "float"))
        return value, aux

    def by_func(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[tuple[Tensor, Aux], T]:
        _check_floating(tree)
        transformed = torch.func.grad_and_value(checked, has_aux=True)
        gradient, (value, aux) = cast("tuple[T, tuple[Tensor, Aux]]", transformed(tree, *args, **kwargs))
        return (value, aux), gradient

    def by_autograd(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[tuple[Tensor, Aux], T]:
        _check_floating(tree)
        inputs = [leaf.detach().requires_grad_() for leaf in leaves(tree)]
        with torch.enable_grad():
            value, aux = checked(unflatten(tree, inputs), *args, **kwargs)
        if not value.requires_grad:
            return (value, detach(aux)), zeros_like(tree)
        gradient = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return (value.detach(), detach(aux)), unflatten(tree, gradient)

    return by_func if engine == "func" else by_autograd


def _check_floating(tree: Tree) -> None:
    for path, leaf in _named(tree):
        check.holds("value_and_grad", f"leaf {path}", leaf, "float")


def grad(function: Callable[Concatenate[T, P], Tensor]) -> Callable[Concatenate[T, P], T]:
    """`torch.func.grad` with respect to the first argument, typed."""
    return cast("Callable[Concatenate[T, P], T]", torch.func.grad(function))


def vmap(function: Callable[P, T], in_dims: tuple[int | None, ...]) -> Callable[P, T]:
    """`torch.func.vmap`, typed."""
    return cast("Callable[P, T]", torch.func.vmap(function, in_dims=in_dims))
