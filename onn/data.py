"""Corpora to batches: windows cut from token sequences, and the targets that count in each.

Shape letters: N tokens of a sequence, B batch, S window length, D domains, W windows to sample from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onn import check
from onn.corpus import Corpus as Corpus
from onn.corpus import embedded_corpus as embedded_corpus
from onn.documents import ByteTokenizer as ByteTokenizer
from onn.documents import HubTokenizer as HubTokenizer
from onn.documents import Tokenizer as Tokenizer
from onn.documents import chat_corpus as chat_corpus
from onn.documents import load_corpus as load_corpus
from onn.documents import retokenized as retokenized
from onn.documents import text_corpus as text_corpus

LONGEST = 2**22
"""Tokens of a window."""
MOST_TOKENS = 2**31 - 1
"""Of a pool: what its starts can tell apart."""


class Batch(NamedTuple):
    """Windows of text and what comes next in each."""

    tokens: Tensor
    """[B, S] int64."""
    targets: Tensor
    """[B, S] int64: the token after each token."""
    mask: Tensor
    """[B, S] bool: which targets count."""
    domain: Tensor
    """[B] int64: where each window comes from."""


class Pool(NamedTuple):
    """Sequences of several domains laid end to end, and every place where a window can begin; made by `pool`."""

    tokens: Tensor
    """[N]."""
    mask: Tensor
    """[N] bool."""
    starts: Tensor
    """[W] int32: windows that lie within one domain and hold a target that counts, domain after domain."""
    bounds: Tensor
    """[D + 1] int64: the windows of domain `d` are `starts[bounds[d] : bounds[d + 1]]`."""
    length: int
    """S."""


def pool(tokens: Sequence[Tensor], masks: Sequence[Tensor], *, length: int) -> Pool:
    """What `sample_batch` draws from: all windows of `length` tokens and a next one, but those without a target.

    Args:
        tokens: [N] each, one sequence a domain, such as `corpus.train`.
        masks: [N] bool each, such as `corpus.train_mask`.
        length: tokens of a window.

    Raises:
        ValueError: `length < 1`, or a domain has no window with a target that counts.
    """
    check.at_least("pool", "length", length, 1)
    check.require(len(tokens) == len(masks) > 0, f"pool: {len(tokens)} token sequences and {len(masks)} masks.")
    total = sum(sequence.numel() for sequence in tokens)
    check.require(total <= MOST_TOKENS, f"pool: expected at most {MOST_TOKENS} tokens, got {total}.")
    offset, bounds, starts = 0, [0], []
    for domain, (sequence, mask) in enumerate(zip(tokens, masks, strict=True)):
        N = check.shapes("pool", ("tokens", sequence, "integer N"), ("masks", mask, "bool N"))["N"]
        check.require(not sequence.is_meta, "pool: expected tokens with values, got them on meta.")
        learnt = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)])
        found = (learnt[length + 1 :] > learnt[1 : max(N - length, 0) + 1]).nonzero().flatten()
        check.require(
            len(found) > 0,
            f"pool: domain {domain} has {N} tokens, {int(mask.sum())} to learn: no window of length={length} and a "
            "next token that counts.",
        )
        starts.append((found + offset).int())
        bounds.append(bounds[-1] + len(found))
        offset += N
    return Pool(torch.cat(list(tokens)), torch.cat(list(masks)), torch.cat(starts), torch.tensor(bounds), length)


def check_vocabulary(corpus: Corpus, *, vocab_size: int) -> None:
    """Raise `ValueError` unless every token of a corpus is one that a model of this vocabulary can embed.

    What a batch is cut from is checked once, here: an embedding looks a token up unchecked, or ends the process.
    """
    counts = {name: len(getattr(corpus, name)) for name in ("domains", "train", "held_out")}
    check.require(len(set(counts.values())) == 1, f"check_vocabulary: expected one entry a domain, got {counts}.")
    for domain, *sides in zip(corpus.domains, corpus.train, corpus.held_out, strict=True):
        for side in sides:
            check.shapes("check_vocabulary", (f"tokens of {domain}", side, "integer N"))
            check.require(not side.is_meta, f"check_vocabulary: expected tokens of {domain} with values, got meta.")
        for tokens in (side for side in sides if len(side)):
            low, high = (int(value) for value in torch.aminmax(tokens))
            check.require(
                low >= 0 and high < vocab_size,
                f"check_vocabulary: {domain} has tokens from {low} to {high}, the model vocab_size={vocab_size}.",
            )


def check_batch(batch: Batch, *, vocab_size: int) -> None:
    """Raise `ValueError` unless a batch is what a training step of this vocabulary takes.

    It is `check_vocabulary` for batches that were not made here. It reads values, so it belongs where batches are made,
    and not into the step.
    """
    check.shapes(
        "check_batch",
        ("tokens", batch.tokens, "integer B S"),
        ("targets", batch.targets, "integer B S"),
        ("mask", batch.mask, "bool B S"),
        ("domain", batch.domain, "integer B"),
    )
    for name, ids in (("tokens", batch.tokens), ("targets", batch.targets)):
        check.require(ids.dtype == torch.int64, f"check_batch: expected int64 {name}, got {ids.dtype}.")
        check.require(ids.numel() > 0 and not ids.is_meta, f"check_batch: {name} {list(ids.shape)} has no values.")
        low, high = (int(value) for value in torch.aminmax(ids))
        check.require(
            low >= 0 and high < vocab_size,
            f"check_batch: {name} from {low} to {high}, the model has vocab_size={vocab_size}.",
        )


def sample_batch(pool: Pool, choice: Tensor) -> Batch:
    """Windows chosen by noise: every domain alike, and within it every window of the pool alike.

    A schedule of domains is a matter of the noise: `choice[:, 0] = (d + 0.5) / D` picks domain `d`.

    Args:
        pool: where the windows come from.
        choice: [B, 2] uniform noise in [0, 1): for the domain and for the window in it. In float32 it tells at most
            2^24 windows apart.

    Guarantees: pure; the same noise gives the same batch. Every window lies within its domain and has a target that
    counts.

    Raises:
        ValueError: shapes or dtypes differ, or the pool is not what `pool` makes: bounds that do not rise from 0 to the
            number of starts, or a window chosen that leaves the tokens. It reads values: for where batches are made.
    """
    check.shapes(
        "sample_batch",
        ("choice", choice, "float B 2"),
        ("pool.tokens", pool.tokens, "integer N"),
        ("pool.mask", pool.mask, "bool N"),
        ("pool.starts", pool.starts, "integer W"),
        ("pool.bounds", pool.bounds, "integer D"),
    )
    check.require(
        len(pool.bounds) > 1 and len(pool.starts) > 0 and 0 < pool.length < len(pool.tokens),
        f"sample_batch: pool has bounds {list(pool.bounds.shape)}, starts {list(pool.starts.shape)}, "
        f"length={pool.length}, tokens {list(pool.tokens.shape)}: no window; expected what `pool` makes.",
    )
    check.require(not choice.is_meta, "sample_batch: expected choice and pool with values, got them on meta.")
    bounds = pool.bounds.long()
    rising = bool((bounds[1:] > bounds[:-1]).all()) and int(bounds[0]) == 0 and int(bounds[-1]) == len(pool.starts)
    check.require(
        rising,
        f"sample_batch: expected pool.bounds rising from 0 to {len(pool.starts)}, the number of starts, got "
        f"{check.shown(bounds.tolist())}.",
    )
    uniform = choice.double()
    domain = _pick(uniform[:, 0], torch.full_like(uniform[:, 0], len(bounds) - 1))
    first = bounds[domain]
    window = first + _pick(uniform[:, 1], bounds[domain + 1] - first)
    return windows(pool.tokens, pool.mask, pool.starts[window], length=pool.length)._replace(domain=domain)


def _pick(uniform: Tensor, sizes: Tensor) -> Tensor:
    """An index below each size, [B] int64, also where rounding or wrong noise would leave the range."""
    return (uniform * sizes).long().clamp_min(0).minimum(sizes.long() - 1)


def windows(tokens: Tensor, mask: Tensor, starts: Tensor, *, length: int) -> Batch:
    """The next-token windows of one sequence that begin at `starts`; `domain` is 0.

    Args:
        tokens: [N] integers.
        mask: [N] bool: tokens that count as targets.
        starts: [B] integers from 0 to N - length - 1.
        length: tokens of a window.

    Guarantees: `targets[:, :-1]` equals `tokens[:, 1:]`, and `mask` belongs to the targets.

    Raises:
        ValueError: a window would leave the sequence.
    """
    sizes = check.shapes(
        "windows", ("tokens", tokens, "integer N"), ("mask", mask, "bool N"), ("starts", starts, "integer B")
    )
    check.require(not starts.is_meta, "windows: expected starts with values, got them on meta.")
    check.at_least("windows", "length", length, 1)
    outside = starts[(starts < 0) | (starts >= sizes["N"] - length)]
    check.require(
        len(outside) == 0,
        f"windows: starts {outside[:3].tolist()} of length={length} and a next token leave {sizes['N']} tokens.",
    )
    check.require(length <= LONGEST, f"windows: expected length={length} <= {LONGEST}.")
    return _cut(tokens, mask, starts, length)


def _cut(tokens: Tensor, mask: Tensor, starts: Tensor, length: int) -> Batch:
    places = starts[:, None] + torch.arange(length + 1, device=starts.device)
    cut = tokens.index_select(0, places.flatten()).view(places.shape).long()
    counted = mask.index_select(0, places[:, 1:].flatten()).view(len(starts), length)
    domain = torch.zeros(len(starts), dtype=torch.int64, device=starts.device)
    return Batch(cut[:, :-1].contiguous(), cut[:, 1:].contiguous(), counted, domain)


def evaluation_batches(tokens: Tensor, mask: Tensor, *, batch: int, length: int, limit: int) -> tuple[Batch, ...]:
    """The first `limit` windows of a sequence, end to end, in batches of `batch`, the last of which may be smaller.

    Windows without a target that counts are left out, and so is the rest shorter than a window. No target comes twice,
    and which ones there are does not depend on `batch`. `domain` is 0.

    Args:
        tokens: [N] integers, such as `corpus.held_out[0]`.
        mask: [N] bool.
        batch: windows in a batch.
        length: tokens of a window.
        limit: windows at most.

    Raises:
        ValueError: a number is below 1, or there is no window with a target that counts.
    """
    for name, value in (("batch", batch), ("length", length), ("limit", limit)):
        check.at_least("evaluation_batches", name, value, 1)
    N = check.shapes("evaluation_batches", ("tokens", tokens, "integer N"), ("mask", mask, "bool N"))["N"]
    check.require(not tokens.is_meta, "evaluation_batches: expected tokens with values, got them on meta.")
    starts = torch.arange(0, max(N - length, 0), length)
    if length < N:
        starts = starts[windows(tokens, mask, starts, length=length).mask.any(dim=1)][:limit]
    check.require(
        len(starts) > 0,
        f"evaluation_batches: {N} tokens, {int(mask.sum())} to learn: no window of length={length} and a next token "
        "that counts.",
    )
    return tuple(windows(tokens, mask, chunk, length=length) for chunk in starts.split(batch))
