"""The main job from end to end: data, dense Qwen3, carve, training by surprise, evaluation, run folder."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments import guard, noise, presets, records
from experiments.compiling import by_region
from experiments.evaluate import Evaluation, evaluate, generate, parameter_count
from experiments.facts import facts
from experiments.journal import Journal, reborn_experts
from experiments.keeping import METRICS, Generators, Keeper, Phase, Position, any_config
from experiments.memory import Meter, keep_freed_memory, return_large_blocks
from experiments.page import write_page
from experiments.page_data import write_experts
from experiments.presets import RunConfig
from experiments.progress import progress
from experiments.report import write_report
from onn import carve, check, data, objective, observe, qwen3, train, tree, weights
from onn.data import Batch, Corpus, Tokenizer
from onn.objective import StepConfig
from onn.observe import Json
from onn.qwen3 import Model
from onn.train import Metrics, State

Step = Callable[[State, Batch, Model | tuple[()], StepConfig, Model | tuple[()]], tuple[State, Metrics]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a run starts from."""

    tokenizer: Tokenizer
    corpus: Corpus
    model: Model
    """Dense: freshly drawn, or read from a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run at work."""

    config: RunConfig
    folder: Path
    source: Source
    step: Step
    keeper: Keeper
    meter: Meter
    signals: guard.Signals


def run(config: RunConfig, folder: Path, *, command: str | None = None) -> Mapping[str, Json]:
    """Carry out the main job and leave everything it finds in `folder`.

    Args:
        config: what to do.
        folder: new, or empty.
        command: that repeats the run, for its reports; without it that of a replay.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: the folder holds a run already, or the data, the weights or the configuration do not fit.
        OSError: the folder cannot be written, or the disk is full.
        Stopped: asked to (Ctrl-C), or by steps that are not finite.
    """
    _require_new(folder)
    _require_carvable(config)
    meter = Meter()
    with guard.Signals() as signals:
        source = _prepared(config, meter)
        folder.mkdir(parents=True, exist_ok=True)
        with guard.alone(folder):
            _require_new(folder)
            observe.write_json(folder / "config.json", presets.save(config))
            return _carry_out(config, folder, source, meter, signals, command or _replay(folder))


def resume(folder: Path) -> Mapping[str, Json]:
    """Go on with a run that was stopped, from its last whole checkpoint; the result is that of one never stopped.

    Returns:
        What `summary.json` holds; that of a finished run is left as it is.

    Raises:
        ValueError: there is no run, its configuration is not readable, or another process is at work on it.
        OSError: as `run`.
        Stopped: as `run`.
    """
    check.require(folder.is_dir(), f"{folder}: no such folder.")
    with guard.alone(folder), guard.Signals() as signals:
        done = finished(folder)
        if done is not None:
            print(f"{folder}: this run is finished.")
            return done
        config = saved_config(folder)
        meter = Meter()
        return _carry_out(config, folder, _prepared(config, meter), meter, signals, _replay(folder))


def _replay(folder: Path) -> str:
    return f"uv run experiments/run.py --replay {shlex.quote(str(folder))}"


def finished(folder: Path) -> dict[str, Json] | None:
    """What `summary.json` of a finished run holds."""
    path = folder / "summary.json"
    try:
        summary = observe.decode(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None
    return summary if isinstance(summary, dict) and summary.get("finished", True) else None


def saved_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder, or that of a checkpoint in it where `config.json` is gone.

    Raises:
        ValueError: there is none, or it is not one.
    """
    path = folder / "config.json"
    if path.is_file():
        return presets.load(presets.read(path), where=str(path))
    kept = any_config(folder)
    if kept is None:
        raise ValueError(f"{folder}: holds no run: no config.json and no whole checkpoint.")
    print(f"{path}: is missing; taking the configuration of a checkpoint.", file=sys.stderr)
    return kept


def _require_new(folder: Path) -> None:
    there = any((folder / name).exists() for name in ("config.json", METRICS))
    check.require(not there, f"run: {folder} holds a run already; choose another --out, or --resume it.")


def _require_carvable(config: RunConfig) -> None:
    neurons, experts = config.model.intermediate_size, config.sparse.moe.num_experts
    check.require(
        neurons % experts == 0 and neurons // experts <= qwen3.MAX_EXPERT_SIZE,
        f"run: {neurons} neurons do not divide into num_experts={experts} of at most {qwen3.MAX_EXPERT_SIZE} each.",
    )


def _prepared(config: RunConfig, meter: Meter) -> Source:
    if config.checkpoint.name:
        return_large_blocks()
    else:
        keep_freed_memory()
    with meter.part("prepare"):
        source = prepare(config)
        data.check_vocabulary(source.corpus, vocab_size=config.model.vocab_size)
        return source


def _carry_out(
    config: RunConfig, folder: Path, source: Source, meter: Meter, signals: guard.Signals, command: str
) -> Mapping[str, Json]:
    about = facts(source.corpus.fingerprint)
    keeper = Keeper(folder, config, about, meter)
    held_out = held_out_batches(source.corpus, config)
    step: Step = partial(train.step, region=by_region()) if config.train.compile else train.step
    job = Job(config=config, folder=folder, source=source, step=step, keeper=keeper, meter=meter, signals=signals)

    def evaluated(model: Model, name: str, phase: Phase) -> Evaluation:
        with meter.part("evaluate"):
            known = keeper.figures(name)
            if known is None:
                known = evaluate(model, held_out, config=presets.step_config(config, phase=phase))
                keeper.keep_figures(name, known)
        return known

    dense, position = source.model, Position(step=0, records=0, skipped=0)
    if config.train.dense_steps:
        dense, position = _trained(dense, "dense", config.train.dense_steps, position, job)
    dense_figures = evaluated(dense, "dense", "dense")
    with meter.part("carve"):
        carved = carve.carve(dense, num_experts=config.sparse.moe.num_experts)
    carved_figures = evaluated(carved, "carved", "moe")
    print(f"carved: held-out loss {carved_figures.mean('loss'):.6f}, dense {dense_figures.mean('loss'):.6f}")
    moe, position = _trained(carved, "moe", config.train.steps, position, job, dense)
    final = evaluated(moe, "moe", "moe")
    models = {"dense": dense, "moe": moe}
    continued = None
    if config.train.dense_continued:
        models["dense_continued"], _ = _trained(dense, "dense_continued", config.train.steps, position, job)
        continued = evaluated(models["dense_continued"], "dense_continued", "dense_continued")
    with meter.part("sample"):
        samples = _samples(moe, source, config)
    with meter.part("save"):
        for name, model in models.items():
            weights.save(model, folder / f"{name}.safetensors", metadata={"preset": config.preset, "phase": name})
    steps = observe.read_jsonl(folder / METRICS)
    summary: dict[str, Json] = {
        "preset": config.preset,
        "command": command,
        **records.figures(dense_figures, carved_figures, final, continued, steps, config),
        "parameters": parameter_count(moe),
        "corpus_domains": {
            name: {"train_tokens": len(tokens), "held_out_tokens": len(rest)}
            for name, tokens, rest in zip(
                source.corpus.domains, source.corpus.train, source.corpus.held_out, strict=True
            )
        },
        "samples": samples,
        **about,
        "resumed_from": keeper.resumed_from,
        "seconds": {**meter.seconds, "all": time.monotonic() - meter.started},
        "peak_memory_gib": {**meter.peak_gib},
        "finished": False,
    }
    observe.write_json(folder / "summary.json", summary)
    observe.curves(steps, folder / "curves.png")
    observe.expert_by_domain(final.usage(), final.domains, folder / "expert_by_domain.png")
    observe.surprise_map(final.surprise_by_expert(), folder / "surprise_map.png", per_layer=False)
    observe.surprise_map(final.surprise_by_expert(), folder / "surprise_map_per_layer.png", per_layer=True)
    write_experts(folder, final)
    write_report(folder, summary, steps)
    write_page(folder)
    summary["finished"] = True
    observe.write_json(folder / "summary.json", summary)
    return summary


def prepare(config: RunConfig) -> Source:
    """The text, its tokenizer and the dense model of a run; a checkpoint is verified before it is read."""
    draws = noise.generator(config.seed)
    dtype = presets.dtype(config)
    if not config.checkpoint.name:
        tokenizer: Tokenizer = data.ByteTokenizer()
        drawn = noise.normal_like(qwen3.abstract(config.model), draws)
        model = qwen3.init(drawn, config=config.model, dtype=dtype)
        return Source(tokenizer=tokenizer, corpus=_corpus(config, tokenizer), model=model)
    manifest = weights.read_manifest(config.checkpoint.manifest, config.checkpoint.name)
    folder = weights.find(config.checkpoint.folder, manifest)
    weights.verify(folder, manifest)
    found = weights.read_config(folder / "config.json")
    check.require(found == config.model, f"prepare: {folder} holds {found}, the configuration says {config.model}.")
    tokenizer = data.HubTokenizer(folder)
    loaded = tree.map1(lambda leaf: leaf.to(dtype), weights.load(folder, config=config.model))
    return Source(tokenizer=tokenizer, corpus=_corpus(config, tokenizer), model=loaded)


def held_out_batches(corpus: Corpus, config: RunConfig) -> dict[str, tuple[Batch, ...]]:
    """What an evaluation reads of every domain."""
    return {
        name: data.evaluation_batches(
            tokens,
            mask,
            batch=config.data.batch_size,
            length=config.data.sequence_length,
            limit=config.data.eval_windows,
        )
        for name, tokens, mask in zip(corpus.domains, corpus.held_out, corpus.held_out_mask, strict=True)
    }


def _corpus(config: RunConfig, tokenizer: Tokenizer) -> Corpus:
    settings = config.data
    if settings.path is not None:
        return data.load_corpus(settings.path, tokenizer, held_out=settings.held_out)
    embedded = data.embedded_corpus(
        bytes_per_domain=settings.bytes_per_domain, held_out=settings.held_out, seed=config.seed
    )
    return data.retokenized(embedded, tokenizer)


def _trained(
    model: Model, phase: Phase, steps: int, before: Position, job: Job, teacher: Model | tuple[()] = ()
) -> tuple[Model, Position]:
    """What a phase makes of a model, and where metrics.jsonl ends then; a phase that was finished is not repeated."""
    with job.meter.part(phase), job.signals.patience():
        kept = job.keeper.model(phase, model)
        if kept is None:
            kept = _train(model, phase, steps, before, job, teacher)
            job.keeper.require_finite(phase, *kept)
            job.keeper.keep_model(phase, *kept)
    if job.signals.requested:
        raise guard.Stopped(f"Stopped after phase {phase}. {job.keeper.last()}", status=guard.INTERRUPTED)
    return kept


def _train(
    model: Model, phase: Phase, steps: int, before: Position, job: Job, teacher: Model | tuple[()]
) -> tuple[Model, Position]:
    config, settings = job.config, presets.step_config(job.config, phase=phase)
    draws = noise.generator(config.seed + (1 if phase == "dense" else 2))
    births = noise.generator(config.seed + 3)
    offset = 0 if phase == "dense" else config.train.dense_steps
    held, position = list[State](), Position(step=0, records=before.records, skipped=0)
    kept = job.keeper.state(phase, model, Generators(draws.get_state(), births.get_state()))
    if kept is None:
        held.append(train.init_state(model, experts=config.sparse.optimizer, regime=config.sparse.regime))
    else:
        position = kept.position
        draws.set_state(kept.generators.draws)
        births.set_state(kept.generators.births)
        held.append(kept.state)
    del kept
    windows = data.pool(job.source.corpus.train, job.source.corpus.train_mask, length=config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    with (
        Journal(job.folder, phase=phase, records=position.records, step=offset + position.step) as log,
        progress(range(steps), initial=position.step, desc=phase, unit="step") as bar,
    ):
        while position.step < steps:
            began = time.monotonic()
            batch = data.sample_batch(windows, torch.rand(config.data.batch_size, 2, generator=draws))
            metrics = _advance(held, batch, births, settings, teacher, job.step)
            born: list[Json] = []
            every = config.train.rebirth_every
            if settings.sparse is not None and every and (position.step + 1) % every == 0:
                fresh = tuple(
                    torch.randn(layer.router.prototypes.shape, generator=births)
                    for layer in objective.carved_layers(held[0].model)
                )
                was = [layer.router.prototypes for layer in objective.carved_layers(held[0].model)]
                held[0], _ = train.lifecycle(held[0], fresh, config=settings.sparse, scale=config.train.rebirth_scale)
                now = [layer.router.prototypes for layer in objective.carved_layers(held[0].model)]
                born = reborn_experts(was, now)
            record = records.step_record(metrics, settings, step=offset + position.step, phase=phase, reborn=len(born))
            if born:
                record["born"] = born
            record["tokens_per_second"] = tokens / (time.monotonic() - began)
            log.write(record, metrics, held[0].model)
            bar.set_postfix_str(records.progress_text(record), refresh=False)
            bar.update()
            position = position.after(skipped=bool(metrics.skipped))
            _require_finite(record, position, job)
            if position.step < steps and (job.signals.requested or job.keeper.is_due(position)):
                job.keeper.keep_state(phase, held[0], position, Generators(draws.get_state(), births.get_state()))
            if position.step < steps and job.signals.requested:
                raise guard.Stopped(
                    f"Stopped after step {position.step} of {phase}. {job.keeper.last()}", status=guard.INTERRUPTED
                )
    return held[0].model, position


def _require_finite(record: Mapping[str, Json], position: Position, job: Job) -> None:
    """Stop a run whose steps were not finite, as configured."""
    settings = job.config.train
    limit = 1 if settings.on_non_finite == "stop" else settings.max_skipped
    if limit and position.skipped >= limit:
        raise guard.Stopped(
            f"{record['phase']}, step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}: "
            f"not finite, {position.skipped} in a row, all skipped. train.on_non_finite is {settings.on_non_finite}, "
            f"train.max_skipped {settings.max_skipped}. {job.keeper.last()}",
            status=guard.NOT_FINITE,
        )


def _advance(
    held: list[State],
    batch: Batch,
    draws: torch.Generator,
    settings: StepConfig,
    teacher: Model | tuple[()],
    step: Step,
) -> Metrics:
    """Put the next state in the place of the one in `held`. Nobody else holds that one: see `train.step` on memory."""
    bits = [noise.rounding_bits(held[0].model, draws)]
    state, metrics = step(held.pop(), batch, bits.pop(), settings, teacher)
    held.append(state)
    return metrics


def _samples(model: Model, source: Source, config: RunConfig) -> dict[str, Json]:
    draws = noise.generator(config.seed + 4)
    settings = presets.step_config(config, phase="moe")
    texts: dict[str, Json] = {}
    for name, tokens in zip(source.corpus.domains, source.corpus.held_out, strict=True):
        prompt: Tensor = tokens[: config.sample.prompt_tokens].long()
        uniform = torch.rand(config.sample.new_tokens, config.model.vocab_size, generator=draws)
        written = generate(model, prompt, uniform, temperature=config.sample.temperature, config=settings)
        texts[name] = f"{source.tokenizer.decode(prompt)} ⟹ {source.tokenizer.decode(written[len(prompt) :])}"
    return texts
