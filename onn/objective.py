"""What training minimises and measures: the language loss, its surprise, and what the routers learn from it.

Shape letters: B batch, S sequence, T = B S tokens, H hidden, E experts, L carved layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import onn.functional as F
from onn import check, qwen3, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.qwen3 import Carved, Model, Moe
from onn.region import Region, inline
from onn.tree import Tree

T = TypeVar("T", bound=Tree)

Granularity = Literal["token", "batch", "off"]
RouterTarget = Literal["surprise", "normalised", "counterfactual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule and clipping."""

    lr: float
    """Peak learning rate."""
    warmup: int
    """Steps to the peak."""
    floor: float
    """Last learning rate as a share of the peak."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    """Largest global norm of the gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegrityConfig:
    """Predictive integrity."""

    alpha: float
    """Sensitivity."""
    gamma: float
    """Share of surprise against error."""
    tau_floor: float
    """Lower bound of the output entropy, in nats."""
    delta: float
    """Penalty of unsteadiness in the integral over a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How the router is taught beside the gradient of the main loss."""

    target: RouterTarget
    """Surprise of the active experts, the same without the combine weight, or the counterfactual one of all experts."""
    weight: float
    """Weight of all router losses together."""
    w_ce: float
    """Cross-entropy with the least surprised expert."""
    w_kl: float
    """Divergence from the distribution over surprise."""
    w_diversity: float
    """Orthogonality of the prototypes."""
    w_simplicity: float
    """Small prototypes."""
    temperature: float
    """Margins are divided by it before every softmax."""
    sensitivity: float
    """Steepness of the PI-adaptive mix of surprise and balance."""
    pi_threshold: float
    """PI at which surprise and balance weigh the same; below it balance wins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityConfig:
    """The controller that brings the share of active experts down and holds it."""

    target: float
    """k / E to reach."""
    ramp_steps: int
    """Steps from every expert open to the target."""
    gain: float
    """Share of the measured error that is corrected each step."""

    def __post_init__(self) -> None:
        """Refuse shares that mean nothing."""
        check.between("DensityConfig", "target", self.target, 0, 1)
        check.between("DensityConfig", "gain", self.gain, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Soft targets from the dense model that the experts were carved from, beside the text's own."""

    weight: float
    """Share of the divergence from the teacher in what is minimised; at 0 no teacher is asked."""
    temperature: float
    """Divides the logits of both before every softmax."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check.between("DistillConfig", "weight", self.weight, 0, 1)
        check.require(self.temperature > 0, f"DistillConfig: expected temperature={self.temperature!r} > 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeTraining:
    """Everything that only a carved model needs."""

    moe: qwen3.MoeConfig
    granularity: Granularity
    """SMK by token, by batch, or off."""
    router: RouterConfig
    density: DensityConfig
    distill: DistillConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """What `step` needs to know; static, so a compiled step is compiled once."""

    model: qwen3.Qwen3Config
    sparse: MoeTraining | None
    """`None` for a dense model."""
    optim: OptimConfig
    integrity: IntegrityConfig
    total_steps: int
    engine: tree.Engine


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
        ValueError: it has weight and there is no teacher.
    """
    if config.sparse is None or config.sparse.distill.weight == 0:
        return ()
    weight = config.sparse.distill.weight
    if not isinstance(teacher, Model):
        raise ValueError(f"soft_targets: distill.weight={weight!r} needs a dense model as the teacher, got none.")
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
        [T]; 0 where the two differ by a constant.

    References:
        Hinton, Vinyals and Dean, 1503.02531.
    """
    student, teacher = (log_softmax(scores / temperature, dim=-1) for scores in (logits, soft))
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
    """
    moe = None if config.sparse is None else config.sparse.moe
    x_BSH, carved = qwen3.hidden_states(model, batch.tokens, taps, config=config.model, moe=moe, region=region)
    readout = region(_readout_loss, kind="loss")
    loss, seen = readout(model.norm, qwen3.output_weight(model), x_BSH, batch.targets, batch.mask, soft, config=config)
    return loss, seen._replace(carved=carved)


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
    """Surprise of the summed loss: that of the mean loss times the targets that count, so free of the batch size."""
    total = batch.mask.sum().clamp_min(1)
    return tuple(
        {name: value * (total**2 if name == "neuron" else total) for name, value in tap.items()} for tap in taps
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
    progress = (step.to(torch.float32) / max(config.ramp_steps, 1)).clamp(max=1)
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


def _layer_figures(seen: Carved, surprise: Tensor) -> _LayerFigures:
    active = seen.routing.active & (seen.routing.weights != 0)
    counted = active & torch.isfinite(surprise)
    total = torch.where(counted, surprise, 0)
    by_expert = counted.sum(dim=0)
    return _LayerFigures(
        total=total.sum(),
        counted=by_expert.sum(),
        active_share=active.float().mean(),
        gate=F.gate_accuracy(seen.routing.scores, surprise, active),
        usage=F.usage(seen.routing),
        surprise_by_expert=total.sum(dim=0) / torch.where(by_expert > 0, by_expert, torch.nan),
        non_finite=F.non_finite(surprise, active),
    )


def sparse_metrics(
    loss: Tensor, seen: Measured, surprise: Taps, share: Tensor, *, config: IntegrityConfig, region: Region = inline
) -> SparseMetrics:
    """The figures of a carved model from one forward and backward pass."""
    of_layer = region(_layer_figures, kind="figures")
    layers = [of_layer(layer, tap["surprise"]) for layer, tap in zip(seen.carved, surprise, strict=True)]
    figures = _LayerFigures(*(_stacked(column) for column in zip(*layers, strict=True)))
    mean = figures.total.sum() / figures.counted.sum().clamp_min(1)
    return SparseMetrics(
        surprise=mean,
        pi=F.predictive_integrity(
            loss, seen.tau, mean, alpha=config.alpha, gamma=config.gamma, tau_floor=config.tau_floor
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
