"""The peers of the benchmarks do the work that ours does: their numbers are ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import onn.functional as F
from experiments import bench_norms, bench_peers, compiling
from experiments.bench_cases import Bank, BankCase, Gradients, bank_layer, random_bank
from experiments.measure import Run
from tests.support import assert_close, tolerance

CASE = BankCase(T=10, H=16, E=12, I=8, k=3)
CASES = (CASE, replace(CASE, k=12), replace(CASE, T=1), replace(CASE, skew=3.0))


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: False)


def expected(bank: Bank) -> Gradients:
    """By the specification."""
    y, residuals = F.bank_forward(bank.experts, bank.x, bank.weights)
    grads = F.bank_vjp(bank.experts, bank.x, bank.weights, residuals, bank.dy, select=None)
    return Gradients(y, (grads.x, grads.weights, *grads.experts))


def unpacked(result: object, bank: Bank, *, k: int) -> Gradients:
    """What a peer gives, in our layout: gradients of the experts [E, I, H] each, of the weights where routed."""
    assert isinstance(result, Gradients)
    x, weights, *rest = result.grads
    if len(rest) == 2:
        gate, up = rest[0].chunk(2, dim=1)
        experts = (gate, up, rest[1].mT)
    else:
        E = len(bank.experts.gate)
        parts = [torch.stack(rest[start : start + E]) for start in range(0, 3 * E, E)]
        experts = (parts[0], parts[1], parts[2])
    chosen = bench_peers.route_of(bank, k=k).chosen
    return Gradients(result.y, (x, torch.zeros_like(bank.weights).scatter(1, chosen, weights), *experts))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_peer_gives_our_output_and_our_gradients(case: BankCase) -> None:
    bank = random_bank(case, torch.float32, seed=0)
    wanted = expected(bank)
    routed = bank.weights != 0
    wanted = wanted._replace(grads=(wanted.grads[0], torch.where(routed, wanted.grads[1], 0), *wanted.grads[2:]))
    found, skipped = bench_peers.peers(bank, k=case.k)
    assert set(found) >= {bench_peers.LOOP, *bench_peers.STOCK}
    assert set(skipped) == {"eager, compiled"}
    for run in found.values():
        assert_close(unpacked(run(), bank, k=case.k), wanted, bound=tolerance(torch.float32, terms=256))


def test_the_loop_is_exact() -> None:
    bank = random_bank(CASE, torch.float64, seed=0)
    got = unpacked(bench_peers.loop_layer(bank, k=CASE.k)(), bank, k=CASE.k)
    wanted = expected(bank)
    assert_close((got.y, got.grads[0], got.grads[2:]), (wanted.y, wanted.grads[0], wanted.grads[2:]), bound=1e-12)


def flops(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_floor_has_the_flops_of_the_rows_that_are_active(case: BankCase) -> None:
    bank = random_bank(case, torch.float32, seed=0)
    nine_products = 9 * 2 * case.T * case.k * case.I * case.H
    assert flops(bench_peers.floor(bank, k=case.k)) == nine_products
    assert flops(bench_peers.loop_layer(bank, k=case.k)) == nine_products


def test_a_dense_bank_has_the_flops_of_its_floor_where_all_experts_are_active() -> None:
    case = replace(CASE, k=CASE.E)
    bank = random_bank(case, torch.float32, seed=0)
    assert flops(bank_layer(bank, k=case.k, backend="dense", eager=True)) == flops(bench_peers.floor(bank, k=case.k))


def on_meta(case: BankCase) -> Bank:
    """A bank of any size without its memory."""

    def of(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    experts = F.Experts(*(of(case.E, case.I, case.H) for _ in F.Experts._fields))
    return Bank(experts=experts, x=of(case.T, case.H), weights=of(case.T, case.E), dy=of(case.T, case.H))


def test_what_would_take_too_much_is_not_run_and_says_how_much() -> None:
    def why(implementation: str, **sizes: int) -> str:
        case = BankCase(T=1024, H=1024, E=sizes["E"], I=sizes["I"], k=sizes["k"])
        return bench_peers.refusal(on_meta(case), k=case.k, implementation=implementation)

    assert why("batched_mm", E=32, I=16, k=4) == ""
    assert "1.5 GiB" in why("batched_mm", E=32, I=16, k=8)
    assert "4.5 GiB" in why("batched_mm", E=256, I=96, k=4)
    assert why("eager", E=256, I=16, k=4) == ""
    assert "72 GiB" in why("eager", E=256, I=96, k=4)
    assert why("grouped_mm", E=256, I=96, k=32) == ""


NORMS: dict[str, tuple[str, Callable[[Bank], Callable[[], Tensor]]]] = {
    "vmap(grad)": ("torch", bench_norms.per_token_norms),
    "ghost": ("opacus", lambda bank: bench_norms.opacus_norms(bank, ghost=True)),
    "per sample": ("opacus", lambda bank: bench_norms.opacus_norms(bank, ghost=False)),
    "BackPACK": ("backpack", bench_norms.backpack_norms),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norms_of_others_are_the_surprise(name: str) -> None:
    library, make = NORMS[name]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    bank = random_bank(CASE, torch.float64, seed=0)
    _, residuals = F.bank_forward(bank.experts, bank.x, bank.weights)
    surprise = F.bank_vjp(bank.experts, bank.x, bank.weights, residuals, bank.dy, select=None).surprise
    norms = make(bank)
    for _ in range(2):
        assert_close(norms(), surprise, bound=1e-12)


def test_the_linear_modules_are_the_bank() -> None:
    bank = random_bank(CASE, torch.float64, seed=0)
    y = bench_norms.LinearExperts(bank.experts)(bank.x, bank.weights)
    assert_close(y, F.bank_forward(bank.experts, bank.x, bank.weights)[0], bound=1e-12)
