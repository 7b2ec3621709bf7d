"""What a whole training step costs: a carved model with a quarter of its experts active, against its dense origin.

`uv run experiments/bench.py step` compares; here `uv run experiments/bench_step.py` measures how long the step of
Qwen3-0.6B, 28 layers with random weights, takes to compile in regions with nothing cached: a few minutes on two CPU
cores and 12 GiB. Expected: carved takes at most as long as dense, and compiling less than 120 s.
`experiments/LOG.md` has the figures of the last measurement.

Shape letters: T tokens, L layers, E experts, k active experts of a token.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor

import onn.functional as F
from experiments import noise, presets
from experiments.bench_cases import Options, device
from experiments.compiling import by_region, compiled
from experiments.measure import Row, Run, measured, row
from experiments.memory import peak_gib, return_large_blocks
from experiments.presets import QWEN3_06B
from experiments.progress import progress
from onn import carve, qwen3, train, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.objective import ExpertOptimizer, Regime, StepConfig
from onn.qwen3 import Model, MoeConfig, Qwen3Config, Route
from onn.tiling import backend_of
from onn.train import State

Form = Literal["eager", "regional"]
"""How a step is carried out: as it is, or compiled by layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """A model and a batch."""

    model: Qwen3Config
    batch: int
    length: int
    experts: int
    """A quarter of which is active."""

    def __str__(self) -> str:
        size = self.model
        return (
            f"T{self.batch * self.length} H{size.hidden_size} M{size.intermediate_size} E{self.experts} "
            f"L{size.num_hidden_layers}"
        )


CASE = StepCase(model=replace(QWEN3_06B.model, num_hidden_layers=2, vocab_size=4096), batch=2, length=512, experts=32)
QUICK = StepCase(
    model=replace(presets.TINY.model, num_hidden_layers=2, intermediate_size=192), batch=2, length=16, experts=12
)


class Work(NamedTuple):
    """What one step of one model starts from."""

    state: State
    batch: Batch
    bits: Model | tuple[()]
    settings: StepConfig


def step_suite(options: Options) -> list[Row]:
    """Steps of the carved model with top-k and threshold routes and with SMK, each against the dense model's."""
    case, rows = QUICK if options.quick else CASE, []
    for dtype in progress((torch.float32, torch.bfloat16), desc="step", unit="dtype"):
        rows += step_rows(case, dtype, options=options)
    return rows


def step_rows(case: StepCase, dtype: torch.dtype, *, options: Options) -> list[Row]:
    """The rows of one dtype. As one graph it is not measured: compiling that takes minutes a variant."""
    torch._dynamo.reset()
    quarter = case.experts // 4
    moe = replace(QWEN3_06B.sparse.moe, num_experts=case.experts, top_k=quarter, backend=options.backend)
    everything = replace(moe, min_k=case.experts)
    top_k = replace(everything, route="top_k")
    works = {
        "dense": work(case, dtype, None, seed=options.seed),
        "carved": work(case, dtype, top_k, seed=options.seed),
        "carved, threshold": work(case, dtype, replace(everything, route="threshold"), seed=options.seed),
        "carved, SMK": work(case, dtype, replace(moe, route="top_k", min_k=max(quarter // 4, 1)), seed=options.seed),
        "carved, consolidation": work(case, dtype, top_k, seed=options.seed, optimizer="consolidation"),
        "experts alone": work(case, dtype, top_k, seed=options.seed, regime="experts"),
        "experts alone, consolidation": work(
            case, dtype, top_k, seed=options.seed, optimizer="consolidation", regime="experts"
        ),
    }
    forms: tuple[Form, ...] = get_args(Form)
    variants = {f"{name}, {form}": step_run(start, form) for name, start in works.items() for form in forms}
    found = measured(variants, repeats=options.rounds, budget=options.budget)
    pairs = [(f"{name}, {form}", f"dense, {form}") for name in works if name != "dense" for form in forms]
    rows = []
    others = ("carved, consolidation", "experts alone", "experts alone, consolidation")
    against = [(f"{name}, {form}", f"carved, {form}") for name in others for form in forms]
    for variant, baseline in [*pairs, *against, ("dense, regional", "dense, eager")]:
        one = row(found, variant, baseline, suite="step", case=str(case), dtype=dtype)
        rows.append(replace(one, note=f"{case.batch * case.length / one.seconds:.0f} tokens/s"))
    if torch.cuda.is_available():
        rows = [replace(one, note=f"{one.note}, bank {mfu(case, moe, dtype):.0%} of a large product") for one in rows]
    return rows


def step_run(start: Work, form: Form) -> Run:
    """One step from the same start again and again."""
    state, batch, bits, settings = start
    if form == "regional":
        return partial(train.step, state, batch, bits, settings, (), by_region())
    return partial(train.step, state, batch, bits, settings)


def work(
    case: StepCase,
    dtype: torch.dtype,
    moe: MoeConfig | None,
    *,
    seed: int,
    optimizer: ExpertOptimizer = "adamw",
    regime: Regime = "everything",
) -> Work:
    """A model of a case with random weights, carved where there is a `moe`, a quarter of whose experts is active."""
    draws = noise.generator(seed)
    model = random_model(case.model, dtype, draws)
    tokens = torch.randint(case.model.vocab_size, (case.batch, case.length + 1), generator=draws).to(device())
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=torch.ones(case.batch, case.length, dtype=torch.bool, device=device()),
        domain=torch.zeros(case.batch, dtype=torch.int64, device=device()),
    )
    config = replace(QWEN3_06B, model=case.model)
    if moe is None:
        settings = presets.step_config(config, phase="dense_continued")
    else:
        sparse = replace(config.sparse, moe=moe, optimizer=optimizer, regime=regime)
        settings = presets.step_config(replace(config, sparse=sparse), phase="moe")
        model = carve.carve(model, num_experts=case.experts)
        if moe.route == "threshold":
            model = at_a_quarter(model, batch, config=case.model, moe=moe)
    bits = noise.rounding_bits(model, draws)
    state = train.init_state(model, experts=optimizer, regime=regime)
    return Work(state, batch, bits, replace(settings, engine="autograd"))


def random_model(config: Qwen3Config, dtype: torch.dtype, draws: torch.Generator) -> Model:
    """A dense model, drawn leaf by leaf in its own dtype."""

    def drawn(leaf: Tensor) -> Tensor:
        if leaf.ndim == 1:
            return torch.ones(leaf.shape, dtype=dtype, device=device())
        return (torch.randn(leaf.shape, generator=draws, dtype=dtype) * config.initializer_range).to(device())

    return tree.map1(drawn, qwen3.abstract(config))


def at_a_quarter(model: Model, batch: Batch, *, config: Qwen3Config, moe: MoeConfig) -> Model:
    """The model with each layer's thresholds moved so that a quarter of all pairs passes them."""
    for position in range(len(model.layers)):
        taps: Taps = ({},) * len(model.layers)
        with torch.no_grad():
            seen = qwen3.forward(model, batch.tokens, taps, config=config, moe=moe).carved[position]
        layer = model.layers[position]
        assert isinstance(layer.mlp, qwen3.Moe)
        router = layer.mlp.router
        share = torch.tensor(0.25, device=router.thresholds.device)
        shift = F.share_threshold_shift(seen.affinity, router.thresholds, squash=moe.squash, target=share)
        moved = layer._replace(mlp=layer.mlp._replace(router=router._replace(thresholds=router.thresholds + shift)))
        model = model._replace(layers=(*model.layers[:position], moved, *model.layers[position + 1 :]))
    return model


def mfu(case: StepCase, moe: MoeConfig, dtype: torch.dtype) -> float:
    """The rate of the bank forward and backward, nine products of `T k` rows, against that of one large product."""
    T, H, E = case.batch * case.length, case.model.hidden_size, case.experts
    I = case.model.intermediate_size // E
    draws = noise.generator(0)
    x, dy = (torch.randn(T, H, generator=draws).to(device(), dtype) for _ in range(2))
    experts = F.Experts(*(torch.randn(E, I, H, generator=draws).to(device(), dtype) / H**0.5 for _ in range(3)))
    weights = F.top_k_route(torch.randn(T, E, generator=draws).to(device(), dtype), k=moe.top_k, normalise=True).weights

    def loss(inputs: tuple[F.Experts, Tensor, Tensor], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return (F.bank(*inputs, {}, min_k=E, backend=backend_of(moe.backend)) * dy).sum(), ()

    step = compiled(tree.value_and_grad(loss, engine="func"))
    square = torch.randn(8192, 8192, generator=draws).to(device(), dtype)
    found = measured({"bank": lambda: step((experts, x, weights), dy), "product": lambda: square @ square}, repeats=9)
    seconds = {name: sorted(times)[len(times) // 2] for name, times in found.seconds.items()}
    flops = {"bank": 9 * 2 * T * moe.top_k * I * H, "product": 2 * 8192**3}
    return (flops["bank"] / seconds["bank"]) / (flops["product"] / seconds["product"])


def cold(case: StepCase, route: Route, optimizer: ExpertOptimizer, regime: Regime) -> Mapping[str, float]:
    """Seconds of the first and of the second step of a bfloat16 model in regions, with nothing compiled before, and the
    peak of the process in GiB. The state is handed over, as in training.
    """
    torch._dynamo.reset()
    return_large_blocks()
    moe = replace(QWEN3_06B.sparse.moe, num_experts=case.experts, top_k=case.experts // 4, route=route)
    state, batch, _, settings = work(case, torch.bfloat16, moe, seed=0, optimizer=optimizer, regime=regime)
    held, draws, seconds = [state], noise.generator(1), {}
    del state
    for name in ("first", "second"):
        bits = [noise.rounding_bits(held[0].model, draws)]
        before = time.monotonic()
        after, metrics = train.step(held.pop(), batch, bits.pop(), settings, (), by_region())
        held.append(after)
        del after
        assert not bool(metrics.skipped)
        seconds[name] = time.monotonic() - before
    return {**seconds, "peak_gib": peak_gib()}


def main(
    layers: int = 28,
    length: int = 128,
    route: Route = "threshold",
    optimizer: ExpertOptimizer = "adamw",
    regime: Regime = "everything",
) -> None:
    """Compile the step of Qwen3-0.6B from nothing."""
    case = StepCase(model=replace(QWEN3_06B.model, num_hidden_layers=layers), batch=1, length=length, experts=32)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        found = cold(case, route, optimizer, regime)
    print(
        f"{case}: first step {found['first']:.1f} s, second {found['second']:.1f} s, peak {found['peak_gib']:.2f} GiB"
    )
    print(f"compiling took {found['first'] - found['second']:.1f} s, with nothing cached")


if __name__ == "__main__":
    tyro.cli(main, prog="bench_step.py", description=__doc__, args=sys.argv[1:])
