"""The dense computation of a bank in stock operations: every expert computes every token.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from onn.functional.kernels.local import unit_gradients
from onn.functional.kernels.segments import segment_outer
from onn.functional.surprise import (
    bias_gradients,
    counterfactual_surprise,
    matrix_surprise,
    min_k_indices,
    weight_surprise,
)
from onn.functional.types import Experts, Residuals, Wanted


class DenseGrads(NamedTuple):
    """What the backward pass gives; a tensor without entries where it was not wanted."""

    experts: Experts
    x: Tensor
    """[T, H]: never masked."""
    weights: Tensor
    """[T, E]: also where the weight is 0."""
    surprise: Tensor
    """[T, E]"""
    bias: Tensor
    """[2, E, I]: of the pairs that learn."""
    squares: Tensor
    """[3, E, I]"""
    counterfactual: Tensor
    """[T, E]"""


def dense_forward(experts: Experts, x: Tensor, weights: Tensor) -> tuple[Tensor, Residuals, Tensor]:
    """The output, the residuals and the weighted activation [T, E, I]."""
    split = experts.gate.shape[:2]
    h1 = (x @ experts.gate.flatten(0, 1).mT).unflatten(-1, split)
    h3 = (x @ experts.up.flatten(0, 1).mT).unflatten(-1, split)
    weighted = silu(h1) * h3 * weights[..., None]
    return weighted.flatten(1) @ experts.down.flatten(0, 1), Residuals(h1=h1, h3=h3), weighted


def output_products(experts: Experts, dy: Tensor) -> Tensor:
    """`u_tei = down_ei g_t`: the gradient of every activation at combine weight 1."""
    u: Tensor = (dy @ experts.down.flatten(0, 1).mT).unflatten(-1, experts.down.shape[:2])
    return u


def input_gradient(experts: Experts, d1: Tensor, d3: Tensor) -> Tensor:
    """What weighted rows [T, E, I] of the two projections send to their input, [T, H]."""
    return d1.flatten(1) @ experts.gate.flatten(0, 1) + d3.flatten(1) @ experts.up.flatten(0, 1)


def expert_gradient(d1: Tensor, d3: Tensor, a: Tensor, x: Tensor, dy: Tensor) -> Experts:
    """Sums over tokens of the outer products of weighted rows [T, E, I] with x and dy."""
    split = a.shape[-2:]
    return Experts(
        gate=(d1.flatten(1).mT @ x).unflatten(0, split),
        up=(d3.flatten(1).mT @ x).unflatten(0, split),
        down=(a.flatten(1).mT @ dy).unflatten(0, split),
    )


def dense_backward(
    dy: Tensor,
    experts: Experts,
    x: Tensor,
    weights: Tensor,
    residuals: Residuals,
    weighted: Tensor | None,
    *,
    min_k: int,
    all_learn: bool,
    wanted: Wanted,
    counterfactual: bool,
) -> DenseGrads:
    """The gradients of `dense_forward` under SMK, which `all_learn` is without, and what else is wanted.

    `weighted`, the weighted activation [T, E, I], is made again where it was not kept.
    """
    nothing = x.new_empty(0)
    u = output_products(experts, dy)
    local = unit_gradients(residuals, u)
    d1, d3 = local.c1 * weights[..., None], local.c3 * weights[..., None]
    masked = (wanted.experts or wanted.bias) and not all_learn
    surprise = unit = nothing
    if masked or wanted.surprise or counterfactual:
        unit = counterfactual_surprise(local, x, dy)
        surprise = weight_surprise(unit, weights)
    learnt, learning = Experts(nothing, nothing, nothing), weights
    if masked:
        kept = min_k_indices(surprise, weights != 0, min_k=min_k)
        if wanted.experts:
            learnt = min_k_gradient(residuals, u, x, weights, dy, *kept, places=None)
        if wanted.bias:
            learning = torch.where(torch.zeros_like(weights, dtype=torch.bool).scatter(-1, *kept), weights, 0)
    elif wanted.experts:
        again = local.a * weights[..., None] if weighted is None else weighted
        learnt = expert_gradient(d1, d3, again, x, dy)
    return DenseGrads(
        experts=learnt,
        x=input_gradient(experts, d1, d3) if wanted.x else nothing,
        weights=(local.a * u).sum(dim=-1),
        surprise=surprise if wanted.surprise else nothing,
        bias=bias_gradients(local, learning) if wanted.bias else nothing,
        squares=matrix_surprise(local, x, weights, dy) if wanted.squares else nothing,
        counterfactual=unit if counterfactual else nothing,
    )


def min_k_gradient(
    residuals: Residuals,
    u: Tensor,
    x: Tensor,
    weights: Tensor,
    dy: Tensor,
    chosen: Tensor,
    filled: Tensor,
    *,
    places: Tensor | None,
) -> Experts:
    """`expert_gradient` of the rows that `min_k_indices` names: T * min_k of them, gathered and sorted by expert.

    `residuals` and `u` hold the rows of all pairs, [T, E, I], or with `places` [T, E] those there are, [., I].
    """
    num_experts, min_k = weights.shape[1], chosen.shape[1]
    owner, order = torch.sort(torch.where(filled, chosen, num_experts).flatten(), stable=True)
    token = torch.div(order, min_k, rounding_mode="floor")
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x.device).scatter_add(
        0, owner, torch.ones_like(owner)
    )
    ends = counts[:-1].cumsum(dim=0)
    pair = token * num_experts + owner.clamp(max=num_experts - 1)
    row = pair if places is None else places.flatten().index_select(0, pair)
    h1, h3, u = (part.flatten(0, -2).index_select(0, row) for part in (*residuals, u))
    weight = weights.flatten().index_select(0, pair)[:, None]
    d1, d3, a = (part * weight for part in unit_gradients(Residuals(h1, h3), u))
    gate, up = segment_outer(torch.cat([d1, d3], dim=-1), x, token, ends).chunk(2, dim=1)
    return Experts(gate=gate, up=up, down=segment_outer(a, dy, token, ends))
