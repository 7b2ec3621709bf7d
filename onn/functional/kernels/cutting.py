"""How the active pairs of a bank are cut into parts.

Shape letters: T tokens, H hidden, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from onn.functional.kernels.parts import Filling, Padded, Pairs, Part, Span, Whole, Workspace
from onn.functional.kernels.tilings import Tiling


def parts(pairs: Pairs, *, tokens: int, width: int, hidden: int, tiling: Tiling) -> Iterator[Part]:
    """Cut the pairs up, in order; every expert is in one part.

    Args:
        pairs: of `active_pairs`.
        tokens: T.
        width: I.
        hidden: H.
        tiling: how; of at least one entry.
    """
    space = Workspace()
    rows, wide = max(1, tiling.entries // hidden), max(1, 2 * tiling.entries // max(tokens * width, 1))
    least = tiling.whole_from * tokens
    first = start = 0
    while first < len(pairs.counts):
        whole = pairs.counts[first] > 0 and pairs.counts[first] >= least
        size = _like(pairs.counts[first:], least, wide) if whole else _similar(pairs.counts[first:], rows, least)
        experts, last = slice(first, first + size), start + sum(pairs.counts[first : first + size])
        if whole:
            inside = slice(start, last)
            places = pairs.token[inside] * size + (pairs.expert[inside] - first)
            yield Whole(experts=experts, pairs=inside, places=places, tokens=tokens)
        else:
            yield _padded(pairs, experts, start, space)
        first, start = first + size, last


_SLACK: Final = 0.75
"""A part takes in experts that alone would fall just beyond its kind: parts of one expert each cost more."""


def _like(counts: Sequence[int], least: float, most: int) -> int:
    """How many of the first experts have about `least` pairs or more, `most` at most."""
    size = 1
    while size < min(most, len(counts)) and counts[size] >= _SLACK * least:
        size += 1
    return size


def _similar(counts: Sequence[int], rows: int, below: float) -> int:
    """How many of the first experts fill `rows` rows together and are not made up of filling."""
    size, largest, total = 1, counts[0], counts[0]
    for count in counts[1:]:
        largest, total = max(largest, count), total + count
        filled = (size + 1) * largest
        if filled > rows or filled > 1.4 * total + 256 or (count > 0 and _SLACK * count >= below):
            break
        size += 1
    return size


def _padded(pairs: Pairs, experts: Span, start: int, space: Workspace) -> Padded:
    counts = pairs.counts[experts]
    rows, last = max(counts), start + sum(counts)
    inside = slice(start, last)
    if rows * len(counts) == last - start:
        return Padded(experts, pairs=inside, tokens=pairs.token[inside], filling=None, rows=rows, space=space)
    held = torch.tensor(counts, device=pairs.token.device)[:, None]
    begins = start + held.cumsum(0) - held
    lane = torch.arange(rows, device=pairs.token.device)
    places = torch.where(lane < held, begins + lane, pairs.number).flatten()
    own = (begins + torch.minimum(lane, held - 1)).clamp(min=start).flatten()
    filling = Filling(
        places,
        tokens=pairs.token.index_select(0, own),
        without=tuple(experts.start + place for place, count in enumerate(counts) if not count),
    )
    tokens = pairs.token.index_select(0, places)
    return Padded(experts, pairs=inside, tokens=tokens, filling=filling, rows=rows, space=space)
