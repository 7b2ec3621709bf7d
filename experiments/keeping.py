"""What a run keeps to be resumed from, in `checkpoints/` of its folder.

- `<phase>-<step>`: a training phase after that many of its own steps: `model`, `training` (optimizer, usage, lifetime,
  step counter) and the states of its `generators`. Batches are drawn by a generator, so its state is the place in the
  data too.
- `<phase>-model` and `<phase>-model-copy`: what a finished phase leaves for the later ones.
- `<model>-figures`: a held-out evaluation.

All hold the configuration, the code version and the text's fingerprint, and the first two the metrics.jsonl so far.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from experiments import presets
from experiments.evaluate import DomainFigures, Evaluation, SparseFigures
from experiments.facts import differences
from experiments.guard import NOT_FINITE, Stopped
from experiments.memory import Meter
from experiments.presets import RunConfig
from onn import check, checkpoint, optim, storage, train, tree
from onn.checkpoint import Checkpoint
from onn.functional import Usage
from onn.observe import Json
from onn.qwen3 import Model
from onn.train import State

Phase: TypeAlias = Literal["dense", "moe", "dense_continued"]
PHASES: tuple[Phase, ...] = ("dense", "moe", "dense_continued")
FOLDER = "checkpoints"
METRICS = "metrics.jsonl"
_COPIES = ("model", "model-copy")
_NAME = re.compile(rf"({'|'.join(PHASES)})-(\d+|model)")
_FREE = ("checkpoint_every", "checkpoints_kept", "on_non_finite", "max_skipped")
"""Values of `train` that change no bit of what a step computes, and so may be another when a run is resumed."""


class Position(NamedTuple):
    """A place between two steps of a phase."""

    step: int
    """Steps of the phase that are done."""
    records: int
    """Lines of metrics.jsonl, of all phases."""
    skipped: int
    """Steps in a row up to here that were not finite."""

    def after(self, *, skipped: bool) -> Position:
        """One step on."""
        return Position(self.step + 1, self.records + 1, self.skipped + 1 if skipped else 0)


class Generators(NamedTuple):
    """The states of those that a phase draws from."""

    draws: Tensor
    """Of batches, which phases of one seed so share."""
    births: Tensor
    """Of all else: rounding, and births."""


class _Training(NamedTuple):
    """A `State` without its model."""

    optimizer: optim.AdamWState[Model]
    importance: tuple[Tensor, ...]
    usage: tuple[Usage, ...]
    lifetime: tuple[Tensor, ...]
    step: Tensor


class Kept(NamedTuple):
    """What a checkpoint within a phase holds."""

    state: State
    position: Position
    generators: Generators


class Keeper:
    """Writes and finds the checkpoints of one run; nothing is written where `train.checkpoint_every` is 0."""

    def __init__(self, folder: Path, config: RunConfig, facts: Mapping[str, Json], meter: Meter) -> None:
        """Take over a folder that no other process uses."""
        self.folder, self.home = folder, folder / FOLDER
        self.config, self.facts, self.meter = config, facts, meter
        self.on = config.train.checkpoint_every > 0
        self.resumed_from: list[str] = []
        checkpoint.clean(self.home)

    def is_due(self, position: Position) -> bool:
        """Whether the interval between two checkpoints is over."""
        return self.on and position.step % self.config.train.checkpoint_every == 0

    def keep_state(self, phase: Phase, state: State, position: Position, generators: Generators) -> None:
        """Write a checkpoint, and drop the oldest beyond those to keep.

        Raises:
            Stopped: a parameter or a moment is not finite; nothing is written.
        """
        if not self.on:
            return
        with self.meter.part(f"{phase}_checkpoints"):
            self.require_finite(phase, state, position)
            parts: dict[str, tree.Tree] = {"model": state.model, "training": _training(state), "generators": generators}
            self._write(f"{phase}-{position.step:06d}", parts, position)
            for old in self._states()[self.config.train.checkpoints_kept :]:
                checkpoint.remove(old)

    def require_finite(self, phase: Phase, values: tree.Tree, position: Position) -> None:
        """Refuse to keep parameters or moments that are not finite.

        Raises:
            Stopped: with their names, and the last checkpoint.
        """
        unsound = _not_finite(values)
        if unsound:
            names = f"{unsound[0]}{f' and {len(unsound) - 1} others' if unsound[1:] else ''}"
            message = f"{phase}, step {position.step}: {names}: not finite, and not kept. {self.last()}"
            raise Stopped(message, status=NOT_FINITE)

    def state(self, phase: Phase, model: Model, generators: Generators) -> Kept | None:
        """The newest whole checkpoint of a phase that is not finished, with metrics.jsonl put back to it.

        Whatever later phases left is dropped, and what was measured of the model that this one is to make anew.

        Args:
            phase: the one to go on with.
            model: that it began with; its names, shapes and dtypes alone.
            generators: of the same shapes as those that were kept.
        """
        stale = [f"{later}-*" for later in PHASES[PHASES.index(phase) + 1 :]]
        stale += [f"{name}-figures" for name in ((phase, "carved") if phase == "dense" else (phase,))]
        for entry in (entry for pattern in stale for entry in self.home.glob(pattern)):
            checkpoint.remove(entry)
        own = [entry for entry in self._states() if entry.name.startswith(f"{phase}-")]
        found = self._newest(own, f"Going back to the beginning of {phase}.")
        if found is None:
            return None
        template = tree.map1(lambda leaf: leaf.to("meta"), model)
        like = train.init_state(template, experts=self.config.sparse.optimizer, regime=self.config.sparse.regime)
        restored = checkpoint.restore(found, "model", like=like.model)
        training = checkpoint.restore(found, "training", like=_training(like))
        state = State(restored, *training)
        return Kept(state, self._position(found), checkpoint.restore(found, "generators", like=generators))

    def keep_model(self, phase: Phase, model: Model, position: Position) -> None:
        """Write what a finished phase leaves, twice: everything after it would be lost with it."""
        if self.on:
            with self.meter.part(f"{phase}_checkpoints"):
                for name in _COPIES:
                    self._write(f"{phase}-{name}", {"model": model}, position)

    def model(self, phase: Phase, like: Model) -> tuple[Model, Position] | None:
        """What a finished phase left, with metrics.jsonl put back to its end."""
        copies = [self.home / f"{phase}-{name}" for name in _COPIES]
        found = self._newest(copies, f"Going back to the last checkpoint within {phase}, or to its beginning.")
        return None if found is None else (checkpoint.restore(found, "model", like=like), self._position(found))

    def keep_figures(self, name: str, evaluation: Evaluation) -> None:
        """Write an evaluation."""
        if self.on:
            facts: dict[str, Json] = {"domains": evaluation.domains, **self._about()}
            self.home.mkdir(exist_ok=True)
            checkpoint.write(self.home / f"{name}-figures", {"figures": _flat(evaluation)}, texts={}, facts=facts)

    def figures(self, name: str) -> Evaluation | None:
        """An evaluation that was kept."""
        found = self._newest([self.home / f"{name}-figures"], "Measuring it again.")
        return None if found is None else _evaluation(found)

    def last(self) -> str:
        """Where the last checkpoint is and how to go on."""
        command = f"uv run experiments/run.py --resume {self.folder}"
        if not self.on:
            return f"There are no checkpoints (train.checkpoint_every is 0): `{command}` starts anew."
        kept = self._kept()
        place = f"The last checkpoint is {kept[0]}" if kept else "There is no checkpoint yet"
        return f"{place}; go on with: {command}"

    def _write(self, name: str, trees: Mapping[str, tree.Tree], position: Position) -> None:
        self.home.mkdir(exist_ok=True)
        metrics = (self.folder / METRICS).read_text(encoding="utf-8")
        facts = {**position._asdict(), **self._about()}
        checkpoint.write(self.home / name, trees, texts={METRICS: metrics}, facts=facts)

    def _about(self) -> Mapping[str, Json]:
        return {"config": presets.save(self.config), "run": self.facts}

    def _position(self, found: Checkpoint) -> Position:
        """Where a checkpoint is; metrics.jsonl is put back to it."""
        step, records, skipped = (found.facts.get(name) for name in Position._fields)
        if (
            not (isinstance(step, int) and isinstance(records, int) and isinstance(skipped, int))
            or min(step, records, skipped) < 0
        ):
            raise ValueError(f"{found.folder}: expected whole numbers of 0 or more for {', '.join(Position._fields)}.")
        storage.write_text(self.folder / METRICS, checkpoint.text(found, METRICS))
        return Position(step, records, skipped)

    def _newest(self, folders: Sequence[Path], otherwise: str) -> Checkpoint | None:
        """The first that is whole; what is wrong with those before it is said, a line each, and what is done now."""
        found, problems = checkpoint.newest([folder for folder in folders if folder.exists()])
        done = otherwise if found is None else f"Going back to {found.folder}."
        for problem in problems:
            print(f"damaged: {problem} {done}", file=sys.stderr)
        if found is not None:
            self._compare(found)
            self.resumed_from.append(found.folder.name)
        return found

    def _compare(self, found: Checkpoint) -> None:
        """Refuse a checkpoint of another configuration or text; say what else is not as it was, once."""
        theirs, ours = kept_config(found), self.config
        check.require(
            replace(theirs, train=_bound(theirs)) == replace(ours, train=_bound(ours)),
            f"{found.folder}: was made with another configuration than {self.folder / 'config.json'} holds now. "
            "Without that file the run goes on with the checkpoint's.",
        )
        before = found.facts.get("run")
        changes = differences(before if isinstance(before, Mapping) else {}, self.facts)
        moved = [change for change in changes if change.startswith("corpus")]
        check.require(not moved, f"{found.folder}: the text is another one: {'; '.join(moved)}.")
        if changes and not self.resumed_from:
            print(f"not as when it was started, so bits may differ: {'; '.join(changes)}.", file=sys.stderr)

    def _kept(self) -> list[Path]:
        """The models that finished phases left, and the checkpoints within phases, the newest first."""
        order = {str(phase): place for place, phase in enumerate(PHASES)}
        named = [(match, entry) for entry in self.home.glob("*") if (match := _NAME.fullmatch(entry.name))]
        rank = {entry: (order[m[1]], math.inf if m[2] == "model" else int(m[2])) for m, entry in named}
        return sorted(rank, key=lambda entry: rank[entry], reverse=True)

    def _states(self) -> list[Path]:
        """The checkpoints within phases, the newest first."""
        return [entry for entry in self._kept() if not entry.name.endswith("-model")]


def kept_config(found: Checkpoint) -> RunConfig:
    """The configuration in a checkpoint, of this version or an earlier one."""
    where = str(found.folder)
    return presets.load(presets.plain(found.facts.get("config"), where=where), where=where)


def any_config(folder: Path) -> RunConfig | None:
    """The configuration that some whole checkpoint of a run holds."""
    found, _ = checkpoint.newest(sorted((folder / FOLDER).glob("*")))
    return None if found is None else kept_config(found)


def _bound(config: RunConfig) -> presets.TrainConfig:
    free = {name: getattr(presets.TINY.train, name) for name in _FREE}
    return replace(config.train, **free)


def _training(state: State) -> _Training:
    return _Training(state.optimizer, state.importance, state.usage, state.lifetime, state.step)


def _not_finite(values: tree.Tree) -> list[str]:
    """Names of parameters and moments that are not finite; a threshold may be -inf, which is always open."""
    named = zip(tree.paths(values), tree.leaves(values), strict=True)
    return [
        name
        for name, leaf in named
        if leaf.is_floating_point()
        and not bool((torch.isfinite(leaf) | (torch.isneginf(leaf) & name.endswith("thresholds"))).all())
    ]


def _flat(evaluation: Evaluation) -> dict[str, tree.Tree]:
    """Every number of an evaluation as a tensor, floats in float64."""
    parts: dict[str, tree.Tree] = {}
    for position, figures in enumerate(evaluation.figures):
        rows: dict[str, tree.Tree] = {}
        for kind, row in (("all", figures), ("sparse", figures.sparse)):
            values = {} if row is None else {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            for name, value in values.items():
                if isinstance(value, Tensor):
                    rows[f"{kind}_{name}"] = value
                elif isinstance(value, int | float):
                    rows[f"{kind}_{name}"] = torch.tensor(value, dtype=torch.float64)
        parts[str(position)] = rows
    return parts


def _evaluation(found: Checkpoint) -> Evaluation:
    domains = found.facts.get("domains")
    if not isinstance(domains, Sequence) or isinstance(domains, str) or not all(isinstance(d, str) for d in domains):
        raise ValueError(f"{found.folder}: expected the names of the domains in its manifest.")
    stored = checkpoint.tensors(found, "figures")
    places = {name.partition(".")[0] for name in stored}
    check.require(
        places == {str(position) for position in range(len(domains))},
        f"{found.folder}: {len(domains)} domains in its manifest, figures of {len(places)}.",
    )
    return Evaluation(
        domains=tuple(str(name) for name in domains),
        figures=tuple(_domain(stored, f"{position}.") for position in range(len(domains))),
    )


def _domain(stored: Mapping[str, Tensor], at: str) -> DomainFigures:
    def number(name: str) -> float:
        return float(stored[at + name])

    sparse = None
    if f"{at}sparse_batches" in stored:
        sparse = SparseFigures(
            batches=int(number("sparse_batches")),
            surprise=number("sparse_surprise"),
            pi=number("sparse_pi"),
            active_share=number("sparse_active_share"),
            gate_accuracy=number("sparse_gate_accuracy"),
            gate_chance=number("sparse_gate_chance"),
            routed=stored[f"{at}sparse_routed"],
            active=stored[f"{at}sparse_active"],
            surprise_sum=stored[f"{at}sparse_surprise_sum"],
        )
    return DomainFigures(
        targets=int(number("all_targets")),
        loss=number("all_loss"),
        accuracy=number("all_accuracy"),
        tau=number("all_tau"),
        sparse=sparse,
    )
