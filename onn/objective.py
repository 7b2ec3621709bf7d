"""What training minimises and measures: the language loss, its surprise, and what the routers learn from it.

Shape letters: B batch, S sequence, T = B S tokens, H hidden, E experts, L carved layers.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import onn.functional as F
from onn import check, qwen3, tree
from onn.architecture import Route
from onn.data import Batch
from onn.functional.kernels.entries import tap_dims
from onn.functional.transform import Taps
from onn.qwen3 import Carved, Model, Moe
from onn.region import Region, inline
from onn.settings import ConsolidationConfig as ConsolidationConfig
from onn.settings import DensityConfig as DensityConfig
from onn.settings import DistillConfig as DistillConfig
from onn.settings import ExpertOptimizer as ExpertOptimizer
from onn.settings import Granularity as Granularity
from onn.settings import IntegrityConfig as IntegrityConfig
from onn.settings import MoeTraining as MoeTraining
from onn.settings import OptimConfig as OptimConfig
from onn.settings import Regime as Regime
from onn.settings import RouterConfig as RouterConfig
from onn.settings import RouterTarget as RouterTarget
from onn.settings import StepConfig as StepConfig
from onn.tree import Tree

T = TypeVar("T", bound=Tree)

_SQUARES = ("neuron", "matrix")


class Measured(NamedTuple):
    """What a forward pass tells besides the scalar to minimise."""

    error: Tensor
    """Scalar: the main loss, mean cross-entropy in nats."""
    divergence: Tensor | tuple[()]
    """Scalar: `distillation_loss`, its mean; empty without a teacher."""
    tau: Tensor
    """Scalar: mean output entropy in nats."""
    accuracy: Tensor
    """Scalar: share of counted targets that are the most likely token."""
    carved: tuple[Carved, ...]


class SparseMetrics(NamedTuple):
    """Figures that only a carved model has."""

    surprise: Tensor
    """Scalar: mean over layers and active pairs."""
    pi: Tensor
    """Scalar: predictive integrity."""
    active_share: Tensor
    """Scalar: active pairs over all pairs, k / E."""
    target_share: Tensor
    """Scalar: what the controller aims at."""
    gate: F.GateAccuracy
    usage: F.Usage
    """[L, E] each"""
    surprise_by_expert: Tensor
    """[L, E]: mean over the tokens that each expert was active on; NaN without any."""
    non_finite: Tensor
    """Scalar int64: active pairs whose surprise is NaN or infinite."""


def carved_layers(model: Model) -> list[Moe]:
    """The carved layers of a model, in order."""
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)]


def soft_targets(
    teacher: Model | tuple[()], batch: Batch, *, config: StepConfig, region: Region = inline
) -> Tensor | tuple[()]:
    """What a dense teacher says of every token: logits [T, V], a constant.

    Empty, and nothing is computed, where the configuration gives it no weight.

    Raises:
        ValueError: it has weight and there is no teacher, or one that does not fit.
    """
    if config.sparse is None or config.sparse.distill.weight == 0:
        return ()
    weight = config.sparse.distill.weight
    if not isinstance(teacher, Model):
        raise ValueError(f"soft_targets: distill.weight={weight!r} needs a dense model as the teacher, got none.")
    check.require(not carved_layers(teacher), "soft_targets: expected a dense model as the teacher, got a carved one.")
    with torch.no_grad():
        output = qwen3.forward(teacher, batch.tokens, (), config=config.model, moe=None, region=region)
    return output.logits.flatten(0, 1)


def distillation_loss(logits: Tensor, soft: Tensor, *, temperature: float) -> Tensor:
    """`temperature^2 KL(softmax(soft / temperature) || softmax(logits / temperature))` of every row, in nats.

    The square keeps the size of the gradient, which falls with it, beside that of the main loss.

    Args:
        logits: [T, V] of the student.
        soft: [T, V] of the teacher.
        temperature: positive.

    Returns:
        [T], float32 (float64 for float64 logits); 0 where the two differ by a constant.

    References:
        Hinton, Vinyals and Dean, 1503.02531.
    """
    check.shapes("distillation_loss", ("logits", logits, "float T V"), ("soft", soft, "float T V"))
    check.positive("distillation_loss", "temperature", temperature)
    widened = (scores.to(F.reduction_dtype(scores.dtype)) for scores in (logits, soft))
    student, teacher = (log_softmax(scores / temperature, dim=-1) for scores in widened)
    return temperature**2 * kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def language_loss(
    model: Model,
    batch: Batch,
    taps: Taps,
    soft: Tensor | tuple[()],
    *,
    config: StepConfig,
    region: Region = inline,
) -> tuple[Tensor, Measured]:
    """What is minimised, in float32 (float64 for float64 models), over the targets that count.

    Args:
        model: parameters.
        batch: text.
        taps: see `qwen3.forward`.
        soft: of `soft_targets`; empty for the main loss alone.
        config: static.
        region: how the layers and the loss are carried out.

    Returns:
        The mean cross-entropy in nats, mixed with the divergence from the teacher where there is one; and what else the
        forward pass tells, detached.

    Raises:
        ValueError: see `qwen3.forward`; or batch, soft targets and configuration do not fit one another.
    """
    _check_batch("language_loss", batch)
    if isinstance(soft, Tensor):
        check.holds("language_loss", "soft", soft, "float")
        check.require(config.sparse is not None, "language_loss: got soft targets, but config.sparse=None: no weight.")
    moe = None if config.sparse is None else config.sparse.moe
    x_BSH, carved = qwen3.hidden_states(model, batch.tokens, taps, config=config.model, moe=moe, region=region)
    readout = region(_readout_loss, kind="loss")
    head = qwen3.output_weight(model)
    try:
        loss, seen = readout(model.norm, head, x_BSH, batch.targets, batch.mask, soft, config=config)
    except IndexError as error:  # on a CPU, which looks before it reads
        message = f"language_loss: targets that are not below vocab_size={config.model.vocab_size}: {error}."
        raise ValueError(message) from error
    return loss, seen._replace(carved=carved)


def _check_batch(where: str, batch: Batch) -> None:
    check.shapes(
        where,
        ("tokens", batch.tokens, "integer B S"),
        ("targets", batch.targets, "integer B S"),
        ("mask", batch.mask, "bool B S"),
    )
    check.require(batch.targets.dtype == torch.int64, f"{where}: expected int64 targets, got {batch.targets.dtype}.")


def _readout_loss(
    norm: Tensor,
    head: Tensor,
    x_BSH: Tensor,
    targets: Tensor,
    mask: Tensor,
    soft: Tensor | tuple[()],
    *,
    config: StepConfig,
) -> tuple[Tensor, Measured]:
    logits = qwen3.readout(norm, head, x_BSH, config=config.model).flatten(0, 1)
    logits = logits.to(F.reduction_dtype(logits.dtype))
    counted = mask.flatten().to(logits.dtype)
    targets = targets.flatten()

    def mean(values: Tensor) -> Tensor:
        return (values * counted).sum() / counted.sum().clamp_min(1)

    error = loss = mean(cross_entropy(logits, targets, reduction="none"))
    divergence: Tensor | tuple[()] = ()
    if isinstance(soft, Tensor) and config.sparse is not None:
        distill = config.sparse.distill
        divergence = mean(distillation_loss(logits, soft.to(logits.dtype), temperature=distill.temperature))
        loss = (1 - distill.weight) * error + distill.weight * divergence
    detached = logits.detach()
    seen = Measured(
        error=error,
        divergence=divergence,
        tau=mean(F.token_entropy(detached)),
        accuracy=mean(detached.argmax(dim=-1) == targets),
        carved=(),
    )
    return loss, tree.detach(seen)


def zero_taps(model: Model, tokens: int, *, names: tuple[F.TapName, ...]) -> Taps:
    """Taps for every carved layer of a model (see `onn.functional.zero_taps`)."""
    return tuple(F.zero_taps(names, tokens=tokens, experts=layer.experts) for layer in carved_layers(model))


def scaled_surprise(taps: Taps, batch: Batch) -> Taps:
    """Surprise of the summed loss: that of the mean loss times the targets that count, so free of the batch size.

    Raises:
        ValueError: an unknown tap, or one that is not of the batch.
    """
    _check_batch("scaled_surprise", batch)
    for tap in taps:
        for name in tap:
            check.one_of("scaled_surprise", "tap", name, get_args(F.TapName))
        rows = ((f"tap {name}", tap[name], f"float {tap_dims(name=name)}") for name in tap)
        check.shapes("scaled_surprise", ("tokens", batch.tokens.flatten(), "T"), *rows)
    total = batch.mask.sum().clamp_min(1)
    return tuple(
        {name: value * (total**2 if name in _SQUARES else total) for name, value in tap.items()} for tap in taps
    )


def measure(model: Model, batch: Batch, *, config: StepConfig) -> tuple[Tensor, Measured, Taps]:
    """Main loss, figures and surprise without any parameter gradient: evaluation.

    Returns:
        The loss, what the forward pass tells, and per carved layer the surprise [T, E] of the summed loss.
    """

    def loss(_: tuple[()], inputs: Batch, taps: Taps) -> tuple[Tensor, Measured]:
        return language_loss(model, inputs, taps, (), config=config)

    taps = zero_taps(model, batch.tokens.numel(), names=("surprise",))
    if not taps:
        with torch.no_grad():
            return *loss((), batch, taps), ()
    result = F.surprise_and_grad(loss, taps=taps, engine=config.engine)((), batch)
    return result.loss, result.aux, scaled_surprise(result.surprise, batch)


def target_share(step: Tensor, *, config: DensityConfig) -> Tensor:
    """The share of active experts to aim at: linear from 1 down to the target over the ramp."""
    check.holds("target_share", "step", step, "real")
    ramp = config.ramp_steps
    progress = (step.to(torch.float32) / ramp).clamp(max=1) if ramp else torch.ones_like(step, dtype=torch.float32)
    return 1 - (1 - config.target) * progress


class _LayerFigures(NamedTuple):
    """Of one carved layer; scalars but where a shape stands."""

    total: Tensor
    """Finite surprise of active pairs, summed."""
    counted: Tensor
    """How many these are."""
    active_share: Tensor
    gate: F.GateAccuracy
    usage: F.Usage
    """[E] each"""
    surprise_by_expert: Tensor
    """[E]"""
    non_finite: Tensor


def _layer_figures(seen: Carved, surprise: Tensor, *, route: Route) -> _LayerFigures:
    active = seen.routing.active & (seen.routing.weights != 0)
    counted = active & torch.isfinite(surprise)
    total = torch.where(counted, surprise, 0)
    by_expert = counted.sum(dim=0)
    return _LayerFigures(
        total=total.sum(),
        counted=by_expert.sum(),
        active_share=active.float().mean(),
        gate=F.gate_accuracy(seen.routing.scores, surprise, active),
        usage=_usage(seen.routing, route),
        surprise_by_expert=total.sum(dim=0) / torch.where(by_expert > 0, by_expert, torch.nan),
        non_finite=F.non_finite(surprise, active),
    )


def _usage(routing: F.Routing, route: Route) -> F.Usage:
    """The best k have no threshold to pass: all that are active were routed."""
    if route == "threshold":
        return F.usage(routing)
    counts = routing.active.sum(dim=0)
    return F.Usage(routed=counts, active=counts)


def sparse_metrics(
    loss: Tensor, seen: Measured, surprise: Taps, share: Tensor, *, config: StepConfig, region: Region = inline
) -> SparseMetrics:
    """The figures of a carved model from one forward and backward pass."""
    if config.sparse is None:
        raise ValueError("sparse_metrics: config.sparse=None: no carved model.")
    check.require(
        len(seen.carved) == len(surprise) > 0 and all("surprise" in tap for tap in surprise),
        f"sparse_metrics: expected a tap 'surprise' for each of {len(seen.carved)} carved layers, one or more, got "
        f"{[sorted(tap) for tap in surprise]}.",
    )
    scalars = (("loss", loss), ("tau", seen.tau), ("share", share))
    check.shapes("sparse_metrics", *((name, value, "float") for name, value in scalars))
    for layer, tap in zip(seen.carved, surprise, strict=True):
        rows = (("weights", layer.routing.weights, "float T E"), ("tap surprise", tap["surprise"], "float T E"))
        check.shapes("sparse_metrics", *rows, ("active", layer.routing.active, "bool T E"))
    of_layer, route = region(_layer_figures, kind="figures"), config.sparse.moe.route
    layers = [of_layer(layer, tap["surprise"], route=route) for layer, tap in zip(seen.carved, surprise, strict=True)]
    figures = _LayerFigures(*(_stacked(column) for column in zip(*layers, strict=True)))
    mean, integrity = figures.total.sum() / figures.counted.sum().clamp_min(1), config.integrity
    return SparseMetrics(
        surprise=mean,
        pi=F.predictive_integrity(
            loss, seen.tau, mean, alpha=integrity.alpha, gamma=integrity.gamma, tau_floor=integrity.tau_floor
        ),
        active_share=figures.active_share.mean(),
        target_share=share,
        gate=tree.map1(torch.mean, figures.gate),
        usage=figures.usage,
        surprise_by_expert=figures.surprise_by_expert,
        non_finite=figures.non_finite.sum(),
    )


def _stacked(column: tuple[T, ...]) -> T:
    return tree.unflatten(column[0], [torch.stack(row) for row in zip(*map(tree.leaves, column), strict=True)])
