"""Suite `experts`: forward and backward of a bank against every peer that can be had, and against the floor.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, k active experts of a token.
"""

from __future__ import annotations

import torch

from experiments.bench_cases import DTYPES, BankCase, Options, backends, bank_layer, random_bank
from experiments.bench_goals import OVER_ALL, SPEED_UP
from experiments.bench_peers import STOCK, floor, peers
from experiments.measure import Row, Run, fastest, measured, missing, row, working
from experiments.progress import progress

FLOOR = "floor"
OURS = "onn"
WASTE = 8
"""How many times the rows that are active a dense backend may compute where it is not the one asked for."""


def grid(options: Options) -> list[BankCase]:
    """Few and many experts, tiny and large, sparse and dense."""
    if options.quick:
        return [BankCase(T=64, H=64, E=16, I=16, k=k) for k in (4, 16)]
    return [
        BankCase(T=options.tokens, H=options.hidden, E=E, I=I, k=k)
        for E in (32, 256)
        for I in (16, 96)
        for k in (4, 8, 16, 32)
    ]


def experts_suite(options: Options) -> list[Row]:
    """Every case in both dtypes."""
    rows: list[Row] = []
    cases = [(case, dtype) for case in grid(options) for dtype in DTYPES]
    for case, dtype in progress(cases, desc="experts", unit="case"):
        rows += case_rows(case, dtype, options=options)
    return rows


def case_rows(case: BankCase, dtype: torch.dtype, *, options: Options) -> list[Row]:
    """All variants against the floor; in the last two rows the best of transformers, and of all peers, against ours.

    Ours is the backend asked for, compiled and not. The others are there for the picture: `dense` compiled, which gains
    from it, and the rest as they are.
    """
    torch._dynamo.reset()
    bank = random_bank(case, dtype, seed=options.seed)
    theirs, skipped = peers(bank, k=case.k)
    ours: dict[str, Run] = {}
    asked: str = options.backend
    for backend in backends(dtype):
        name = f"{OURS} {backend}"
        if backend == "dense" and asked != backend and WASTE * case.k < case.E:
            skipped[f"{name}, compiled"] = f"skipped: computes {case.E / case.k:.0f} times the active rows"
            continue
        if backend in (asked, "dense"):
            ours[f"{name}, compiled"] = bank_layer(bank, k=case.k, backend=backend, eager=False)
        if backend == asked or backend != "dense":
            ours[name] = bank_layer(bank, k=case.k, backend=backend, eager=True)
    runs, failed = working(theirs | ours)
    found = measured({FLOOR: floor(bank, k=case.k)} | runs, repeats=options.rounds, budget=options.budget, warm_up=1)
    common = {"suite": "experts", "case": str(case)}
    rows = [row(found, name, FLOOR, **common, dtype=dtype) for name in runs]
    rows += [missing(name, FLOOR, **common, dtype=dtype, note=why) for name, why in (skipped | failed).items()]
    chosen = [name for name in runs if name.split(",")[0] == f"{OURS} {asked}"]
    rivals = [name for name in runs if name in theirs]
    stock = [name for name in rivals if name.split(",")[0] in STOCK]
    for names, note in ((stock, SPEED_UP), (rivals, OVER_ALL)):
        if chosen and names:
            rows.append(row(found, fastest(found, names), fastest(found, chosen), **common, dtype=dtype, note=note))
    return rows
