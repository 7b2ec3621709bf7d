"""Surprise consolidation: what has been surprised much has learnt, and hardens; and what that leaves for new lessons.

One number a neuron cannot hold which inputs a neuron has learnt from. What all tokens of an expert have in common is
where its lessons collide: `centre_inputs` and `whiten_inputs` take it out of a gradient, without any state.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from onn import check
from onn.functional.kernels.entries import bank_parts
from onn.functional.types import Experts, reduction_dtype

Form = Literal["root", "bounded"]


def consolidate(grads: Experts, importance: Tensor, *, form: Form, strength: float, eps: float) -> Experts:
    """The gradients of a bank, those of what has been surprised much made small.

    Args:
        grads: [E, I, H] each.
        importance: `F`, accumulated squared surprise: by neuron [E, I] (`neuron_surprise`), by expert [E], or of gate,
            up and down each [3, E, I], such as the first times `matrix_shares`.
        form: `root` scales by `1 / sqrt(F + eps)`, Adagrad with one scalar a neuron (take steps of `lr * sqrt(H)`);
            `bounded` by `1 / (1 + strength F / mean F)`, which fits under another optimizer.
        strength: of the bounded form; at 0 nothing is changed.
        eps: above 0, of the root form, and floor of the mean of the bounded one, which is over the finite entries.

    Returns:
        The scaled gradients, in their dtype; where `F` is equal, equal gradients stay equal.

    References:
        Adagrad (Duchi et al., 2011); online EWC (Schwarz et al., 1805.06370).
    """
    check.instance("consolidate", "importance", importance, Tensor)
    dims = {1: "float E", 3: "float 3 E I"}.get(importance.ndim, "float E I")
    check.shapes("consolidate", *bank_parts(grads, where="consolidate", name="grads"), ("importance", importance, dims))
    check.one_of("consolidate", "form", form, get_args(Form))
    check.weight("consolidate", "strength", strength)
    check.positive("consolidate", "eps", eps)
    rows = importance[:, None] if importance.ndim == 1 else importance
    finite = torch.isfinite(importance)
    mean = torch.where(finite, importance, 0).sum() / finite.sum().clamp_min(1)
    bound = 1 + strength * rows / mean.clamp_min(eps) if strength else torch.ones_like(rows)
    scale = (torch.rsqrt(rows + eps) if form == "root" else 1 / bound)[..., None]
    scales = scale.expand(3, *scale.shape[-3:])
    return Experts(*((g * own).to(g.dtype) for g, own in zip(grads, scales, strict=True)))


def matrix_shares(squares: Tensor) -> Tensor:
    """How the squared surprise of a bank falls to gate, up and down: [3], 1 on average; zeros where there is none.

    Args:
        squares: [3, E, I], of `matrix_surprise` or the tap `matrix`; what is not finite does not count.

    Returns:
        [3], float32 (float64 for float64 inputs).
    """
    check.shapes("matrix_shares", ("squares", squares, "float 3 E I"))
    total = torch.where(squares.isfinite(), squares, 0).sum(dim=(1, 2), dtype=reduction_dtype(squares.dtype))
    return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)


def expert_means(x: Tensor, weights: Tensor) -> Tensor:
    """The mean input of every expert, its tokens weighted by the size of their combine weights.

    Args:
        x: [T, H].
        weights: [T, E].

    Returns:
        [E, H], float32 (float64 for float64 inputs); zeros for an expert without tokens.
    """
    check.shapes("expert_means", ("x", x, "float T H"), ("weights", weights, "float T E"))
    dtype = reduction_dtype(x.dtype)
    w = weights.to(dtype).abs()
    return w.mT @ x.to(dtype) / w.sum(dim=0)[:, None].clamp_min(torch.finfo(dtype).tiny)


def centre_inputs(grads: Experts, biases: Tensor, centre: Tensor) -> Experts:
    """The gradients of a bank whose gate and up projections had read their inputs less `centre`.

    With `W x = W (x - m) + W m` they are those of the first term alone: `sum_t d_t x_t^T` less `(sum_t d_t) m^T`. What
    the tokens of an expert have in common is then no longer where all of its lessons meet.

    Args:
        grads: [E, I, H] each, of the batch.
        biases: [2, E, I], `sum_t d_t` of gate and up: of `bias_gradients` or the tap `bias`.
        centre: [E, H], such as `expert_means`.

    Returns:
        The gradients, in their dtype; that of down is the one given.
    """
    check.shapes(
        "centre_inputs",
        *bank_parts(grads, where="centre_inputs", name="grads"),
        ("biases", biases, "float 2 E I"),
        ("centre", centre, "float E H"),
    )
    taken = biases.to(reduction_dtype(biases.dtype))[..., None] * centre[:, None]
    gate, up = (g - part.to(g.dtype) for g, part in zip((grads.gate, grads.up), taken, strict=True))
    return Experts(gate, up, grads.down)


def whitening(x: Tensor, *, damping: float) -> Tensor:
    """What a gradient by input is multiplied with, to be smaller along directions that all inputs share.

    Along a direction in which the inputs have the second moment c, over the mean of all directions, it divides by
    `(c + damping) / (1 + damping)`: it is the identity where the inputs are white.

    Args:
        x: [T, H], the inputs of the batch. Their mean is such a direction, and where it is long it hides the others:
            take it off before, from the gradient too (`centre_inputs`).
        damping: above 0; the larger, the less is changed.

    Returns:
        [H, H], symmetric, float32 (float64 for float64 inputs). Costs H^3 and no state. NaN where `damping` is so small
        that rounding leaves no second moment to divide by.

    References:
        The input's factor of K-FAC (Martens and Grosse, 1503.05671), damped, of one batch.
    """
    check.shapes("whitening", ("x", x, "float T H"))
    check.positive("whitening", "damping", damping)
    dtype = reduction_dtype(x.dtype)
    inputs, size = x.to(dtype), x.shape[-1]
    moment = inputs.mT @ inputs / (inputs.square().sum() / size).clamp_min(torch.finfo(dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(moment + damping * torch.eye(size, dtype=dtype, device=x.device))
    return torch.where(failed == 0, (1 + damping) * torch.cholesky_inverse(factor), torch.nan)


def whiten_inputs(grads: Experts, x: Tensor, *, damping: float) -> Experts:
    """The gradients of gate and up, smaller along directions of the input that the whole batch shares.

    Args:
        grads: [E, I, H] each.
        x: [T, H], the inputs of the batch.
        damping: of `whitening`.

    Returns:
        The gradients times `whitening`, in their dtype; that of down is the one given.
    """
    check.shapes("whiten_inputs", *bank_parts(grads, where="whiten_inputs", name="grads"), ("x", x, "float T H"))
    check.positive("whiten_inputs", "damping", damping)
    inverse = whitening(x, damping=damping)
    gate, up = ((g.to(inverse.dtype) @ inverse).to(g.dtype) for g in (grads.gate, grads.up))
    return Experts(gate, up, grads.down)
