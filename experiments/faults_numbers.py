"""NaN and infinities planted in a run, and what must come of them: counted, skipped or stopped, never in a model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Concatenate, Literal, ParamSpec, TypeAlias, TypeVar
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

import onn.functional as F
from experiments.faults_process import Lab, Sabotage, Trial, ended, last_line
from experiments.keeping import FOLDER, METRICS
from onn import observe, train, tree
from onn.data import Batch
from onn.functional.transform import SurpriseAndGrad
from onn.objective import Measured, carved_layers
from onn.qwen3 import Model
from onn.train import State

P = ParamSpec("P")
R = TypeVar("R")
Measure: TypeAlias = Callable[[Model, Batch], SurpriseAndGrad[Model, Measured]]

Place = Literal["batch", "gradient", "surprise", "weight", "threshold", "moment"]
PASSING: tuple[Place, ...] = ("batch", "gradient", "surprise")
"""Gone with the step; the others stay."""
LASTING: tuple[Place, ...] = ("weight", "threshold", "moment")
Policy = Literal["skip", "stop"]


def planted(lab: Lab, source: random.Random, position: int, *, place: Place, value: float, policy: Policy) -> Trial:
    """Plant a number in a step of the second phase that is neither the first nor the last."""
    folder = lab.root / f"{place}-{value}-{policy}-{position}"
    strike = lab.dense_steps + source.randrange(lab.every + 1, 3 * lab.every)
    child = lab.begin(folder, planting(place, value, strike), ["--train.on-non-finite", policy])
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


def planting(place: Place, value: float, strike: int) -> Sabotage:
    """Plant `value` at the step of this number, counted over all phases, in the process that calls it."""
    counted, struck = itertools.count(), list[bool]()

    def spoiling(function: Callable[Concatenate[State, P], R]) -> Callable[Concatenate[State, P], R]:
        def step(state: State, /, *args: P.args, **kwargs: P.kwargs) -> R:
            struck[:] = [next(counted) == strike]
            return function(_spoilt(state, place, value) if struck[0] else state, *args, **kwargs)

        return step

    def measuring(function: Callable[P, Measure]) -> Callable[P, Measure]:
        def transform(*args: P.args, **kwargs: P.kwargs) -> Measure:
            real = function(*args, **kwargs)

            def measure(model: Model, batch: Batch) -> SurpriseAndGrad[Model, Measured]:
                return _measured(real, model, batch, place, value) if any(struck) else real(model, batch)

            return measure

        return transform

    def sabotage() -> None:
        mock.patch.object(train, "step", spoiling(train.step)).start()
        mock.patch.object(F, "surprise_and_grad", measuring(F.surprise_and_grad)).start()

    return sabotage


def _measured(
    real: Measure, model: Model, batch: Batch, place: Place, value: float
) -> SurpriseAndGrad[Model, Measured]:
    """What one pass gives, with `value` in it where that is the place."""
    if place == "batch":
        row = batch.tokens.flatten()[:1]
        return real(model._replace(embedding=model.embedding.index_fill(0, row, value)), batch)
    found = real(model, batch)
    if place == "gradient":
        return found._replace(grads=found.grads._replace(norm=_first(found.grads.norm, value)))
    if place == "surprise":
        first = {name: _first(values, value) for name, values in found.surprise[0].items()}
        return found._replace(surprise=(first, *found.surprise[1:]))
    return found


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
