"""Products and sums over segments of sorted rows, as raw operators of static shapes: what grouped experts are made of.

A raw `torch.library` operator stands inside an `autograd.Function`, under `vmap` and in a compiled graph alike. On a
GPU none of these waits for a number as long as torch's `grouped_mm` takes the rows and does not wait itself: in
bfloat16, on Hopper or later.

Shape letters: R rows, E segments, I and H their widths, T tokens, K places of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, pad

from onn.functional.kernels import native
from onn.functional.kernels.cutting import parts
from onn.functional.kernels.parts import Pairs, extended
from onn.functional.kernels.tilings import GATHERING

_library = torch.library.Library("onn", "DEF")
_library.define("segment_outer(Tensor rows, Tensor x, Tensor? token, Tensor ends) -> Tensor")
_library.define("segment_product(Tensor rows, Tensor matrices, Tensor ends) -> Tensor")
_library.define("sum_by_token(Tensor rows, Tensor places) -> Tensor")


def segment_outer(rows: Tensor, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
    """`out[e] = sum of outer(rows[r], x[token[r]])` over the rows `ends[e - 1] <= r < ends[e]`.

    Args:
        rows: [R, I], sorted by segment.
        x: [T, H].
        token: [R] int64, the row of `x` that belongs to each row; `None` where they lie in the same order.
        ends: [E] int64, ascending, at most R; rows from `ends[-1]` on belong to nobody.

    Returns:
        [E, I, H] in the dtype of `rows`; zeros for an empty segment.
    """
    out: Tensor = torch.ops.onn.segment_outer(rows, x, token, ends)
    return out


def segment_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`rows[r] @ matrices[e]` for the rows `ends[e - 1] <= r < ends[e]`.

    Args:
        rows: [R, I], sorted by segment.
        matrices: [E, I, H].
        ends: [E] int64, ascending, at most R.

    Returns:
        [R, H]; rows from `ends[-1]` on may hold anything.
    """
    out: Tensor = torch.ops.onn.segment_product(rows, matrices, ends)
    return out


def sum_by_token(rows: Tensor, places: Tensor) -> Tensor:
    """The sum of the rows that belong to each token.

    Args:
        rows: [R + 1, H], of which the last is nobody's and may hold anything.
        places: [T, K] int64, of the rows of each token; R stands for none.

    Returns:
        [T, H] in the dtype of `rows`, summed in float32 at least.
    """
    out: Tensor = torch.ops.onn.sum_by_token(rows, places)
    return out


def _outer(rows: Tensor, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
    last = int(ends[-1]) if len(ends) else 0
    token = torch.arange(last, device=rows.device) if token is None else token
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


def _grouped_outer(rows: Tensor, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
    source = x if token is None else x.index_select(0, token)
    if not _takes_grouped(rows, source):
        return _outer(rows, x, token, ends)
    sums = grouped_mm(_aligned(rows).mT, _aligned(source), offs=ends.to(torch.int32))
    return sums[:, : rows.shape[1], : x.shape[1]].contiguous()


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if _takes_grouped(rows, matrices):
        left = _aligned(rows)
        missing = left.shape[1] - rows.shape[1]
        right = pad(matrices, (0, 0, 0, missing)) if missing else matrices
        product = grouped_mm(left, _aligned(right), offs=ends.to(torch.int32))
        return product[:, : matrices.shape[2]].contiguous()
    out = rows.new_empty(len(rows), matrices.shape[2])
    last = ends.tolist()
    for matrix, start, end in zip(matrices.unbind(0), (0, *last), last, strict=False):
        torch.mm(rows[start:end], matrix, out=out[start:end])
    return out


def _sum(rows: Tensor, places: Tensor) -> Tensor:
    """Of the places that are somebody's: a fifth of the price of passing over the others one by one."""
    owned = places < len(rows) - 1
    counts = owned.sum(dim=1)
    return embedding_bag(places[owned], rows, counts.cumsum(dim=0) - counts, mode="sum")


def _padded_sum(rows: Tensor, places: Tensor) -> Tensor:
    return embedding_bag(places, rows, mode="sum", padding_idx=len(rows) - 1)


def _takes_grouped(first: Tensor, second: Tensor) -> bool:
    """`grouped_mm` takes them: bfloat16, on a CPU float32 too, and some rows."""
    dtype = first.dtype
    known = dtype == torch.bfloat16 or (dtype == torch.float32 and first.device.type == "cpu")
    return known and dtype == second.dtype and first.numel() > 0


def _aligned(operand: Tensor) -> Tensor:
    """[..., I] and as many columns of zeros as make all strides but one whole 16 bytes, as `grouped_mm` wants them."""
    unit, wide = sorted(operand.stride()[-2:])
    whole = 16 // operand.element_size()
    if unit == 1 and all(stride % whole == 0 for stride in (wide, *operand.stride()[:-2])):
        return operand
    return pad(operand, (0, -operand.shape[-1] % whole)).contiguous()


def _outer_shape(rows: Tensor, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], x.shape[1])


def _product_shape(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


def _sum_shape(rows: Tensor, places: Tensor) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


def _batches(tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> tuple[int, list[Tensor]]:
    """The size of the dimension that is mapped over, and the tensors with it in front."""
    size = next(t.shape[d] for t, d in zip(tensors, in_dims, strict=True) if d is not None)
    return size, [
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True)
    ]


def _closed(ends: Tensor, rows: int) -> Tensor:
    """The ends [N, E] of a batch of N banks as those of one bank with a segment more after the last of each, which
    takes its rows of nobody: [N, E + 1].
    """
    bank = torch.arange(len(ends), device=ends.device)[:, None]
    return torch.cat([ends, torch.full_like(ends[:, :1], rows)], dim=1) + bank * rows


def _batched_outer(
    info: object, in_dims: tuple[int | None, ...], rows: Tensor, x: Tensor, token: Tensor | None, ends: Tensor
) -> tuple[Tensor, int]:
    given = (rows, x, ends) if token is None else (rows, x, ends, token)
    dims = (*in_dims[:2], in_dims[3], *(() if token is None else in_dims[2:3]))
    size, (rows, x, ends, *tokens) = _batches(given, dims)
    bank = torch.arange(size, device=rows.device)[:, None]
    own = (tokens[0] + bank * x.shape[1]).flatten() if tokens else None
    closed = _closed(ends, rows.shape[1])
    out = segment_outer(rows.flatten(0, 1), x.flatten(0, 1), own, closed.flatten())
    return out.unflatten(0, closed.shape)[:, :-1], 0


def _batched_product(info: object, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
    size, (rows, matrices, ends) = _batches(args, in_dims)
    spare = torch.cat([matrices, torch.zeros_like(matrices[:, :1])], dim=1)
    closed = _closed(ends, rows.shape[1])
    out = segment_product(rows.flatten(0, 1), spare.flatten(0, 1), closed.flatten())
    return out.unflatten(0, (size, -1)), 0


def _batched_sum(info: object, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
    size, (rows, places) = _batches(args, in_dims)
    each = rows.shape[1]
    bank = torch.arange(size, device=rows.device)[:, None, None]
    own = torch.where(places == each - 1, size * each - 1, places + bank * each)
    return sum_by_token(rows.flatten(0, 1), own.flatten(0, 1)).unflatten(0, (size, -1)), 0


for _name, _on_cpu, _on_cuda, _shape, _rule in (
    ("segment_outer", _outer, _grouped_outer, _outer_shape, _batched_outer),
    ("segment_product", _product, _product, _product_shape, _batched_product),
    ("sum_by_token", _sum, _padded_sum, _sum_shape, _batched_sum),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"onn::{_name}", _shape, lib=_library)
    torch.library.register_vmap(f"onn::{_name}", _rule, lib=_library)
