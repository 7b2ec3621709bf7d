"""A bank's active pairs by native code: no token is gathered, and the row of a pair is as wide as its expert.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, R active pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onn.functional.kernels import native
from onn.functional.kernels.tilings import Tiling
from onn.functional.types import Experts, RaggedGrads, Residuals, Wanted


def pairs_of(weights: Tensor, tiling: Tiling) -> native.Active | None:
    """The active pairs of combine weights [T, E], but where so many are that all are computed."""
    pairs = native.counted(weights)
    return None if tiling.computes_all(pairs.number, of=weights.numel()) else native.listed(weights, pairs)


def forward(experts: Experts, x: Tensor, pairs: native.Active) -> tuple[Tensor, Tensor, Tensor]:
    """The bank's output [T, H] and its residuals, [R + 1, I] each, of which the last row is 0."""
    I = experts.gate.shape[1]
    residuals = Residuals(*(x.new_empty(pairs.number + 1, I) for _ in Residuals._fields))
    for rows in residuals:
        rows[-1] = 0
    native.project(x, (experts.gate, experts.up), pairs.segments, out=residuals)
    weighted = native.activate(residuals, pairs.weight)
    return native.combine([(weighted, experts.down)], pairs.segments, tokens=len(x)), *residuals


def backward(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    residuals: Residuals,
    pairs: native.Active,
    *,
    min_k: int,
    wanted: Wanted,
) -> RaggedGrads:
    """The bank's gradients and surprise under SMK."""
    segments = pairs.segments
    bias, squares, table = (pairs.weight.new_empty(0) for _ in range(3))
    masked = (wanted.experts or wanted.bias) and pairs.most > min_k
    measured = wanted.surprise or masked
    lengths = None
    if measured or wanted.squares:
        lengths = native.Lengths(native.lengths(x), native.lengths(dy))
    rows, d_weights, surprise = native.local(
        residuals,
        _projected(dy, experts.down, pairs),
        pairs,
        tokens=len(x),
        lengths=lengths if measured else None,
    )
    dx = x.new_empty(0, x.shape[1])
    if wanted.x:
        dx = native.combine([(rows.c1, experts.gate), (rows.c3, experts.up)], segments, tokens=len(x))
    if wanted.squares and lengths is not None:
        scales = (lengths.x, lengths.x, lengths.dy)
        squares = torch.stack(
            [native.total(one, segments, scale=scale) for one, scale in zip(rows, scales, strict=True)]
        )
    c1, c3, a = rows
    del rows, lengths
    if masked:
        places, segments = native.least(surprise, segments, tokens=len(x), min_k=min_k, dtype=x.dtype)
        c1 = c1.index_select(0, places)
        c3 = c3.index_select(0, places)
        a = a.index_select(0, places)

    def room(matrix: Tensor) -> Tensor:
        return x.new_empty(matrix.shape if wanted.experts else 0)

    down = room(experts.down)
    if wanted.experts:
        native.outer(dy, [(a, down)], segments)
    del a
    gate, up = room(experts.gate), room(experts.up)
    if wanted.experts:
        native.outer(x, [(c1, gate), (c3, up)], segments)
    if wanted.bias:
        bias = torch.stack([native.total(one, segments, scale=None) for one in (c1, c3)])
    del c1, c3
    if wanted.surprise:
        table = native.spread(surprise, pairs.segments, tokens=len(x), dtype=x.dtype)
    return RaggedGrads(gate, up, down, x=dx, weights=d_weights, surprise=table, bias=bias, squares=squares)


def _projected(dy: Tensor, down: Tensor, pairs: native.Active) -> Tensor:
    u = dy.new_empty(pairs.number, down.shape[1])
    native.project(dy, [down], pairs.segments, out=[u])
    return u
