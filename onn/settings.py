"""What a training step is told: every value of the optimizer, the routers, the density and the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from onn import check, tree
from onn.architecture import MoeConfig, Qwen3Config

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

    def __post_init__(self) -> None:
        """Refuse decays that leave nothing, or grow."""
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            check.require(0 <= beta < 1, f"OptimConfig: expected 0 <= {name}={beta!r} < 1.")
        check.at_least("OptimConfig", "warmup", self.warmup, 0)
        check.between("OptimConfig", "floor", self.floor, 0, 1)
        check.require(self.clip_norm > 0, f"OptimConfig: expected clip_norm={self.clip_norm!r} > 0.")


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

    def __post_init__(self) -> None:
        """Refuse a target that is none, and a division by nothing."""
        check.one_of("RouterConfig", "target", self.target, get_args(RouterTarget))
        check.positive("RouterConfig", "temperature", self.temperature)


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

    moe: MoeConfig
    granularity: Granularity
    """SMK by token, by batch, or off."""
    router: RouterConfig
    density: DensityConfig
    distill: DistillConfig

    def __post_init__(self) -> None:
        """Refuse a granularity that is none."""
        check.one_of("MoeTraining", "granularity", self.granularity, get_args(Granularity))


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
