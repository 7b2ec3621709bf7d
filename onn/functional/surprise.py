"""Surprise: the norm of the gradient that one token gives one expert, and what may learn from it.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.

Notation, for token t and expert e: `g = dL/dy_t`, `u = down_e g`, `a = silu(h1) h3`, and the unit gradients (those at
combine weight 1) `c1 = u h3 silu'(h1)` and `c3 = u silu(h1)` of the two pre-activations; the actual ones are `w c1` and
`w c3`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from onn import check
from onn.functional.kernels.entries import bank_parts, local_parts, pass_parts
from onn.functional.kernels.local import matrix_squares, unit_norms
from onn.functional.types import Experts, Local, reduction_dtype


def counterfactual_surprise(local: Local, x: Tensor, dy: Tensor) -> Tensor:
    """`S / w`: the surprise at combine weight 1, for inactive experts too.

    `C_te^2 = (||c1||^2 + ||c3||^2) ||x_t||^2 + ||a||^2 ||g_t||^2`, since every term of a token's parameter gradient is
    a rank-one product.

    Args:
        local: of the dense computation.
        x: [T, H], the input of the bank.
        dy: [T, H], the gradient of its output.

    Returns:
        [T, E], float32 (float64 for float64 inputs). The norms square their entries in it: in float32 exact to rounding
        for gradients of size 1e-18 to 1e18, and 0 or not finite far outside.
    """
    check.shapes(
        "counterfactual_surprise",
        *local_parts(local, where="counterfactual_surprise"),
        ("x", x, "float T H"),
        ("dy", dy, "float T H"),
    )
    inner, outer = unit_norms(local)
    x_norm, dy_norm = (vector_norm(v, dim=-1, keepdim=True, dtype=reduction_dtype(v.dtype)) for v in (x, dy))
    return torch.hypot(inner * x_norm, outer * dy_norm)


def parameter_surprise(local: Local, x: Tensor, weights: Tensor, dy: Tensor) -> Tensor:
    """The Frobenius norm of token t's own contribution to expert e's parameter gradient: `|w_te| C_te`.

    Exact: the gradient that each token position would give an untied copy of the expert's weights.

    Args:
        local: of the dense computation.
        x: [T, H].
        weights: [T, E] combine weights.
        dy: [T, H].

    Returns:
        [T, E], 0 where the weight is 0; float32 (float64 for float64 inputs).
    """
    check.shapes(
        "parameter_surprise",
        ("weights", weights, "float T E"),
        *local_parts(local, where="parameter_surprise"),
        ("x", x, "float T H"),
    )
    return weight_surprise(counterfactual_surprise(local, x, dy), weights)


def weight_surprise(counterfactual: Tensor, weights: Tensor) -> Tensor:
    """`|w| C`, and 0 where the weight is 0 even if `C` is not finite.

    Args:
        counterfactual: [T, E].
        weights: [T, E].

    Returns:
        [T, E].
    """
    check.shapes("weight_surprise", ("counterfactual", counterfactual, "float T E"), ("weights", weights, "float T E"))
    return torch.where(weights != 0, counterfactual * weights.abs().to(counterfactual.dtype), 0)


def normalised_surprise(surprise: Tensor, weights: Tensor) -> Tensor:
    """`S / |w|`: surprise freed of the router's own weight, 0 where the weight is 0.

    Args:
        surprise: [T, E] parameter surprise.
        weights: [T, E] combine weights.

    Returns:
        [T, E]. On active pairs it is the counterfactual surprise.
    """
    check.shapes("normalised_surprise", ("surprise", surprise, "float T E"), ("weights", weights, "float T E"))
    magnitude = weights.abs().to(surprise.dtype)
    return torch.where(magnitude > 0, surprise / torch.where(magnitude > 0, magnitude, 1), 0)


def output_surprise(weights: Tensor, dy: Tensor) -> Tensor:
    """`||dL/do_te|| = |w_te| ||g_t||`: a baseline that carries no information about the expert.

    Args:
        weights: [T, E].
        dy: [T, H].

    Returns:
        [T, E]. Its least expert is the least weight, and under uniform weights all active experts tie.
    """
    check.shapes("output_surprise", ("weights", weights, "float T E"), ("dy", dy, "float T H"))
    dtype = reduction_dtype(dy.dtype)
    dy_norm: Tensor = vector_norm(dy, dim=-1, keepdim=True, dtype=dtype)
    return weight_surprise(dy_norm.expand(weights.shape), weights)


def input_surprise(local: Local, experts: Experts, weights: Tensor) -> Tensor:
    """`||dL/dx_te||`: the norm of the gradient that expert e sends to its copy of the input of token t.

    Args:
        local: of the dense computation.
        experts: the bank.
        weights: [T, E].

    Returns:
        [T, E]. A baseline for studies: it materialises [T, E, H].
    """
    check.shapes(
        "input_surprise",
        ("weights", weights, "float T E"),
        *local_parts(local, where="input_surprise"),
        *bank_parts(experts, where="input_surprise", name="experts"),
    )
    check.one_dtype("input_surprise", c1=local.c1, c3=local.c3, gate=experts.gate, up=experts.up)
    to_input = torch.einsum("tei,eih->teh", local.c1, experts.gate) + torch.einsum("tei,eih->teh", local.c3, experts.up)
    unit: Tensor = vector_norm(to_input, dim=-1, dtype=reduction_dtype(to_input.dtype))
    return weight_surprise(unit, weights)


def matrix_surprise(local: Local, x: Tensor, weights: Tensor, dy: Tensor) -> Tensor:
    """Squared surprise by matrix and neuron, summed over tokens: the empirical Fisher information of every row.

    `sum_t w_te^2 c1_tei^2 ||x_t||^2` of gate, `sum_t w_te^2 c3_tei^2 ||x_t||^2` of up, `sum_t w_te^2 a_tei^2 ||g_t||^2`
    of down. Tokens of weight 0 count nothing.

    Args:
        local: of the dense computation.
        x: [T, H].
        weights: [T, E].
        dy: [T, H].

    Returns:
        [3, E, I], float32 (float64 for float64 inputs).

    References:
        Kirkpatrick et al., 1612.00796 (the Fisher as importance); Kunstner et al., 1905.12558 (the empirical one).
    """
    check.shapes("matrix_surprise", *pass_parts(local, x, weights, dy, where="matrix_surprise"))
    dtype = reduction_dtype(x.dtype)
    w = weights.to(dtype)
    inner = w * vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    outer = w * vector_norm(dy.to(dtype), dim=-1, keepdim=True)
    active = (weights != 0)[..., None]
    squares = matrix_squares(local, inner[..., None], outer[..., None])
    return torch.stack([torch.where(active, part, 0).sum(dim=0) for part in squares])


def neuron_surprise(local: Local, x: Tensor, weights: Tensor, dy: Tensor) -> Tensor:
    """Squared surprise by neuron, summed over tokens: of row i of the three matrices together.

    `f_ei = sum_t w_te^2 ((c1_tei^2 + c3_tei^2) ||x_t||^2 + a_tei^2 ||g_t||^2)`, the sum of `matrix_surprise`; its sum
    over neurons is the sum of `S_te^2` over tokens.

    Args:
        local: of the dense computation.
        x: [T, H].
        weights: [T, E].
        dy: [T, H].

    Returns:
        [E, I], float32 (float64 for float64 inputs).
    """
    check.shapes("neuron_surprise", *pass_parts(local, x, weights, dy, where="neuron_surprise"))
    return matrix_surprise(local, x, weights, dy).sum(dim=0)


def bias_gradients(local: Local, weights: Tensor) -> Tensor:
    """The gradients of a bias on every pre-activation of gate and up: `sum_t w_te c1_tei` and `sum_t w_te c3_tei`.

    Args:
        local: of the dense computation.
        weights: [T, E], 0 for the pairs that do not learn, whose `local` reaches nothing, finite or not.

    Returns:
        [2, E, I], float32 (float64 for float64 inputs).
    """
    check.shapes("bias_gradients", *local_parts(local, where="bias_gradients"), ("weights", weights, "float T E"))
    w = weights.to(reduction_dtype(weights.dtype))[..., None]
    return torch.stack([torch.where(w != 0, part.to(w.dtype) * w, 0).sum(dim=0) for part in (local.c1, local.c3)])


def _least(keys: Tensor, active: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The `k` active entries of a row with the smallest keys: indices [T, k], and which of them are really active."""
    largest = torch.finfo(keys.dtype).max
    usable = torch.nan_to_num(keys.detach(), nan=largest, posinf=largest)
    order = torch.sort(torch.where(active, usable, torch.inf), dim=-1, stable=True).indices[..., :k]
    return order, active.gather(-1, order)


def min_k_indices(surprise: Tensor, active: Tensor, *, min_k: int) -> tuple[Tensor, Tensor]:
    """The selection of `min_k_mask` in a static shape.

    Args:
        surprise: [T, E].
        active: [T, E] bool.
        min_k: how many learn.

    Returns:
        Expert indices [T, min_k] from the least surprise up, and bool [T, min_k]: which slots are filled.
    """
    sizes = check.shapes("min_k_mask", ("surprise", surprise, "float T E"), ("active", active, "bool T E"))
    check.whole("min_k_mask", "min_k", min_k, 1, sizes["E"])
    return _least(surprise, active, k=min_k)


def min_k_mask(surprise: Tensor, active: Tensor, *, min_k: int) -> Tensor:
    """SMK: of the active experts of a token, the `min_k` of least surprise.

    Args:
        surprise: [T, E].
        active: [T, E] bool: routed and of non-zero weight.
        min_k: how many learn.

    Returns:
        bool [T, E], a subset of `active`. With at most `min_k` active, all of them. Ties go to the lowest index. NaN
        and Inf count as +inf: they are kept last, and only where too few finite ones are active.
    """
    kept = min_k_indices(surprise, active, min_k=min_k)
    return torch.zeros_like(active).scatter(-1, *kept)


def max_k_mask(surprise: Tensor, active: Tensor, *, max_k: int) -> Tensor:
    """The rule opposite to SMK: of the active experts, the `max_k` of most (finite) surprise; ties to the lowest index.

    Args:
        surprise: [T, E].
        active: [T, E] bool.
        max_k: how many learn.

    Returns:
        bool [T, E], a subset of `active`; entries that are not finite are kept last.
    """
    sizes = check.shapes("max_k_mask", ("surprise", surprise, "float T E"), ("active", active, "bool T E"))
    check.whole("max_k_mask", "max_k", max_k, 1, sizes["E"])
    keys = torch.where(torch.isfinite(surprise), -surprise, torch.inf)
    return torch.zeros_like(active).scatter(-1, *_least(keys, active, k=max_k))


def random_k_mask(noise: Tensor, active: Tensor, *, random_k: int) -> Tensor:
    """The control of SMK: `random_k` of the active experts, chosen by uniform `noise`.

    Args:
        noise: [T, E], independent and continuous.
        active: [T, E] bool.
        random_k: how many learn.

    Returns:
        bool [T, E], a subset of `active`.
    """
    sizes = check.shapes("random_k_mask", ("noise", noise, "float T E"), ("active", active, "bool T E"))
    check.whole("random_k_mask", "random_k", random_k, 1, sizes["E"])
    return min_k_mask(noise, active, min_k=random_k)


def non_finite(surprise: Tensor, active: Tensor) -> Tensor:
    """How many active pairs have a surprise that is NaN or infinite.

    Args:
        surprise: [T, E].
        active: [T, E] bool.

    Returns:
        Scalar int64.
    """
    check.shapes("non_finite", ("surprise", surprise, "float T E"), ("active", active, "bool T E"))
    return (active & ~torch.isfinite(surprise)).sum()


def expert_norms(grads: Experts) -> Tensor:
    """The norm of the batch's gradient of every expert, over its three matrices.

    Args:
        grads: [E, I, H] each.

    Returns:
        [E], float32 (float64 for float64 inputs).
    """
    check.shapes("expert_norms", *bank_parts(grads, where="expert_norms", name="grads"))
    norms = [vector_norm(g, dim=(-2, -1), dtype=reduction_dtype(g.dtype)) for g in grads]
    return torch.hypot(torch.hypot(norms[0], norms[1]), norms[2])


def select_min_k(grads: Experts, *, min_k: int) -> Experts:
    """SMK at batch granularity: only the `min_k` experts with the smallest non-zero gradient norm keep their gradient.

    Args:
        grads: the batch's gradient.
        min_k: how many experts of the layer learn.

    Returns:
        `grads` with zeros for all other experts; ties go to the lowest index, NaN and Inf count as +inf.
    """
    norms = expert_norms(grads)
    keep = min_k_mask(norms[None], (norms != 0)[None], min_k=min_k)[0, :, None, None]
    return Experts(*(torch.where(keep, g, 0) for g in grads))
