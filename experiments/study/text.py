"""Text as tasks: the next byte of four domains in sequence, through the frozen trunk of a small dense Qwen3.

The dense model, whose MLPs have as many neurons as the bank, is trained on all domains alike; then the MLP of its last
layer is carved into the experts. What its bank reads and what the bank's output is added to are constants of the text,
so they are computed once. Tuning reads other windows of the text than the test does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import onn.functional as F
from experiments import noise
from experiments.presets import PRESETS
from experiments.progress import progress
from experiments.study.arms import BASE_ACTIVE
from experiments.study.net import Net
from experiments.study.tasks import HIDDEN, Bank, Tasks
from experiments.workers import one_thread
from onn import carve, data, qwen3, train
from onn.corpus import Corpus, embedded_corpus
from onn.objective import OptimConfig, StepConfig
from onn.qwen3 import Mlp, Model, Qwen3Config

TINY = PRESETS["tiny"]
STEPS, BATCH, LENGTH = 1000, 16, 64
BYTES = 300_000
TRAIN, HELD_OUT = 8192, 1024
"""Positions of each domain."""


class Positions(NamedTuple):
    """Of all domains, in the order of the corpus: [domains, n, ...]."""

    inputs: Tensor
    residual: Tensor
    labels: Tensor
    tokens: Tensor


class Texts(NamedTuple):
    """What a seed learns and is judged by."""

    train: Positions
    held_out: Positions


class Trunk(NamedTuple):
    """What all seeds share."""

    bank: Bank
    model: Model
    test: Texts
    tuning: Texts
    """Windows between those of the test; none begins where another does."""


def dense(bank: Bank) -> Qwen3Config:
    """The dense model that is carved into such a bank."""
    return replace(
        TINY.model,
        hidden_size=HIDDEN,
        intermediate_size=bank.experts * bank.width,
        num_hidden_layers=2,
        head_dim=HIDDEN // 4,
    )


def trunk(bank: Bank) -> Trunk:
    """The dense model, trained on one thread as all runs are, and all that its carved layer will see."""
    corpus, config = embedded_corpus(bytes_per_domain=BYTES, held_out=0.1, seed=0), dense(bank)
    with one_thread():
        model = _trained(corpus, config)
        train = _positions(model, corpus.train, corpus.train_mask, config=config, wanted=TRAIN)
        held_out = _positions(model, corpus.held_out, corpus.held_out_mask, config=config, wanted=HELD_OUT)
        test, tuning = (Texts(*parts) for parts in zip(train, held_out, strict=True))
        return Trunk(bank=bank, model=model, test=test, tuning=tuning)


def _trained(corpus: Corpus, config: Qwen3Config) -> Model:
    draws = noise.generator(0)
    windows = data.pool(corpus.train, corpus.train_mask, length=LENGTH)
    model = qwen3.init(noise.normal_like(qwen3.abstract(config), draws), config=config, dtype=torch.float32)
    settings = StepConfig(
        model=config,
        sparse=None,
        optim=OptimConfig(
            lr=1e-2, warmup=50, floor=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0
        ),
        integrity=TINY.integrity,
        total_steps=STEPS,
        engine="autograd",
    )
    state = train.init_state(model)
    for _ in progress(range(STEPS), desc="dense Qwen3", unit="step"):
        batch = data.sample_batch(windows, torch.rand(BATCH, 2, generator=draws))
        state, _ = train.step(state, batch, (), settings)
    return state.model


def _positions(
    model: Model, texts: Sequence[Tensor], masks: Sequence[Tensor], *, config: Qwen3Config, wanted: int
) -> tuple[Positions, Positions]:
    """Windows spread evenly over the text of every domain, every second one in the second part; `wanted` in each."""
    found: tuple[list[Positions], list[Positions]] = ([], [])
    for tokens, mask in zip(texts, masks, strict=True):
        starts = torch.linspace(0, len(tokens) - LENGTH - 1, 2 * wanted // LENGTH).long()
        for part, place in zip(found, (starts[::2], starts[1::2]), strict=True):
            batch = data.windows(tokens, mask, place, length=LENGTH)
            read, labels = batch.tokens.long(), batch.targets.long()
            inputs, residual = before_last_mlp(model, read, config=config)
            part.append(Positions(inputs, residual, labels=labels.flatten(), tokens=read.flatten()))
    first, second = (Positions(*map(torch.stack, zip(*part, strict=True))) for part in found)
    return first, second


def before_last_mlp(model: Model, tokens: Tensor, *, config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """What the last layer's MLP reads, and what its output is added to, each [B S, H]."""
    with torch.no_grad():
        x = torch.nn.functional.embedding(tokens, model.embedding)
        positions = qwen3.rotary_positions(x, config)
        *layers, last = model.layers
        for layer in layers:
            x, _ = qwen3.layer_forward(layer, x, positions, {}, config=config, moe=None)
        normed = qwen3.apply_norm(last.input_norm, x, config)
        x = x + qwen3.apply_attention(last.attention, normed, positions, config)
        return qwen3.apply_norm(last.post_attention_norm, x, config).flatten(0, 1), x.flatten(0, 1)


def text(shared: Trunk, texts: Texts, seed: int) -> Tasks:
    """The domains in the order of row `seed` of a Latin square, and the carved layer with a router of the seed's own.

    Prototypes are tokens drawn at random. Combine weights sum to 1 here, where the dense layer adds its experts up: the
    down projections are scaled by the number of active experts.
    """
    draws, domains = noise.generator(seed), len(texts.train.labels)
    order = [(seed + task) % domains for task in range(domains)]
    last = shared.model.layers[-1].mlp
    assert isinstance(last, Mlp)
    experts = carve.split_mlp(last, num_experts=shared.bank.experts)
    tokens = texts.train.inputs.flatten(0, 1)
    centred = tokens - tokens.mean(dim=0)
    chosen = torch.randperm(len(tokens), generator=draws)[: shared.bank.experts]
    return Tasks(
        inputs=texts.train.inputs[order],
        residual=texts.train.residual[order],
        labels=texts.train.labels[order],
        held_inputs=texts.held_out.inputs[order],
        held_residual=texts.held_out.residual[order],
        held_labels=texts.held_out.labels[order],
        held_tokens=texts.held_out.tokens[order],
        net=Net(
            features=torch.zeros(HIDDEN, 0),
            prototypes=centred[chosen],
            experts=F.Experts(experts.gate, experts.up, experts.down * round(BASE_ACTIVE * shared.bank.experts)),
            readout=qwen3.output_weight(shared.model) * shared.model.norm,
        ),
    )
