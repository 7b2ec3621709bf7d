"""NaN and infinities planted in a run, and what must come of them: counted, skipped or stopped, never in a model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Literal
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.faults_process import Lab, Sabotage, Trial, ended, last_line
from experiments.keeping import FOLDER, METRICS
from onn import objective, observe, optim, train, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.objective import Measured, StepConfig, carved_layers
from onn.qwen3 import Model
from onn.train import Metrics, State

Place = Literal["batch", "gradient", "surprise", "weight", "threshold", "moment"]
PASSING: tuple[Place, ...] = ("batch", "gradient", "surprise")
"""Gone with the step; the others stay."""
LASTING: tuple[Place, ...] = ("weight", "threshold", "moment")
Policy = Literal["skip", "stop"]


def planted(lab: Lab, source: random.Random, position: int, *, place: Place, value: float, policy: Policy) -> Trial:
    """Plant a number in a step of the second phase that is neither the first nor the last."""
    folder = lab.root / f"{place}-{value}-{policy}-{position}"
    strike = lab.dense_steps + source.randrange(lab.every + 1, 3 * lab.every)
    child = lab.begin(folder, _sabotage(place, value, strike), ["--train.on-non-finite", policy])
    status, steps, said = ended(child), lab.steps(folder), lab.said(folder)
    counted = sum(bool(r.get("skipped")) + bool(r.get("non_finite_surprise")) for r in _records(lab, folder.name))
    sound = not any(_poisoned(folder.glob("*.safetensors"))) and not any(_poisoned((folder / FOLDER).rglob("*.safe*")))
    orderly = "Traceback" not in said and (status == 0 or (status == 3 and f"--resume {folder}" in said))
    told = f"ended with {status}, {counted} counted, models {'sound' if sound else 'POISONED'}"
    if status == 0:
        mild = place in PASSING and (policy == "skip" or place == "surprise")
        return Trial(orderly and sound and counted > 0 and mild, 0, told)
    trial = lab.recovered(folder, steps=steps - counted)
    return trial._replace(
        kept=trial.kept and orderly and sound,
        outcome=f"{told}, {trial.outcome}" if orderly else last_line(said, folder),
    )


def _records(lab: Lab, name: str) -> list[dict[str, observe.Json]]:
    path = lab.root / name / METRICS
    return observe.read_jsonl(path) if path.exists() else []


def _poisoned(paths: Iterator[object]) -> Iterator[bool]:
    for path in paths:
        if not str(path).endswith("figures.safetensors"):
            tensors = load_file(str(path)).values()
            yield any(not bool(torch.isfinite(leaf).all()) for leaf in tensors if leaf.is_floating_point())


def _first(values: Tensor, value: float) -> Tensor:
    """A copy with `value` in its first entry."""
    return values.detach().clone().index_fill_(0, torch.tensor([0], device=values.device), value)


def _sabotage(place: Place, value: float, strike: int) -> Sabotage:
    """Plant `value` at the step of this number, counted over all phases, in the process that calls it."""
    real_step, real_loss, real_clip, real_scaled = (
        train.step,
        objective.language_loss,
        optim.clip_by_global_norm,
        objective.scaled_surprise,
    )
    counted = itertools.count()
    struck: list[bool] = []

    def step(
        state: State, batch: Batch, noise: Model | tuple[()], config: StepConfig, teacher: Model | tuple[()] = ()
    ) -> tuple[State, Metrics]:
        struck[:] = [next(counted) == strike]
        if struck[0]:
            state = _spoilt(state, place, value)
        return real_step(state, batch, noise, config, teacher)

    def loss(
        model: Model, batch: Batch, taps: Taps, soft: Tensor | tuple[()], *, config: StepConfig
    ) -> tuple[Tensor, Measured]:
        if struck[0] and place == "batch":
            row = batch.tokens.flatten()[:1]
            model = model._replace(embedding=model.embedding.index_fill(0, row, value))
        return real_loss(model, batch, taps, soft, config=config)

    def clip(grads: Model, *, max_norm: float) -> tuple[Model, Tensor]:
        if struck[0] and place == "gradient":
            grads = grads._replace(norm=_first(grads.norm, value))
        return real_clip(grads, max_norm=max_norm)

    def scaled(surprise: Taps, batch: Batch) -> Taps:
        found = real_scaled(surprise, batch)
        if struck[0] and place == "surprise":
            first = {name: _first(values, value) for name, values in found[0].items()}
            return (first, *found[1:])
        return found

    def sabotage() -> None:
        mock.patch.object(train, "step", step).start()
        mock.patch.object(train, "language_loss", loss).start()
        mock.patch.object(optim, "clip_by_global_norm", clip).start()
        mock.patch.object(train, "scaled_surprise", scaled).start()

    return sabotage


def _spoilt(state: State, place: Place, value: float) -> State:
    """A state with `value` in it for good, where that is the place."""
    if place == "weight":
        return state._replace(model=state.model._replace(norm=_first(state.model.norm, value)))
    if place == "moment":
        mean = state.optimizer.mean
        return state._replace(optimizer=state.optimizer._replace(mean=mean._replace(norm=_first(mean.norm, value))))
    if place == "threshold":
        router = carved_layers(state.model)[0].router
        return tree.unflatten(
            state,
            [_first(leaf, value) if leaf is router.thresholds else leaf for leaf in tree.leaves(state)],
        )
    return state
