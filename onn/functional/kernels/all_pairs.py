"""A bank of which nearly all pairs are active: the dense computation, without what only that knows of the others.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onn.functional.kernels.dense import dense_backward, dense_forward
from onn.functional.types import Experts, RaggedGrads, Residuals, Wanted, reduction_dtype


def forward(experts: Experts, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bank's output [T, H] and its residuals, [T E, I] each."""
    y, residuals, _ = dense_forward(experts, x, weights)
    h1, h3 = (rows.flatten(0, 1) for rows in residuals)
    return y, h1, h3


def backward(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    residuals: Residuals,
    *,
    min_k: int,
    wanted: Wanted,
) -> RaggedGrads:
    """The bank's gradients and surprise under SMK."""
    h1, h3 = (rows.unflatten(0, weights.shape) for rows in residuals)
    grads = dense_backward(
        *(dy, experts, x, weights, Residuals(h1, h3), None),
        min_k=min_k,
        all_learn=not bool(((weights != 0).sum(dim=1) > min_k).any()),
        wanted=wanted,
        counterfactual=False,
    )
    measured = (part.to(reduction_dtype(x.dtype)) for part in (grads.surprise, grads.bias, grads.squares))
    dx = grads.x if wanted.x else x.new_empty(0, x.shape[1])
    return RaggedGrads(*grads.experts, dx, torch.where(weights != 0, grads.weights, 0), *measured)
