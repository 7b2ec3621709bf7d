"""A bank's active pairs in grouped products of static shapes: numbered, gathered, multiplied, summed by token.

How many pairs there are is only known where they are counted, on the device; the host knows how many there may be. So
nothing here waits, and a compiler traces all but the products and sums of `segments`.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, K experts of a token at most, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

from onn.functional.kernels.dense import min_k_gradient
from onn.functional.kernels.local import matrix_squares, unit_gradients, unit_norms
from onn.functional.kernels.segments import segment_outer, segment_product, sum_by_token
from onn.functional.surprise import min_k_indices, weight_surprise
from onn.functional.types import Experts, RaggedGrads, Residuals, Wanted, reduction_dtype


class Rows(NamedTuple):
    """The rows of a bank's active pairs, by expert and then by token: R and one more, the last of which is nobody's."""

    pair: Tensor
    """[R + 1] int64: `t E + e` of each row; of nobody's one whose combine weight is 0, or T E."""
    token: Tensor
    """[R + 1] int64; of nobody's any."""
    weight: Tensor
    """[R + 1, 1] combine weights; 0 for nobody's."""
    ends: Tensor
    """[E] int64: where the rows of each expert end."""
    place: Tensor
    """[T, E] int64: the row of each pair; R where there is none."""
    places: Tensor
    """[T, K] int64: the rows of each token; R where there are fewer."""
    fits: Tensor
    """Whether there was room for every pair."""

    def of_pairs(self, values: Tensor) -> Tensor:
        """[R + 1, 1] to [T, E], 0 where there is no row."""
        spread = values.index_select(0, self.place.flatten()).view(self.place.shape)
        return torch.where(self.place < len(self.token) - 1, spread, 0)

    def weighted(self, rows: Tensor) -> Tensor:
        """[R + 1, I] times the combine weights; nobody's are 0, whatever they hold."""
        return torch.where(self.weight != 0, rows * self.weight, 0)

    def by_expert(self, rows: Tensor) -> Tensor:
        """Sums of [R + 1, I], where nobody's are 0, over the rows of each expert: [E, I]."""
        return rows.new_zeros(len(self.ends), rows.shape[1]).index_add(0, self.pair % len(self.ends), rows)


def rows_of(weights: Tensor, *, rows: int, per_token: int) -> Rows:
    """The rows of the active pairs of combine weights [T, E], of some tokens.

    Args:
        weights: [T, E].
        rows: R, as many as there are pairs or T K.
        per_token: K, as many as a token has at most; with fewer pairs are left out, and `fits` says so.
    """
    (T, E), active = weights.shape, weights != 0
    counts = active.sum(dim=0)
    ends = counts.cumsum(dim=0)
    place = torch.where(active, active.cumsum(dim=0) - 1 + ends - counts, rows).clamp(max=rows)
    numbers = torch.arange(T * E, device=weights.device)
    pair = numbers.new_full((rows + 1,), T * E).scatter(0, place.flatten(), numbers)
    places = place
    if per_token < E:
        column = torch.where(active, active.cumsum(dim=1) - 1, per_token).clamp(max=per_token)
        places = place.new_full((T, per_token + 1), rows).scatter(1, column, place)[:, :per_token]
    return Rows(
        pair=pair,
        token=torch.div(pair, E, rounding_mode="floor").clamp(max=T - 1),
        weight=_at(pair, weights),
        ends=ends.clamp(max=rows),
        place=place,
        places=places,
        fits=(active.sum(dim=1) <= per_token).all(),
    )


def _at(pair: Tensor, values: Tensor) -> Tensor:
    """The values [T, E] of some pairs, 0 for that of nobody: [R + 1, 1]."""
    return torch.cat([values.flatten(), values.new_zeros(1)]).index_select(0, pair)[:, None]


def forward(experts: Experts, x: Tensor, rows: Rows) -> tuple[Tensor, Residuals]:
    """The bank's output [T, H], NaN where `rows` had no room for all pairs, and its residuals, [R + 1, I] each."""
    taken = x.index_select(0, rows.token)
    h1, h3 = (segment_product(taken, matrix.mT, rows.ends) for matrix in (experts.gate, experts.up))
    sent = segment_product(rows.weighted(silu(h1) * h3), experts.down, rows.ends)
    return torch.where(rows.fits, sum_by_token(sent, rows.places), torch.nan), Residuals(h1, h3)


def backward(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    residuals: Residuals,
    rows: Rows,
    *,
    min_k: int,
    wanted: Wanted,
) -> RaggedGrads:
    """The bank's gradients and surprise under SMK."""
    wide = reduction_dtype(x.dtype)
    masked = (wanted.experts or wanted.bias) and min_k < rows.places.shape[1]
    measured = wanted.surprise or masked
    g = dy.index_select(0, rows.token)
    u = segment_product(g, experts.down.mT, rows.ends)
    local = unit_gradients(residuals, u)
    c1, c3 = rows.weighted(local.c1), rows.weighted(local.c3)
    surprise, squares, bias = (x.new_empty(0, dtype=wide) for _ in range(3))
    if measured or wanted.squares:
        lengths = (vector_norm(source, dim=-1, keepdim=True, dtype=wide) for source in (x, dy))
        inner, outer = (length.index_select(0, rows.token) for length in lengths)
        weight = rows.weight.to(wide)
        if measured:
            first, second = unit_norms(local)
            unit = torch.hypot(first[:, None] * inner, second[:, None] * outer)
            surprise = rows.of_pairs(weight_surprise(unit, rows.weight))
        if wanted.squares:
            met = matrix_squares(local, weight * inner, weight * outer)
            squares = torch.stack([rows.by_expert(torch.where(weight != 0, square, 0)) for square in met])
    learning, learnt = rows, Experts(*(x.new_empty(0) for _ in Experts._fields))
    if masked:
        kept = min_k_indices(surprise, weights != 0, min_k=min_k)
        if wanted.experts:
            learnt = min_k_gradient(residuals, u, x, weights, dy, *kept, places=rows.place)
        if wanted.bias:
            keep = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, *kept)
            learning = rows._replace(weight=_at(rows.pair, torch.where(keep, weights, 0)))
    elif wanted.experts:
        taken, a = x.index_select(0, rows.token), rows.weighted(local.a)
        sources = ((c1, taken), (c3, taken), (a, g))
        learnt = Experts(*(segment_outer(part, source, None, rows.ends) for part, source in sources))
    if wanted.bias:
        bias = torch.stack([rows.by_expert(learning.weighted(part).to(wide)) for part in (local.c1, local.c3)])
    dx = x.new_empty(0, x.shape[1])
    if wanted.x:
        first, second = (
            segment_product(part, matrix, rows.ends) for part, matrix in ((c1, experts.gate), (c3, experts.up))
        )
        dx = sum_by_token(first + second, rows.places)
    return RaggedGrads(
        *learnt,
        x=dx,
        weights=rows.of_pairs((local.a * u).sum(dim=-1, keepdim=True)),
        surprise=surprise if wanted.surprise else surprise.new_empty(0),
        bias=bias,
        squares=squares,
    )
