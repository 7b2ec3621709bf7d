"""Suite `scaling`: how cost grows with tokens, experts, their size, and layers, the rest fixed.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, k active experts of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from experiments import noise, presets
from experiments.bench_cases import DTYPES, BankCase, Options, bank_step, device, random_bank
from experiments.measure import Row, Run, measured, missing, row
from experiments.progress import progress
from onn import carve, qwen3, train, tree
from onn.data import Batch
from onn.objective import StepConfig

Axis = Literal["T", "E", "I"]
DENSE_ROWS = 2**21
"""(token, expert) rows that the dense backend is asked for; more of them take minutes."""
ROWS_OF_AN_EXPERT = 64
"""The cost in E is held against its goal while experts get this many tokens on average."""


class Sweep(NamedTuple):
    """One size varied."""

    axis: Axis
    base: BankCase
    sizes: tuple[int, ...]

    def at(self, size: int) -> BankCase:
        """The case of one size."""
        return replace(self.base, **{self.axis: size})

    def __str__(self) -> str:
        fixed = [word for word in str(self.base).split() if not word.startswith(self.axis)]
        return f"{' '.join(fixed)}, against {self.axis}"


SWEEPS = (
    Sweep(axis="T", base=BankCase(T=0, H=256, E=32, I=32, k=8), sizes=(256, 512, 1024, 2048, 4096)),
    Sweep(axis="E", base=BankCase(T=8192, H=256, E=0, I=16, k=8), sizes=(32, 64, 128, 256, 512, 1024)),
    Sweep(axis="I", base=BankCase(T=1024, H=256, E=32, I=0, k=8), sizes=(8, 16, 32, 64, 96)),
)
QUICK_SWEEPS = (
    Sweep(axis="T", base=BankCase(T=0, H=32, E=16, I=16, k=4), sizes=(32, 64, 128)),
    Sweep(axis="E", base=BankCase(T=128, H=32, E=0, I=8, k=4), sizes=(8, 16, 32)),
    Sweep(axis="I", base=BankCase(T=64, H=32, E=16, I=0, k=4), sizes=(8, 16, 32)),
)
LAYERS = (1, 2, 4, 8)
QUICK_LAYERS = (1, 2)


def scaling_suite(options: Options) -> list[Row]:
    """Every size of a sweep in the same rounds, against the smallest."""
    rows: list[Row] = []
    sweeps = [(sweep, dtype) for sweep in (QUICK_SWEEPS if options.quick else SWEEPS) for dtype in DTYPES]
    for sweep, dtype in progress(sweeps, desc="scaling", unit="sweep"):
        rows += sweep_rows(sweep, dtype, options=options)
    return rows + layer_rows(QUICK_LAYERS if options.quick else LAYERS, options=options)


def sweep_rows(sweep: Sweep, dtype: torch.dtype, *, options: Options) -> list[Row]:
    """Forward and backward of the bank, compiled for each size."""
    torch._dynamo.reset()
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for size in sweep.sizes:
        case = sweep.at(size)
        if options.backend == "dense" and case.T * case.E > DENSE_ROWS:
            skipped[f"{sweep.axis}{size}"] = f"skipped: a dense bank of {case.T * case.E} rows"
            continue
        bank = random_bank(case, dtype, seed=options.seed)
        runs[f"{sweep.axis}{size}"] = bank_step(bank, names=(), min_k=case.E, backend=options.backend)
    return _against_first(runs, str(sweep), dtype, skipped, options=options)


def layer_rows(layers: tuple[int, ...], *, options: Options) -> list[Row]:
    """A training step of a small carved model, eager, with more and more layers."""
    runs = {f"L{count}": training_step(count, options=options) for count in layers}
    return _against_first(runs, "tiny, top-8 of 32, step, against L", torch.float32, {}, options=options)


def training_step(layers: int, *, options: Options) -> Run:
    """One step of the preset `tiny` with so many layers and the top-k route, from fresh parameters."""
    settings = step_config(layers, options=options)
    assert settings.sparse is not None
    source = noise.generator(options.seed)
    drawn = noise.normal_like(qwen3.abstract(settings.model), source)
    dense = qwen3.init(drawn, config=settings.model, dtype=torch.float32)
    model = carve.carve(dense, num_experts=settings.sparse.moe.num_experts)
    state = train.init_state(tree.map1(lambda value: value.to(device()), model))
    B, S = (1, 32) if options.quick else (4, 128)
    text = torch.randint(settings.model.vocab_size, (B, S + 1), generator=source).to(device())
    mask = torch.ones(B, S, dtype=torch.bool, device=device())
    batch = Batch(tokens=text[:, :-1], targets=text[:, 1:], mask=mask, domain=torch.zeros(B, dtype=torch.int64))
    return lambda: train.step(state, batch, (), settings)


def step_config(layers: int, *, options: Options) -> StepConfig:
    """The step of `tiny` with so many layers, 8 of 32 experts by rank, and the backend asked for."""
    config = presets.TINY
    moe = replace(config.sparse.moe, route="top_k", top_k=8, backend=options.backend)
    changed = replace(
        config,
        model=replace(config.model, num_hidden_layers=layers),
        sparse=replace(config.sparse, moe=moe),
    )
    return presets.step_config(changed, phase="moe")


def _against_first(
    runs: Mapping[str, Run], case: str, dtype: torch.dtype, skipped: Mapping[str, str], *, options: Options
) -> list[Row]:
    first, *others = runs
    found = measured(runs, repeats=options.rounds, budget=2 * options.budget)
    common = {"suite": "scaling", "case": case}
    return [row(found, name, first, **common, dtype=dtype) for name in others] + [
        missing(name, first, **common, dtype=dtype, note=why) for name, why in skipped.items()
    ]
