"""One pure training step for dense and carved models: loss, surprise, SMK, router, density, integrity, optimizer.

Shape letters: T tokens, H hidden, E experts, L carved layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

import onn.functional as F
from onn import check, optim, tree
from onn.data import Batch
from onn.descent import Speeds, updated
from onn.functional.transform import Taps
from onn.grain import adamw_part, banks_alone, entry_norms, grain_of, that_learn, with_mlps
from onn.lessons import expert_lesson, router_lesson
from onn.objective import (
    ExpertOptimizer,
    Measured,
    MoeTraining,
    Regime,
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


class State(NamedTuple):
    """Everything that training changes."""

    model: Model
    optimizer: optim.AdamWState[Model]
    """Moments of what AdamW trains, and of nothing else."""
    importance: tuple[Tensor, ...]
    """[E, I] of each carved layer whose experts consolidation trains; none otherwise."""
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


def init_state(model: Model, *, experts: ExpertOptimizer = "adamw", regime: Regime = "everything") -> State:
    """The state before the first step; no two of its tensors share memory that the model does not share.

    Args:
        model: dense or carved.
        experts: what trains the experts, as in `MoeTraining.optimizer`; of a dense model nothing.
        regime: what learns, as in `MoeTraining.regime`; of a dense model everything.

    Raises:
        ValueError: the model is none, its parts do not fit one another, or an unknown optimizer or regime.
    """
    check_layers("init_state", model)
    check.one_of("init_state", "experts", experts, get_args(ExpertOptimizer))
    check.one_of("init_state", "regime", regime, get_args(Regime))
    layers, consolidated = carved_layers(model), experts == "consolidation"
    part = adamw_part(model, experts=experts, regime=regime) if layers else model

    def counts(layer: Moe) -> Tensor:
        return torch.zeros_like(layer.router.thresholds, dtype=torch.int64)

    return State(
        model=model,
        optimizer=optim.adamw_init(part, grain_of(model)),
        importance=tuple(optim.consolidation_init(layer.experts) for layer in layers if consolidated),
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


def _optimizer_of(state: State) -> ExpertOptimizer:
    return "consolidation" if state.importance else "adamw"


def _regime_of(state: State) -> Regime:
    return "everything" if state.optimizer.mean.norm.numel() else "experts"


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
    importance = state.importance
    check.require(
        len(importance) in (0, len(layers)),
        f"{where}: the state has {len(layers)} carved layers, importance of {len(importance)}.",
    )
    for layer, met in zip(layers, importance, strict=False):
        check.shapes(where, ("gate", layer.experts.gate, "E I H"), ("importance", met, "float E I"))
    trained = adamw_part(state.model, experts=_optimizer_of(state), regime=_regime_of(state))
    for name in ("mean", "square"):
        _check_like(where, f"optimizer.{name}", getattr(state.optimizer, name), trained)
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
    if config.sparse is not None:
        told = config.sparse
        pairs = (("optimizer", _optimizer_of(state), told.optimizer), ("regime", _regime_of(state), told.regime))
        for name, found, value in pairs:
            check.require(
                found == value, f"step: the state is one of {found}, the configuration has sparse.{name}={value!r}."
            )
    if tree.leaves(noise):
        _check_like("step", "noise", noise, state.model)
    sparse = config.sparse
    passed = config
    if sparse is not None and sparse.granularity != "token":
        passed = replace(config, sparse=replace(sparse, moe=replace(sparse.moe, min_k=sparse.moe.num_experts)))
    soft = soft_targets(teacher, batch, config=config, region=region)
    total, seen, grads, of_mean = _backward(state.model, batch, soft, config=passed, region=region)
    metrics: SparseMetrics | tuple[()] = ()
    lr = _rate(state.step, config.optim.lr, config)
    if sparse is not None:
        surprise = scaled_surprise(of_mean, batch)
        share = target_share(state.step, config=sparse.density)
        metrics = sparse_metrics(seen.error, seen, surprise, share, config=config, region=region)
        grads = _sparse_gradients(state.model, grads, seen.carved, surprise, metrics.pi, config=sparse, region=region)
    norms = entry_norms(grads)
    norm = optim.global_norm(norms)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    learns = that_learn(norms, finite)
    importance, usage, lifetime, counter = state.importance, state.usage, state.lifetime, state.step
    scale = optim.clip_scale(norm, max_norm=config.optim.clip_norm)
    speeds = Speeds(lr, scale, experts=lr)
    if importance and sparse is not None:
        kept = tuple(
            {"matrix": own["matrix"], "bias": mean["bias"]} for own, mean in zip(surprise, of_mean, strict=True)
        )
        grads, importance = _consolidated(grads, importance, seen.carved, kept, learns, config=sparse, region=region)
        rate = _rate(counter, sparse.consolidation.lr, config)
        speeds = speeds._replace(experts=rate * batch.mask.sum() * scale)
    columns = [tree.leaves(part) for part in (state.model, grads, *state.optimizer, learns, noise)]
    del state, grads, noise
    model, optimizer = updated(columns, learns, speeds, config=config.optim, region=region)
    if sparse is not None and isinstance(metrics, SparseMetrics):
        model = _controlled(model, seen.carved, metrics.target_share, finite, config=sparse)
        counts = tree.map1(lambda new: torch.where(finite, new, 0), metrics.usage)
        layers = [F.Usage(*row) for row in zip(*counts, strict=True)]
        usage = tuple(tree.map2(torch.add, old, new) for old, new in zip(usage, layers, strict=True))
        lifetime = tuple(old + new.active for old, new in zip(lifetime, layers, strict=True))
    return (
        State(
            model=model,
            optimizer=optimizer,
            importance=importance,
            usage=usage,
            lifetime=lifetime,
            step=counter + 1,
        ),
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


def _backward(
    model: Model, batch: Batch, soft: Tensor | tuple[()], *, config: StepConfig, region: Region
) -> F.SurpriseAndGrad[Model, Measured]:
    """One forward and backward pass; gradients of what does not learn hold no entry and are not computed."""
    sparse = config.sparse
    alone = sparse is not None and sparse.regime == "experts"

    def loss(learns: Model, inputs: Batch, taps: Taps) -> tuple[Tensor, Measured]:
        whole = with_mlps(model, carved_layers(learns)) if alone else learns
        return language_loss(whole, inputs, taps, soft, config=config, region=region)

    taps = zero_taps(model, batch.tokens.numel(), names=_tap_names(sparse))
    gradient = F.surprise_and_grad(loss, taps=taps, engine=config.engine)
    return gradient(banks_alone(model) if alone else model, batch)


def _rate(step: Tensor, peak: float, config: StepConfig) -> Tensor:
    warmup, floor = config.optim.warmup, config.optim.floor
    return optim.warmup_cosine(step, peak=peak, warmup=warmup, total=config.total_steps, floor=floor)


def _tap_names(config: MoeTraining | None) -> tuple[F.TapName, ...]:
    """What the backward pass has to measure."""
    names: tuple[F.TapName, ...] = ("surprise",)
    if config is not None and config.router.target == "counterfactual":
        names += ("counterfactual",)
    if config is not None and config.optimizer == "consolidation":
        names += ("matrix", "bias")
    return names


def _consolidated(
    grads: Model,
    importance: tuple[Tensor, ...],
    seen: tuple[Carved, ...],
    taps: Taps,
    learns: Model,
    *,
    config: MoeTraining,
    region: Region,
) -> tuple[Model, tuple[Tensor, ...]]:
    """The gradients with those of the experts hardened, and the importance of those that learn with this batch's."""
    teach = region(expert_lesson, kind="lesson")
    mlps, met = [], []
    for layer, before, was, own, may in zip(
        carved_layers(grads), importance, seen, taps, carved_layers(learns), strict=True
    ):
        experts, after = teach(layer.experts, before, was, own, config=config.consolidation)
        mlps.append(layer._replace(experts=experts))
        met.append(torch.where(may.experts.gate[..., 0], after, before))
    return with_mlps(grads, mlps), tuple(met)


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
    return with_mlps(grads, mlps)


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
    return with_mlps(model, mlps)


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
        return with_mlps(
            moments, [_forget(layer, plan) for layer, plan in zip(carved_layers(moments), plans, strict=True)]
        )

    return (
        state._replace(
            model=with_mlps(state.model, mlps),
            optimizer=optim.AdamWState(*(follow(part) for part in state.optimizer)),
            importance=tuple(map(F.forget_reborn, state.importance, plans)),
            usage=tree.zeros_like(state.usage),
        ),
        torch.stack([plan.reborn.sum() for plan in plans]),
    )
