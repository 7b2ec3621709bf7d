"""What the study compares: an arm is a row of numbers that one universal step reads, so that no arm is compiled twice.

`ARMS` is the table. Every arm is tried under the same grid of learning rates by every optimizer, unless it is its own
optimizer; a second number (`strength`), where an arm has one, is tried at every value of its own grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Literal

from onn.observe import Json

Optimizer = Literal["sgd", "adamw", "adagrad", "own"]
Data = Literal["order", "joint"]
Penalty = Literal["none", "ewc", "si"]

OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adamw", "adagrad")
ALL = 10**6
BASE_ACTIVE = 1 / 4
"""Share of the experts that a token has active, unless an arm says otherwise."""


class Rule(IntEnum):
    """By which a token's active experts are ranked; the first learn from it."""

    SURPRISE = 0
    MOST_SURPRISE = 1
    RANDOM = 2
    NORMALISED = 3
    OUTPUT = 4
    RELATIVE = 5


class ExpertRule(IntEnum):
    """By which the experts are ranked that learn from a batch at all."""

    EVERY = 0
    BATCH_SURPRISE = 1
    USAGE_CONTRAST = 2


class Grain(IntEnum):
    """For what one number of importance stands."""

    EXPERT = 0
    NEURON = 1
    WEIGHT = 2
    EXPERT_INPUT = 3
    """For an expert, times one for each input that all experts share."""
    NEURON_INPUT = 4


class Centre(IntEnum):
    """What is taken off the inputs of the experts before their gate and up projections learn from them."""

    NOTHING = 0
    BATCH = 1
    """The mean of the batch."""
    EXPERT = 2
    """The mean of each expert's own tokens, by combine weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to learn. What is left at its default is updating everything."""

    note: str
    """What it is, in a few words."""
    rule: Rule = Rule.SURPRISE
    learners: int = ALL
    """How many of a token's active experts learn from it."""
    expert_rule: ExpertRule = ExpertRule.EVERY
    expert_share: float = 1.0
    """Of all experts, may learn from a batch."""
    active: float = BASE_ACTIVE
    """Share of the experts that a token has active; a target where the route is dynamic."""
    dynamic: bool = False
    """Thresholds decide how many are active; the best `active` of all otherwise."""
    teach_surprise: float = 0.0
    """Weight of the surprise in what the router learns."""
    teach_balance: float = 0.0
    """Weight of load balance in what the router learns."""
    router_moves: bool = True
    """Whether the router learns after the first task; it does in the first."""
    experts_move: bool = True
    root: float = 0.0
    """Power of the importance that divides a step; 0.5 is the root form."""
    bounded: bool = False
    """Steps are divided by `1 + strength F / mean F`."""
    grain: Grain = Grain.NEURON
    everywhere: bool = True
    """Consolidation of every matrix that learns; of the experts alone otherwise."""
    importance_decay: float = 1.0
    """Of the importance, each step."""
    momentum: float = 0.0
    centre: Centre = Centre.NOTHING
    whitened: bool = False
    """The batch's inputs are damped along the directions that they share, before gate and up learn from them, and
    features, where these learn: from inputs less their mean.
    """
    split: bool = False
    """An expert's or neuron's importance is divided among gate, up and down as the batch's squared gradients are."""
    penalty: Penalty = "none"
    replay: bool = False
    project: bool = False
    """A-GEM: the gradient is projected where it would raise the loss of stored examples."""
    data: Data = "order"
    matched: str = ""
    """Another arm: the learning rate is lowered until the experts change by as much as under it."""
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
    strengths: tuple[float, ...] = (0.0,)

    def told(self) -> Mapping[str, Json]:
        """Every field, as a file holds it: rules and grains by their names."""
        return {name: value.name if isinstance(value, Enum) else value for name, value in asdict(self).items()}


_LOWEST: Mapping[Optimizer, float] = MappingProxyType({"sgd": 0.05, "adamw": 2.5e-4, "adagrad": 0.005, "own": 0.0025})


def rates(optimizer: Optimizer) -> tuple[float, ...]:
    """The grid of learning rates: six, each twice the last."""
    return tuple(_LOWEST[optimizer] * 2**step for step in range(6))


def _selections() -> dict[str, Arm]:
    """SMK and its controls."""
    named = (
        ("smk", Rule.SURPRISE, "the least surprised"),
        ("max", Rule.MOST_SURPRISE, "the most surprised"),
        ("random", Rule.RANDOM, "at random"),
    )
    found = {
        f"{name}-{k}": Arm(note=f"{k} of a token's active experts learn, {which}", rule=rule, learners=k)
        for name, rule, which in named
        for k in (1, 2, 4)
    }
    return found | {
        "normalised-2": Arm(note="SMK on S / w, the counterfactual surprise", rule=Rule.NORMALISED, learners=2),
        "output-2": Arm(note="SMK on output surprise, which knows nothing of the expert", rule=Rule.OUTPUT, learners=2),
        "relative-2": Arm(note="SMK on surprise over the expert's own running level", rule=Rule.RELATIVE, learners=2),
        "batch-smk": Arm(
            note="the quarter of the experts with the least gradient learns",
            expert_rule=ExpertRule.BATCH_SURPRISE,
            expert_share=0.25,
        ),
        "usage-contrast": Arm(
            note="the quarter of the experts learns that is used more now than before",
            expert_rule=ExpertRule.USAGE_CONTRAST,
            expert_share=0.25,
        ),
    }


def _baselines() -> dict[str, Arm]:
    return {
        "all": Arm(note="everything learns"),
        "matched": Arm(
            note="everything learns, at the rate that changes the experts as much as smk-2", matched="smk-2"
        ),
        "frozen-experts": Arm(note="experts frozen after the first task", experts_move=False),
        "frozen-router": Arm(note="router frozen after the first task", router_moves=False),
        "ewc": Arm(note="elastic weight consolidation, online", penalty="ewc", strengths=(1.0, 10.0, 100.0)),
        "si": Arm(note="synaptic intelligence", penalty="si", strengths=(0.001, 0.01, 0.1)),
        "a-gem": Arm(note="A-GEM, 100 stored examples a task", project=True),
        "replay": Arm(note="replay of 100 stored examples a task, half of each batch", replay=True),
        "joint": Arm(note="all tasks at once: the upper bound", data="joint"),
        "loss-route": Arm(note="thresholds, taught by the loss alone", dynamic=True),
        "balance-route": Arm(note="thresholds, taught by load balance", dynamic=True, teach_balance=0.01),
        "surprise-route": Arm(note="thresholds, taught by surprise (SurpriseMin)", dynamic=True, teach_surprise=0.01),
        "smk-2-surprise-route": Arm(
            note="SurpriseMin and SMK", dynamic=True, teach_surprise=0.01, rule=Rule.SURPRISE, learners=2
        ),
    }


def _consolidations() -> dict[str, Arm]:
    found = {}
    for grain in (Grain.EXPERT, Grain.NEURON, Grain.WEIGHT):
        found[f"root-{grain.name.lower()}"] = Arm(
            note=f"surprise consolidation, root form, one number by {grain.name.lower()}",
            root=0.5,
            grain=grain,
            optimizers=("own",),
        )
        found[f"bounded-{grain.name.lower()}"] = Arm(
            note=f"surprise consolidation, bounded form, one number by {grain.name.lower()}",
            bounded=True,
            grain=grain,
            optimizers=("sgd", "adamw"),
            strengths=(3.0, 30.0, 300.0),
        )
    return found | {
        "centred": Arm(note="everything learns, experts from inputs less the batch's mean", centre=Centre.BATCH),
        "centred-neuron": Arm(
            note="surprise consolidation by neuron, experts from inputs less the batch's mean",
            root=0.5,
            centre=Centre.BATCH,
            optimizers=("own",),
        ),
        "self-centred": Arm(note="everything learns, experts from inputs less their own mean", centre=Centre.EXPERT),
        "self-centred-neuron": Arm(
            note="surprise consolidation by neuron, split by matrix, experts from inputs less their own mean",
            root=0.5,
            centre=Centre.EXPERT,
            split=True,
            optimizers=("own",),
        ),
        "whitened-neuron": Arm(
            note="self-centred-neuron, the inputs whitened of experts and of features that learn",
            root=0.5,
            centre=Centre.EXPERT,
            whitened=True,
            split=True,
            optimizers=("own",),
        ),
    }


ARMS: Mapping[str, Arm] = MappingProxyType(_baselines() | _selections() | _consolidations())
FRONTIER = ("smk-2", "random-2", "all", "root-neuron", "whitened-neuron")
"""Arms that are tried on all seeds along the whole grid."""
SPECIALISED = ("all", "smk-2", "random-2", "balance-route", "surprise-route", "root-neuron", "whitened-neuron")
"""Arms whose experts are looked at one by one."""


def _explorations() -> dict[str, Arm]:
    """Where surprise consolidation works and where it stops: one change of `root-neuron` each."""
    ours = ARMS["root-neuron"]
    densities = (1 / 32, 1 / 16, 1 / 8, 1 / 2, 1.0)
    changed = {
        **{f"power {power:g}": replace(ours, root=power) for power in (0.25, 0.4, 0.6, 0.75, 1.0)},
        **{f"centred, power {power:g}": replace(ours, root=power, centre=Centre.BATCH) for power in (0.4, 0.6)},
        **{f"decay {decay:g}": replace(ours, importance_decay=decay) for decay in (0.99, 0.999)},
        "momentum 0.9": replace(ours, momentum=0.9),
        "experts alone": replace(ours, everywhere=False),
        "with smk-2": replace(ours, learners=2),
        "with random-2": replace(ours, learners=2, rule=Rule.RANDOM),
        "with usage contrast": replace(ours, expert_rule=ExpertRule.USAGE_CONTRAST, expert_share=0.25),
        "frozen router": replace(ours, router_moves=False),
        "by expert and input": replace(ours, grain=Grain.EXPERT_INPUT),
        "by neuron and input": replace(ours, grain=Grain.NEURON_INPUT),
        "centred, by expert and input": replace(ours, grain=Grain.EXPERT_INPUT, centre=Centre.BATCH),
        "centred, by neuron and input": replace(ours, grain=Grain.NEURON_INPUT, centre=Centre.BATCH),
        "centred, by weight": replace(ours, grain=Grain.WEIGHT, centre=Centre.BATCH),
        "split": replace(ours, split=True),
        "self-centred": replace(ours, centre=Centre.EXPERT),
        "whitened": replace(ours, whitened=True),
        "self-centred, by expert, split": replace(ours, grain=Grain.EXPERT, centre=Centre.EXPERT, split=True),
        "self-centred, by weight": replace(ours, grain=Grain.WEIGHT, centre=Centre.EXPERT),
        **{f"density 1/{1 / density:g}": replace(ours, active=density) for density in densities},
    }
    dense = {
        f"all, density 1/{1 / density:g}": replace(ARMS["all"], active=density, optimizers=("sgd",))
        for density in densities
    }
    named = {f"root-neuron, {change}": arm for change, arm in changed.items()} | dense
    return {name: replace(arm, note=name) for name, arm in named.items()}


EXPLORATIONS: Mapping[str, Arm] = MappingProxyType(_explorations())
