"""AdamW over trees, with entries that skip a step and bfloat16 parameters that lose no small update; and surprise
consolidation, with one number a neuron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

import onn.functional as F
from onn import check, tree
from onn.functional.kernels.entries import bank_parts
from onn.functional.types import reduction_dtype
from onn.region import Region, inline
from onn.rounding import narrow as narrow
from onn.rounding import stochastic_round as stochastic_round
from onn.tree import Tree

Params = TypeVar("Params", bound=Tree)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of AdamW, all but the learning rate."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        """Refuse values under which no step means anything."""
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            check.require(0 <= beta < 1, f"adamw: expected 0 <= {name}={beta!r} < 1.")
        check.weight("adamw", "eps", self.eps)
        check.weight("adamw", "weight_decay", self.weight_decay)


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
    _check_leaves("adamw_init", params, learns=learns)
    for path, leaf, mask in zip(tree.paths(params), tree.leaves(params), tree.leaves(learns), strict=True):
        check.holds("adamw_init", f"params {path}", leaf, "float")
        check.require(
            leaf.device == mask.device,
            f"adamw_init: params {path} are on {leaf.device}, what learns is on {mask.device}.",
        )
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
            momentum, no decay, whatever the gradient holds; each entry's bias correction counts its own steps. An
            entry whose new value would not be finite, as from a moment that is not, keeps its value and moments.
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
    columns = (params, grads, state.steps, state.mean, state.square, learns)
    _check_leaves("adamw", params, grads=grads, steps=state.steps, mean=state.mean, square=state.square, learns=learns)
    if tree.leaves(noise):
        _check_leaves("adamw", params, noise=noise)
    bits: list[tuple[Tensor, ...]] = [(leaf,) for leaf in tree.leaves(noise)] or [()] * len(tree.leaves(params))
    rows = zip(*(tree.leaves(column) for column in columns), bits, strict=True)
    scale = torch.ones((), device=lr.device)
    rates = Rates(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    moved = [adamw_leaf(Entry(*row), lr=lr, scale=scale, rates=rates, region=inline) for row in rows]
    new, steps, mean, square = (tree.unflatten(params, column) for column in zip(*moved, strict=True))
    return new, AdamWState(steps=steps, mean=mean, square=square)


def _check_leaves(where: str, params: Tree, **others: Tree) -> None:
    """Refuse another tree of more or fewer leaves than `params`."""
    expected = len(tree.leaves(params))
    for name, other in others.items():
        found = len(tree.leaves(other))
        check.require(found == expected, f"{where}: expected {expected} leaves in {name}, as in params, got {found}.")


class Entry(NamedTuple):
    """One leaf and what AdamW remembers of it."""

    param: Tensor
    grad: Tensor
    steps: Tensor
    mean: Tensor
    square: Tensor
    learns: Tensor
    """bool: a scalar, or one for each row of the first dimensions, in the shape [R, 1, ...]."""
    bits: tuple[Tensor, ...]
    """int16 for the rounding; empty for parameters that are not bfloat16."""


def _check_entry(entry: Entry, lr: Tensor, scale: Tensor) -> None:
    """Refuse what does not belong together; nothing is written down before something is wrong."""
    p, wide = entry.param, (entry.mean, entry.square)
    alike = all(own.shape == p.shape for own in (entry.grad, *wide, *entry.bits))
    together = all(own.device == p.device for own in (*entry[:-1], *entry.bits))
    if not alike or not together or entry.steps.shape != entry.learns.shape:
        parts = zip((*Entry._fields[:-1], "noise"), (*entry[:-1], *entry.bits), strict=False)
        listed = ", ".join(f"{name} {list(own.shape)} on {own.device}" for name, own in parts)
        raise ValueError(f"adamw: shapes do not fit params: {listed}.")
    if any(own.dtype != reduction_dtype(p.dtype) for own in wide):
        raise ValueError(
            f"adamw: mean of {wide[0].dtype} and square of {wide[1].dtype} do not fit params of {p.dtype}."
        )
    for name, tensor, kind in (
        ("params", p, "float"),
        ("grads", entry.grad, "float"),
        ("steps", entry.steps, "integer"),
        ("learns", entry.learns, "bool"),
        ("lr", lr, "float"),
        ("scale", scale, "float"),
    ):
        check.holds("adamw", name, tensor, kind)
    if lr.ndim or scale.ndim or lr.is_meta != p.is_meta or scale.is_meta != p.is_meta:
        raise ValueError(
            f"adamw: expected scalars lr and scale where params are, on {p.device}, got lr {list(lr.shape)} on "
            f"{lr.device}, scale {list(scale.shape)} on {scale.device}."
        )


def adamw_leaf(
    entry: Entry, *, lr: Tensor, scale: Tensor, rates: Rates, region: Region
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`adamw` on one leaf, with its gradient times `scale`: the new parameter, steps, mean and square.

    What is large is handed to `region` as matrices, so that one compiled function serves leaves of all shapes.

    Raises:
        ValueError: `learns` is not one for each row.
    """
    p, steps, learns = entry.param, entry.steps, entry.learns
    _check_entry(entry, lr, scale)
    rows = p.shape[: learns.ndim - learns.shape.count(1)] if learns.numel() > 1 else ()
    check.require(
        learns.numel() == math.prod(rows) and learns.shape == (*rows, *(1,) * (learns.ndim - len(rows))),
        f"adamw: expected learns to be a scalar or one for each row of {list(p.shape)}, got {list(learns.shape)}.",
    )

    def matrix(part: Tensor) -> Tensor:
        return part.reshape(learns.numel(), -1)

    dtype, step = entry.mean.dtype, steps + 1
    moved = region(_moved, kind="update")(
        matrix(p),
        matrix(entry.grad),
        matrix(entry.mean),
        matrix(entry.square),
        matrix(learns),
        matrix(1 - rates.beta1 ** step.to(dtype)),
        matrix(1 - rates.beta2 ** step.to(dtype)),
        tuple(map(matrix, entry.bits)),
        lr,
        scale,
        (1 - lr * rates.weight_decay) if p.ndim >= 2 else torch.ones_like(lr),
        rates=rates,
    )
    param, mean, square = (part.reshape(p.shape) for part in moved)
    return param, torch.where(learns, step, steps), mean, square


def _moved(
    p: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    learns: Tensor,
    mean_bias: Tensor,
    square_bias: Tensor,
    bits: tuple[Tensor, ...],
    lr: Tensor,
    scale: Tensor,
    decay: Tensor,
    *,
    rates: Rates,
) -> tuple[Tensor, Tensor, Tensor]:
    """[R, C] each, learns and the biases [R, 1]: one pass over memory once it is compiled."""
    wide = g.to(mean.dtype) * scale
    moved_mean = torch.lerp(mean, wide, 1 - rates.beta1)
    moved_square = rates.beta2 * square + (1 - rates.beta2) * wide * wide
    root = (moved_square / square_bias).sqrt() + rates.eps
    moved = narrow(p.to(mean.dtype) * decay - lr * (moved_mean / mean_bias) / root, p.dtype, *bits)
    learns = learns & torch.isfinite(moved)
    return (
        torch.where(learns, moved, p),
        torch.where(learns, moved_mean, mean),
        torch.where(learns, moved_square, square),
    )


def consolidation(
    grads: F.Experts,
    importance: Tensor,
    x: Tensor,
    weights: Tensor,
    *,
    squares: Tensor,
    biases: Tensor,
    damping: float,
    eps: float,
) -> tuple[F.Experts, Tensor]:
    """What surprise consolidation makes of a bank's gradient: Adagrad with one number a neuron that sees its input.

    Gate and up learn from inputs less the mean of their expert's own tokens (`onn.functional.centre_inputs`), whitened
    by the batch (`whiten_inputs`). A step is then divided by the root of the squared surprise that its neuron has met
    so far, by weight, which falls to gate, up and down as it does in this batch (`matrix_shares`). No momentum, no
    decay: [E, I] numbers for [3, E, I, H] parameters.

    Args:
        grads: [E, I, H] each.
        importance: [E, I]: of `consolidation_init` or the last step.
        x: [T, H], the input of the bank.
        weights: [T, E] combine weights.
        squares: [3, E, I]: the tap `matrix` of this batch, in the units of `importance`.
        biases: [2, E, I]: the tap `bias`, in those of `grads`.
        damping: of `whiten_inputs`.
        eps: added to the importance of a weight.

    Returns:
        What to descend along, in the dtype of `grads`, and the importance with that of this batch; a neuron whose
        surprise is not finite keeps what it had.

    References:
        Adagrad (Duchi et al., 2011); `experiments/LOG.md` on why and where it works.
    """
    check.shapes("consolidation", ("importance", importance, "float E I"), ("squares", squares, "float 3 E I"))
    met = importance + squares.to(importance.dtype).sum(dim=0)
    met = torch.where(torch.isfinite(met), met, importance)
    by_weight = met * F.matrix_shares(squares)[:, None, None] / (3 * x.shape[-1])
    lesson = F.whiten_inputs(F.centre_inputs(grads, biases, F.expert_means(x, weights)), x, damping=damping)
    return F.consolidate(lesson, by_weight, form="root", strength=0.0, eps=eps), met


def consolidation_init(experts: F.Experts) -> Tensor:
    """The importance [E, I] of a bank that has met nothing: float32 zeros (float64 for float64 experts)."""
    check.shapes("consolidation_init", *bank_parts(experts, where="consolidation_init", name="experts"))
    return torch.zeros_like(experts.gate[..., 0], dtype=reduction_dtype(experts.gate.dtype))


def descended(
    param: Tensor, direction: Tensor, learns: Tensor, bits: tuple[Tensor, ...], *, rate: Tensor, region: Region
) -> Tensor:
    """`param - rate * direction`, rounded as AdamW rounds.

    Args:
        param: [R, ...].
        direction: of its shape.
        learns: bool [R, 1, ...]; rows where it is false, and entries that would not be finite, keep their bits.
        bits: int16 of its shape for the rounding; empty for parameters that are not bfloat16.
        rate: scalar.
        region: as of `adamw_leaf`.
    """
    for name, own, kind in (("param", param, "float"), ("direction", direction, "float"), ("learns", learns, "bool")):
        check.holds("descended", name, own, kind)
    check.shapes("descended", ("rate", rate, "float"))
    check.require(
        all(own.shape == param.shape for own in (direction, *bits))
        and learns.shape == (*param.shape[:1], *(1,) * (param.ndim - 1))
        and all(own.device == param.device for own in (direction, learns, rate, *bits)),
        f"descended: expected direction, noise, learns and rate that fit param {list(param.shape)} on {param.device}, "
        f"got {[(list(own.shape), str(own.device)) for own in (direction, *bits, learns, rate)]}.",
    )

    def matrix(part: Tensor) -> Tensor:
        return part.reshape(len(param), -1)

    moved = region(_descended, kind="update")(
        matrix(param), matrix(direction), matrix(learns), tuple(map(matrix, bits)), rate
    )
    return moved.reshape(param.shape)


def _descended(p: Tensor, direction: Tensor, learns: Tensor, bits: tuple[Tensor, ...], rate: Tensor) -> Tensor:
    """[R, C] each, learns [R, 1]."""
    wide = reduction_dtype(p.dtype)
    moved = narrow(p.to(wide) - rate * direction.to(wide), p.dtype, *bits)
    return torch.where(learns & torch.isfinite(moved), moved, p)


def global_norm(grads: Tree) -> Tensor:
    """The Euclidean norm of all leaves together, float32 (float64 for float64 leaves)."""
    found = tree.leaves(grads)
    check.require(len(found) > 0, "global_norm: expected grads with a leaf, got none.")
    for path, leaf in zip(tree.paths(grads), found, strict=True):
        check.holds("global_norm", f"grads {path}", leaf, "float")
    norms = [torch.linalg.vector_norm(g, dtype=reduction_dtype(g.dtype)) for g in found]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_scale(norm: Tensor, *, max_norm: float) -> Tensor:
    """What to multiply gradients of a global norm with so that it is at most `max_norm`; 1 where the norm is NaN."""
    check.holds("clip_scale", "norm", norm, "float")
    check.require(
        0 < max_norm <= check.LARGEST or max_norm == math.inf,
        f"clip_scale: expected 0 < max_norm={max_norm!r} <= {check.LARGEST:g}, or infinite.",
    )
    return (max_norm / norm.clamp_min(max_norm)).nan_to_num(nan=1.0)


def clip_by_global_norm(grads: Params, *, max_norm: float) -> tuple[Params, Tensor]:
    """Scale gradients down to a global norm of at most `max_norm`.

    Returns:
        The gradients in their dtypes, and the norm before clipping.
    """
    norm = global_norm(grads)
    scale = clip_scale(norm, max_norm=max_norm)
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
    check.holds("warmup_cosine", "step", step, "real")
    check.weight("warmup_cosine", "peak", peak)
    check.between("warmup_cosine", "floor", floor, 0, 1)
    for name, value in (("warmup", warmup), ("total", total)):
        check.between("warmup_cosine", name, value, 0, 2**62)
    at = step.to(torch.float32)
    rising = (at + 1) / max(warmup, 1)
    progress = ((at - warmup) / max(total - warmup, 1)).clamp(0, 1)
    falling = floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * progress))
    return peak * torch.minimum(rising.clamp_max(1), falling)
