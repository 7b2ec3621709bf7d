"""Banks that compute their active pairs alone, as two raw operators: forward, and backward with surprise and SMK.

A raw `torch.library` operator stands inside an `autograd.Function`, under `vmap` and in a compiled graph alike, and may
return as many rows as there happen to be active pairs. Each takes an ensemble of N banks, one after the other.

Shape letters: N banks, T tokens, H hidden, E experts, I expert intermediate size, R active pairs of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

from onn.functional.kernels import all_pairs, grouped, native_bank
from onn.functional.kernels.cutting import parts
from onn.functional.kernels.local import matrix_squares, unit_gradients, unit_norms
from onn.functional.kernels.parts import Pairs, Part, active_pairs, extended, kept_pairs
from onn.functional.kernels.tilings import NATIVE, Tiling
from onn.functional.surprise import min_k_mask, weight_surprise
from onn.functional.types import Experts, Local, RaggedGrads, Residuals, Wanted, reduction_dtype

_library = torch.library.Library("onn", "FRAGMENT")
_BANK = "Tensor gate, Tensor up, Tensor down, Tensor x, Tensor weights"
_TILING = "int entries, float whole_from"
_WANTED = ", ".join(f"bool want_{name}" for name in Wanted._fields)
_library.define(f"ragged_forward({_BANK}, {_TILING}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"ragged_backward(Tensor dy, {_BANK}, Tensor h1, Tensor h3, {_TILING}, int min_k, {_WANTED}) "
    f"-> ({', '.join(['Tensor'] * len(RaggedGrads._fields))})"
)


def ragged_forward(experts: Experts, x: Tensor, weights: Tensor, tiling: Tiling) -> tuple[Tensor, Residuals]:
    """`bank_forward` of the active pairs.

    Args:
        experts: [E, I, H] each.
        x: [T, H].
        weights: [T, E].
        tiling: how it is cut up.

    Returns:
        y [T, H], summed in float32 at least, and the residuals of the pairs: [R + 1, I] in `active_pairs`' order, or
        [T E, I] where all are computed.
    """
    y, h1, h3 = torch.ops.onn.ragged_forward(*(t[None] for t in (*experts, x, weights)), *tiling)
    return y[0], Residuals(h1=h1, h3=h3)


def ragged_backward(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    residuals: Residuals,
    tiling: Tiling,
    *,
    min_k: int,
    wanted: Wanted,
) -> RaggedGrads:
    """`bank_vjp` of the active pairs under SMK, without N; `residuals` are those of `ragged_forward`."""
    bank = (t[None] for t in (dy, *experts, x, weights))
    grads = torch.ops.onn.ragged_backward(*bank, *residuals, *tiling, min_k, *wanted)
    return RaggedGrads(*(grad[0] for grad in grads))


def _forward(
    gate: Tensor, up: Tensor, down: Tensor, x: Tensor, weights: Tensor, entries: int, whole_from: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiling = Tiling(entries, whole_from)
    banks = [
        _forward_one(Experts(*bank[:3]), *bank[3:], tiling) for bank in zip(gate, up, down, x, weights, strict=True)
    ]
    y, h1, h3 = zip(*banks, strict=True)
    return _stacked(y), _joined(h1), _joined(h3)


def _stacked(members: tuple[Tensor, ...]) -> Tensor:
    """As `torch.stack`, without a copy of a lone one."""
    return torch.stack(members) if len(members) > 1 else members[0][None]


def _joined(members: tuple[Tensor, ...]) -> Tensor:
    """As `torch.cat`, without a copy of a lone one."""
    return torch.cat(members) if len(members) > 1 else members[0]


def _forward_one(experts: Experts, x: Tensor, weights: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
    if tiling.entries == 0:
        y, residuals = grouped.forward(experts, x, _counted(weights))
        return y, *residuals
    if tiling.entries == NATIVE:
        if (active := native_bank.pairs_of(weights, tiling)) is not None:
            return native_bank.forward(experts, x, active)
        return all_pairs.forward(experts, x, weights)
    pairs = active_pairs(weights)
    (T, H), I = x.shape, experts.gate.shape[1]
    h1, h3 = (_of_pairs(pairs, I, like=x, dtype=x.dtype) for _ in range(2))
    y = x.new_zeros(T + 1, H, dtype=reduction_dtype(x.dtype))
    for part in parts(pairs, tokens=T, width=I, hidden=H, tiling=tiling):
        rows = part.take(x, "x")
        gated, raised = part.project(rows, experts.gate, experts.up)
        part.put(gated, h1)
        part.put(raised, h3)
        part.send((_weighted(part, silu(gated).mul_(raised), part.spread(pairs.weight)), experts.down), into=y)
    return y[:T].to(x.dtype), h1, h3


def _counted(weights: Tensor) -> grouped.Rows:
    """As many rows as there are active pairs of combine weights [T, E]."""
    counts = (weights != 0).sum(dim=1)
    return grouped.rows_of(weights, rows=int(counts.sum()), per_token=max(1, int(counts.max())))


def _apart(grads: RaggedGrads) -> RaggedGrads:
    """Each in memory of its own, as torch demands of what an operator returns."""
    whole = (part.untyped_storage().nbytes() == part.nbytes > 0 for part in grads)
    return RaggedGrads(*(part if own else part.clone() for part, own in zip(grads, whole, strict=True)))


def _of_pairs(pairs: Pairs, width: int, *, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[R + 1, width] to be filled; nobody's are 0."""
    rows = like.new_empty(pairs.number + 1, width, dtype=dtype)
    rows[-1] = 0
    return rows


def _weighted(part: Part, rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [..., I] times combine weights [..., 1] in their own place, 0 where nobody is.

    Rows shorter than a vector register would be multiplied number by number.
    """
    short = rows.shape[-1] * rows.element_size() < 64
    return part.guarded(rows.mul_(weight.expand_as(rows).contiguous() if short else weight), weight)


def _norms(local: Local) -> Tensor:
    """`unit_norms` [..., 2], of so few rows at a time that what they are widened to stays in a cache."""
    few = max(1, 2**18 // max(local.a[:1].numel(), 1))
    parts = zip(*(rows.split(few) for rows in local), strict=True)
    return torch.cat([torch.stack(unit_norms(Local(*rows)), dim=-1) for rows in parts])


def _backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    weights: Tensor,
    h1: Tensor,
    h3: Tensor,
    entries: int,
    whole_from: float,
    min_k: int,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    tiling = Tiling(entries, whole_from)
    sizes = _residual_rows(weights, tiling) if len(weights) > 1 else [len(h1)]
    residuals = map(Residuals, h1.split(sizes), h3.split(sizes))
    grads = [
        _backward_one(g, Experts(*experts), *inputs, kept, tiling, min_k, Wanted(*wanted))
        for g, experts, inputs, kept in zip(
            dy, zip(gate, up, down, strict=True), zip(x, weights, strict=True), residuals, strict=True
        )
    ]
    return tuple(map(_stacked, zip(*grads, strict=True)))


def _residual_rows(weights: Tensor, tiling: Tiling) -> list[int]:
    """Of each bank with these combine weights [N, T, E]."""
    every = weights[0].numel()
    counts = (weights != 0).flatten(1).sum(dim=1).tolist()
    return [every if tiling.computes_all(active, of=every) else active + 1 for active in counts]


def _backward_one(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    residuals: Residuals,
    tiling: Tiling,
    min_k: int,
    wanted: Wanted,
) -> RaggedGrads:
    if tiling.entries == 0:
        bank = (experts, x, weights, residuals, _counted(weights))
        return _apart(grouped.backward(dy, *bank, min_k=min_k, wanted=wanted))
    if tiling.entries == NATIVE:
        if (active := native_bank.pairs_of(weights, tiling)) is not None:
            return native_bank.backward(dy, experts, x, residuals, active, min_k=min_k, wanted=wanted)
        return _apart(all_pairs.backward(dy, experts, x, weights, residuals, min_k=min_k, wanted=wanted))
    (T, H), (E, I, _), wide = x.shape, experts.gate.shape, reduction_dtype(x.dtype)
    pairs = active_pairs(weights)
    masked = (wanted.experts or wanted.bias) and bool(((weights != 0).sum(dim=1) > min_k).any())
    measured = wanted.surprise or masked

    def of_pairs(width: int, dtype: torch.dtype) -> Tensor:
        return _of_pairs(pairs, width, like=x, dtype=dtype)

    def room(*, needed: bool) -> Experts:
        return Experts(*(x.new_empty(m.shape if needed else 0) for m in experts))

    learnt = room(needed=wanted.experts and not masked)
    dx = x.new_zeros((T + 1, H) if wanted.x else (0, H), dtype=wide)
    bias = x.new_empty((2, E, I) if wanted.bias else 0, dtype=wide)
    squares = x.new_empty((3, E, I) if wanted.squares else 0, dtype=wide)
    d_weights, norms = of_pairs(1, x.dtype), of_pairs(2 if measured else 0, wide)
    products = of_pairs(I if masked else 0, x.dtype)
    sources = norms
    if measured or wanted.squares:
        ends = torch.stack([vector_norm(rows, dim=-1, dtype=wide) for rows in (x, dy)], dim=-1)
        sources = extended(ends).index_select(0, pairs.token)

    def first_pass(part: Part) -> None:
        """Everything but what only the least surprised pairs are to give, where these are not known yet."""
        g, weight = part.take(dy, "dy"), part.spread(pairs.weight)
        (u,) = part.project(g, experts.down)
        local = unit_gradients(Residuals(*map(part.spread, residuals)), u)
        part.put((local.a * u).sum(dim=-1, keepdim=True), d_weights)
        if measured:
            part.put(_norms(local), norms)
        if wanted.squares:
            met = matrix_squares(local, *(weight * part.spread(sources)).split(1, dim=-1))
            for square, total in zip(met, squares, strict=True):
                part.total(part.guarded(square, weight), total)
        c1, c3 = (_weighted(part, rows, weight) for rows in (local.c1, local.c3))
        if masked:
            part.put(u, products)
        else:
            if wanted.experts:
                rows = Local(c1, c3, _weighted(part, local.a, weight))
                _learn(part, rows, part.take(x, "x"), g, learnt)
            if wanted.bias:
                _learn_bias(part, c1, c3, bias)
        if wanted.x:
            part.send((c1, experts.gate), (c3, experts.up), into=dx)

    for part in parts(pairs, tokens=T, width=I, hidden=H, tiling=tiling):
        first_pass(part)
    surprise = norms.new_empty(0)
    if measured:
        surprise = weight_surprise(torch.hypot(*(norms * sources).split(1, dim=1)), pairs.weight)[:-1, 0]
    if masked:
        kept, places = kept_pairs(pairs, _least(pairs, surprise, weights, min_k=min_k))
        products = products.index_select(0, places)
        learnt = room(needed=wanted.experts)
        for part in parts(kept, tokens=T, width=I, hidden=H, tiling=tiling):
            h1, h3 = (part.spread(rows, places) for rows in residuals)
            local = unit_gradients(Residuals(h1, h3), part.spread(products))
            weight = part.spread(kept.weight)
            rows = Local(*(_weighted(part, one, weight) for one in local))
            if wanted.experts:
                _learn(part, rows, part.take(x, "x"), part.take(dy, "dy"), learnt)
            if wanted.bias:
                _learn_bias(part, rows.c1, rows.c3, bias)

    def by_token(values: Tensor) -> Tensor:
        return values.new_zeros(weights.shape).index_put((pairs.token[:-1], pairs.expert[:-1]), values)

    return RaggedGrads(
        *learnt,
        x=dx[:T].to(x.dtype),
        weights=by_token(d_weights[:-1, 0]),
        surprise=by_token(surprise) if wanted.surprise else surprise.new_empty(0),
        bias=bias,
        squares=squares,
    )


def _learn(part: Part, rows: Local, x: Tensor, dy: Tensor, learnt: Experts) -> None:
    part.outer(x, (rows.c1, learnt.gate), (rows.c3, learnt.up))
    part.outer(dy, (rows.a, learnt.down))


def _learn_bias(part: Part, c1: Tensor, c3: Tensor, bias: Tensor) -> None:
    part.total(c1, bias[0])
    part.total(c3, bias[1])


def _least(pairs: Pairs, surprise: Tensor, weights: Tensor, *, min_k: int) -> Tensor:
    """`min_k_mask` of the pairs, bool [R]: sorted are only as many columns as a token has experts at most."""
    active = weights != 0
    place = (pairs.token[:-1], active.cumsum(dim=1)[pairs.token[:-1], pairs.expert[:-1]] - 1)
    columns = surprise.new_zeros(len(weights), int(active.sum(dim=1).max()))
    filled = torch.zeros_like(columns, dtype=torch.bool).index_put(place, torch.ones_like(place[0], dtype=torch.bool))
    return min_k_mask(columns.index_put(place, surprise), filled, min_k=min(min_k, columns.shape[1]))[place]


def _fake_forward(
    gate: Tensor, up: Tensor, down: Tensor, x: Tensor, weights: Tensor, entries: int, whole_from: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(x.shape), x.new_empty(rows, gate.shape[2]), x.new_empty(rows, gate.shape[2])


def _fake_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    weights: Tensor,
    h1: Tensor,
    h3: Tensor,
    entries: int,
    whole_from: float,
    min_k: int,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    asked, (N, E, I, H), wide = Wanted(*wanted), gate.shape, reduction_dtype(x.dtype)
    learnt = (x.new_empty((N, E, I, H) if asked.experts else (N, 0)) for _ in range(3))
    return (
        *learnt,
        x.new_empty(x.shape if asked.x else (N, 0, H)),
        x.new_empty(weights.shape),
        x.new_empty(weights.shape if asked.surprise else (N, 0), dtype=wide),
        x.new_empty((N, 2, E, I) if asked.bias else (N, 0), dtype=wide),
        x.new_empty((N, 3, E, I) if asked.squares else (N, 0), dtype=wide),
    )


def _folded(tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> tuple[int, list[Tensor]]:
    """The size of the dimension that is mapped over, and the tensors with it folded into N."""
    size = next(t.shape[d] for t, d in zip(tensors, in_dims, strict=True) if d is not None)
    aligned = (
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True)
    )
    return size, [t.flatten(0, 1) for t in aligned]


def _batched_forward(
    info: object, in_dims: tuple[int | None, ...], *args: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size, bank = _folded(args[:5], in_dims[:5])
    y, h1, h3 = torch.ops.onn.ragged_forward(*bank, *args[5:])
    return (y.unflatten(0, (size, -1)), h1, h3), (0, None, None)


def _batched_backward(
    info: object, in_dims: tuple[int | None, ...], *args: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The residuals hold the rows of all banks, one after the other, as the forward pass under `vmap` left them.

    Where this `vmap` has been around the backward pass alone they hold those of an outer `vmap`, if any, whose order
    has no place for copies.
    """
    of_dy, *of_bank = in_dims[:6]
    if of_dy is not None and all(dim is None for dim in of_bank):
        calls = [torch.ops.onn.ragged_backward(dy, *args[1:]) for dy in args[0].unbind(of_dy)]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])
    size, bank = _folded(args[:6], in_dims[:6])
    grads = torch.ops.onn.ragged_backward(*bank, *args[6:])
    return tuple(grad.unflatten(0, (size, -1)) for grad in grads), (0,) * len(grads)


for _name, _kernel, _fake, _rule in (
    ("ragged_forward", _forward, _fake_forward, _batched_forward),
    ("ragged_backward", _backward, _fake_backward, _batched_backward),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"onn::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"onn::{_name}", _rule, lib=_library)
