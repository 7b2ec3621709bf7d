"""The expert bank: many small SwiGLU experts, their exact surprise and SMK in one backward pass.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.

`bank_forward` and `bank_vjp` are the specification, in stock operations; `bank` is production and gives the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from onn import check
from onn.functional.kernels import grouped
from onn.functional.kernels.backends import Backend, Bounded, choose
from onn.functional.kernels.dense import (
    dense_backward,
    dense_forward,
    expert_gradient,
    input_gradient,
    output_products,
)
from onn.functional.kernels.entries import bank_parts, tap_dims
from onn.functional.kernels.local import unit_gradients
from onn.functional.kernels.precision import as_given
from onn.functional.kernels.ragged import ragged_backward, ragged_forward
from onn.functional.kernels.tilings import Tiling
from onn.functional.surprise import parameter_surprise
from onn.functional.types import Experts, Local, Residuals, Wanted, reduction_dtype

TapName = Literal["surprise", "counterfactual", "neuron", "matrix", "bias"]
Select = Callable[[Tensor, Tensor], Tensor]
_MOST_TOKENS = 2**31
"""Of a batch; more are a mistake that no machine has memory for."""


class BankGrads(NamedTuple):
    """Gradients of one bank and the surprise that came with them."""

    experts: Experts
    x: Tensor
    """[T, H]: never masked."""
    weights: Tensor
    """[T, E]: also where the weight is 0, since the dense computation knows it."""
    surprise: Tensor
    """[T, E]: parameter surprise."""


def _sizes(where: str, experts: Experts, x: Tensor, weights: Tensor) -> dict[str, int]:
    return check.shapes(
        where,
        *bank_parts(experts, where=where, name="experts"),
        ("x", x, "float T H"),
        ("weights", weights, "float T E"),
    )


def _check_backward(where: str, experts: Experts, residuals: Residuals, dy: Tensor) -> None:
    check.instance(where, "residuals", residuals, Residuals)
    rows = [(name, part, "float T E I") for name, part in zip(Residuals._fields, residuals, strict=True)]
    check.shapes(where, *bank_parts(experts, where=where, name="experts"), *rows, ("dy", dy, "float T H"))
    check.one_dtype(where, **experts._asdict(), **residuals._asdict(), dy=dy)


def bank_forward(experts: Experts, x: Tensor, weights: Tensor) -> tuple[Tensor, Residuals]:
    """`y_t = sum_e w_te down_e^T (silu(gate_e x_t) * (up_e x_t))`, densely.

    Args:
        experts: the bank, [E, I, H] each.
        x: [T, H].
        weights: [T, E] combine weights, 0 where inactive; applied to the [., I] activation.

    Returns:
        y [T, H] and the residuals that `bank_vjp` needs. Every expert computes every token: with all weights 1 and
        experts carved from a dense MLP this is that MLP, up to the order of summation.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    _sizes("bank_forward", experts, x, weights)
    check.one_dtype("bank_forward", **experts._asdict(), x=x, weights=weights)
    y, residuals, _ = dense_forward(experts, x, weights)
    return y, residuals


def bank_local(experts: Experts, residuals: Residuals, dy: Tensor) -> tuple[Local, Tensor]:
    """The unit gradients of every (token, expert, neuron), and the gradient of the combine weights.

    Args:
        experts: the bank.
        residuals: of `bank_forward`.
        dy: [T, H], the gradient of its output.

    Returns:
        `Local`, from which all forms of surprise follow, and dL/dw [T, E].

    Raises:
        ValueError: shapes or dtypes differ.
    """
    _check_backward("bank_local", experts, residuals, dy)
    u = output_products(experts, dy)
    local = unit_gradients(residuals, u)
    return local, (local.a * u).sum(dim=-1)


def bank_vjp(
    experts: Experts, x: Tensor, weights: Tensor, residuals: Residuals, dy: Tensor, *, select: Select | None
) -> BankGrads:
    """The gradients of `bank_forward` and the exact parameter surprise, from the same products.

    Args:
        experts: the bank.
        x: [T, H].
        weights: [T, E].
        residuals: of `bank_forward`.
        dy: [T, H], the gradient of its output.
        select: which (token, expert) pairs learn: `(surprise, active) -> keep`, bool [T, E]; `None` keeps all.

    Returns:
        `BankGrads`. The gradient of a pair that is not kept, NaN or not, is left out of the experts' gradient and
        nothing else; the gradients of `x` and `weights` are those without a selection.

    Raises:
        ValueError: shapes or dtypes differ, also of what is selected.
    """
    _sizes("bank_vjp", experts, x, weights)
    _check_backward("bank_vjp", experts, residuals, dy)
    check.shapes("bank_vjp", ("x", x, "float T H"), ("dy", dy, "float T H"), ("h1", residuals.h1, "float T E I"))
    check.one_dtype("bank_vjp", x=x, weights=weights, dy=dy)
    local, d_weights = bank_local(experts, residuals, dy)
    surprise = parameter_surprise(local, x, weights, dy)
    d1, d3, a = (part * weights[..., None] for part in local)
    dx = input_gradient(experts, d1, d3)
    if select is None:
        learnt = expert_gradient(d1, d3, a, x, dy)
    else:
        check.function("bank_vjp", "select", select)
        keep = select(surprise, weights != 0)
        check.shapes("bank_vjp", ("what select keeps", keep, "bool T E"), ("weights", weights, "float T E"))
        learnt = Experts(*(_kept_gradient(rows, source, keep) for rows, source in ((d1, x), (d3, x), (a, dy))))
    return BankGrads(experts=learnt, x=dx, weights=d_weights, surprise=surprise)


def _kept_gradient(rows: Tensor, source: Tensor, keep: Tensor) -> Tensor:
    """Sums of outer products over the pairs that are kept; what is not kept is dropped from both factors."""
    columns = zip(rows.unbind(1), keep.mT[..., None].unbind(0), strict=True)
    return torch.stack([torch.where(kept, part, 0).mT @ torch.where(kept, source, 0) for part, kept in columns])


class _Plan(NamedTuple):
    """What is static about a call."""

    min_k: int
    taps: tuple[str, ...]
    way: Tiling | Bounded | None
    """How the active pairs are computed; `None` computes all pairs, densely."""
    active_only: bool
    """No gradient for combine weights that are 0, though the dense computation knows it."""


def _rows(weights: Tensor, known: Bounded) -> grouped.Rows:
    """Room for as many active pairs of combine weights [T, E] as there may be."""
    return grouped.rows_of(weights, rows=len(weights) * known.per_token, per_token=known.per_token)


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, _Plan, *tuple[Tensor, ...]]


class _Saved(torch.autograd.function.FunctionCtx):
    """What `_Bank` leaves on its context."""

    plan: _Plan
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own: nothing inside is recorded, and a second derivative is an error.

    What is not wanted comes back without entries.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor,
        plan: _Plan,
        wanted: Wanted,
        counterfactual: bool,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        x: Tensor,
        weights: Tensor,
        h1: Tensor,
        h3: Tensor,
        *weighted: Tensor,
    ) -> tuple[Tensor, ...]:
        experts, residuals = Experts(gate, up, down), Residuals(h1, h3)
        with as_given(x.device):
            if isinstance(plan.way, Tiling):
                ragged = (experts, x, weights, residuals, plan.way)
                return (*ragged_backward(dy, *ragged, min_k=plan.min_k, wanted=wanted), x.new_empty(0))
            if isinstance(plan.way, Bounded):
                bank = (experts, x, weights, residuals, _rows(weights, plan.way))
                return (*grouped.backward(dy, *bank, min_k=plan.min_k, wanted=wanted), x.new_empty(0))
            learnt, *rest = dense_backward(
                *(dy, experts, x, weights, residuals, weighted[0] if weighted else None),
                min_k=plan.min_k,
                all_learn=plan.min_k == weights.shape[-1],
                wanted=wanted,
                counterfactual=counterfactual,
            )
        dx, d_weights, *measured = rest
        return (*learnt, dx, torch.where(weights != 0, d_weights, 0) if plan.active_only else d_weights, *measured)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError(
            "onn.functional.bank is differentiable once: its surprise has no derivative, and a second derivative would "
            "be wrong without it. Use bank_forward for higher derivatives."
        )


class _Bank(torch.autograd.Function):
    """Forward returns its residuals, since `setup_context` sees inputs and outputs alone.

    Where every row learns from the dense computation the weighted activation is one of them; SMK needs few of its rows
    and recomputes these.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gate: Tensor, up: Tensor, down: Tensor, x: Tensor, weights: Tensor, plan: _Plan, *taps: Tensor
    ) -> tuple[Tensor, ...]:
        experts = Experts(gate, up, down)
        with as_given(x.device):
            if isinstance(plan.way, Tiling):
                y, residuals = ragged_forward(experts, x, weights, plan.way)
                return (y, *residuals)
            if isinstance(plan.way, Bounded):
                y, residuals = grouped.forward(experts, x, _rows(weights, plan.way))
                return (y, *residuals)
            y, residuals, weighted = dense_forward(experts, x, weights)
        return (y, *residuals, weighted) if plan.min_k == weights.shape[-1] else (y, *residuals)

    @staticmethod
    def setup_context(ctx: _Saved, inputs: _Inputs, output: tuple[Tensor, ...]) -> None:
        gate, up, down, x, weights, plan, *_ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(gate, up, down, x, weights, *kept)
        ctx.plan = plan

    @staticmethod
    def backward(ctx: _Saved, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down, x, weights, _, *taps = ctx.needs_input_grad
        asked = dict(zip(ctx.plan.taps, taps, strict=True))
        wanted = Wanted(
            experts=gate or up or down,
            x=x,
            surprise=asked.get("surprise", False),
            bias=asked.get("bias", False),
            squares=asked.get("matrix", False) or asked.get("neuron", False),
        )
        grads = _Backward.apply(dy, ctx.plan, wanted, asked.get("counterfactual", False), *ctx.saved_tensors)
        measured = dict(zip(("surprise", "bias", "matrix", "counterfactual"), grads[5:], strict=True))
        if asked.get("neuron", False):
            measured["neuron"] = measured["matrix"].sum(dim=0)
        inputs = (grad if need else None for grad, need in zip(grads[:5], (gate, up, down, x, weights), strict=True))
        return (*inputs, None, *(measured[name] if need else None for name, need in asked.items()))


def zero_taps(names: tuple[TapName, ...], *, tokens: int, experts: Experts) -> dict[str, Tensor]:
    """Zeros to differentiate `bank` with respect to: the "gradient" of each is what its name says.

    Args:
        names: any of `surprise` and `counterfactual`, both [T, E]; `neuron`, [E, I] (`neuron_surprise`), and `matrix`,
            [3, E, I] (`matrix_surprise`); and `bias`, [2, E, I] (`bias_gradients` of the pairs that learn).
        tokens: T.
        experts: the bank, for its sizes, dtype and device.

    Returns:
        One tensor for each name, float32 (float64 for float64 experts).

    Raises:
        ValueError: an unknown name, tokens that no batch has, or experts that are no bank.
    """
    check.instance("zero_taps", "names", names, tuple)
    check.whole("zero_taps", "tokens", tokens, 0, _MOST_TOKENS)
    sizes = check.shapes("zero_taps", *bank_parts(experts, where="zero_taps", name="experts"))
    for name in names:
        check.one_of("zero_taps", "name", name, get_args(TapName))
    known = {**sizes, "T": tokens, "2": 2, "3": 3}
    shapes = {name: [known[size] for size in tap_dims(name=name).split()] for name in names}
    dtype = reduction_dtype(experts.gate.dtype)
    return {name: torch.zeros(shape, dtype=dtype, device=experts.gate.device) for name, shape in shapes.items()}


def _apply_bank(*args: Tensor | _Plan) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _Bank.apply(*args)
    return outputs


torch._dynamo.allow_in_graph(_apply_bank)


def bank(
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    tap: Tensor | Mapping[str, Tensor],
    *,
    min_k: int,
    backend: Backend | Tiling | Bounded,
) -> Tensor:
    """The production bank: `bank_forward` whose backward pass measures surprise and applies SMK.

    Args:
        experts: the bank, [E, I, H] each.
        x: [T, H].
        weights: [T, E] combine weights in the dtype of `x`, 0 where inactive.
        tap: zeros [T, E] whose "gradient" is the parameter surprise, or a mapping of such (`zero_taps`). What is not
            differentiated with respect to is not computed. One tap for each call: a tap used twice would return a sum.
        min_k: how many of a token's active experts learn from it; E keeps all and is the plain layer.
        backend: how it is computed. `dense` computes every pair of token and expert. `grouped` sorts the active pairs
            by expert and multiplies them in grouped products, on a GPU after waiting for their number; `loop` takes
            few experts at a time, in a CPU's cache; `native` gathers no rows, by C++ compiled at first use. `auto` is
            one of them by device, dtype and sizes; a `Tiling` is `loop` or `native` in numbers (`onn.calibration`).
            `Bounded` is `auto` or `grouped` with room for so many experts of each token, which waits for no number.

    Returns:
        y [T, H]. Composes with `torch.func.grad`, `vmap` and `torch.compile(fullgraph=True)` of both. Differentiable
        once; the second derivative is an error. Autocast changes nothing inside.

    Guarantee:
        All backends give the same numbers up to rounding, with two exceptions. Where a combine weight is 0 its gradient
        is known to `dense` and 0 otherwise, `auto` included: a router that learns from experts it did not choose needs
        `dense`. And a token that is not finite spoils the gradients of its own experts, or of others as well.

    Raises:
        ValueError: shapes or dtypes differ, a tap is not floating, `min_k` out of range, an unknown tap or backend,
            `native` without a compiler, a bound that is none, or the counterfactual tap where inactive experts are not
            computed.
    """
    sizes = _sizes("bank", experts, x, weights)
    check.whole("bank", "min_k", min_k, 1, sizes["E"])
    dtypes = {t.dtype for t in (*experts, x, weights)}
    check.require(len(dtypes) == 1, f"bank: experts, x and weights differ in dtype: {sorted(map(str, dtypes))}.")
    check.instance("bank", "tap", tap, Tensor, Mapping)
    taps: Mapping[str, Tensor] = {"surprise": tap} if isinstance(tap, Tensor) else tap
    for name, value in taps.items():
        check.one_of("bank", "tap", name, get_args(TapName))
        given = (f"tap {name}", value, f"float {tap_dims(name=name)}")
        check.shapes("bank", given, ("gate", experts.gate, "E I H"), ("weights", weights, "T E"))
    way = choose(backend, experts.gate, tokens=sizes["T"], counterfactual="counterfactual" in taps)
    plan = _Plan(min_k=min_k, taps=tuple(taps), way=way, active_only=backend != "dense")
    return _apply_bank(*experts, x, weights, plan, *taps.values())[0]
