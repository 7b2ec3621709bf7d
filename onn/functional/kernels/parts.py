"""The active (token, expert) pairs of a bank in the order of the experts, and parts that are multiplied at once.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, R pairs; of a part: G experts, N rows of each.

A tensor with one entry for each pair has R + 1 of them, and a sum by token T + 1: the last is nobody's, and rows that
only fill a part up point there.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Span: TypeAlias = "slice[int, int, int]"


class Pairs(NamedTuple):
    """The pairs that are computed, by expert and then by token."""

    token: Tensor
    """[R + 1] int64; the last is T."""
    expert: Tensor
    """[R + 1] int64; the last is E."""
    weight: Tensor
    """[R + 1, 1] combine weights; the last is 0."""
    counts: tuple[int, ...]
    """Pairs of each expert."""

    @property
    def number(self) -> int:
        """R."""
        return len(self.token) - 1


def active_pairs(weights: Tensor) -> Pairs:
    """The pairs whose combine weight [T, E] is not 0."""
    T, E = weights.shape
    columns = weights.mT.contiguous()
    expert, token = columns.nonzero(as_tuple=True)
    return Pairs(
        token=_and(token, T),
        expert=_and(expert, E),
        weight=_and(columns.flatten().index_select(0, expert * T + token), 0)[:, None],
        counts=tuple(torch.bincount(expert, minlength=E).tolist()),
    )


def kept_pairs(pairs: Pairs, keep: Tensor) -> tuple[Pairs, Tensor]:
    """The pairs that are kept, bool [R], and their places among all: [R' + 1], the last is nobody's."""
    places = _and(keep.nonzero().flatten(), pairs.number)
    token, expert, weight = (part.index_select(0, places) for part in pairs[:3])
    counts = torch.bincount(expert[:-1], minlength=len(pairs.counts)).tolist()
    return Pairs(token=token, expert=expert, weight=weight, counts=tuple(counts)), places


def extended(rows: Tensor) -> Tensor:
    """`rows` and one more of zeros."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


def _and(values: Tensor, last: int) -> Tensor:
    return torch.cat([values, values.new_full((1,), last)])


class Workspace:
    """Memory that the parts of a pass use one after the other.

    Rows of a part are as large as a cache; an allocator that maps and clears them anew for every part takes up to as
    long as all products together.
    """

    def __init__(self) -> None:
        """Nothing is held before it is asked for."""
        self._held: dict[str, Tensor] = {}

    def rows(self, slot: str, *shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of any content on the device of `like`; the one taken before from this slot must not be needed."""
        size = math.prod(shape)
        held = self._held.get(slot)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[slot] = like.new_empty(size, dtype=dtype)
        return held[:size].view(shape)


class Filling(NamedTuple):
    """Rows that belong to nobody."""

    places: Tensor
    """[G N]: the pair of each row."""
    tokens: Tensor
    """[G N]: of each row; of nobody's one that its expert has, since its rows are multiplied by 0 and may be NaN."""
    without: tuple[int, ...]
    """Experts that have no pair and hold rows of others."""


class Padded(NamedTuple):
    """Experts side by side, filled up to the rows of the largest: batched products."""

    experts: Span
    pairs: Span
    tokens: Tensor
    """[G N]; T where filled up."""
    filling: Filling | None
    """`None` where nothing was filled up."""
    rows: int
    """N"""
    space: Workspace

    @property
    def _shape(self) -> tuple[int, int]:
        return self.experts.stop - self.experts.start, self.rows

    def take(self, source: Tensor, slot: str) -> Tensor:
        """Rows of a token-wise tensor, until the next of this slot: [T, H] to [G, N, H], any where filled up."""
        rows = self.space.rows(slot, len(self.tokens), source.shape[1], like=source, dtype=source.dtype)
        torch.index_select(source, 0, self.tokens if self.filling is None else self.filling.tokens, out=rows)
        return rows.view(*self._shape, source.shape[1])

    def spread(self, values: Tensor, among: Tensor | None = None) -> Tensor:
        """Rows of a pair-wise tensor: [R + 1, I] to [G, N, I]; of one of more pairs, `among` which these are."""
        rows = _rows(values, self.pairs if self.filling is None else self.filling.places, among)
        return rows.view(*self._shape, values.shape[1])

    def put(self, rows: Tensor, into: Tensor) -> None:
        """The inverse of `spread`; nobody's stay 0."""
        flat = rows.flatten(0, 1)
        if self.filling is None:
            into[self.pairs] = flat
        else:
            into.index_copy_(0, self.filling.places, flat)
            into[-1] = 0

    def guarded(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[G, N, I], made of `spread` rows and 0 where filled up as it is."""
        return rows

    def project(self, rows: Tensor, *matrices: Tensor) -> list[Tensor]:
        """`matrix_e rows` of each matrix: [G, N, H] to [G, N, I]."""
        return [torch.bmm(rows, matrix[self.experts].mT) for matrix in matrices]

    def send(self, *products: tuple[Tensor, Tensor], into: Tensor) -> None:
        """Add the sum of the products of [G, N, I] and [E, I, H] to the tokens [T + 1, H] that they belong to."""
        (rows, matrix), *others = products
        shape = (*self._shape, matrix.shape[2])
        sent = self.space.rows("sent", *shape, like=rows, dtype=rows.dtype)
        torch.bmm(rows, matrix[self.experts], out=sent)
        for rows, matrix in others:
            sent.baddbmm_(rows, matrix[self.experts])
        if sent.dtype != into.dtype:
            sent = self.space.rows("wide", *shape, like=into, dtype=into.dtype).copy_(sent)
        into.index_add_(0, self.tokens, sent.flatten(0, 1))

    def outer(self, sources: Tensor, *products: tuple[Tensor, Tensor]) -> None:
        """Sums of the outer products of [G, N, H] and each [G, N, I], 0 where filled up, into `out`."""
        for rows, out in products:
            torch.bmm(rows.mT, sources, out=out[self.experts])
            self._clear(out)

    def total(self, rows: Tensor, out: Tensor) -> None:
        """Sums of [G, N, I] over the rows of each expert: the part's rows of `out` [E, I]."""
        torch.sum(rows, dim=1, out=out[self.experts])
        self._clear(out)

    def _clear(self, out: Tensor) -> None:
        for expert in self.filling.without if self.filling is not None else ():
            out[expert] = 0


class Whole(NamedTuple):
    """Experts side by side that compute every token: plain products, and no gather.

    As in the dense computation, a token that is not finite reaches experts that it did not choose.
    """

    experts: Span
    pairs: Span
    places: Tensor
    """[pairs]: of each in [T, G]."""
    tokens: int
    """T"""

    def take(self, source: Tensor, slot: str) -> Tensor:
        """[T, H]."""
        return source

    def spread(self, values: Tensor, among: Tensor | None = None) -> Tensor:
        """[R + 1, I] to [T, G, I], 0 where there is no pair; of a tensor of more pairs, `among` which these are."""
        size = self.experts.stop - self.experts.start
        rows = values.new_zeros(self.tokens * size, values.shape[1])
        own = _rows(values, self.pairs, among)
        return rows.index_copy_(0, self.places, own).view(self.tokens, size, values.shape[1])

    def put(self, rows: Tensor, into: Tensor) -> None:
        """The inverse of `spread`."""
        into[self.pairs] = rows.flatten(0, 1).index_select(0, self.places)

    def guarded(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[T, G, I], which are 0 times something where there is no pair: 0, also if that was not finite.

        A sum tells whether anything was not: a tenth of the price of choosing row by row.
        """
        return rows if bool(rows.sum().isfinite()) else torch.where(weight != 0, rows, 0)

    def project(self, rows: Tensor, *matrices: Tensor) -> list[Tensor]:
        """[T, H] to [T, G, I] each."""
        own = [matrix[self.experts] for matrix in matrices]
        return [(rows @ part.flatten(0, 1).mT).unflatten(1, part.shape[:2]) for part in own]

    def send(self, *products: tuple[Tensor, Tensor], into: Tensor) -> None:
        """Add the sum over products and experts, of [T, G, I] and [E, I, H], to the tokens [T + 1, H]."""
        for rows, matrix in products:
            factors = rows.flatten(1), matrix[self.experts].flatten(0, 1)
            if into.dtype == rows.dtype:
                into[: self.tokens].addmm_(*factors)
            else:
                into[: self.tokens] += torch.mm(*factors)

    def outer(self, sources: Tensor, *products: tuple[Tensor, Tensor]) -> None:
        """Sums of the outer products of [T, H] and each [T, G, I]."""
        for rows, out in products:
            torch.mm(rows.flatten(1).mT, sources, out=out[self.experts].flatten(0, 1))

    def total(self, rows: Tensor, out: Tensor) -> None:
        """Sums of [T, G, I] over the tokens."""
        torch.sum(rows, dim=0, out=out[self.experts])


Part = Padded | Whole


def _rows(values: Tensor, pairs: Span | Tensor, among: Tensor | None) -> Tensor:
    """The rows of these pairs, counted over all or, where it is there, over those that `among` names."""
    if among is not None:
        return values.index_select(0, among[pairs])
    return values[pairs] if isinstance(pairs, slice) else values.index_select(0, pairs)
