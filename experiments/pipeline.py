"""The main job from end to end: data, dense Qwen3, carve, training by surprise, evaluation, run folder."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import onn.functional as F
from experiments import noise, presets
from experiments.compiling import compiled
from experiments.evaluate import Evaluation, evaluate, generate, parameter_count
from experiments.memory import Meter, return_large_blocks
from experiments.presets import RunConfig
from experiments.report import write_report
from onn import carve, check, data, objective, observe, qwen3, train, tree, weights
from onn.data import Batch, Corpus, Tokenizer
from onn.objective import StepConfig
from onn.observe import Json
from onn.qwen3 import Model
from onn.train import Metrics, State

Phase = Literal["dense", "moe", "dense_continued"]
Step = Callable[[State, Batch, Model | tuple[()], StepConfig, Model | tuple[()]], tuple[State, Metrics]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a run starts from."""

    tokenizer: Tokenizer
    corpus: Corpus
    model: Model
    """Dense: freshly drawn, or read from a checkpoint."""


def run(config: RunConfig, folder: Path) -> Mapping[str, Json]:
    """Carry out the main job and leave everything it finds in `folder`.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: the folder holds a run already, or the data, the weights or the configuration do not fit.
    """
    check.require(not (folder / "metrics.jsonl").exists(), f"run: {folder} holds a run already; choose another --out.")
    if config.checkpoint.name:
        return_large_blocks()
    meter = Meter()
    with meter.part("prepare"):
        source = prepare(config)
    folder.mkdir(parents=True, exist_ok=True)
    observe.write_json(folder / "config.json", presets.save(config))
    held_out = held_out_batches(source.corpus, config)
    step: Step = compiled(train.step) if config.train.compile else train.step

    def trained(model: Model, phase: Phase, steps: int, teacher: Model | tuple[()] = ()) -> Model:
        with meter.part(phase):
            return _train(model, phase, steps, teacher, step=step, source=source, config=config, folder=folder)

    def evaluated(model: Model, phase: Phase) -> Evaluation:
        with meter.part("evaluate"):
            return evaluate(model, held_out, config=presets.step_config(config, phase=phase))

    dense = source.model
    if config.train.dense_steps:
        dense = trained(dense, "dense", config.train.dense_steps)
    dense_figures = evaluated(dense, "dense")
    with meter.part("carve"):
        carved = carve.carve(dense, num_experts=config.sparse.moe.num_experts)
    carved_figures = evaluated(carved, "moe")
    print(f"carved: held-out loss {carved_figures.mean('loss'):.6f}, dense {dense_figures.mean('loss'):.6f}")
    moe = trained(carved, "moe", config.train.steps, dense)
    final = evaluated(moe, "moe")
    models = {"dense": dense, "moe": moe}
    continued = None
    if config.train.dense_continued:
        models["dense_continued"] = trained(dense, "dense_continued", config.train.steps)
        continued = evaluated(models["dense_continued"], "dense_continued")
    with meter.part("sample"):
        samples = _samples(moe, source, config)
    with meter.part("save"):
        for name, model in models.items():
            weights.save(model, folder / f"{name}.safetensors", metadata={"preset": config.preset, "phase": name})
    records = observe.read_jsonl(folder / "metrics.jsonl")
    summary: dict[str, Json] = {
        "preset": config.preset,
        "command": "uv run experiments/run.py " + " ".join(sys.argv[1:]),
        **_figures(dense_figures, carved_figures, final, continued, records, config),
        "parameters": parameter_count(moe),
        "corpus_fingerprint": source.corpus.fingerprint,
        "corpus_domains": {
            name: {"train_tokens": len(tokens), "held_out_tokens": len(rest)}
            for name, tokens, rest in zip(
                source.corpus.domains, source.corpus.train, source.corpus.held_out, strict=True
            )
        },
        "samples": samples,
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "seconds": {**meter.seconds, "all": time.monotonic() - meter.started},
        "peak_memory_gib": {**meter.peak_gib},
    }
    observe.write_json(folder / "summary.json", summary)
    observe.curves(records, folder / "curves.png")
    observe.expert_by_domain(final.usage(), final.domains, folder / "expert_by_domain.png")
    observe.surprise_map(final.surprise_by_expert(), folder / "surprise_map.png", per_layer=False)
    observe.surprise_map(final.surprise_by_expert(), folder / "surprise_map_per_layer.png", per_layer=True)
    write_report(folder, summary, records)
    return summary


def prepare(config: RunConfig) -> Source:
    """The text, its tokenizer and the dense model of a run; a checkpoint is verified before it is read."""
    draws = noise.generator(config.seed)
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
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


def _train(
    model: Model,
    phase: Phase,
    steps: int,
    teacher: Model | tuple[()],
    *,
    step: Step,
    source: Source,
    config: RunConfig,
    folder: Path,
) -> Model:
    settings = presets.step_config(config, phase=phase)
    draws = noise.generator(config.seed + (1 if phase == "dense" else 2))
    births = noise.generator(config.seed + 3)
    offset = 0 if phase == "dense" else config.train.dense_steps
    held = [train.init_state(model)]
    windows = data.pool(source.corpus.train, source.corpus.train_mask, length=config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    with observe.MetricsWriter(folder / "metrics.jsonl") as log, tqdm(total=steps, desc=phase, unit="step") as bar:
        for position in range(steps):
            before = time.monotonic()
            batch = data.sample_batch(windows, torch.rand(config.data.batch_size, 2, generator=draws))
            metrics = _advance(held, batch, draws, settings, teacher, step)
            reborn = 0
            if settings.sparse is not None and (position + 1) % config.train.rebirth_every == 0:
                fresh = tuple(
                    torch.randn(layer.router.prototypes.shape, generator=births)
                    for layer in objective.carved_layers(held[0].model)
                )
                held[0], born = train.lifecycle(
                    held[0], fresh, config=settings.sparse, scale=config.train.rebirth_scale
                )
                reborn = int(born.sum())
            record = _record(metrics, settings, step=offset + position, phase=phase, reborn=reborn)
            record["tokens_per_second"] = tokens / (time.monotonic() - before)
            log.write(record)
            bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update()
    return held[0].model


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


def _record(metrics: Metrics, settings: StepConfig, *, step: int, phase: Phase, reborn: int) -> dict[str, Json]:
    loss, tau = float(metrics.loss), float(metrics.tau)
    record: dict[str, Json] = {"step": step, "phase": phase, "loss": loss, "tau": tau}
    record["error_over_tau"] = loss / max(tau, settings.integrity.tau_floor)
    record["divergence"] = float(metrics.divergence) if isinstance(metrics.divergence, Tensor) else None
    sparse = dict.fromkeys(
        ("surprise", "pi", "active_per_token", "target_active_per_token", "gate_accuracy", "gate_chance"), None
    )
    record |= sparse | {"dead_experts": None, "reborn": None}
    if isinstance(metrics.sparse, objective.SparseMetrics) and settings.sparse is not None:
        seen, experts = metrics.sparse, settings.sparse.moe.num_experts
        record |= {
            "surprise": float(seen.surprise),
            "pi": float(seen.pi),
            "active_per_token": float(seen.active_share) * experts,
            "target_active_per_token": float(seen.target_share) * experts,
            "gate_accuracy": float(seen.gate.accuracy),
            "gate_chance": float(seen.gate.chance),
            "dead_experts": int((seen.usage.active == 0).sum()),
            "reborn": reborn,
            "non_finite_surprise": int(seen.non_finite),
        }
    return record | {
        "accuracy": float(metrics.accuracy),
        "learning_rate": float(metrics.learning_rate),
        "grad_norm": float(metrics.grad_norm),
        "skipped": bool(metrics.skipped),
    }


def _postfix(record: Mapping[str, Json]) -> str:
    shown = {"loss": ".3f", "pi": ".3f", "active_per_token": ".1f", "tokens_per_second": ".0f"}
    names = {"pi": "PI", "active_per_token": "active", "tokens_per_second": "tok/s"}
    values = {name: observe.number(record, name) for name in shown}
    return ", ".join(
        f"{names.get(name, name)} {value:{shown[name]}}" for name, value in values.items() if value is not None
    )


def _figures(
    dense: Evaluation,
    carved: Evaluation,
    final: Evaluation,
    continued: Evaluation | None,
    records: list[dict[str, Json]],
    config: RunConfig,
) -> dict[str, Json]:
    before, after = final.dead()
    series = [value for record in records if (value := observe.number(record, "pi")) is not None]
    integral = F.integrity_integral(torch.tensor(series), delta=config.integrity.delta) if series else None
    return {
        "dense_loss": dense.mean("loss"),
        "carved_loss": carved.mean("loss"),
        "final_loss": final.mean("loss"),
        "dense_continued_loss": None if continued is None else continued.mean("loss"),
        "pi": final.sparse_mean("pi"),
        "pi_integral": None if integral is None else float(integral),
        "tau": final.mean("tau"),
        "surprise": final.sparse_mean("surprise"),
        "active_fraction": final.sparse_mean("active_share"),
        "target_active_fraction": config.sparse.density.target,
        "gate_accuracy": final.sparse_mean("gate_accuracy"),
        "gate_chance": final.sparse_mean("gate_chance"),
        "dead_before_fallback": before,
        "dead_after_fallback": after,
        "expert_domain_information_nats": final.expert_domain_information(),
        "per_domain": final.per_domain(num_experts=config.sparse.moe.num_experts),
        "per_domain_dense_continued": None if continued is None else continued.per_domain(num_experts=1),
    }


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


def _versions() -> dict[str, Json]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
