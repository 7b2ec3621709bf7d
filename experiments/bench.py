"""What surprise and SMK cost: time and peak memory as ratios, every variant of a case measured in one run.

`uv run experiments/bench.py surprise [--json FILE]`: about three minutes on two CPU cores. Expected: surprise within
1.10 of the plain bank in time and memory, SMK below 1.0 in time but for the small bank in bfloat16, eager `vmap(grad)`
at least 20 times slower and 50 times larger. `experiments/LOG.md` has the figures of the last measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

import onn.functional as F
from experiments import noise
from experiments.compiling import compiled
from experiments.measure import Row, Run, compare, report
from onn import tree

Suite = Literal["surprise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BankCase:
    """One bank and its routing."""

    T: int
    H: int
    E: int
    I: int
    k: int
    min_k: int
    per_token: bool
    """Measure `vmap(grad)` too: T times the memory of the experts."""

    def __str__(self) -> str:
        return f"T{self.T} H{self.H} E{self.E} I{self.I} k{self.k} min_k{self.min_k}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure and how."""

    suite: Annotated[Suite, tyro.conf.Positional]
    """`surprise`: exact surprise and SMK in a dense bank, against the bank without them and against `vmap(grad)`."""
    json: Path | None = None
    """Write the rows to this file."""
    repeats: int = 25
    """Rounds; each runs every variant once."""
    seed: int = 0


SMALL = BankCase(T=512, H=256, E=32, I=32, k=8, min_k=2, per_token=True)
LARGER = BankCase(T=2048, H=512, E=64, I=64, k=8, min_k=2, per_token=False)


def surprise_suite(options: Options) -> list[Row]:
    """Exact surprise and SMK against the plain bank; the norms one token at a time against exact surprise."""
    rows: list[Row] = []
    cases = [(case, dtype) for case in (SMALL, LARGER) for dtype in (torch.float32, torch.bfloat16)]
    for case, dtype in tqdm(cases, desc="surprise", unit="case"):
        rows += bank_rows(case, dtype, options=options)
    return rows


def bank_rows(case: BankCase, dtype: torch.dtype, *, options: Options) -> list[Row]:
    """The rows of one case: forward and backward of everything, compiled where a compiler is there."""
    torch._dynamo.reset()
    bank = random_bank(case, dtype, seed=options.seed)
    variants = {
        "plain": stock_step(bank),
        "bank": bank_step(bank, names=(), min_k=case.E),
        "surprise": bank_step(bank, names=("surprise",), min_k=case.E),
        "SMK": bank_step(bank, names=(), min_k=case.min_k),
        "SMK + surprise": bank_step(bank, names=("surprise",), min_k=case.min_k),
    }
    compared = [(name, "plain") for name in variants if name != "plain"]
    if case.per_token:
        variants |= {"vmap(grad)": per_token_norms(bank), "vmap(grad), compiled": compiled(per_token_norms(bank))}
        compared += [("vmap(grad)", "surprise"), ("vmap(grad), compiled", "surprise")]
    return compare(variants, compared, suite="surprise", case=str(case), dtype=dtype, repeats=options.repeats)


class Bank(NamedTuple):
    """What a bank computes with, and the gradient that its output gets."""

    experts: F.Experts
    x: Tensor
    weights: Tensor
    dy: Tensor


def random_bank(case: BankCase, dtype: torch.dtype, *, seed: int) -> Bank:
    """A bank of a case under a random top-k route, on the GPU where there is one."""
    source = noise.generator(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device, dtype)

    experts = F.Experts(*(normal(case.E, case.I, case.H) / case.H**0.5 for _ in F.Experts._fields))
    routing = F.top_k_route(normal(case.T, case.E), k=case.k, normalise=True)
    return Bank(experts=experts, x=normal(case.T, case.H), weights=routing.weights, dy=normal(case.T, case.H))


def stock_step(bank: Bank) -> Run:
    """Forward and backward of the specification by torch's own autograd: the plain bank."""

    def loss(inputs: tuple[F.Experts, Tensor, Tensor], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return (F.bank_forward(*inputs)[0] * dy).sum(), ()

    step = compiled(tree.value_and_grad(loss, engine="func"))
    return lambda: step((bank.experts, bank.x, bank.weights), bank.dy)


def bank_step(bank: Bank, *, names: tuple[F.TapName, ...], min_k: int) -> Run:
    """Forward and backward of the production bank, with taps and SMK."""
    taps = F.zero_taps(names, tokens=len(bank.x), experts=bank.experts)

    def loss(inputs: tuple[F.Experts, Tensor, Tensor, Mapping[str, Tensor]], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return (F.bank(*inputs, min_k=min_k, backend="dense") * dy).sum(), ()

    step = compiled(tree.value_and_grad(loss, engine="func"))
    return lambda: step((bank.experts, bank.x, bank.weights, taps), bank.dy)


def per_token_norms(bank: Bank) -> Callable[[], Tensor]:
    """The surprise [T, E] as torch.func gives it without this library: the gradient of every token, then its norm.

    The batch's own gradient, which the other variants compute as well, is left out.
    """

    def loss(experts: F.Experts, x_H: Tensor, weights_E: Tensor, dy_H: Tensor) -> Tensor:
        return (F.bank_forward(experts, x_H[None], weights_E[None])[0][0] * dy_H).sum()

    def norms(experts: F.Experts, x_TH: Tensor, weights_TE: Tensor, dy_TH: Tensor) -> Tensor:
        grads = tree.vmap(tree.grad(loss), (None, 0, 0, 0))(experts, x_TH, weights_TE, dy_TH)
        squares = [vector_norm(g, dim=(-2, -1), dtype=F.reduction_dtype(g.dtype)).square() for g in grads]
        return torch.stack(squares).sum(dim=0).sqrt()

    return lambda: norms(*bank)


SUITES: Mapping[Suite, Callable[[Options], list[Row]]] = MappingProxyType({"surprise": surprise_suite})


def main(options: Options) -> list[Row]:
    """Measure a suite, print its rows and write them where that was asked for."""
    return report(SUITES[options.suite](options), options.json)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="bench.py", description=__doc__, args=sys.argv[1:]))
