"""The model of the study: features, a router, one bank of tiny experts and a read-out, with every gradient by hand.

By hand, so that any rule may decide which (token, expert) pairs learn, and so that the same products give the squared
gradients by row and by weight that consolidation and the penalties need. Each token is an example of its own: the sums
over tokens of squared gradients are the diagonal of the empirical Fisher information.

Shape letters: T tokens, P inputs, H hidden, E experts, I expert intermediate size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, rms_norm

import onn.functional as F
from experiments.study.arms import Centre
from onn import tree
from onn.functional.kernels.dense import expert_gradient, input_gradient

EPS = 1e-6
SHARPNESS = 10.0
"""Of the softmax over the cosines of the active experts."""
DAMPING = 1.0
"""Of whitened inputs."""


class Net(NamedTuple):
    """What one run may learn."""

    features: Tensor
    """[H, P]"""
    prototypes: Tensor
    """[E, H]"""
    experts: F.Experts
    readout: Tensor
    """[C, H]"""


class Rows(NamedTuple):
    """One number for each row of each matrix of a `Net`; a neuron's three rows share one."""

    features: Tensor
    """[H]"""
    prototypes: Tensor
    """[E]"""
    experts: Tensor
    """[E, I]"""
    readout: Tensor
    """[C]"""


class Examples(NamedTuple):
    """What a step learns from."""

    inputs: Tensor
    """[T, P]"""
    residual: Tensor
    """[T, H]: what the bank's output is added to before the last norm; [T, 0] where there is neither."""
    labels: Tensor
    """[T] int64"""


class Seen(NamedTuple):
    """A forward pass."""

    before: Tensor
    """[T, H]: the features before their norm."""
    x: Tensor
    """[T, H]: the bank's input."""
    affinity: Tensor
    """[T, E]"""
    active: Tensor
    """[T, E] bool"""
    weights: Tensor
    """[T, E]"""
    residuals: F.Residuals
    mixed: Tensor
    """[T, H]: the bank's output, with what it is added to."""
    y: Tensor
    """[T, H]: what the read-out reads."""
    logits: Tensor
    """[T, C]"""


class Learnt(NamedTuple):
    """A backward pass."""

    loss: Tensor
    """Scalar: mean cross-entropy in nats."""
    tau: Tensor
    """Scalar: mean entropy of the output in nats."""
    surprise: Tensor
    """[T, E]: parameter surprise of the mean loss, times T: of each token's own loss."""
    grads: Net
    rows: Rows
    """Squared contributions of the tokens to the gradients, by row: `F.neuron_surprise` for the experts."""
    shares: Tensor
    """[3]: of gate, up and down in the experts' `rows`, 1 on average."""
    squares: Net | tuple[()]
    """`rows` by weight, where asked for."""
    seen: Seen


Activate = Callable[[Tensor], Tensor]
"""Affinity [T, E] to the active experts, bool."""
Select = Callable[[Seen, Tensor, Tensor], Tensor]
"""The pass, the parameter surprise and the output surprise [T, E] to the pairs that learn, bool [T, E]."""
Teach = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores, surprise and active pairs [T, E] to what the router minimises beside the loss."""


def rank(keys: Tensor) -> Tensor:
    """The place of every entry in the ascending order of the last dimension; ties go to the lowest index.

    Places are floats, not integers, and sums run over the first index of the pairs: a third of the time when compiled.
    """
    place = torch.arange(keys.shape[-1], dtype=torch.float32, device=keys.device)
    other, mine = keys[..., :, None], keys[..., None, :]
    earlier = torch.where(place[:, None] < place, other <= mine, other < mine)
    return torch.where(earlier, 1.0, 0.0).sum(dim=-2)


def embed(net: Net, inputs: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The features before and after their norm; those of a language model come ready."""
    if residual.shape[-1]:
        return inputs, inputs
    before = inputs @ net.features.mT
    return before, rms_norm(before, before.shape[-1:], eps=EPS)


def forward(net: Net, inputs: Tensor, residual: Tensor, activate: Activate) -> Seen:
    """Features, route, bank and read-out."""
    before, x = embed(net, inputs, residual)
    affinity = F.cosine_affinity(x, net.prototypes, eps=EPS)
    active = activate(affinity)
    weights = torch.softmax((SHARPNESS * affinity).masked_fill(~active, -torch.inf), dim=-1)
    mixed, residuals = F.bank_forward(net.experts, x, weights)
    if residual.shape[-1]:
        mixed = residual + mixed
    y = rms_norm(mixed, mixed.shape[-1:], eps=EPS) if residual.shape[-1] else mixed
    return Seen(
        before=before,
        x=x,
        affinity=affinity,
        active=active,
        weights=weights,
        residuals=residuals,
        mixed=mixed,
        y=y,
        logits=y @ net.readout.mT,
    )


def learn(
    net: Net,
    batch: Examples,
    *,
    activate: Activate,
    select: Select,
    teach: Teach,
    centre: Tensor | None,
    by_weight: bool,
    features: bool,
    whitened: bool,
) -> Learnt:
    """Loss, surprise, gradients and squared gradients of a batch.

    Args:
        net: parameters.
        batch: examples.
        activate: the route.
        select: which pairs the experts learn from; nothing else is masked.
        teach: what the router minimises beside the loss; its inputs are constants to all others.
        centre: scalar, of `Centre`: what the experts' gate and up projections learn from their inputs less of;
            `None` costs less than `Centre.NOTHING`.
        by_weight: whether the squares by weight are wanted, which cost one product more for each matrix.
        features: whether the gradient of the features is wanted; zeros otherwise.
        whitened: whether the experts' gate and up projections learn from inputs by `F.whiten_inputs`, and features,
            where they learn, from inputs less their mean by `F.whitening`.
    """
    tokens, residual = batch.labels.shape[0], batch.residual
    seen = forward(net, batch.inputs, residual, activate)
    log_p = torch.log_softmax(seen.logits, dim=-1)
    p = log_p.exp()
    target = one_hot(batch.labels, p.shape[-1]).to(p.dtype)
    d_logits = p - target
    d_y = d_logits @ net.readout
    d_mixed = _through_norm(seen.mixed, seen.y, d_y) if residual.shape[-1] else d_y
    local, d_weights = F.bank_local(net.experts, seen.residuals, d_mixed)
    surprise = F.parameter_surprise(local, seen.x, seen.weights, d_mixed)
    keep = select(seen, surprise, F.output_surprise(seen.weights, d_mixed))
    kept = torch.where(keep, seen.weights, 0)
    d1, d3, a = (part * kept[..., None] for part in local)
    d_scores = seen.weights * (d_weights - (seen.weights * d_weights).sum(dim=-1, keepdim=True))
    lesson = tree.grad(teach)(SHARPNESS * seen.affinity, surprise, seen.active)
    d_affinity = SHARPNESS * (d_scores + tokens * lesson)
    d_x, d_prototypes = _through_cosine(net, seen, d_affinity)
    d_before, pixels = seen.x.new_zeros(tokens, len(net.features)), batch.inputs[:, : net.features.shape[1]]
    d_features = torch.zeros_like(net.features)
    if features:
        w1, w3, _ = (part * seen.weights[..., None] for part in local)
        d_before = _through_norm(seen.before, seen.x, d_x + input_gradient(net.experts, w1, w3))
        d_features = _whitened(d_before, pixels) if whitened else d_before.mT @ pixels
    experts = expert_gradient(d1, d3, a, seen.x, d_mixed)
    if centre is not None:
        experts = F.centre_inputs(experts, F.bias_gradients(local, kept), _centre(seen, centre))
    grads = Net(
        features=d_features,
        prototypes=d_prototypes,
        experts=F.whiten_inputs(experts, seen.x, damping=DAMPING) if whitened else experts,
        readout=d_logits.mT @ seen.y,
    )
    norms = net.prototypes.square().sum(dim=-1).clamp_min(EPS**2)
    by_matrix = F.matrix_surprise(local, seen.x, kept, d_mixed)
    rows = Rows(
        features=_row_squares(d_before, pixels),
        prototypes=(d_affinity.square() * (1 - seen.affinity.square()).clamp_min(0)).sum(dim=0) / norms,
        experts=by_matrix.sum(dim=0),
        readout=_row_squares(d_logits, seen.y),
    )
    squares: Net | tuple[()] = ()
    if by_weight:
        squares = Net(
            features=d_before.square().mT @ pixels.square(),
            prototypes=_prototype_squares(net, seen, d_affinity),
            experts=expert_gradient(d1.square(), d3.square(), a.square(), seen.x.square(), d_mixed.square()),
            readout=d_logits.square().mT @ seen.y.square(),
        )
    scale = 1 / tokens
    return Learnt(
        loss=-(target * log_p).sum(dim=-1).mean(),
        tau=-(p * log_p).sum(dim=-1).mean(),
        surprise=surprise,
        shares=F.matrix_shares(by_matrix),
        grads=tree.map1(lambda g: g * scale, grads),
        rows=tree.map1(lambda g: g * scale**2, rows),
        squares=tree.map1(lambda g: g * scale**2, squares) if isinstance(squares, Net) else (),
        seen=seen,
    )


def _whitened(d: Tensor, source: Tensor) -> Tensor:
    """The gradient of a matrix that had read `source` less its mean, whitened."""
    centred = source - source.mean(dim=0)
    return d.mT @ centred @ F.whitening(centred, damping=DAMPING)


def _centre(seen: Seen, centre: Tensor) -> Tensor:
    """What is taken off the inputs of every expert, [E, H]."""
    own = F.expert_means(seen.x, seen.weights)
    shared = torch.where(centre == Centre.BATCH.value, seen.x.mean(dim=0), 0)
    return torch.where(centre == Centre.EXPERT.value, own, shared)


def _row_squares(d: Tensor, source: Tensor) -> Tensor:
    """Sum over tokens of the squared norms of the rows of the outer products of `d` [T, R] and `source`."""
    return (d.square() * source.square().sum(dim=-1, keepdim=True)).sum(dim=0)


def _through_norm(before: Tensor, after: Tensor, d_after: Tensor) -> Tensor:
    """From the gradient of what a root-mean-square norm returns to that of what it takes."""
    inverse = torch.rsqrt(before.square().mean(dim=-1, keepdim=True) + EPS)
    return inverse * (d_after - after * (after * d_after).mean(dim=-1, keepdim=True))


def _directions(v: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(EPS)
    return v / norm, norm


def _through_cosine(net: Net, seen: Seen, d_affinity: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of the cosines to those of the bank's input and of the prototypes."""
    (x, x_norm), (p, p_norm) = _directions(seen.x), _directions(net.prototypes)
    pull = d_affinity * seen.affinity
    d_x = (d_affinity @ p - x * pull.sum(dim=-1, keepdim=True)) / x_norm
    return d_x, (d_affinity.mT @ x - p * pull.sum(dim=0)[:, None]) / p_norm


def _prototype_squares(net: Net, seen: Seen, d_affinity: Tensor) -> Tensor:
    """Sum over tokens of `(d (x - cos p) / |p|)^2`, by entry of the prototypes."""
    (x, _), (p, p_norm) = _directions(seen.x), _directions(net.prototypes)
    d2, cos = d_affinity.square(), seen.affinity
    pairs = d2.mT @ x.square() - 2 * p * ((d2 * cos).mT @ x) + p.square() * (d2 * cos.square()).sum(dim=0)[:, None]
    return pairs.clamp_min(0) / p_norm.square()
