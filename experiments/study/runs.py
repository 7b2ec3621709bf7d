"""Runs, twenty lanes at a time: training on the tasks in order, and what is measured before, between and after them.

Shape letters: N lanes, S stretches, otherwise as in `net`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import onn.functional as F
from experiments import noise
from experiments.compiling import compiled
from experiments.study.lanes import Job, lanes, needs, plasticity
from experiments.study.net import Examples, Net, forward
from experiments.study.records import Run, Series
from experiments.study.state import Figures, Lane, Needs, Plasticity, State, init_state
from experiments.study.step import activate, step
from experiments.study.tasks import Schedule, Tasks
from experiments.study.update import end_task
from onn import tree

LANES = 20
STRETCHES = 5
"""Of each task, over which figures are averaged."""
STORED = 100
"""Examples of each task that replay and A-GEM keep."""
SERIES: tuple[Series, ...] = ("loss", "tau", "surprise", "pi")


class Seen(NamedTuple):
    """One evaluation on the held-out examples of one task."""

    loss: Tensor
    """[N] in nats."""
    accuracy: Tensor
    """[N]"""
    active: Tensor
    """[N, n, E] bool"""


class Trained(NamedTuple):
    """A chunk of runs, and the models for what is measured on them."""

    runs: list[Run]
    net: Net
    """[N, ...]: at the end."""
    thresholds: Tensor
    """[N, E]"""
    active: list[Tensor]
    """[N, tasks n, E] bool before the first task and after each."""


def chunks(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in chunks of at most `LANES` that share a kind of step; the same jobs give the same chunks.

    The first of every kind lead, so that several processes begin with different kinds, which they compile.
    """
    kinds: dict[Needs, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(needs(job), []).append(job)
    parts = [[kind[at : at + LANES] for at in range(0, len(kind), LANES)] for kind in kinds.values()]
    return [part[0] for part in parts] + [chunk for part in parts for chunk in part[1:]]


def carry_out(jobs: Sequence[Job], tasks: Mapping[int, Tasks], schedule: Schedule) -> Trained:
    """Train one chunk: each lane its own arm, rate and seed, all tasks in order.

    Seeds pair: examples, their order, stored examples, initial model and noise depend on the seed alone.
    """
    kind = needs(jobs[0])
    full = [*jobs, *[jobs[-1]] * (LANES - len(jobs))]
    seeds = [job.key.seed for job in full]
    data = _stacked([tasks[seed] for seed in seeds])
    lane = lanes(full)
    count, size = data.labels.shape[1:]
    state = _contiguous(torch.func.vmap(partial(init_state, needs=kind))(data.net))
    joint = torch.tensor([job.arm.data == "joint" for job in full])
    table = [_evaluated(state, lane, data, kind)]
    stretches: list[Figures] = []
    after_first = state.net
    for task in range(count):
        plastic = plasticity(full, first=task == 0)
        draws = _Draws.of(seeds, task, count, size, schedule, experts=data.net.prototypes.shape[1])
        batches = _examples(data, torch.where(joint[:, None], draws.any_task, task), draws.examples)
        memories = _examples(data, draws.stored_task, draws.stored) if kind.memory else batches
        figures = []
        for batch, memory, noised in zip(_each(batches), _each(memories), draws.noise, strict=True):
            state, seen = _stepper(kind)(state, batch, memory, noised, lane, plastic)
            figures.append(seen)
        stretches += _means(figures)
        state = _contiguous(_ender()(state, lane))
        after_first = state.net if task == 0 else after_first
        table.append(_evaluated(state, lane, data, kind))
    change = _relative_change(after_first.experts, state.net.experts)
    last = torch.stack([part.active for part in stretches[-STRETCHES:]]).mean(dim=0) / data.net.prototypes.shape[1]
    runs = [
        _run(job, n, table, stretches, change=float(change[n]), active=float(last[n])) for n, job in enumerate(jobs)
    ]
    return Trained(
        runs, state.net, state.ledger.thresholds, [torch.cat([s.active for s in row], dim=1) for row in table]
    )


def _run(job: Job, n: int, table: list[list[Seen]], stretches: list[Figures], *, change: float, active: float) -> Run:
    losses = tuple(tuple(float(seen.loss[n]) for seen in row) for row in table)
    accuracies = tuple(tuple(float(seen.accuracy[n]) for seen in row) for row in table)
    in_nats = job.key.family == "text"
    return Run(
        key=job.key,
        stage=job.stage,
        scores=tuple(tuple(-loss for loss in row) for row in losses) if in_nats else accuracies,
        losses=losses,
        change=change,
        active=active,
        series={name: tuple(float(getattr(part, name)[n]) for part in stretches) for name in SERIES},
    )


def _stacked(tasks: Sequence[Tasks]) -> Tasks:
    columns = zip(*(tree.leaves(one) for one in tasks), strict=True)
    return tree.unflatten(tasks[0], [torch.stack(column) for column in columns])


def _contiguous(state: State) -> State:
    return tree.map1(Tensor.contiguous, state)


class _Draws(NamedTuple):
    """The chance of one task, [steps, N, ...]: equal for lanes of equal seed."""

    examples: Tensor
    """[steps, N, T]: epochs of the task's examples, each in a new order."""
    any_task: Tensor
    """[steps, N, T]: for joint training."""
    stored_task: Tensor
    stored: Tensor
    """[steps, N, T]: stored examples of the tasks before; in the first task those of the batch."""
    noise: Tensor
    """[steps, N, T, E], uniform."""

    @classmethod
    def of(cls, seeds: Sequence[int], task: int, tasks: int, size: int, schedule: Schedule, *, experts: int) -> _Draws:
        unique = sorted(set(seeds))
        drawn = [_drawn(seed, task, tasks, size, schedule, experts) for seed in unique]
        place = torch.tensor([unique.index(seed) for seed in seeds])
        return cls(*(torch.stack(column, dim=1)[:, place] for column in zip(*drawn, strict=True)))


def _drawn(
    seed: int, task: int, tasks: int, size: int, schedule: Schedule, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draws = noise.generator(1000 * (seed + 1) + task)
    shape = (schedule.steps, schedule.tokens)
    epochs = math.ceil(schedule.steps * schedule.tokens / size)
    order = torch.cat([torch.randperm(size, generator=draws) for _ in range(epochs)])
    examples = order[: math.prod(shape)].view(shape)
    any_task = torch.randint(tasks, shape, generator=draws)
    uniform = torch.rand(*shape, experts, generator=draws)
    if task == 0:
        return examples, any_task, torch.zeros_like(examples), examples, uniform
    before = torch.randint(task, shape, generator=draws)
    kept = torch.stack(
        [torch.randperm(size, generator=noise.generator(1000 * (seed + 1) + 500 + t)) for t in range(task)]
    )
    slot = torch.randint(min(STORED, size), shape, generator=draws)
    return examples, any_task, before, kept[before, slot], uniform


def _examples(data: Tasks, task: Tensor, index: Tensor) -> Examples:
    """Of every step and lane the examples at `index` [steps, N, T] of its tasks [steps, N, T]."""
    where = (torch.arange(index.shape[1])[:, None], task, index)
    return Examples(inputs=data.inputs[where], residual=data.residual[where], labels=data.labels[where])


def _each(examples: Examples) -> Iterator[Examples]:
    return (Examples(*step) for step in zip(*examples, strict=True))


def _means(figures: Sequence[Figures]) -> list[Figures]:
    columns = [torch.stack(column) for column in zip(*figures, strict=True)]
    parts = [column.tensor_split(STRETCHES) for column in columns]
    return [Figures(*(part.mean(dim=0) for part in row)) for row in zip(*parts, strict=True)]


def _relative_change(before: F.Experts, after: F.Experts) -> Tensor:
    def norm(experts: F.Experts) -> Tensor:
        return torch.stack([w.flatten(1).square().sum(dim=1) for w in experts]).sum(dim=0).sqrt()

    return norm(tree.map2(torch.sub, after, before)) / norm(before)


def _evaluated(state: State, lane: Lane, data: Tasks, kind: Needs) -> list[Seen]:
    return [
        _evaluator(Needs(*(False,) * len(Needs._fields))._replace(dynamic=kind.dynamic))(
            state.net,
            state.ledger.thresholds,
            lane,
            data.held_inputs[:, task].contiguous(),
            data.held_residual[:, task].contiguous(),
            data.held_labels[:, task].contiguous(),
        )
        for task in range(data.held_labels.shape[1])
    ]


@cache
def _stepper(
    kind: Needs,
) -> Callable[[State, Examples, Examples, Tensor, Lane, Plasticity], tuple[State, Figures]]:
    return compiled(torch.func.vmap(partial(step, needs=kind)))


@cache
def _ender() -> Callable[[State, Lane], State]:
    return torch.func.vmap(end_task)


@cache
def _evaluator(kind: Needs) -> Callable[[Net, Tensor, Lane, Tensor, Tensor, Tensor], Seen]:
    def one(net: Net, thresholds: Tensor, lane: Lane, inputs: Tensor, residual: Tensor, labels: Tensor) -> Seen:
        found = forward(net, inputs, residual, lambda affinity: activate(affinity, thresholds, lane, kind))
        right = (found.logits.argmax(dim=-1) == labels) & torch.isfinite(found.logits).all(dim=-1)
        return Seen(cross_entropy(found.logits, labels), right.float().mean(), found.active)

    return compiled(torch.func.vmap(one))
