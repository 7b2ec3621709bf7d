"""What the suites of `bench.py` share: their options, banks under random routing, and the ways to run ours.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, k active experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor

import onn.functional as F
from experiments import noise
from experiments.compiling import compiled
from experiments.measure import Run
from onn import tree
from onn.functional.kernels import native
from onn.functional.kernels.backends import Backend, bounded
from onn.recompute import recomputed

Suite = Literal["experts", "surprise", "smk", "memory", "scaling", "step"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure and how."""

    suite: Annotated[Suite, tyro.conf.Positional]
    """`experts`: forward and backward of a bank against its peers and its floor; `surprise`: what exact surprise costs,
    here and elsewhere; `smk`: what is saved where few experts learn; `memory`: peaks; `scaling`: cost against T, E, I
    and layers; `step`: a training step."""
    backend: Backend = BACKENDS[0]
    """Which of the bank's backends is ours where a suite wants one; suites that compare backends run the others too."""
    json: Path | None = None
    """Write the rows to this file."""
    figure: Path | None = None
    """Draw the rows to this PNG."""
    repeats: int = 25
    """Most rounds of a case; each runs every variant once."""
    budget: float = 10.0
    """Seconds of a case after its warm-up; at least 7 rounds run whatever they take, 3 of slow variants."""
    quick: bool = False
    """Small cases and 3 rounds: does everything run? The figures mean nothing."""
    tokens: int = 1024
    """T of `experts`."""
    hidden: int = 1024
    """H of `experts`."""
    seed: int = 0

    @property
    def rounds(self) -> int:
        """Most rounds of a case."""
        return min(self.repeats, 3) if self.quick else self.repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class BankCase:
    """One bank and its routing."""

    T: int
    H: int
    E: int
    I: int
    k: int
    skew: float = 0.0
    """Expert `e` is preferred by `-skew log(1 + e)`: 0 routes evenly, at 2 a few experts get most tokens."""

    def __str__(self) -> str:
        return f"T{self.T} H{self.H} E{self.E} I{self.I} k{self.k}" + (f" skew{self.skew:g}" if self.skew else "")


class Bank(NamedTuple):
    """What a bank computes with, and the gradient that its output gets."""

    experts: F.Experts
    x: Tensor
    weights: Tensor
    dy: Tensor


class Gradients(NamedTuple):
    """What one forward and backward pass of a layer gives."""

    y: Tensor
    grads: tuple[Tensor, ...]
    """Of x, of the combine weights, and of the parameters in the layer's own layout."""


def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def backends(dtype: torch.dtype) -> list[Backend]:
    """Those that run here: without a compiler, and on a GPU, there is no native code."""
    return [name for name in BACKENDS if name != "native" or native.available(dtype, device=device())]


def random_bank(case: BankCase, dtype: torch.dtype, *, seed: int) -> Bank:
    """A bank of a case under a random top-k route, on the GPU where there is one."""
    source = noise.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device(), dtype)

    experts = F.Experts(*(normal(case.E, case.I, case.H) / case.H**0.5 for _ in F.Experts._fields))
    preference = -case.skew * torch.arange(1, case.E + 1, device=device()).log()
    routing = F.top_k_route(normal(case.T, case.E) + preference.to(dtype), k=case.k, normalise=True)
    return Bank(experts=experts, x=normal(case.T, case.H), weights=routing.weights, dy=normal(case.T, case.H))


def stock_step(bank: Bank, *, engine: tree.Engine = "func", eager: bool = False) -> Run:
    """Forward and backward of the specification by torch's own autograd: the plain dense bank."""

    def loss(inputs: tuple[F.Experts, Tensor, Tensor], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return (F.bank_forward(*inputs)[0] * dy).sum(), ()

    step = tree.value_and_grad(loss, engine=engine)
    run = step if eager else compiled(step)
    return lambda: run((bank.experts, bank.x, bank.weights), bank.dy)


def bank_step(
    bank: Bank,
    *,
    names: tuple[F.TapName, ...],
    min_k: int,
    backend: Backend = BACKENDS[0],
    engine: tree.Engine = "func",
    eager: bool = False,
) -> Run:
    """Forward and backward of the production bank, with taps and SMK."""
    taps = F.zero_taps(names, tokens=len(bank.x), experts=bank.experts)

    def loss(inputs: tuple[F.Experts, Tensor, Tensor, Mapping[str, Tensor]], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return (F.bank(*inputs, min_k=min_k, backend=backend) * dy).sum(), ()

    step = tree.value_and_grad(loss, engine=engine)
    run = step if eager else compiled(step)
    return lambda: run((bank.experts, bank.x, bank.weights, taps), bank.dy)


def stacked_step(
    bank: Bank, *, layers: int, backend: Backend, engine: tree.Engine, eager: bool, recompute: bool
) -> Run:
    """Forward and backward of a residual stack of one bank, whose layers are run again in the backward pass or not."""

    def layer(experts: F.Experts, x: Tensor, weights: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + F.bank(experts, x, weights, {}, min_k=weights.shape[1], backend=backend), ()

    apply = recomputed(layer, engine=engine) if recompute else layer

    def loss(inputs: tuple[F.Experts, Tensor, Tensor], dy: Tensor) -> tuple[Tensor, tuple[()]]:
        experts, x, weights = inputs
        for _ in range(layers):
            x, _ = apply(experts, x, weights)
        return (x * dy).sum(), ()

    step = tree.value_and_grad(loss, engine=engine)
    run = step if eager else compiled(step)
    return lambda: run((bank.experts, bank.x, bank.weights), bank.dy)


def bank_layer(bank: Bank, *, k: int, backend: Backend, eager: bool) -> Callable[[], Gradients]:
    """The bank as a layer of somebody's model, the way the peers are called: compiled forward, then `autograd.grad`.

    As they, it knows how many experts a token has.
    """
    known = bounded(backend, per_token=k)
    gate, up, down, x, weights = (leaf(value) for value in (*bank.experts, bank.x, bank.weights))
    everything = bank.weights.shape[1]

    def forward(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.bank(F.Experts(gate, up, down), x, weights, {}, min_k=everything, backend=known)

    layer = forward if eager else compiled(forward)
    return lambda: differentiated(layer(x, weights, gate, up, down), [x, weights, gate, up, down], bank.dy)


def differentiated(y: Tensor, inputs: list[Tensor], dy: Tensor) -> Gradients:
    """The output of a layer, and the gradients of the inputs when that of the output is `dy`."""
    return Gradients(y.detach(), torch.autograd.grad(y, inputs, dy))


def leaf(value: Tensor) -> Tensor:
    """The same values as something to differentiate with respect to."""
    return value.detach().clone().requires_grad_()
