"""How much does a dense model lose when only some of its experts compute, by how its neurons are grouped and routed?

`uv run experiments/carving.py [--out DIR] [--steps 400] [--dense FILE] [--checkpoint qwen3-0.6b]`: trains a small dense
Qwen3 on the embedded corpus, carves it by every method of `onn.partition`, and measures the held-out loss at 1, 1/2,
1/4, 1/8 and 1/16 of the experts under five routers. Nothing but the last router is trained after the carve.

- `oracle`: of every token the experts that contribute most, `||o_te||`, which no router can know beforehand;
- `gate`: cosine with the mean gate row and one threshold for all experts, what `carve` gives and a controller shifts;
- `representative`: CMoE's (2502.04416), from one neuron of each expert;
- `analytic`: `onn.carve.analytic_router`, in closed form from calibration text;
- `trained`: from there, `--router-steps` of Adam towards the oracle's choice, then thresholds set for the density.

`shared` opens half of the active experts always. `gate`, `analytic` and `trained` are the layer's own route, whose
number of experts varies by token: their active fraction is measured, not set.

Cost: about 5 minutes and 1.1 GiB on two CPU cores. The checkpoint, with `--calibration-windows 2 --eval-windows 1`: an
estimated 35 minutes a method and 8 GiB. Expected: contiguous and random lose most by far; under the oracle and the two
routers that know the text `contribution` loses least at 1/8 and below, and at 1/2 and 1/4 it, `coactivation` and
`shared` are within 0.02 nats; at like fractions the analytic router beats `gate` and `representative`, and training it
brings little more. `experiments/LOG.md` has the figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from torch import Tensor

from experiments import noise, pipeline, presets
from experiments.carving_figures import draw, table
from experiments.carving_routers import Cut, Routed, evaluate, inputs, mlps, routers
from experiments.command import exit_status
from experiments.presets import RunConfig
from experiments.progress import progress
from onn import carve, check, data, observe, partition, qwen3, train, tree, weights
from onn.data import Batch, Corpus
from onn.observe import Json
from onn.qwen3 import Model

Method = Literal["contiguous", "random", "kmeans", "coactivation", "contribution", "shared"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to carve, and how carefully to measure."""

    out: Path | None = None
    """Folder of results.json and carving.png; a new one below `runs` without it."""
    steps: int = 400
    """Training steps of the dense model."""
    dense: Path | None = None
    """The `dense.safetensors` of a run folder, in place of training; its `config.json` says what the model is."""
    checkpoint: str = ""
    """A preset with a checkpoint in `weights/`, such as `qwen3-0.6b`, in place of training."""
    data: Path | None = None
    """Text in place of the embedded corpus."""
    methods: tuple[Method, ...] = get_args(Method)
    num_experts: int = 32
    fractions: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
    """Of the experts, rounded to at least one."""
    calibration_windows: int = 8
    """Of training text, for each domain."""
    eval_windows: int = 16
    """Of held-out text, for each domain."""
    active_neurons: float = 1 / 8
    """Share of a layer's neurons that count as active on a token."""
    router_steps: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measurement."""

    method: str
    router: str
    target_fraction: float
    active_fraction: float
    loss: float


def configuration(options: Options) -> RunConfig:
    """The run whose data and dense model are carved: float32 throughout, so that rounding plays no part."""
    check.one_of("carving.py", "checkpoint", options.checkpoint or "tiny", presets.PRESETS)
    base = presets.PRESETS[options.checkpoint or "tiny"]
    if options.dense is not None:
        path = options.dense.with_name("config.json")
        check.require(path.is_file(), f"carving.py: {path} is not there; --dense wants the file of a run folder.")
        base = presets.load(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    return replace(
        base,
        seed=options.seed,
        data=replace(base.data, path=options.data, eval_windows=options.eval_windows),
        train=replace(base.train, dtype="float32", dense_steps=0 if options.checkpoint else options.steps),
    )


def run(options: Options, config: RunConfig) -> Mapping[str, Json]:
    """Carve, measure, write results.json and carving.png to `options.out`, and print the table.

    Returns:
        What results.json holds.
    """
    folder = options.out or Path("runs") / f"carving-{datetime.now():%Y%m%d-%H%M%S}"
    source = pipeline.prepare(config)
    model = source.model
    if options.dense is not None:
        loaded = weights.restore(options.dense, like=qwen3.abstract(config.model))
        model = tree.map1(Tensor.float, loaded)
    elif config.train.dense_steps:
        model = pretrained(model, source.corpus, config)
    held_out = [batch for batches in pipeline.held_out_batches(source.corpus, config).values() for batch in batches]
    seen = inputs(model, calibration_tokens(source.corpus, options, config), config=config.model)
    dense = evaluate(model, held_out, None, config=config.model).loss
    print(f"dense: held-out loss {dense:.4f}")
    points = list(measure(model, seen, held_out, options, config))
    results: dict[str, Json] = {
        "date": f"{datetime.now():%Y-%m-%d}",
        "command": "uv run experiments/carving.py " + " ".join(sys.argv[1:]),
        "preset": config.preset,
        "dense_loss": dense,
        "num_experts": options.num_experts,
        "calibration_tokens": len(seen[0]),
        "held_out_targets": sum(int(batch.mask.sum()) for batch in held_out),
        "corpus_fingerprint": source.corpus.fingerprint,
        "points": [asdict(point) for point in points],
    }
    folder.mkdir(parents=True, exist_ok=True)
    observe.write_json(folder / "results.json", results)
    draw(results, folder / "carving.png")
    print(f"\n{table(results)}\n\nFigure: {folder / 'carving.png'}")
    return results


def pretrained(model: Model, corpus: Corpus, config: RunConfig) -> Model:
    """The dense model after its training steps: the first phase of the main job."""
    draws = noise.generator(config.seed + 1)
    settings = presets.step_config(config, phase="dense")
    pool = data.pool(corpus.train, corpus.train_mask, length=config.data.sequence_length)
    state = train.init_state(model)
    for _ in progress(range(config.train.dense_steps), desc="dense", unit="step"):
        batch = data.sample_batch(pool, torch.rand(config.data.batch_size, 2, generator=draws))
        state, _ = train.step(state, batch, noise.rounding_bits(state.model, draws), settings)
    return state.model


def calibration_tokens(corpus: Corpus, options: Options, config: RunConfig) -> Tensor:
    """The first windows of every domain's training text, [B, S]."""
    batches = [
        batch
        for tokens, mask in zip(corpus.train, corpus.train_mask, strict=True)
        for batch in data.evaluation_batches(
            tokens,
            mask,
            batch=options.calibration_windows,
            length=config.data.sequence_length,
            limit=options.calibration_windows,
        )
    ]
    return torch.cat([batch.tokens for batch in batches])


def cut_layers(model: Model, seen: Sequence[Tensor], method: Method, *, shared: int, options: Options) -> Cut:
    """Cut every layer by a method; every layer has noise of its own.

    Args:
        model: dense.
        seen: of `inputs`, on calibration text.
        method: how neurons are grouped.
        shared: experts that are always open, for the method `shared`.
        options: sizes and seed.
    """
    draws, E = noise.generator(options.seed + 5), options.num_experts
    experts, speakers = [], []
    for mlp, x in zip(mlps(model), seen, strict=True):
        size, uniform = len(mlp.gate), torch.rand(E, generator=draws)
        norms = carve.neuron_norms(mlp, x)
        active = partition.most_active(norms, k=max(1, round(options.active_neurons * size)))
        match method:
            case "contiguous":
                neurons = partition.cut(torch.arange(size), num_experts=E)
            case "random":
                neurons = partition.cut(torch.randperm(size, generator=draws), num_experts=E)
            case "kmeans":
                neurons = partition.by_gate_rows(mlp.gate, uniform)
            case "coactivation":
                neurons = partition.by_coactivation(active, uniform)
            case "contribution":
                neurons = partition.by_contribution(norms, uniform)
            case "shared":
                neurons = partition.shared_and_routed(active, num_experts=E, shared=shared)
        experts.append(carve.split_by(mlp, neurons))
        speakers.append(partition.representatives(active.mT, neurons))
    return Cut(experts=tuple(experts), speakers=tuple(speakers), shared=shared)


def measure(
    model: Model, seen: Sequence[Tensor], batches: Sequence[Batch], options: Options, config: RunConfig
) -> Iterator[Point]:
    """Every method at every fraction under every router."""
    counts = [max(1, round(fraction * options.num_experts)) for fraction in options.fractions]
    with progress(range(len(options.methods) * len(counts)), desc="carved", unit="cut") as bar:
        for method in options.methods:
            cut = None
            for k in counts:
                shared = k // 2 if method == "shared" else 0
                if cut is None or cut.shared != shared:
                    cut = cut_layers(model, seen, method, shared=shared, options=options)
                for router, choose in routers(model, cut, seen, k=k, steps=options.router_steps):
                    found = evaluate(model, batches, Routed(cut, choose), config=config.model)
                    yield Point(
                        method=method,
                        router=router,
                        target_fraction=k / options.num_experts,
                        active_fraction=found.active_fraction,
                        loss=found.loss,
                    )
                bar.update()


def main(options: Options) -> int:
    """Run one study; the exit status."""

    def timed() -> None:
        before = time.monotonic()
        run(options, configuration(options))
        print(f"{time.monotonic() - before:.0f} seconds")

    return exit_status(timed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="carving.py", description=__doc__)))
