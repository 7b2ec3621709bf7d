"""Recomputation in the place of checkpointing: keep the inputs of a function, and run it again in the backward pass.

`torch.utils.checkpoint` raises under `torch.func`; here the function is run again inside a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from onn import check
from onn.region import Kind, Region, check_part
from onn.tree import Engine, Flat

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A function of tensors, of whose results the first is differentiated."""

    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    engine: Engine
    mode: Callable[[], AbstractContextManager[object]]
    """The autocast under which it was called."""


class _Context(torch.autograd.function.FunctionCtx):
    """What `_Recomputed` leaves for its backward pass."""

    call: _Call
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        value, *others = _results(call.run, inputs)
        return (value, *map(Tensor.detach, others))

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[_Call, *tuple[Tensor, ...]], output: tuple[Tensor, ...]) -> None:
        call, *kept = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*kept)
        ctx.call = call

    @staticmethod
    def backward(ctx: _Context, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if ctx.call.engine == "func":
            found = _Again.apply(ctx.call, needed, dy, *ctx.saved_tensors)
        elif torch.is_grad_enabled():
            raise RuntimeError(
                "recomputed: engine='autograd' stands neither under torch.func nor under a second derivative; "
                "take engine='func' for the first, and no recomputation for the second."
            )
        else:
            found = _gradients(ctx.call, needed, dy, ctx.saved_tensors)
        grads = iter(found)
        return (None, *(next(grads) if need else None for need in needed))


class _Again(torch.autograd.Function):
    """The backward pass as a function of its own, so that `torch.func` records nothing of what is run again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, needed: tuple[bool, ...], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        def run(*varied: Tensor) -> Tensor:
            own = iter(varied)
            with call.mode():
                return call.run([next(own) if need else given for given, need in zip(inputs, needed, strict=True)])[0]

        varied = (given for given, need in zip(inputs, needed, strict=True) if need)
        found: tuple[Tensor, ...] = torch.func.vjp(run, *varied)[1](dy)
        return found

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError("recomputed: differentiable once; take no recomputation for a second derivative.")


def _gradients(call: _Call, needed: tuple[bool, ...], dy: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.enable_grad(), call.mode():
        again = [given.detach().requires_grad_(need) for given, need in zip(inputs, needed, strict=True)]
        value = call.run(again)[0]
    varied = [given for given, need in zip(again, needed, strict=True) if need]
    return torch.autograd.grad(value, varied, dy, allow_unused=True, materialize_grads=True)


def _autocast_of(inputs: Sequence[Tensor]) -> Callable[[], AbstractContextManager[object]]:
    """Enters once more the autocast, or its absence, that there is now on the device of the inputs."""
    kind = inputs[0].device.type if inputs else "cpu"
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled, cache_enabled=torch.is_autocast_cache_enabled())


def _results(run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    found = run(inputs)
    check.require(len(found) > 0, "recomputed: expected a tensor in the function's result, got a tree without one.")
    check.holds("recomputed", "first tensor of the function's result", found[0], "float")
    return found


def recomputed(function: Callable[P, R], *, engine: Engine) -> Callable[P, R]:
    """The same function, of which the backward pass keeps the inputs alone and runs it again.

    Args:
        function: pure, of trees of tensors by position and constants by keyword. The first tensor of what it returns is
            what is differentiated; all others come out detached.
        engine: who differentiates, see `onn.tree`; `func` needs more memory while it runs a function again.

    Returns:
        A function with the same numbers. Every gradient is that of `function`, bit for bit, and so is what taps among
        its inputs measure. Differentiable once. Inside a function that is compiled as one graph nothing is run again,
        since a compiler undoes it: what it keeps there is its own choice, as for `function`.

    Raises:
        ValueError: no function, or an unknown engine; when called, arguments or a result that are no trees of tensors,
            or a result whose first tensor is none that can be differentiated.
    """
    check.function("recomputed", "function", function)
    check.one_of("recomputed", "engine", engine, get_args(Engine))

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        call = Flat(function, *args, **kwargs)
        if torch.compiler.is_compiling():
            value, *others = _results(call, call.inputs)
            return call.result([value, *map(Tensor.detach, others)])
        mode = _autocast_of(call.inputs)
        return call.result(_Recomputed.apply(_Call(run=call, engine=engine, mode=mode), *call.inputs))

    return run


def recomputing_layers(region: Region, *, engine: Engine) -> Region:
    """Carry out parts as `region` does, and keep of every layer its inputs alone.

    Raises:
        ValueError: no region, or an unknown engine; when called, no function, or an unknown kind.
    """
    check.function("recomputing_layers", "region", region)
    check.one_of("recomputing_layers", "engine", engine, get_args(Engine))

    def recomputing(function: Callable[P, R], *, kind: Kind) -> Callable[P, R]:
        check_part("recomputing_layers", function, kind=kind)
        own = region(function, kind=kind)
        return recomputed(own, engine=engine) if kind == "layer" else own

    return recomputing
