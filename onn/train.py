"""One pure training step for dense and carved models: loss, surprise, SMK, router, density, integrity, AdamW.

Shape letters: T tokens, H hidden, E experts, L carved layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import onn.functional as F
from onn import optim, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.objective import (
    Measured,
    MoeTraining,
    OptimConfig,
    SparseMetrics,
    StepConfig,
    carved_layers,
    language_loss,
    router_objective,
    scaled_surprise,
    soft_targets,
    sparse_metrics,
    target_share,
    zero_taps,
)
from onn.qwen3 import Carved, Model, Moe

_PIECE = 2**24
"""Entries of a parameter that are updated at a time, so that temporaries stay small beside the largest one."""


class State(NamedTuple):
    """Everything that training changes."""

    model: Model
    optimizer: optim.AdamWState[Model]
    usage: tuple[F.Usage, ...]
    """Of each carved layer, since the last `lifecycle`."""
    lifetime: tuple[Tensor, ...]
    """[E] of each carved layer: tokens each expert ever got."""
    step: Tensor
    """Scalar int64."""


class Metrics(NamedTuple):
    """Figures of one step; the loss and its kin are those before the update."""

    loss: Tensor
    """Scalar: the main loss, the cross-entropy with the text."""
    divergence: Tensor | tuple[()]
    """Scalar: of the teacher from the model (see `distillation_loss`); empty without a teacher."""
    tau: Tensor
    accuracy: Tensor
    grad_norm: Tensor
    learning_rate: Tensor
    skipped: Tensor
    """Scalar bool: a loss or gradient was not finite, and nothing was changed."""
    sparse: SparseMetrics | tuple[()]


def _with_mlps(model: Model, mlps: list[Moe]) -> Model:
    carved = iter(mlps)
    return model._replace(
        layers=tuple(
            layer._replace(mlp=next(carved)) if isinstance(layer.mlp, Moe) else layer for layer in model.layers
        )
    )


def _learns(grads: Model) -> Model:
    """Which entries take part in a step: an expert without any gradient, masked or idle, does not."""
    everything = tree.map1(lambda leaf: torch.ones((), dtype=torch.bool, device=leaf.device), grads)
    masks = []
    for mlp, ones in zip(carved_layers(grads), carved_layers(everything), strict=True):
        learns = (F.expert_norms(mlp.experts) != 0)[:, None, None]
        masks.append(Moe(experts=F.Experts(learns, learns, learns), router=ones.router))
    return _with_mlps(everything, masks)


def init_state(model: Model) -> State:
    """The state before the first step; no two of its tensors share memory that the model does not share."""
    layers = carved_layers(model)

    def counts(layer: Moe) -> Tensor:
        return torch.zeros_like(layer.router.thresholds, dtype=torch.int64)

    return State(
        model=model,
        optimizer=optim.adamw_init(model, _learns(model)),
        usage=tuple(F.Usage(routed=counts(layer), active=counts(layer)) for layer in layers),
        lifetime=tuple(counts(layer) for layer in layers),
        step=torch.zeros((), dtype=torch.int64, device=model.norm.device),
    )


def step(
    state: State, batch: Batch, noise: Model | tuple[()], config: StepConfig, teacher: Model | tuple[()] = ()
) -> tuple[State, Metrics]:
    """One training step, pure: the same arguments give the same bits.

    One forward and one backward pass give the loss, every gradient and the surprise; SMK masks the experts' gradients
    inside that backward pass; the routers learn from the surprise with their inputs detached. Where the loss or a
    gradient is not finite nothing but the step counter changes.

    Args:
        state: of `init_state` or the last step. Each of its tensors is let go as soon as its successor is made: a
            caller who keeps no reference to the state, nor to `noise`, needs memory for one state, not for two.
        batch: text.
        noise: uniform int16 of the model's structure and shapes for stochastic rounding; `()` for models that are not
            bfloat16.
        config: static.
        teacher: the dense model that the experts were carved from, where `distill` has weight; not asked otherwise.

    Returns:
        The next state and the figures of this step.
    """
    sparse = config.sparse
    passed = config
    if sparse is not None and sparse.granularity != "token":
        passed = replace(config, sparse=replace(sparse, moe=replace(sparse.moe, min_k=sparse.moe.num_experts)))
    soft = soft_targets(teacher, batch, config=config)

    def loss(model: Model, inputs: Batch, taps: Taps) -> tuple[Tensor, Measured]:
        return language_loss(model, inputs, taps, soft, config=passed)

    names: tuple[F.TapName, ...] = ("surprise",)
    if sparse is not None and sparse.router.target == "counterfactual":
        names = ("surprise", "counterfactual")
    taps = zero_taps(state.model, batch.tokens.numel(), names=names)
    total, seen, grads, surprise = F.surprise_and_grad(loss, taps=taps, engine=config.engine)(state.model, batch)
    metrics: SparseMetrics | tuple[()] = ()
    lr = optim.warmup_cosine(
        state.step, peak=config.optim.lr, warmup=config.optim.warmup, total=config.total_steps, floor=config.optim.floor
    )
    if sparse is not None:
        surprise = scaled_surprise(surprise, batch)
        share = target_share(state.step, config=sparse.density)
        metrics = sparse_metrics(seen.error, seen, surprise, share, config=config.integrity)
        grads = _sparse_gradients(state.model, grads, seen.carved, surprise, metrics.pi, config=sparse)
    grads, norm = optim.clip_by_global_norm(grads, max_norm=config.optim.clip_norm)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    learns = tree.map1(lambda mask: mask & finite, _learns(grads))
    usage, lifetime, counter = state.usage, state.lifetime, state.step
    columns = [tree.leaves(part) for part in (state.model, grads, *state.optimizer, learns, noise)]
    del state, grads, noise
    model, optimizer = _updated(columns, learns, lr, config=config.optim)
    if sparse is not None and isinstance(metrics, SparseMetrics):
        model = _controlled(model, seen.carved, metrics.target_share, finite, config=sparse)
        counts = [F.Usage(*row) for row in zip(*metrics.usage, strict=True)]
        usage = tuple(
            F.Usage(*(a + b for a, b in zip(old, new, strict=True))) for old, new in zip(usage, counts, strict=True)
        )
        lifetime = tuple(old + new.active for old, new in zip(lifetime, counts, strict=True))
    return (
        State(model=model, optimizer=optimizer, usage=usage, lifetime=lifetime, step=counter + 1),
        Metrics(
            loss=seen.error,
            divergence=seen.divergence,
            tau=seen.tau,
            accuracy=seen.accuracy,
            grad_norm=norm,
            learning_rate=lr,
            skipped=~finite,
            sparse=metrics,
        ),
    )


def _sparse_gradients(
    model: Model, grads: Model, seen: tuple[Carved, ...], surprise: Taps, pi: Tensor, *, config: MoeTraining
) -> Model:
    """The gradients with SMK by batch applied to the experts, and the routers' own objective added."""
    mix = F.adaptive_mix(pi, sensitivity=config.router.sensitivity, threshold=config.router.pi_threshold)
    objective = tree.value_and_grad(router_objective, engine="func")
    routers = tuple(layer.router for layer in carved_layers(model))
    _, taught = objective(routers, seen, surprise, mix, config=config)
    mlps = []
    for layer, lesson in zip(carved_layers(grads), taught, strict=True):
        experts = layer.experts
        if config.granularity == "batch":
            experts = F.select_min_k(experts, min_k=config.moe.min_k)
        mlps.append(Moe(experts=experts, router=tree.map2(torch.add, layer.router, lesson)))
    return _with_mlps(grads, mlps)


def _controlled(model: Model, seen: tuple[Carved, ...], share: Tensor, finite: Tensor, *, config: MoeTraining) -> Model:
    """Move all thresholds of a layer together so that the share of active experts follows its target.

    The top-k route has no thresholds, and its share is what it is.
    """
    if config.moe.route == "top_k":
        return model
    mlps = []
    for layer, was in zip(carved_layers(model), seen, strict=True):
        thresholds = layer.router.thresholds
        shift = F.share_threshold_shift(was.affinity, thresholds, squash=config.moe.squash, target=share)
        moved = (thresholds + config.density.gain * shift).to(thresholds.dtype)
        router = layer.router._replace(thresholds=torch.where(finite & torch.isfinite(shift), moved, thresholds))
        mlps.append(layer._replace(router=router))
    return _with_mlps(model, mlps)


def _updated(
    columns: list[list[Tensor]], like: Model, lr: Tensor, *, config: OptimConfig
) -> tuple[Model, optim.AdamWState[Model]]:
    """`optim.adamw` by groups of leaves; the columns lose each leaf as soon as it is replaced.

    They are parameters, gradients, steps, mean, square, learns and noise, the last of which may be empty. The embedding
    comes last, when the gradients of all others are gone, and in pieces where it is large: the temporaries of a whole
    one are several times its own size.
    """
    done: tuple[list[Tensor], ...] = ([], [], [], [])
    while columns[0]:
        size = _group(columns[0])
        pieces = len(columns[0][-1].chunk(max(1, columns[0][-1].numel() // _PIECE))) if size == 1 else 1
        cut = (_cut([column.pop() for _ in range(min(size, len(column)))], pieces) for column in columns)
        params, grads, steps, mean, square, learns, noise = cut
        moved, state = optim.adamw(
            params,
            grads,
            optim.AdamWState(steps=steps, mean=mean, square=square),
            learns,
            noise,
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        results = [*reversed(state), moved]
        del params, grads, steps, mean, square, learns, noise, moved, state
        for column in done:
            column.extend(_joined(results.pop(), pieces))
    model, *moments = (tree.unflatten(like, column[::-1]) for column in done)
    return model, optim.AdamWState(*moments)


def _group(leaves: list[Tensor]) -> int:
    """How many of the last leaves have `_PIECE` entries together: at least one."""
    total, size = 0, 0
    for leaf in reversed(leaves):
        total += leaf.numel()
        if total > _PIECE:
            break
        size += 1
    return max(size, 1)


def _cut(leaves: list[Tensor], pieces: int) -> tuple[Tensor, ...]:
    if pieces == 1 or not leaves:
        return tuple(leaves)
    (leaf,) = leaves
    return leaf.chunk(pieces) if leaf.ndim else (leaf,) * pieces


def _joined(parts: tuple[Tensor, ...], pieces: int) -> tuple[Tensor, ...]:
    if pieces == 1:
        return parts
    return (torch.cat(parts) if parts[0].ndim else parts[0],)


def _forget(layer: Moe, plan: F.Heirs) -> Moe:
    return tree.map1(lambda leaf: F.forget_reborn(leaf, plan) if leaf.ndim else leaf, layer)


def lifecycle(state: State, noise: tuple[Tensor, ...], *, config: MoeTraining, scale: float) -> tuple[State, Tensor]:
    """Rebirth of the experts that no token chose since the last call; the usage counts start anew.

    Shared experts, whose threshold is -inf, are the last to be donors: their heirs would be always open too.

    Args:
        state: of a carved model.
        noise: standard normal [E, H] for each carved layer.
        config: combine decides whether donor and reborn share their output.
        scale: see `onn.functional.rebirth`.

    Returns:
        The next state, optimizer included, and the number of reborn experts of each layer [L].
    """
    share = 0.5 if config.moe.route == "threshold" and config.moe.combine == "sum" else 1.0
    mlps, plans = [], []
    for layer, counts, bits in zip(carved_layers(state.model), state.usage, noise, strict=True):
        always_open = torch.isneginf(layer.router.thresholds)
        plan = F.heirs(torch.where(always_open, counts.active.clamp_max(1), counts.active))
        experts, router = F.rebirth(layer.experts, layer.router, plan, bits, scale=scale, share=share)
        mlps.append(Moe(experts=experts, router=router))
        plans.append(plan)

    def follow(moments: Model) -> Model:
        return _with_mlps(
            moments, [_forget(layer, plan) for layer, plan in zip(carved_layers(moments), plans, strict=True)]
        )

    return (
        state._replace(
            model=_with_mlps(state.model, mlps),
            optimizer=optim.AdamWState(*(follow(part) for part in state.optimizer)),
            usage=tree.zeros_like(state.usage),
        ),
        torch.stack([plan.reborn.sum() for plan in plans]),
    )
