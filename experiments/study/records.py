"""What the forgetting study keeps of every run, in memory and in `results.json`."""

from __future__ import annotations

from typing import Literal, NamedTuple

Stage = Literal["tuning", "evaluation", "frontier", "neighbour", "exploration"]
Series = Literal["loss", "tau", "surprise", "pi"]
Symbols = Literal["input", "target", "class"]


class Key(NamedTuple):
    """What was run; two runs of equal key are the same run."""

    family: str
    """`digits-permuted`, `digits-rotated` or `text`."""
    regime: str
    """`experts`: they and the router hold all plasticity after the first task; `everything`: all is trained."""
    arm: str
    """Of the table of arms, as `smk-2` or `root-neuron`."""
    optimizer: str
    """`sgd`, `adamw`, `adagrad`, or `own` where the arm is its own optimizer."""
    lr: float
    strength: float
    """The arm's other number, as of a penalty; 0 where it has none."""
    seed: int


class Run(NamedTuple):
    """One model trained on the tasks in order."""

    key: Key
    stage: Stage
    """Seeds of `tuning` are never among those of the other stages."""
    scores: tuple[tuple[float, ...], ...]
    """[tasks + 1][tasks]: row i after i tasks (row 0 before the first): accuracy in [0, 1], or minus nats for text."""
    losses: tuple[tuple[float, ...], ...]
    """[tasks + 1][tasks]: held-out cross-entropy in nats."""
    change: float
    """Norm of what the experts' parameters changed by from the end of the first task to the last, over their norm."""
    active: float
    """Mean active experts of a token over the last task, as a share of all."""
    series: dict[Series, tuple[float, ...]]
    """Means over equal stretches of training, the same number of stretches for every task, in order."""


class Vocabulary(NamedTuple):
    """How far experts keep to certain symbols, by `measures.vocabulary`; NaN for an expert that is never active."""

    symbols: Symbols
    """The characters that are read, those that come next, or the classes of images."""
    mean: float
    """Over the experts that are active on any token."""
    experts: tuple[float, ...]
    """[E]"""
    chance: tuple[float, ...]
    """[E]: the mean over permutations of the symbols over the tokens."""
    permuted: tuple[float, ...]
    """The mean over experts, for each permutation."""


class Specialisation(NamedTuple):
    """Who serves which task, measured on one trained model; T tokens are the held-out ones of all tasks."""

    key: Key
    usage: tuple[tuple[int, ...], ...]
    """[tasks][E]: held-out tokens that each expert was active on, at the end."""
    information: float
    """I(expert; task) in nats, of the active pairs."""
    permuted: tuple[float, ...]
    """The same for permutations of the tasks over the tokens."""
    ablation: tuple[tuple[float, ...], ...]
    """[E][tasks]: nats that the task's held-out loss rises by when the expert is left out."""
    saturation: tuple[float, ...]
    """[tasks + 1]: |A_i and A_end| / |A_end|, mean over tokens, of the active sets after i tasks and at the end."""
    coactivation: float
    """Mean over pairs of distinct experts of P(both active) / min(P(one), P(other)); 0 for pairs of an unused one."""
    vocabulary: tuple[Vocabulary, ...] = ()
    """Of each kind of symbols that the family has."""
    course: tuple[float, ...] = ()
    """[tasks + 1]: I(expert; task) before the first task, where prototypes are random, and after each."""
