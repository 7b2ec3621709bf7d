"""What our bank costs inside transformers: time and peak memory against its own implementations, as ratios.

`uv run experiments/bench_hub.py experts|surprise [--json FILE]`: about two minutes each on two CPU cores. Expected: the
bank computes the active pairs, and in generation gathers the experts chosen; it should be no slower than `grouped_mm`.
`surprise` costs about as much as a training step under `grouped_mm`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from experiments import noise
from experiments.command import exit_status
from experiments.measure import Row, Run, compare, report
from experiments.progress import progress
from onn.hub import ModelSurprise, surprise
from onn.hub.experts import IMPLEMENTATION, StockExperts, is_stock

Suite = Literal["experts", "surprise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A stock Qwen3-MoE of one layer, or two where the whole model is measured."""

    T: int
    H: int
    E: int
    I: int
    k: int

    def __str__(self) -> str:
        return f"T{self.T} H{self.H} E{self.E} I{self.I} k{self.k}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure and how."""

    suite: Annotated[Suite, tyro.conf.Positional]
    """`experts`: one layer's experts on the bank; `surprise`: `onn.hub.surprise` against a training step."""
    json: Path | None = None
    """Write the rows to this file."""
    repeats: int = 15
    """Rounds; each runs every variant once."""
    seed: int = 0


VOCABULARY = 512
TINY = Case(T=512, H=256, E=64, I=16, k=8)
MANY = Case(T=512, H=256, E=64, I=64, k=4)
FEW = Case(T=512, H=256, E=8, I=512, k=2)
ONE_TOKEN = Case(T=1, H=256, E=64, I=64, k=4)
DTYPES = (torch.float32, torch.bfloat16)
STOCK = ("eager", "grouped_mm")


def random_model(case: Case, dtype: torch.dtype, *, layers: int, seed: int) -> PreTrainedModel:
    """A stock model of this size, on the GPU where there is one."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.H,
        num_hidden_layers=layers,
        num_attention_heads=case.H // 64,
        num_key_value_heads=case.H // 64,
        moe_intermediate_size=case.I,
        num_experts=case.E,
        num_experts_per_tok=case.k,
    )
    model = Qwen3MoeForCausalLM(config)
    source = noise.generator(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=source) / case.H**0.5
        parameter.data = (drawn + float(parameter.ndim == 1)).to(device, dtype)
    return model


def against_others(
    suite: Suite, case: Case, dtype: torch.dtype, variants: Mapping[str, Run], options: Options
) -> list[Row]:
    """The last variant against all the others."""
    *baselines, variant = variants
    pairs = [(variant, baseline) for baseline in baselines]
    return compare(variants, pairs, suite=suite, case=str(case), dtype=dtype, repeats=options.repeats)


class Layer(NamedTuple):
    """One layer's experts, and what they are called with."""

    config: PreTrainedConfig
    experts: StockExperts
    x: Tensor
    chosen: Tensor
    weights: Tensor
    dy: Tensor


def random_layer(case: Case, dtype: torch.dtype, *, seed: int) -> Layer:
    """The experts of a stock layer under a random top-k route."""
    model = random_model(case, dtype, layers=1, seed=seed)
    (experts,) = (module for module in model.modules() if is_stock(module))
    source = noise.generator(seed + 1)
    x, dy = (torch.randn(case.T, case.H, generator=source).to(model.device, dtype) for _ in range(2))
    weights, chosen = torch.rand(case.T, case.E, generator=source).to(model.device).topk(case.k)
    return Layer(
        config=experts.config,
        experts=experts,
        x=x.requires_grad_(),
        chosen=chosen,
        weights=weights.to(dtype).requires_grad_(),
        dy=dy,
    )


def forward(layer: Layer, implementation: str) -> Tensor:
    """The output of a layer."""
    layer.config._experts_implementation = implementation
    y: Tensor = layer.experts(layer.x, layer.chosen, layer.weights)
    return y


def without_gradients(layer: Layer, implementation: str) -> Tensor:
    """The output of a layer, as in generation."""
    with torch.no_grad():
        return forward(layer, implementation)


def with_gradients(layer: Layer, implementation: str) -> tuple[Tensor, ...]:
    """The gradients of a layer's parameters and of everything that it is called with."""
    inputs = (layer.x, layer.weights, *layer.experts.parameters())
    return torch.autograd.grad(forward(layer, implementation), inputs, layer.dy)


def experts_suite(options: Options) -> list[Row]:
    """One layer's experts on the bank against `eager` and `grouped_mm`: forward alone, and with backward."""
    rows: list[Row] = []
    cases = [(case, dtype) for case in (TINY, MANY, FEW, ONE_TOKEN) for dtype in DTYPES]
    for case, dtype in progress(cases, desc="experts", unit="case"):
        layer = random_layer(case, dtype, seed=options.seed)
        for kind, function in (("forward", without_gradients), ("and backward", with_gradients)):
            variants = {f"{name}, {kind}": partial(function, layer, name) for name in (*STOCK, IMPLEMENTATION)}
            rows += against_others("experts", case, dtype, variants, options)
    return rows


def training_step(model: PreTrainedModel, batch: Mapping[str, Tensor], implementation: str) -> tuple[Tensor, ...]:
    """The gradients of all parameters."""
    model.set_experts_implementation(implementation)
    return torch.autograd.grad(model(**batch).loss, list(model.parameters()))


def measurement(model: PreTrainedModel, batch: Mapping[str, Tensor], implementation: str) -> ModelSurprise:
    """The surprise of every pair."""
    model.set_experts_implementation(implementation)
    return surprise(model, batch)


def surprise_suite(options: Options) -> list[Row]:
    """`onn.hub.surprise` of a model of two layers under `grouped_mm` against a training step of the same model."""
    rows: list[Row] = []
    cases = [(case, dtype) for case in (TINY, MANY, FEW) for dtype in DTYPES]
    for case, dtype in progress(cases, desc="surprise", unit="case"):
        model = random_model(case, dtype, layers=2, seed=options.seed)
        tokens = torch.randint(VOCABULARY, (4, case.T // 4), generator=noise.generator(options.seed)).to(model.device)
        batch = {"input_ids": tokens, "labels": tokens}
        variants: dict[str, Run] = {
            f"training step, {name}": partial(training_step, model, batch, name) for name in STOCK
        }
        variants["surprise, grouped_mm"] = partial(measurement, model, batch, "grouped_mm")
        rows += against_others("surprise", case, dtype, variants, options)
    return rows


SUITES: Mapping[Suite, Callable[[Options], list[Row]]] = MappingProxyType(
    {"experts": experts_suite, "surprise": surprise_suite}
)


def main(options: Options) -> list[Row]:
    """Measure a suite, print its rows and write them where that was asked for."""
    return report(SUITES[options.suite](options), options.json)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, prog="bench_hub.py", description=__doc__, args=sys.argv[1:]))))
