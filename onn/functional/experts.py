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
from torch.nn.functional import silu

from onn import check
from onn.functional.segments import segment_outer
from onn.functional.surprise import (
    Local,
    counterfactual_surprise,
    min_k_indices,
    neuron_surprise,
    parameter_surprise,
    weight_surprise,
)
from onn.functional.types import Experts, reduction_dtype

Backend = Literal["dense"]
TapName = Literal["surprise", "counterfactual", "neuron"]
Select = Callable[[Tensor, Tensor], Tensor]


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass, each [T, E, I]."""

    h1: Tensor
    """Pre-activation of the gate."""
    h3: Tensor
    """Up projection."""


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
        ("gate", experts.gate, "E I H"),
        ("up", experts.up, "E I H"),
        ("down", experts.down, "E I H"),
        ("x", x, "T H"),
        ("weights", weights, "T E"),
    )


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
        ValueError: shapes differ.
    """
    _sizes("bank_forward", experts, x, weights)
    y, residuals, _ = _forward(experts, x, weights)
    return y, residuals


def _forward(experts: Experts, x: Tensor, weights: Tensor) -> tuple[Tensor, Residuals, Tensor]:
    """The output, the residuals and the weighted activation [T, E, I]."""
    split = experts.gate.shape[:2]
    h1 = (x @ experts.gate.flatten(0, 1).mT).unflatten(-1, split)
    h3 = (x @ experts.up.flatten(0, 1).mT).unflatten(-1, split)
    weighted = silu(h1) * h3 * weights[..., None]
    return weighted.flatten(1) @ experts.down.flatten(0, 1), Residuals(h1=h1, h3=h3), weighted


def bank_local(experts: Experts, residuals: Residuals, dy: Tensor) -> tuple[Local, Tensor]:
    """The unit gradients of every (token, expert, neuron), and the gradient of the combine weights.

    Args:
        experts: the bank.
        residuals: of `bank_forward`.
        dy: [T, H], the gradient of its output.

    Returns:
        `Local`, from which all forms of surprise follow, and dL/dw [T, E].
    """
    u = _output_products(experts, dy)
    local = _unit_gradients(residuals, u)
    return local, (local.a * u).sum(dim=-1)


def _output_products(experts: Experts, dy: Tensor) -> Tensor:
    """`u_tei = down_ei g_t`: the gradient of every activation at combine weight 1."""
    u: Tensor = (dy @ experts.down.flatten(0, 1).mT).unflatten(-1, experts.down.shape[:2])
    return u


def _unit_gradients(residuals: Residuals, u: Tensor) -> Local:
    h1, h3 = residuals
    sigmoid = torch.sigmoid(h1)
    gated = h1 * sigmoid
    return Local(c1=u * h3 * sigmoid * (1 + h1 * (1 - sigmoid)), c3=u * gated, a=gated * h3)


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
        ValueError: shapes differ.
    """
    _sizes("bank_vjp", experts, x, weights)
    local, d_weights = bank_local(experts, residuals, dy)
    surprise = parameter_surprise(local, x, weights, dy)
    d1, d3, a = (part * weights[..., None] for part in local)
    dx = _input_gradient(experts, d1, d3)
    if select is None:
        learnt = _expert_gradient(d1, d3, a, x, dy)
    else:
        keep = select(surprise, weights != 0)
        learnt = Experts(*(_kept_gradient(rows, source, keep) for rows, source in ((d1, x), (d3, x), (a, dy))))
    return BankGrads(experts=learnt, x=dx, weights=d_weights, surprise=surprise)


def _kept_gradient(rows: Tensor, source: Tensor, keep: Tensor) -> Tensor:
    """Sums of outer products over the pairs that are kept; what is not kept is dropped from both factors."""
    columns = zip(rows.unbind(1), keep.mT[..., None].unbind(0), strict=True)
    return torch.stack([torch.where(kept, part, 0).mT @ torch.where(kept, source, 0) for part, kept in columns])


def _input_gradient(experts: Experts, d1: Tensor, d3: Tensor) -> Tensor:
    return d1.flatten(1) @ experts.gate.flatten(0, 1) + d3.flatten(1) @ experts.up.flatten(0, 1)


def _expert_gradient(d1: Tensor, d3: Tensor, a: Tensor, x: Tensor, dy: Tensor) -> Experts:
    """Sums over tokens of the outer products of weighted rows [T, E, I] with x and dy."""
    split = a.shape[-2:]
    return Experts(
        gate=(d1.flatten(1).mT @ x).unflatten(0, split),
        up=(d3.flatten(1).mT @ x).unflatten(0, split),
        down=(a.flatten(1).mT @ dy).unflatten(0, split),
    )


def _min_k_gradient(
    residuals: Residuals, u: Tensor, x: Tensor, weights: Tensor, dy: Tensor, surprise: Tensor, min_k: int
) -> Experts:
    """`_expert_gradient` of the rows that `min_k_mask` keeps: T * min_k of them, gathered and sorted by expert."""
    num_experts = weights.shape[1]
    chosen, filled = min_k_indices(surprise, weights != 0, min_k=min_k)
    owner, order = torch.sort(torch.where(filled, chosen, num_experts).flatten(), stable=True)
    token = torch.div(order, min_k, rounding_mode="floor")
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x.device).scatter_add(
        0, owner, torch.ones_like(owner)
    )
    ends = counts[:-1].cumsum(dim=0)
    pair = token * num_experts + owner.clamp(max=num_experts - 1)
    h1, h3, u = (part.flatten(0, 1).index_select(0, pair) for part in (*residuals, u))
    weight = weights.flatten().index_select(0, pair)[:, None]
    d1, d3, a = (part * weight for part in _unit_gradients(Residuals(h1, h3), u))
    gate, up = segment_outer(torch.cat([d1, d3], dim=-1), x, token, ends).chunk(2, dim=1)
    return Experts(gate=gate, up=up, down=segment_outer(a, dy, token, ends))


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, tuple[str, ...], *tuple[Tensor, ...]]


class _Saved(torch.autograd.function.FunctionCtx):
    """What `_Bank` leaves on its context."""

    min_k: int
    names: tuple[str, ...]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own: nothing inside is recorded, and a second derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor,
        min_k: int,
        wanted: tuple[str, ...],
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
        u = _output_products(experts, dy)
        local = _unit_gradients(residuals, u)
        d_weights = (local.a * u).sum(dim=-1)
        d1, d3 = local.c1 * weights[..., None], local.c3 * weights[..., None]
        measured: dict[str, Tensor] = {}
        if not weighted or "surprise" in wanted or "counterfactual" in wanted:
            measured["counterfactual"] = counterfactual_surprise(local, x, dy)
            measured["surprise"] = weight_surprise(measured["counterfactual"], weights)
        if "neuron" in wanted:
            measured["neuron"] = neuron_surprise(local, x, weights, dy)
        if weighted:
            learnt = _expert_gradient(d1, d3, weighted[0], x, dy)
        else:
            learnt = _min_k_gradient(residuals, u, x, weights, dy, measured["surprise"], min_k)
        return (*learnt, _input_gradient(experts, d1, d3), d_weights, *(measured[name] for name in wanted))

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

    Where every row learns the weighted activation is one of them; SMK needs few of its rows and recomputes these.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        x: Tensor,
        weights: Tensor,
        min_k: int,
        names: tuple[str, ...],
        *taps: Tensor,
    ) -> tuple[Tensor, ...]:
        y, residuals, weighted = _forward(Experts(gate, up, down), x, weights)
        return (y, *residuals, weighted) if min_k == weights.shape[-1] else (y, *residuals)

    @staticmethod
    def setup_context(ctx: _Saved, inputs: _Inputs, output: tuple[Tensor, ...]) -> None:
        gate, up, down, x, weights, min_k, names, *_ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(gate, up, down, x, weights, *kept)
        ctx.min_k, ctx.names = min_k, names

    @staticmethod
    def backward(ctx: _Saved, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(name for name, need in zip(ctx.names, ctx.needs_input_grad[7:], strict=True) if need)
        grads = _Backward.apply(dy, ctx.min_k, wanted, *ctx.saved_tensors)
        measured = dict(zip(wanted, grads[5:], strict=True))
        return (*grads[:5], None, None, *(measured.get(name) for name in ctx.names))


def zero_taps(names: tuple[TapName, ...], *, tokens: int, experts: Experts) -> dict[str, Tensor]:
    """Zeros to differentiate `bank` with respect to: the "gradient" of each is what its name says.

    Args:
        names: any of `surprise` and `counterfactual`, both [T, E], and `neuron`, [E, I] (`neuron_surprise`).
        tokens: T.
        experts: the bank, for its sizes, dtype and device.

    Returns:
        One tensor for each name, float32 (float64 for float64 experts).
    """
    E, I, _ = experts.gate.shape
    shapes: dict[str, tuple[int, int]] = {"surprise": (tokens, E), "counterfactual": (tokens, E), "neuron": (E, I)}
    for name in names:
        check.one_of("zero_taps", "name", name, get_args(TapName))
    dtype = reduction_dtype(experts.gate.dtype)
    return {name: torch.zeros(shapes[name], dtype=dtype, device=experts.gate.device) for name in names}


def _apply_bank(*args: Tensor | int | tuple[str, ...]) -> Tensor:
    y: Tensor = _Bank.apply(*args)[0]
    return y


torch._dynamo.allow_in_graph(_apply_bank)


def bank(
    experts: Experts, x: Tensor, weights: Tensor, tap: Tensor | Mapping[str, Tensor], *, min_k: int, backend: Backend
) -> Tensor:
    """The production bank: `bank_forward` whose backward pass measures surprise and applies SMK.

    Args:
        experts: the bank, [E, I, H] each.
        x: [T, H].
        weights: [T, E] combine weights in the dtype of `x`, 0 where inactive.
        tap: zeros [T, E] whose "gradient" is the parameter surprise, or a mapping of such (`zero_taps`). What is not
            differentiated with respect to is not computed. One tap for each call: a tap used twice would return a sum.
        min_k: how many of a token's active experts learn from it; E keeps all and is the plain layer.
        backend: how it is computed.

    Returns:
        y [T, H]. Composes with `torch.func.grad`, `vmap` and `torch.compile(fullgraph=True)` of both. Differentiable
        once; the second derivative is an error.

    Raises:
        ValueError: shapes or dtypes differ, `min_k` out of range, an unknown tap or backend.
    """
    sizes = _sizes("bank", experts, x, weights)
    check.between("bank", "min_k", min_k, 1, sizes["E"])
    check.one_of("bank", "backend", backend, get_args(Backend))
    dtypes = {t.dtype for t in (*experts, x, weights)}
    check.require(len(dtypes) == 1, f"bank: experts, x and weights differ in dtype: {sorted(map(str, dtypes))}.")
    taps: Mapping[str, Tensor] = {"surprise": tap} if isinstance(tap, Tensor) else tap
    for name, value in taps.items():
        check.one_of("bank", "tap", name, get_args(TapName))
        dims, against = ("E I", experts.gate[..., 0]) if name == "neuron" else ("T E", weights)
        check.shapes("bank", (f"tap {name}", value, dims), ("its reference", against, dims))
    return _apply_bank(*experts, x, weights, min_k, tuple(taps), *taps.values())
