"""AdamW over trees, with entries that skip a step and bfloat16 parameters that lose no small update."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from onn import check, tree
from onn.functional.types import reduction_dtype
from onn.tree import Tree

Params = TypeVar("Params", bound=Tree)


class AdamWState(NamedTuple, Generic[Params]):
    """What AdamW remembers, each a tree of the structure of the parameters."""

    steps: Params
    """Steps that each entry took part in, in the shapes of `learns`."""
    mean: Params
    square: Params


def adamw_init(params: Params, learns: Params) -> AdamWState[Params]:
    """The state before the first step.

    Args:
        params: the parameters.
        learns: bool tree of their structure; each leaf broadcasts to its parameter and says how finely steps may be
            skipped: a scalar, or [E, 1, 1] for a bank whose experts skip alone.

    Returns:
        Zeros; moments are float32 (float64 for float64 parameters).
    """
    moments = tree.map1(lambda p: torch.zeros_like(p, dtype=reduction_dtype(p.dtype)), params)
    return AdamWState(
        steps=tree.map1(lambda mask: torch.zeros_like(mask, dtype=torch.int64), learns),
        mean=moments,
        square=tree.map1(torch.zeros_like, moments),
    )


def adamw(
    params: Params,
    grads: Params,
    state: AdamWState[Params],
    learns: Params,
    noise: Tree,
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Params, AdamWState[Params]]:
    """One step of AdamW with decoupled weight decay on matrices (leaves of two dimensions or more).

    Args:
        params: the parameters.
        grads: of the same structure.
        state: of `adamw_init` or the last step.
        learns: bool tree, see `adamw_init`. Where it is false, parameter, moments and steps stay bit-identical: no
            momentum, no decay, whatever the gradient holds; each entry's bias correction counts its own steps.
        noise: for bfloat16 parameters a tree of uniform int16 of the parameters' structure and shapes (see
            `stochastic_round`); for wider ones an empty tuple.
        lr: scalar learning rate.
        beta1: decay of the mean.
        beta2: decay of the mean square.
        eps: added to the root of the mean square.
        weight_decay: decoupled, times `lr`.

    Returns:
        New parameters and state.

    References:
        Loshchilov and Hutter, 1711.05101.
    """
    rounding: list[Tensor | None] = [*tree.leaves(noise)] or [None] * len(tree.leaves(params))

    def update(
        p: Tensor, g: Tensor, steps: Tensor, mean: Tensor, square: Tensor, mask: Tensor, bits: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = g.to(mean.dtype)
        step = steps + 1
        moved_mean = torch.lerp(mean, wide, 1 - beta1)
        moved_square = beta2 * square + (1 - beta2) * wide * wide
        unbiased_mean = moved_mean / (1 - beta1 ** step.to(mean.dtype))
        unbiased_square = moved_square / (1 - beta2 ** step.to(mean.dtype))
        kept = p.to(mean.dtype) * (1 - lr * weight_decay) if p.ndim >= 2 else p.to(mean.dtype)
        moved = narrow(kept - lr * unbiased_mean / (unbiased_square.sqrt() + eps), p.dtype, bits)
        return (
            torch.where(mask, moved, p),
            torch.where(mask, step, steps),
            torch.where(mask, moved_mean, mean),
            torch.where(mask, moved_square, square),
        )

    columns = (params, grads, state.steps, state.mean, state.square, learns)
    rows = zip(*(tree.leaves(column) for column in columns), rounding, strict=True)
    new_params, steps, mean, square = zip(*(update(*row) for row in rows), strict=True)
    new_state = AdamWState(
        steps=tree.unflatten(params, steps), mean=tree.unflatten(params, mean), square=tree.unflatten(params, square)
    )
    return tree.unflatten(params, new_params), new_state


def narrow(x: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Round to `dtype`: stochastically to bfloat16, to the nearest otherwise.

    Raises:
        ValueError: bfloat16 without noise.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    if bits is None:
        raise ValueError("adamw: bfloat16 parameters need noise, uniform int16 of their shapes; got none.")
    return stochastic_round(x, bits)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the expectation exact.

    Args:
        x: float32.
        bits: int16, uniform over all 65,536 values, the shape of `x`.

    Returns:
        bfloat16: one of the two neighbours of `x`, `x` itself where it is representable; NaN and infinities are kept.

    References:
        Zamirai et al., 2010.06192.
    """
    check.require(x.dtype == torch.float32, f"stochastic_round: expected float32, got x of {x.dtype}.")
    check.require(bits.dtype == torch.int16, f"stochastic_round: expected int16 noise, got bits of {bits.dtype}.")
    noisy = (x.view(torch.int32) + (bits.to(torch.int32) & 0xFFFF)) & -0x10000
    return torch.where(torch.isfinite(x), noisy.view(torch.float32), x).to(torch.bfloat16)


def global_norm(grads: Tree) -> Tensor:
    """The Euclidean norm of all leaves together, float32 (float64 for float64 leaves)."""
    norms = [torch.linalg.vector_norm(g, dtype=reduction_dtype(g.dtype)) for g in tree.leaves(grads)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_by_global_norm(grads: Params, *, max_norm: float) -> tuple[Params, Tensor]:
    """Scale gradients down to a global norm of at most `max_norm`.

    Returns:
        The gradients in their dtypes, and the norm before clipping.
    """
    norm = global_norm(grads)
    scale = (max_norm / norm.clamp_min(max_norm)).nan_to_num(nan=1.0)
    return tree.map1(lambda g: g * scale.to(g.dtype), grads), norm


def warmup_cosine(step: Tensor, *, peak: float, warmup: int, total: int, floor: float) -> Tensor:
    """Learning rate: linear from 0 over `warmup` steps, then a half cosine down to `floor * peak` at `total`.

    Args:
        step: scalar, steps already taken.
        peak: the largest rate.
        warmup: steps until the peak.
        total: steps until the floor; constant afterwards.
        floor: as a share of the peak.

    Returns:
        float32 scalar; positive at step 0 when `warmup` is not 0.
    """
    at = step.to(torch.float32)
    rising = (at + 1) / max(warmup, 1)
    progress = ((at - warmup) / max(total - warmup, 1)).clamp(0, 1)
    falling = floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * progress))
    return peak * torch.minimum(rising.clamp_max(1), falling)
