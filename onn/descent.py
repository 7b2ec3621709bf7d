"""The optimizers of a step, leaf by leaf, so that no more than one leaf is held twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onn import optim, tree
from onn.objective import OptimConfig
from onn.qwen3 import Model
from onn.region import Region

_PIECE = 2**24
"""Entries of a parameter that are updated at a time, so that temporaries stay small beside the largest one."""


class Speeds(NamedTuple):
    """Scalars by which the optimizers multiply."""

    lr: Tensor
    scale: Tensor
    """Of the gradients, against a norm too large."""
    experts: Tensor
    """The rate of experts that consolidation trains."""


def updated(
    columns: list[list[Tensor]], like: Model, speeds: Speeds, *, config: OptimConfig, region: Region
) -> tuple[Model, optim.AdamWState[Model]]:
    """The optimizers leaf by leaf; the columns lose each leaf as soon as it is replaced.

    They are parameters, gradients, steps, mean, square, learns and noise, the last of which may be empty. A parameter
    whose gradient holds no entry stays as it is. The embedding comes last, when the gradients of all others are gone,
    and in pieces where it is large: the temporaries of a whole one are several times its own size.
    """
    rates = optim.Rates(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
    done: tuple[list[Tensor], ...] = ([], [], [], [])
    while columns[0]:
        pieces = _pieces(columns[0][-1]) if columns[1][-1].numel() else 1
        cut = [_cut(column.pop(), pieces) for column in columns if column]
        results = [
            _moved(optim.Entry(p, g, steps, mean, square, learns, tuple(bits)), speeds, rates=rates, region=region)
            for p, g, steps, mean, square, learns, *bits in zip(*cut, strict=True)
        ]
        del cut
        parts = list(zip(*results, strict=True))
        del results
        for column in reversed(done):
            column.append(_joined(parts.pop()))
    model, *moments = (tree.unflatten(like, column[::-1]) for column in done)
    return model, optim.AdamWState(*moments)


def _moved(
    entry: optim.Entry, speeds: Speeds, *, rates: optim.Rates, region: Region
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AdamW on one leaf; one without moments descends along its gradient, which consolidation made."""
    if not entry.grad.numel():
        return entry.param, entry.steps, entry.mean, entry.square
    if entry.mean.numel():
        return optim.adamw_leaf(entry, lr=speeds.lr, scale=speeds.scale, rates=rates, region=region)
    param = optim.descended(entry.param, entry.grad, entry.learns, entry.bits, rate=speeds.experts, region=region)
    return param, torch.where(entry.learns, entry.steps + 1, entry.steps), entry.mean, entry.square


def _pieces(leaf: Tensor) -> int:
    """How many to cut a leaf into: along its first dimension, of `_PIECE` entries or more."""
    wanted = leaf.numel() // _PIECE
    return len(leaf.chunk(wanted)) if wanted > 1 and leaf.ndim else 1


def _cut(leaf: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return leaf.chunk(pieces) if leaf.ndim else (leaf,) * pieces


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 or not parts[0].ndim else torch.cat(parts)
