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
    """The tensors of a tree, in a fixed order.

    Raises:
        ValueError: something in the tree is neither a tensor nor a tuple or mapping.
    """
    return _flatten("leaves", "tree", tree)[0]


def _flatten(where: str, name: str, tree: Tree) -> tuple[list[Tensor], optree.PyTreeSpec]:
    found: list[Tensor]
    found, structure = optree.tree_flatten(tree, none_is_leaf=True)  # type: ignore[arg-type]
    _check_leaves(where, name, found)
    return found, structure


def _check_leaves(where: str, name: str, found: Sequence[object]) -> None:
    for leaf in found:
        if not isinstance(leaf, Tensor):
            raise _stranger(where, name, leaf)


def _stranger(where: str, name: str, found: object) -> ValueError:
    return ValueError(f"{where}: expected tensors in {name}, in tuples and mappings; found {type(found).__name__}.")


def paths(tree: Tree) -> list[str]:
    """A dotted name for every leaf, in the order of `leaves`: `layers.0.attention.q`.

    Raises:
        ValueError: as of `leaves`; or a mapping has keys that are no text.
    """
    return [path for path, _ in _named("paths", "tree", tree)]


def _named(where: str, what: str, tree: Tree) -> list[tuple[str, Tensor]]:
    """Paths and leaves; torch.compile follows it into mappings, which it does not follow optree into."""
    if isinstance(tree, Tensor):
        return [("", tree)]
    if isinstance(tree, Mapping):
        for key in tree:
            check.instance(where, f"every key in {what}", key, str)
        items = [(key, tree[key]) for key in (tree if isinstance(tree, OrderedDict) else sorted(tree))]
    elif not _is_sequence(tree):
        raise _stranger(where, what, tree)
    else:
        names = getattr(tree, "_fields", None) or [str(position) for position in range(len(tree))]
        items = list(zip(names, tree, strict=True))
    return [
        (f"{name}.{path}" if path else name, leaf) for name, child in items for path, leaf in _named(where, what, child)
    ]


def _is_sequence(value: object) -> bool:
    return isinstance(value, tuple | list)


def unflatten(like: T, values: Sequence[Tensor]) -> T:
    """A tree with the structure of `like` and the leaves `values`.

    Raises:
        ValueError: another number of values than leaves, or a value that is no tensor.
    """
    check.instance("unflatten", "values", values, Sequence)
    _check_leaves("unflatten", "values", values)
    own, structure = _flatten("unflatten", "like", like)
    if len(values) != len(own):
        raise ValueError(f"unflatten: expected as many values as like has leaves, {len(own)}, got {len(values)}.")
    return cast("T", optree.tree_unflatten(structure, values))


def map1(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Apply `function` to every leaf.

    Raises:
        ValueError: as of `leaves`.
    """
    check.function("map1", "function", function)
    return _mapped("map1", function, tree)


def _mapped(where: str, function: Callable[[Tensor], Tensor], tree: T) -> T:
    found, structure = _flatten(where, "tree", tree)
    return cast("T", optree.tree_unflatten(structure, [function(leaf) for leaf in found]))


def map2(function: Callable[[Tensor, Tensor], Tensor], first: T, second: Tree) -> T:
    """Apply `function` to the pairs of leaves of two trees of the same structure.

    Raises:
        ValueError: as of `leaves`; or the structures differ.
    """
    check.function("map2", "function", function)
    return _mapped_pairs("map2", function, ("first", first), ("second", second))


def _mapped_pairs(
    where: str, function: Callable[[Tensor, Tensor], Tensor], first: tuple[str, T], second: tuple[str, Tree]
) -> T:
    (name, tree), (another, other) = first, second
    found, structure = _flatten(where, name, tree)
    try:
        others = cast("list[Tensor]", structure.flatten_up_to(other))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{where}: expected {name} and {another} alike, got {_outline(tree)} and {_outline(other)}."
        ) from error
    _check_leaves(where, another, others)
    return cast("T", optree.tree_unflatten(structure, list(map(function, found, others))))


def _outline(tree: Tree) -> str:
    """What a message says of a structure."""
    names = [".".join(map(str, path)) for path in optree.tree_paths(tree, none_is_leaf=True)]  # type: ignore[arg-type]
    return f"{type(tree).__name__} with leaves {check.shown(names)}"


class Flat(Generic[R]):
    """One call of a function of trees as a function of tensors."""

    def __init__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
        """Trees by position, constants by keyword."""
        check.function("Flat", "function", function)
        trees = cast("tuple[Tree, ...]", args)
        self._function = cast("_Untyped[Tree]", function)
        self._kwargs = cast("Mapping[str, object]", kwargs)
        self._result: Tree = ()
        self.inputs, _ = _flatten("Flat", "the arguments by position", trees)
        """The tensors of the arguments."""
        self._args = map1(_shell, trees)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the result."""
        result = self._function(*unflatten(self._args, inputs), **self._kwargs)
        found, _ = _flatten("Flat", "the function's result", result)
        self._result = map1(_shell, result)
        return tuple(found)

    def result(self, outputs: Sequence[Tensor]) -> R:
        """The result of the last call, with these tensors."""
        return cast("R", unflatten(self._result, outputs))


def _shell(leaf: Tensor) -> Tensor:
    """Something in the place of a leaf that holds no memory."""
    return leaf.new_empty(0)


def shapes(where: str, tree: Tree, dims: Mapping[str, str]) -> dict[str, int]:
    """`check.shapes` of all leaves together, each after what `dims` says of the end of its path.

    Raises:
        ValueError: as of `check.shapes`; or `dims` says nothing of a leaf.
    """
    check.instance("shapes", "dims", dims, Mapping)
    rows = [(path, leaf, _of_end(path, dims)) for path, leaf in zip(paths(tree), leaves(tree), strict=True)]
    return check.shapes(where, *rows)


def _of_end(path: str, dims: Mapping[str, str]) -> str:
    end = path
    while end not in dims and "." in end:
        end = end.partition(".")[2]
    check.require(end in dims, f"shapes: no parameter is called {path}.")
    check.instance("shapes", f"dims of {end}", dims[end], str)
    return dims[end]


def detach(tree: T) -> T:
    """The same values, cut from any graph."""
    return _mapped("detach", Tensor.detach, tree)


def zeros_like(tree: T) -> T:
    """Zeros of the same structure, shapes, dtypes and devices."""
    return _mapped("zeros_like", torch.zeros_like, tree)


def where(condition: Tensor, chosen: T, other: T) -> T:
    """`chosen` where `condition` (broadcast to each leaf) holds, else `other`.

    Raises:
        ValueError: `condition` is not bool, or does not broadcast to a leaf; or the trees differ in structure, or two
            leaves in shape, dtype or device.
    """
    check.holds("where", "condition", condition, "bool")

    def picked(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(reversed(condition.shape), reversed(a.shape), strict=False)
        check.require(
            condition.ndim <= a.ndim and all(size in (1, whole) for size, whole in pairs),
            f"where: condition {list(condition.shape)} does not broadcast to a leaf {list(a.shape)}.",
        )
        check.require(
            (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device),
            f"where: chosen and other differ in a leaf: {_listed(a)} and {_listed(b)}.",
        )
        check.require(
            condition.device == a.device or (condition.ndim == 0 and not condition.is_meta and not a.is_meta),
            f"where: condition is on {condition.device}, a leaf on {a.device}.",
        )
        return torch.where(condition, a, b)

    return _mapped_pairs("where", picked, ("chosen", chosen), ("other", other))


def _listed(leaf: Tensor) -> str:
    return f"{list(leaf.shape)} of {leaf.dtype} on {leaf.device}"


def all_finite(tree: Tree) -> Tensor:
    """A scalar bool: no leaf holds a NaN or an infinity; true of a tree without leaves.

    Raises:
        ValueError: a leaf holds no numbers that are finite or not, such as float8; or they are on several devices.
    """
    found, _ = _flatten("all_finite", "tree", tree)
    for leaf in found:
        if leaf.dtype != torch.bool:
            check.holds("all_finite", "every leaf of tree", leaf, "real")
    devices = {leaf.device for leaf in found}
    check.require(len(devices) <= 1, f"all_finite: expected tree on one device, got {sorted(map(str, devices))}.")
    finite = [torch.isfinite(leaf).all() for leaf in found]
    return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool)


def value_and_grad(
    function: Callable[Concatenate[T, P], tuple[Tensor, Aux]], *, engine: Engine
) -> Callable[Concatenate[T, P], tuple[tuple[Tensor, Aux], T]]:
    """Gradient with respect to the first argument of a function that returns `(scalar, auxiliary tree)`.

    Returns `((value, auxiliary), gradient)`, detached (under `func` where no leaf requires a gradient already); a leaf
    that the value does not depend on has gradient zero. Both engines give the same numbers. `autograd` needs about a
    third of the memory of `func`, which keeps the graph of the gradient itself (`create_graph=True` is fixed in
    `torch.func.grad`).

    Raises:
        ValueError: no function, or an unknown engine; when called, a leaf or value that is not floating, a value that
            is no scalar, or an auxiliary tree that is none; or `autograd` inside `torch.inference_mode`, where it would
            record nothing.
    """
    check.function("value_and_grad", "function", function)
    check.one_of("value_and_grad", "engine", engine, get_args(Engine))

    def checked(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Aux]:
        result = function(tree, *args, **kwargs)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                f"value_and_grad: expected the function to return a value and a tree, got {_found(result)}."
            )
        value, aux = result
        check.shapes("value_and_grad", ("the function's value", value, "float"))
        _named("value_and_grad", "the auxiliary tree", aux)
        return value, aux

    def by_func(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[tuple[Tensor, Aux], T]:
        _check_floating("value_and_grad", tree)
        transformed = torch.func.grad_and_value(checked, has_aux=True)
        gradient, (value, aux) = cast("tuple[T, tuple[Tensor, Aux]]", transformed(tree, *args, **kwargs))
        return (value, aux), gradient

    def by_autograd(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[tuple[Tensor, Aux], T]:
        _check_floating("value_and_grad", tree)
        check.require(
            not torch.is_inference_mode_enabled(),
            "value_and_grad: engine='autograd' records nothing in torch.inference_mode; take torch.no_grad or 'func'.",
        )
        inputs = [leaf.detach().requires_grad_() for leaf in leaves(tree)]
        with torch.enable_grad():
            value, aux = checked(unflatten(tree, inputs), *args, **kwargs)
        if not value.requires_grad:
            return (value, detach(aux)), zeros_like(tree)
        gradient = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return (value.detach(), detach(aux)), unflatten(tree, gradient)

    return by_func if engine == "func" else by_autograd


def _check_floating(where: str, tree: Tree) -> None:
    for path, leaf in _named(where, "what is differentiated", tree):
        check.holds(where, f"leaf {path}", leaf, "float")


def _found(result: object) -> str:
    return f"{len(result)} results" if isinstance(result, tuple) else type(result).__name__


def grad(function: Callable[Concatenate[T, P], Tensor]) -> Callable[Concatenate[T, P], T]:
    """`torch.func.grad` with respect to the first argument, typed.

    Raises:
        ValueError: no function; when called, a leaf or value that is not floating, or a value that is no scalar.
    """
    check.function("grad", "function", function)

    def checked(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        value = function(tree, *args, **kwargs)
        check.shapes("grad", ("the function's value", value, "float"))
        return value

    def run(tree: T, /, *args: P.args, **kwargs: P.kwargs) -> T:
        _check_floating("grad", tree)
        return cast("T", torch.func.grad(checked)(tree, *args, **kwargs))

    return run


def vmap(function: Callable[P, T], in_dims: tuple[int | None, ...]) -> Callable[P, T]:
    """`torch.func.vmap`, typed.

    Raises:
        ValueError: no function, or `in_dims` is no tuple of dimensions and `None`; when called, `in_dims` or the sizes
            do not fit the arguments.
    """
    check.function("vmap", "function", function)
    check.instance("vmap", "in_dims", in_dims, tuple)
    for dim in in_dims:
        check.instance("vmap", "every one of in_dims", dim, int, type(None))
    return cast("Callable[P, T]", torch.func.vmap(function, in_dims=in_dims))
