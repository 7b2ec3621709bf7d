"""Sums of outer products over segments of sorted rows: the weight gradient of ragged experts, as one raw operator.

A raw `torch.library` operator stands inside an `autograd.Function`, under `vmap` and in a compiled graph alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from onn.functional.kernels import native
from onn.functional.kernels.cutting import parts
from onn.functional.kernels.parts import Pairs, extended, takes_grouped
from onn.functional.kernels.tilings import GATHERING

_library = torch.library.Library("onn", "DEF")
_library.define("segment_outer(Tensor rows, Tensor x, Tensor token, Tensor ends) -> Tensor")


def segment_outer(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    """`out[e] = sum of outer(rows[r], x[token[r]])` over the rows `ends[e - 1] <= r < ends[e]`.

    Args:
        rows: [R, I], sorted by segment.
        x: [T, H].
        token: [R] int64, the row of `x` that belongs to each row.
        ends: [E] int64, ascending, at most R; rows from `ends[-1]` on belong to nobody.

    Returns:
        [E, I, H] in the dtype of `rows`; zeros for an empty segment.
    """
    out: Tensor = torch.ops.onn.segment_outer(rows, x, token, ends)
    return out


def _in_cache(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    last = int(ends[-1]) if len(ends) else 0
    out = rows.new_empty(len(ends), rows.shape[1], x.shape[1])
    if _native(rows, x, token[:last], ends):
        native.outer(x, [(rows, out)], native.Segments(token.contiguous(), ends.contiguous()))
        return out
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    pairs = Pairs(
        token=torch.cat([token[:last], token.new_full((1,), len(x))]),
        expert=token.new_empty(0),
        weight=rows.new_empty(0),
        counts=tuple(counts.tolist()),
    )
    owned = extended(rows[:last])
    for part in parts(pairs, tokens=len(x), width=rows.shape[1], hidden=x.shape[1], tiling=GATHERING):
        part.outer(part.take(x, "x"), (part.spread(owned), out))
    return out


def _native(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> bool:
    """There is native code, and none of the mistakes that it does not look for."""
    named = len(token) == 0 or 0 <= int(token.min()) <= int(token.max()) < len(x)
    typed = rows.dtype == x.dtype and token.dtype == ends.dtype == torch.int64
    return named and typed and native.available(x.dtype, device=x.device.type)


def _grouped(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` where it takes the rows, and no wait for their number."""
    source = x.index_select(0, token)
    if not takes_grouped(rows, source):
        return _in_cache(rows, x, token, ends)
    return grouped_mm(rows.mT, source, offs=ends.to(torch.int32))


def _shape(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], x.shape[1])


def _batched(
    info: object, in_dims: tuple[int | None, ...], rows: Tensor, x: Tensor, token: Tensor, ends: Tensor
) -> tuple[Tensor, int]:
    """A batch of banks is one bank of more experts; rows of nobody go to a segment after the last of each bank."""
    size = next(t.shape[d] for t, d in zip((rows, x, token, ends), in_dims, strict=True) if d is not None)
    rows, x, token, ends = (
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((rows, x, token, ends), in_dims, strict=True)
    )
    R, T = rows.shape[1], x.shape[1]
    bank = torch.arange(size, device=rows.device)[:, None]
    closed = torch.cat([ends, torch.full_like(ends[:, :1], R)], dim=1) + bank * R
    out = segment_outer(rows.flatten(0, 1), x.flatten(0, 1), (token + bank * T).flatten(), closed.flatten())
    return out.unflatten(0, closed.shape)[:, :-1], 0


_library.impl("segment_outer", _in_cache, "CPU")
_library.impl("segment_outer", _grouped, "CUDA")
torch.library.register_fake("onn::segment_outer", _shape, lib=_library)
torch.library.register_vmap("onn::segment_outer", _batched, lib=_library)
