"""Suites `surprise`, `smk` and `memory`: what the norms cost, what SMK saves, and what either holds in memory.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, k active experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

import onn.functional as F
from experiments.bench_cases import (
    DTYPES,
    Bank,
    BankCase,
    Options,
    backends,
    bank_step,
    random_bank,
    stacked_step,
    stock_step,
)
from experiments.bench_norms import library_norms, per_token_norms, plain_modules
from experiments.compiling import compiled
from experiments.measure import Row, Run, compare, measured, missing, row, working
from experiments.progress import progress
from onn.functional.kernels.backends import Backend
from onn.tree import Engine

SMALL = BankCase(T=512, H=256, E=32, I=32, k=8)
LARGER = BankCase(T=2048, H=512, E=64, I=64, k=8)
QUICK = BankCase(T=64, H=64, E=16, I=16, k=8)
MIN_K = 2
STACK = 4
"""Banks one after the other, of which recomputation keeps the inputs."""
SMK: Mapping[int, tuple[int, ...]] = MappingProxyType({4: (1,), 8: (1, 2, 4), 16: (2,), 32: (8,)})
"""Values of `min_k` for each k."""
PLAIN = "plain"
STOCK = "stock autograd"
MODULES = "Linear modules, plain"


def cases(options: Options) -> list[BankCase]:
    """The two banks of the log, or a small one."""
    return [QUICK] if options.quick else [SMALL, LARGER]


def surprise_suite(options: Options) -> list[Row]:
    """Exact surprise against the plain bank; the norms of others against exact surprise, for the smaller bank."""
    rows: list[Row] = []
    measured_cases = [(case, dtype) for case in cases(options) for dtype in DTYPES]
    for case, dtype in progress(measured_cases, desc="surprise", unit="case"):
        rows += surprise_rows(case, dtype, others=case != LARGER, options=options)
    return rows


def surprise_rows(case: BankCase, dtype: torch.dtype, *, others: bool, options: Options) -> list[Row]:
    """Forward and backward of everything, ours compiled.

    `plain` is the same backend without surprise, `stock autograd` the dense specification under torch's own.
    """
    torch._dynamo.reset()
    bank = random_bank(case, dtype, seed=options.seed)
    backend = options.backend
    variants = {
        STOCK: stock_step(bank),
        PLAIN: bank_step(bank, names=(), min_k=case.E, backend=backend),
        "surprise": bank_step(bank, names=("surprise",), min_k=case.E, backend=backend),
        "SMK": bank_step(bank, names=(), min_k=MIN_K, backend=backend),
        "SMK + surprise": bank_step(bank, names=("surprise",), min_k=MIN_K, backend=backend),
    }
    compared = [("surprise", PLAIN), ("SMK + surprise", PLAIN)]
    compared += [(name, STOCK) for name in variants if name != STOCK]
    failed: dict[str, str] = {}
    if others:
        per_token: dict[str, Run] = {
            "vmap(grad)": per_token_norms(bank),
            "vmap(grad), compiled": compiled(per_token_norms(bank)),
        }
        libraries, failed = working(per_token | library_norms(bank))
        variants |= libraries | {MODULES: plain_modules(bank)}
        compared += [(name, "surprise") for name in (*libraries, MODULES)]
        compared += [(name, MODULES) for name in libraries if name not in per_token]
    rows = compare(
        variants,
        compared,
        suite="surprise",
        case=str(case),
        dtype=dtype,
        repeats=options.rounds,
        budget=options.budget,
    )
    common = {"suite": "surprise", "case": str(case)}
    return rows + [missing(name, "surprise", **common, dtype=dtype, note=why) for name, why in failed.items()]


def computed_rows(bank: Bank, backend: Backend) -> int:
    """How many (token, expert) rows a backend computes: every one if dense, else those of the active pairs.

    What `auto` chooses is not known here; it is held against the active pairs.
    """
    return bank.weights.numel() if backend == "dense" else int((bank.weights != 0).sum())


def kept_share(bank: Bank, backend: Backend, *, min_k: int) -> float:
    """`rho`: rows that enter the products of the weights' gradient, of those computed."""
    kept = (bank.weights != 0).sum(dim=1).clamp(max=min_k).sum()
    return int(kept) / computed_rows(bank, backend)


def smk_suite(options: Options) -> list[Row]:
    """Each backend with SMK against itself without, over k and `min_k`, under even and under skewed routing."""
    base = QUICK if options.quick else LARGER
    chosen: list[tuple[BankCase, tuple[int, ...]]] = [] if options.quick else [(SMALL, (MIN_K,))]
    chosen += [(replace(base, k=k), least) for k, least in SMK.items() if k <= base.E and not options.quick]
    chosen += [(replace(base, k=8, skew=skew), (MIN_K,)) for skew in ((0.0, 2.0) if options.quick else (2.0,))]
    everything = [(*one, dtype, backend) for one in chosen for dtype in DTYPES for backend in backends(dtype)]
    rows: list[Row] = []
    for case, least, dtype, backend in progress(everything, desc="smk", unit="case"):
        rows += smk_rows(case, dtype, least=least, backend=backend, options=options)
    return rows


def smk_rows(
    case: BankCase, dtype: torch.dtype, *, least: tuple[int, ...], backend: Backend, options: Options
) -> list[Row]:
    """One backend, compiled; the case of a row names `rho`, from which its goal follows."""
    torch._dynamo.reset()
    bank = random_bank(case, dtype, seed=options.seed)
    plain = f"{backend}: {PLAIN}"
    variants = {plain: bank_step(bank, names=(), min_k=case.E, backend=backend)}
    variants |= {f"{backend}: SMK, min_k {k}": bank_step(bank, names=(), min_k=k, backend=backend) for k in least}
    found = measured(variants, repeats=options.rounds, budget=options.budget)
    return [
        row(
            found,
            f"{backend}: SMK, min_k {k}",
            plain,
            suite="smk",
            case=f"{case} rho{kept_share(bank, backend, min_k=k):.4f}",
            dtype=dtype,
        )
        for k in least
    ]


def memory_suite(options: Options) -> list[Row]:
    """Peaks of surprise, SMK and recomputation against `plain`, the same backend without them, and `stock autograd`.

    Both under the same engine, eager or compiled. The stock bank is dense, and holds every row whatever the backend.
    """
    rows: list[Row] = []
    ways: tuple[tuple[Engine, bool], ...] = (("autograd", True), ("func", True), ("func", False))
    chosen = [(case, dtype, *way) for case in cases(options) for dtype in DTYPES for way in ways]
    for case, dtype, engine, eager in progress(chosen, desc="memory", unit="case"):
        rows += memory_rows(case, dtype, engine=engine, eager=eager, options=options)
    return rows


def memory_rows(case: BankCase, dtype: torch.dtype, *, engine: Engine, eager: bool, options: Options) -> list[Row]:
    """One engine; few rounds, since the peak is the same in each.

    Recomputation is measured on a stack of banks, since of a single one nothing can be let go. Compiled it is the stack
    itself.
    """
    torch._dynamo.reset()
    bank = random_bank(case, dtype, seed=options.seed)
    how = f"{engine}, {'eager' if eager else 'compiled'}"

    def ours(names: tuple[F.TapName, ...], min_k: int) -> Run:
        return bank_step(bank, names=names, min_k=min_k, backend=options.backend, engine=engine, eager=eager)

    def stack(*, recompute: bool) -> Run:
        return stacked_step(
            bank, layers=STACK, backend=options.backend, engine=engine, eager=eager, recompute=recompute
        )

    plain, stock = f"{PLAIN}, {how}", f"{STOCK}, {how}"
    whole, again = (f"{name} {STACK} banks, {how}" for name in (PLAIN, "recomputed"))
    single = {
        plain: ours((), case.E),
        stock: stock_step(bank, engine=engine, eager=eager),
        f"surprise, {how}": ours(("surprise",), case.E),
        f"SMK, {how}": ours((), MIN_K),
        f"SMK + surprise, {how}": ours(("surprise",), MIN_K),
    }
    runs, failed = working({again: stack(recompute=True)})
    variants = single | {whole: stack(recompute=False)} | runs
    found = measured(variants, repeats=min(options.rounds, 5), budget=options.budget)
    pairs = [(name, baseline) for baseline in (plain, stock) for name in single if name not in (plain, stock)]
    pairs += [(plain, stock), *((name, whole) for name in runs)]
    common = {"suite": "memory", "case": str(case)}
    return [row(found, *pair, **common, dtype=dtype) for pair in pairs] + [
        missing(name, whole, **common, dtype=dtype, note=why) for name, why in failed.items()
    ]
