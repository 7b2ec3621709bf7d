"""What a training step is told: every value of the optimizer, the routers, the density and the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from onn import check, tree
from onn.architecture import MoeConfig, Qwen3Config

Granularity = Literal["token", "batch", "off"]
ExpertOptimizer = Literal["adamw", "consolidation"]
Regime = Literal["everything", "experts"]
RouterTarget = Literal["surprise", "normalised", "counterfactual"]
MOST_STEPS = 2**62
"""What a counter of steps holds."""


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

    def __post_init__(self) -> None:
        """Refuse decays that leave nothing, or grow."""
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            check.require(0 <= beta < 1, f"OptimConfig: expected 0 <= {name}={beta!r} < 1.")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            check.weight("OptimConfig", name, value)
        check.between("OptimConfig", "warmup", self.warmup, 0, MOST_STEPS)
        check.between("OptimConfig", "floor", self.floor, 0, 1)
        clip = self.clip_norm
        check.require(
            0 < clip <= check.LARGEST or clip == math.inf,
            f"OptimConfig: expected 0 < clip_norm={clip!r} <= {check.LARGEST:g}, or infinite.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsolidationConfig:
    """Surprise consolidation of the experts, `onn.optim.consolidation`, where it is their optimizer."""

    lr: float
    """Peak learning rate of the experts, on the schedule of all others."""
    damping: float
    """Of the whitening of their inputs; the larger, the less is changed."""
    eps: float
    """Added to the importance of a weight, in squared surprise of the summed loss."""

    def __post_init__(self) -> None:
        """Refuse a division by nothing."""
        check.weight("ConsolidationConfig", "lr", self.lr)
        for name in ("damping", "eps"):
            check.positive("ConsolidationConfig", name, getattr(self, name))


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

    def __post_init__(self) -> None:
        """Refuse what would only be noticed by the first carved step, or at the end of a run."""
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            check.weight("IntegrityConfig", name, value)
        check.between("IntegrityConfig", "gamma", self.gamma, 0, 1)
        check.positive("IntegrityConfig", "tau_floor", self.tau_floor)


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

    def __post_init__(self) -> None:
        """Refuse a target that is none, a division by nothing, and weights that are no numbers."""
        check.one_of("RouterConfig", "target", self.target, get_args(RouterTarget))
        check.positive("RouterConfig", "temperature", self.temperature)
        for name in ("weight", "w_ce", "w_kl", "w_diversity", "w_simplicity", "sensitivity"):
            check.weight("RouterConfig", name, getattr(self, name))
        check.between("RouterConfig", "pi_threshold", self.pi_threshold, -check.LARGEST, check.LARGEST)


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
        check.between("DensityConfig", "ramp_steps", self.ramp_steps, 0, MOST_STEPS)


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
        check.positive("DistillConfig", "temperature", self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeTraining:
    """Everything that only a carved model needs."""

    moe: MoeConfig
    granularity: Granularity
    """SMK by token, by batch, or off."""
    optimizer: ExpertOptimizer
    """Of the experts; all else is AdamW's."""
    regime: Regime
    """Whether everything learns, or experts and routers alone: all else stays as it was carved."""
    consolidation: ConsolidationConfig
    router: RouterConfig
    density: DensityConfig
    distill: DistillConfig

    def __post_init__(self) -> None:
        """Refuse a granularity, optimizer or regime that is none, and a target that the backend does not measure."""
        check.one_of("MoeTraining", "granularity", self.granularity, get_args(Granularity))
        check.one_of("MoeTraining", "optimizer", self.optimizer, get_args(ExpertOptimizer))
        check.one_of("MoeTraining", "regime", self.regime, get_args(Regime))
        check.require(
            self.router.target != "counterfactual" or self.moe.backend.partition(":")[0] in ("auto", "dense"),
            f"MoeTraining: router.target='counterfactual' needs every expert computed: expected moe.backend='dense' or "
            f"'auto', got {self.moe.backend!r}.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """What `step` needs to know; static, so a compiled step is compiled once."""

    model: Qwen3Config
    sparse: MoeTraining | None
    """`None` for a dense model."""
    optim: OptimConfig
    integrity: IntegrityConfig
    total_steps: int
    engine: tree.Engine

    def __post_init__(self) -> None:
        """Refuse an engine that is none, and a schedule of no length."""
        check.one_of("StepConfig", "engine", self.engine, get_args(tree.Engine))
        check.between("StepConfig", "total_steps", self.total_steps, 0, MOST_STEPS)
