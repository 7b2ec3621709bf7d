"""One pure training step for dense and carved models: loss, surprise, SMK, router, density, integrity, AdamW.

Shape letters: T tokens, H hidden, E experts, L carved layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import onn.functional as F
from onn import check, optim, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.lessons import router_lesson
from onn.objective import (
    Measured,
    MoeTraining,
    OptimConfig,
    SparseMetrics,
    StepConfig,
    carved_layers,
    language_loss,
    scaled_surprise,
    soft_targets,
    sparse_metrics,
    target_share,
    zero_taps,
)
from onn.qwen3 import Carved, Model, Moe, check_layers
from onn.region import Region, inline
from onn.tree import Tree

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


def _norms(grads: Model) -> Model:
    """The norm of every gradient, in the shapes of `_grain`: those of the experts one by one."""

    def norm(g: Tensor, grain: Tensor) -> Tensor:
        dims = tuple(range(1, g.ndim)) if grain.ndim else None
        found: Tensor = torch.linalg.vector_norm(g, dim=dims, dtype=F.reduction_dtype(g.dtype), keepdim=grain.ndim > 0)
        return found

    return tree.map2(norm, grads, _grain(grads))


def _grain(model: Model) -> Model:
    """Zeros that say how finely entries may skip a step: [E, 1, 1] for the matrices of a bank, else a scalar."""
    scalars = tree.map1(lambda leaf: torch.zeros((), dtype=torch.int64, device=leaf.device), model)
    mlps = [
        Moe(experts=tree.map1(lambda g: torch.zeros_like(g[:, :1, :1], dtype=torch.int64), own.experts), router=router)
        for own, router in zip(carved_layers(model), (layer.router for layer in carved_layers(scalars)), strict=True)
    ]
    return _with_mlps(scalars, mlps)


def _learns(norms: Model, finite: Tensor) -> Model:
    """Which entries take part in a step: where all is finite everything but experts without any gradient."""
    mlps = []
    for mlp in carved_layers(norms):
        learns = finite & torch.stack([norm != 0 for norm in mlp.experts]).any(dim=0)
        router = tree.map1(lambda _: finite, mlp.router)
        mlps.append(Moe(experts=F.Experts(learns, learns, learns), router=router))
    return _with_mlps(tree.map1(lambda _: finite, norms), mlps)


def init_state(model: Model) -> State:
    """The state before the first step; no two of its tensors share memory that the model does not share.

    Raises:
        ValueError: the model is none, or its parts do not fit one another.
    """
    check_layers("init_state", model)
    layers = carved_layers(model)

    def counts(layer: Moe) -> Tensor:
        return torch.zeros_like(layer.router.thresholds, dtype=torch.int64)

    return State(
        model=model,
        optimizer=optim.adamw_init(model, _grain(model)),
        usage=tuple(F.Usage(routed=counts(layer), active=counts(layer)) for layer in layers),
        lifetime=tuple(counts(layer) for layer in layers),
        step=torch.zeros((), dtype=torch.int64, device=model.norm.device),
    )


def _check_like(where: str, name: str, given: Tree, like: Tree) -> None:
    """Refuse a tree without the structure and the shapes of another."""
    expected = dict(zip(tree.paths(like), (leaf.shape for leaf in tree.leaves(like)), strict=True))
    found = dict(zip(tree.paths(given), (leaf.shape for leaf in tree.leaves(given)), strict=True))
    if found != expected:
        wrong = next(path for path in (*expected, *found) if found.get(path) != expected.get(path))
        got, wanted = (list(shapes[wrong]) if wrong in shapes else "nothing" for shapes in (found, expected))
        raise ValueError(f"{where}: {name} does not fit the model at {wrong}: expected {wanted}, got {got}.")


def _check_state(where: str, state: State, *, sparse: bool) -> None:
    layers = carved_layers(state.model)
    check.require(not sparse or len(layers) > 0, f"{where}: the configuration is sparse, the state's model is dense.")
    check.require(
        len(layers) == len(state.usage) == len(state.lifetime),
        f"{where}: the state has {len(layers)} carved layers, usage of {len(state.usage)}, lifetime of "
        f"{len(state.lifetime)}.",
    )
    for layer, usage, lifetime in zip(layers, state.usage, state.lifetime, strict=True):
        counts = (("usage.routed", usage.routed), ("usage.active", usage.active), ("lifetime", lifetime))
        rows = ((name, value, "integer E") for name, value in counts)
        check.shapes(where, ("thresholds", layer.router.thresholds, "E"), *rows)
    for name in ("mean", "square"):
        _check_like(where, f"optimizer.{name}", getattr(state.optimizer, name), state.model)
    check.shapes(where, ("step", state.step, "integer"))


def step(
    state: State,
    batch: Batch,
    noise: Model | tuple[()],
    config: StepConfig,
    teacher: Model | tuple[()] = (),
    region: Region = inline,
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
        region: how the parts of the step are carried out; the numbers are the same.

    Returns:
        The next state and the figures of this step.

    Raises:
        ValueError: state, batch, noise or teacher do not fit one another or the configuration. Token ids are no more
            looked at than an embedding does, and on a GPU a wrong one ends the process: `onn.data.check_batch`.
    """
    _check_state("step", state, sparse=config.sparse is not None)
    if tree.leaves(noise):
        _check_like("step", "noise", noise, state.model)
    sparse = config.sparse
    passed = config
    if sparse is not None and sparse.granularity != "token":
        passed = replace(config, sparse=replace(sparse, moe=replace(sparse.moe, min_k=sparse.moe.num_experts)))
    soft = soft_targets(teacher, batch, config=config, region=region)

    def loss(model: Model, inputs: Batch, taps: Taps) -> tuple[Tensor, Measured]:
        return language_loss(model, inputs, taps, soft, config=passed, region=region)

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
        metrics = sparse_metrics(seen.error, seen, surprise, share, config=config.integrity, region=region)
        grads = _sparse_gradients(state.model, grads, seen.carved, surprise, metrics.pi, config=sparse, region=region)
    norms = _norms(grads)
    norm = optim.global_norm(norms)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    learns = _learns(norms, finite)
    usage, lifetime, counter = state.usage, state.lifetime, state.step
    columns = [tree.leaves(part) for part in (state.model, grads, *state.optimizer, learns, noise)]
    del state, grads, noise
    scale = optim.clip_scale(norm, max_norm=config.optim.clip_norm)
    model, optimizer = _updated(columns, learns, lr, scale, config=config.optim, region=region)
    if sparse is not None and isinstance(metrics, SparseMetrics):
        model = _controlled(model, seen.carved, metrics.target_share, finite, config=sparse)
        counts = tree.map1(lambda new: torch.where(finite, new, 0), metrics.usage)
        layers = [F.Usage(*row) for row in zip(*counts, strict=True)]
        usage = tuple(tree.map2(torch.add, old, new) for old, new in zip(usage, layers, strict=True))
        lifetime = tuple(old + new.active for old, new in zip(lifetime, layers, strict=True))
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
    model: Model,
    grads: Model,
    seen: tuple[Carved, ...],
    surprise: Taps,
    pi: Tensor,
    *,
    config: MoeTraining,
    region: Region,
) -> Model:
    """The gradients with SMK by batch applied to the experts, and the routers' own objective added."""
    mix = F.adaptive_mix(pi, sensitivity=config.router.sensitivity, threshold=config.router.pi_threshold)
    teach = region(router_lesson, kind="lesson")
    mlps = []
    for layer, moe, was, taps in zip(carved_layers(grads), carved_layers(model), seen, surprise, strict=True):
        experts = layer.experts
        if config.granularity == "batch":
            experts = F.select_min_k(experts, min_k=config.moe.min_k)
        lesson = teach(moe.router, was, taps, mix, config=config)
        mlps.append(Moe(experts=experts, router=tree.map2(lambda g, own: g + own / len(seen), layer.router, lesson)))
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
    columns: list[list[Tensor]], like: Model, lr: Tensor, scale: Tensor, *, config: OptimConfig, region: Region
) -> tuple[Model, optim.AdamWState[Model]]:
    """`optim.adamw` leaf by leaf; the columns lose each leaf as soon as it is replaced.

    They are parameters, gradients, steps, mean, square, learns and noise, the last of which may be empty. The embedding
    comes last, when the gradients of all others are gone, and in pieces where it is large: the temporaries of a whole
    one are several times its own size.
    """
    rates = optim.Rates(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
    done: tuple[list[Tensor], ...] = ([], [], [], [])
    while columns[0]:
        pieces = _pieces(columns[0][-1])
        cut = [_cut(column.pop(), pieces) for column in columns if column]
        results = [
            optim.adamw_leaf(
                optim.Entry(p, g, steps, mean, square, learns, tuple(bits)),
                lr=lr,
                scale=scale,
                rates=rates,
                region=region,
            )
            for p, g, steps, mean, square, learns, *bits in zip(*cut, strict=True)
        ]
        del cut
        parts = list(zip(*results, strict=True))
        del results
        for column in reversed(done):
            column.append(_joined(parts.pop()))
    model, *moments = (tree.unflatten(like, column[::-1]) for column in done)
    return model, optim.AdamWState(*moments)


def _pieces(leaf: Tensor) -> int:
    """How many to cut a leaf into: along its first dimension, of `_PIECE` entries or more."""
    wanted = leaf.numel() // _PIECE
    return len(leaf.chunk(wanted)) if wanted > 1 and leaf.ndim else 1


def _cut(leaf: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return leaf.chunk(pieces) if leaf.ndim else (leaf,) * pieces


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 or not parts[0].ndim else torch.cat(parts)


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

    Raises:
        ValueError: the model has no carved layer, or noise that does not fit.
    """
    _check_state("lifecycle", state, sparse=True)
    check.require(
        len(noise) == len(state.usage),
        f"lifecycle: expected noise for each of {len(state.usage)} carved layers, got {len(noise)}.",
    )
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
