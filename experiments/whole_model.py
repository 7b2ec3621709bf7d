"""Does a whole carved model forget less, by what trains its experts and by what else may learn?

`uv run experiments/whole_model.py [--seeds 4] [--steps 100] [--out DIR]`: a small dense Qwen3 learns four domains of
text alike, is carved in every layer and trained on, alike still, down to a quarter of its experts. From there it learns
one domain after the other, in Latin-square orders, by every arm of `ARMS`: AdamW or `onn.optim.consolidation` for the
experts, everything or experts and routers alone, SMK, replay, and all domains at once as the bound; at as many rates
each, because the start knows every domain and the least rate forgets least: what counts is what is forgotten at equal
learning. A study that was stopped goes on in its folder. Expected: `results.json` with every run, a table of loss,
learning and forgetting on held-out text by arm and rate, and paired differences at equal learning.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import tyro

from experiments import noise, pipeline, presets
from experiments.carving import pretrained
from experiments.command import exit_status
from experiments.facts import facts
from experiments.memory import keep_freed_memory
from experiments.pipeline import Source
from experiments.presets import TINY, RunConfig
from experiments.progress import progress
from experiments.study import store
from experiments.study.groups import grouped, interval
from experiments.study.records import Key, Run
from experiments.study.statistics import Point, at_equal_learning, scores
from experiments.study.tasks import Bank
from experiments.study.text import dense
from experiments.workers import one_thread, processors, workers
from onn import carve, check, data, grain, objective, qwen3, train, tree, weights
from onn.data import Batch, Pool
from onn.objective import ExpertOptimizer, Granularity, Regime, StepConfig
from onn.observe import Json
from onn.qwen3 import Model

BANK, BYTES = Bank(experts=32, width=8), 300_000
STORED = 100
"""Windows of each domain that replay keeps."""
FAMILY = "text, whole model"


class Arm(NamedTuple):
    """One way to learn the domains in turn."""

    note: str
    optimizer: ExpertOptimizer = "adamw"
    """Of the experts."""
    regime: Regime = "everything"
    granularity: Granularity = "off"
    """Of SMK, 2 experts of a token."""
    replay: bool = False
    """Half of each batch is stored windows of the domains before."""
    joint: bool = False
    """All domains at once."""
    paced: bool = False
    """AdamW's rate of the experts is one of its own, as consolidation's is."""

    @property
    def grid(self) -> str:
        """The rates that it is tried at, by name."""
        return "paced" if self.paced else self.optimizer


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "adamw": Arm("everything learns by AdamW"),
        "adamw, paced": Arm("everything learns by AdamW, experts at a rate of their own", paced=True),
        "consolidation": Arm("experts by consolidation, all else by AdamW", optimizer="consolidation"),
        "smk": Arm("AdamW, of a token's experts the 2 least surprised learn", granularity="token"),
        "replay": Arm("AdamW and 100 stored windows a domain", replay=True),
        "joint": Arm("AdamW, all domains at once: the bound", joint=True),
        "experts: adamw": Arm("experts and routers alone, by AdamW", regime="experts"),
        "experts: consolidation": Arm(
            "experts by consolidation, routers by AdamW, nothing else", optimizer="consolidation", regime="experts"
        ),
        "experts: smk": Arm("AdamW and SMK, nothing else learns", regime="experts", granularity="token"),
        "experts: replay": Arm("AdamW and replay, nothing else learns", regime="experts", replay=True),
    }
)
RATES: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType(
    {
        "adamw": tuple((1.25e-4 * 2**step, 0.0) for step in range(6)),
        "paced": tuple(product((2.5e-4, 1e-3), (0.002, 0.004, 0.008))),
        "consolidation": tuple(product((2.5e-4, 1e-3), (0.003, 0.01, 0.03))),
    }
)
"""AdamW's rate, and that of the experts where it is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to run."""

    seeds: int = 4
    """As many as domains have every order of the square once."""
    steps: int = 100
    """Of each domain."""
    arms: tuple[str, ...] = ()
    """Names of arms; all where none is given."""
    dense_steps: int = 1000
    """Of the dense model before the carve, and half as many of the carved one before the first domain."""
    layers: int = 3
    out: Path | None = None
    """Folder; an unfinished study in it goes on. A new one under `runs/` where none is given."""
    workers: int = field(default_factory=processors)
    """Processes at once, of one thread each; results do not depend on how many."""


class Work(NamedTuple):
    """One run for a process that knows nothing else."""

    key: Key
    steps: int
    start: Path
    """The carved model."""
    config: RunConfig


def configuration(options: Options) -> RunConfig:
    """The main job at the size of this study, in float32; AdamW's rate is that of the carved model's training."""
    return replace(
        TINY,
        model=replace(dense(BANK), num_hidden_layers=options.layers),
        sparse=replace(TINY.sparse, moe=replace(TINY.sparse.moe, min_k=2), granularity="off"),
        data=replace(
            TINY.data, bytes_per_domain=BYTES, held_out=0.1, batch_size=8, sequence_length=64, eval_windows=64
        ),
        train=replace(
            TINY.train, dense_steps=options.dense_steps, steps=max(1, options.dense_steps // 2), dtype="float32"
        ),
        optim=replace(TINY.optim, lr=8e-3),
        pretrain=replace(TINY.pretrain, lr=1e-2),
    )


def settings_of(work: Work) -> StepConfig:
    """Rates that stay as they are, and the density held where it is."""
    arm, config = ARMS[work.key.arm], work.config
    sparse = replace(
        config.sparse,
        optimizer=arm.optimizer,
        regime=arm.regime,
        granularity=arm.granularity,
        density=replace(config.sparse.density, ramp_steps=0),
        consolidation=replace(config.sparse.consolidation, lr=work.key.strength),
    )
    lr = work.key.strength if arm.paced else work.key.lr
    optim = replace(config.optim, lr=lr, warmup=0, floor=1.0, weight_decay=0.01)
    return presets.step_config(replace(config, sparse=sparse, optim=optim), phase="moe")


@cache
def _source(config: RunConfig) -> Source:
    return pipeline.prepare(config)


@cache
def _windows(config: RunConfig) -> Pool:
    corpus = _source(config).corpus
    return data.pool(corpus.train, corpus.train_mask, length=config.data.sequence_length)


def started(config: RunConfig) -> Model:
    """The carved model that has learnt all domains alike, a quarter of its experts active."""
    source, draws = _source(config), noise.generator(config.seed + 2)
    learnt = pretrained(source.model, source.corpus, config)
    settings = presets.step_config(config, phase="moe")
    state = train.init_state(carve.carve(learnt, num_experts=BANK.experts))
    for _ in progress(range(config.train.steps), desc="carved", unit="step"):
        batch = data.sample_batch(_windows(config), torch.rand(config.data.batch_size, 2, generator=draws))
        state, _ = train.step(state, batch, (), settings)
    return state.model


def choices(seed: int, place: int, arm: Arm, *, steps: int, size: int, domains: int) -> torch.Tensor:
    """What `data.sample_batch` is told in the steps of the domain at this place of the seed's order, [steps, B, 2].

    Stored windows are `STORED` of each domain, evenly spread over its text. Arms of equal seed share all else.
    """
    draws = noise.generator(1000 * (seed + 1) + place)
    drawn = torch.rand(steps, size, 2, generator=draws)
    earlier = torch.randint(max(place, 1), (steps, size), generator=draws)
    slot = torch.randint(STORED, (steps, size), generator=draws)
    if arm.joint:
        return drawn
    drawn[..., 0] = (_domain(seed, place, domains) + 0.5) / domains
    if arm.replay and place:
        kept = slice(size // 2, None)
        before = torch.tensor([_domain(seed, at, domains) for at in range(place)])[earlier]
        drawn[:, kept] = torch.stack([(before + 0.5) / domains, (slot + 0.5) / STORED], dim=-1)[:, kept]
    return drawn


def _domain(seed: int, place: int, domains: int) -> int:
    return (seed + place) % domains


def carried_out(work: Work) -> Run:
    """One model, all domains in turn, on one thread."""
    with one_thread():
        return _carried_out(work)


def _carried_out(work: Work) -> Run:
    arm, settings, config = ARMS[work.key.arm], settings_of(work), work.config
    domains = len(_source(config).corpus.domains)
    model = weights.restore(work.start, like=_like(config))
    state = train.init_state(model, experts=arm.optimizer, regime=arm.regime)
    table, after_first = [_held_out(model, settings, work)], model
    active: list[float] = []
    for place in range(domains):
        told = choices(work.key.seed, place, arm, steps=work.steps, size=config.data.batch_size, domains=domains)
        active = []
        for choice in told:
            before = state.model
            state, metrics = train.step(state, data.sample_batch(_windows(config), choice), (), settings)
            if arm.paced:
                slower = held_back(before, state.model, share=work.key.lr / work.key.strength)
                state = state._replace(model=slower)
            assert isinstance(metrics.sparse, objective.SparseMetrics)
            active.append(float(metrics.sparse.active_share))
        table.append(_held_out(state.model, settings, work))
        after_first = after_first if place else state.model
    return Run(
        key=work.key,
        stage="frontier",
        scores=tuple(tuple(-loss for loss in row) for row in table),
        losses=tuple(table),
        change=_change(after_first, state.model),
        active=sum(active) / len(active),
        series={},
    )


def held_back(before: Model, after: Model, *, share: float) -> Model:
    """`after`, but all that AdamW trains besides the experts goes this share of the way: its step at less of its rate.

    AdamW's step is linear in its rate, weight decay included. Thresholds, which a controller moves as well, go with the
    experts.
    """
    slower = tree.map2(lambda old, new: torch.lerp(old, new, share), before, after)
    mlps = [
        own._replace(router=own.router._replace(prototypes=part.router.prototypes))
        for own, part in zip(objective.carved_layers(after), objective.carved_layers(slower), strict=True)
    ]
    return grain.with_mlps(slower, mlps)


def _like(config: RunConfig) -> Model:
    return carve.carve(qwen3.abstract(config.model), num_experts=BANK.experts)


def _held_out(model: Model, settings: StepConfig, work: Work) -> tuple[float, ...]:
    """The loss of every domain in the order of the seed, in nats."""
    domains = list(pipeline.held_out_batches(_source(work.config).corpus, work.config).values())
    losses = []
    for place in range(len(domains)):
        batches = domains[_domain(work.key.seed, place, len(domains))]
        counts, sums = zip(*(_loss(model, batch, settings) for batch in batches), strict=True)
        losses.append(sum(sums) / sum(counts))
    return tuple(losses)


@torch.no_grad()
def _loss(model: Model, batch: Batch, settings: StepConfig) -> tuple[int, float]:
    taps = objective.zero_taps(model, batch.tokens.numel(), names=())
    loss, _ = objective.language_loss(model, batch, taps, (), config=settings)
    count = int(batch.mask.sum())
    return count, count * float(loss)


def _change(before: Model, after: Model) -> float:
    """Norm of what the experts changed by, over their norm."""

    def norm(models: Sequence[torch.Tensor]) -> float:
        return math.sqrt(sum(float(leaf.double().square().sum()) for leaf in models))

    old, new = (
        [leaf for layer in objective.carved_layers(model) for leaf in layer.experts] for model in (before, after)
    )
    return norm([b - a for a, b in zip(old, new, strict=True)]) / norm(old)


def key(name: str, rates: tuple[float, float], seed: int) -> Key:
    """Of one run; the strength is a rate of the experts' own."""
    arm = ARMS[name]
    return Key(FAMILY, arm.regime, name, arm.optimizer, *rates, seed)


def run(options: Options) -> Path:
    """Carry out the study, and return its folder.

    Raises:
        ValueError: an unknown arm, sizes out of bounds, or a folder of another study.
        ChildProcessError: a worker ended before its work did.
    """
    for name in options.arms:
        check.one_of("whole_model", "arm", name, ARMS)
    for name in ("seeds", "steps", "dense_steps", "layers", "workers"):
        check.at_least("whole_model", name, getattr(options, name), 1)
    keep_freed_memory()
    config, names = configuration(options), options.arms or tuple(ARMS)
    folder = options.out or Path("runs") / f"whole-model-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Json] = {
        "seeds": options.seeds,
        "steps": options.steps,
        "configuration": presets.save(config),
        "rates": {name: [list(pair) for pair in pairs] for name, pairs in RATES.items()},
        "arms": {name: ARMS[name]._asdict() for name in names},
    }
    store.require_same(folder / "settings.json", settings)
    start = folder / "start.safetensors"
    if not start.exists():
        weights.save(started(config), start, {})
    known = {run.key: run for run in store.load_runs(folder / store.RUNS)}
    wanted = [
        key(name, rates, seed) for name in names for rates in RATES[ARMS[name].grid] for seed in range(options.seeds)
    ]
    work = [Work(what, options.steps, start, config) for what in wanted if what not in known]
    with workers(options.workers) as each:
        done, left = each(carried_out, work), len(wanted) - len(work)
        with progress(done, desc="whole models", unit="run", total=len(wanted), initial=left) as bar:
            for found in bar:
                store.append(folder / store.RUNS, [found])
                known[found.key] = found
    results = store.Results(
        facts={**facts(""), "threads": 1}, settings=settings, runs=list(known.values()), specialisations=[]
    )
    store.write_results(folder / store.RESULTS, results)
    print(f"{rates_table(results.runs)}\n\n{contrasts_table(results.runs)}")
    return folder


def rates_table(runs: Sequence[Run]) -> str:
    """Every arm at every rate: means over the seeds in nats."""
    rows = [["arm", "rates", "at the end", "just learnt", "forgotten", "active"]]
    for group in sorted(grouped(runs), key=lambda group: (list(ARMS).index(group.setup.arm), group.setup)):
        rates = ", ".join(f"{rate:g}" for rate in (group.setup.lr, group.setup.strength) if rate)
        losses = (-group.accuracy.mean, -group.learning.mean, -group.transfer.mean)
        rows.append([group.setup.arm, rates, *(f"{loss:.3f}" for loss in losses), f"{group.active.mean:.2f}"])
    return _aligned(rows)


def contrasts_table(runs: Sequence[Run]) -> str:
    """How much less every arm forgets than AdamW, at equal learning: in nats, paired by seed, intervals of 95%.

    Held against AdamW where as much learns, consolidation also where AdamW has a rate for the experts; AdamW on experts
    alone against AdamW on everything.
    """
    curves: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for run in runs:
        found = scores(run.scores)
        curves[run.key.arm, run.key.seed].append(Point(found.learning, found.transfer))
    rows = [["arm", "less forgotten than", "at equal learning", "seeds"]]
    for name, other in ((arm, rival) for arm in ARMS for rival in _rivals(arm)):
        pairs = [(points, curves.get((other, seed), [])) for (own, seed), points in curves.items() if own == name]
        shared = interval(at_equal_learning(*pair) for pair in pairs)
        if shared.n:
            bounds = f" ({shared.low:+.3f}, {shared.high:+.3f})" if shared.n > 1 else ""
            rows.append([name, other, f"{shared.mean:+.3f}{bounds}", str(shared.n)])
    return _aligned(rows)


def _rivals(name: str) -> Sequence[str]:
    arm = ARMS[name]
    if arm.joint or name == "adamw":
        return ()
    if name == "experts: adamw" or arm.regime == "everything":
        return ("adamw", "adamw, paced") if name == "consolidation" else ("adamw",)
    return ("experts: adamw",)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(options: Options) -> int:
    """Run one study; the exit status."""
    return exit_status(lambda: print(f"Runs: {run(options) / store.RESULTS}"))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="whole_model.py", description=__doc__)))
