"""Other ways to the norm of every token's gradient of every expert: torch.func, Opacus, BackPACK.

Opacus and BackPACK know modules, not routing: they give one norm for each token and `nn.Linear`, and every module must
see every token. So the experts are 3 E Linear modules that compute all tokens densely, with the combine weight on the
activation; a pair that is not routed then has a norm of 0 that was paid for. The root of the sum of squares over an
expert's three modules is its surprise. Neither works in a graph of `torch.compile`.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import silu

import onn.functional as F
from experiments.bench_cases import Bank, leaf
from onn import tree

Norms = Callable[[], Tensor]


def per_token_norms(bank: Bank) -> Norms:
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


class LinearExperts(nn.Module):
    """The experts as 3 E Linear modules; every token passes through all of them."""

    def __init__(self, experts: F.Experts) -> None:
        super().__init__()
        self.gate = nn.ModuleList(_linear(w) for w in experts.gate)
        self.up = nn.ModuleList(_linear(w) for w in experts.up)
        self.down = nn.ModuleList(_linear(w.mT) for w in experts.down)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """[T, H] and [T, E] to [T, H]."""
        parts = zip(self.gate, self.up, self.down, weights.unbind(1), strict=True)
        return torch.stack([down(silu(gate(x)) * up(x) * w[:, None]) for gate, up, down, w in parts]).sum(dim=0)


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight.contiguous().clone())
    return module


def linear_modules(module: nn.Module) -> list[list[nn.Linear]]:
    """The three lists of E modules of `LinearExperts`, whatever is wrapped around them."""
    found = [part for part in module.modules() if isinstance(part, nn.Linear)]
    size = len(found) // len(F.Experts._fields)
    return [found[start : start + size] for start in range(0, len(found), size)]


def _backward(module: nn.Module, bank: Bank) -> None:
    """Forward and backward with gradients of everything that the bank has one for."""
    module.zero_grad(set_to_none=True)
    (module(leaf(bank.x), leaf(bank.weights)) * bank.dy).sum().backward()


def _left_on(parameter: Tensor, name: str) -> Tensor:
    """What a library leaves on a parameter."""
    found = getattr(parameter, name)
    assert isinstance(found, Tensor)
    return found


def plain_modules(bank: Bank) -> Callable[[], None]:
    """The Linear modules without any norm: what the two libraries add their cost to."""
    module = LinearExperts(bank.experts)
    return lambda: _backward(module, bank)


def opacus_norms(bank: Bank, *, ghost: bool) -> Norms:
    """Opacus' norms [T, E]: ghost norms, or from the gradient of every token, which it lets go module by module."""
    name = "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"
    wrap = importlib.import_module(name).GradSampleModuleFastGradientClipping
    module: nn.Module = wrap(LinearExperts(bank.experts), loss_reduction="sum", use_ghost_clipping=ghost)

    def norms() -> Tensor:
        _backward(module, bank)
        found = [[_left_on(part.weight, "_norm_sample") for part in parts] for parts in linear_modules(module)]
        total: Tensor = vector_norm(torch.stack([torch.stack(part, dim=1) for part in found]), dim=0)
        return total

    return norms


def backpack_norms(bank: Bank) -> Norms:
    """BackPACK's BatchL2Grad [T, E]."""
    library, extensions = importlib.import_module("backpack"), importlib.import_module("backpack.extensions")
    module = LinearExperts(bank.experts)
    for part in (part for parts in linear_modules(module) for part in parts):
        library.extend(part)

    def norms() -> Tensor:
        with library.backpack(extensions.BatchL2Grad()):
            _backward(module, bank)
        found = [[_left_on(part.weight, "batch_l2") for part in parts] for parts in linear_modules(module)]
        return torch.stack([torch.stack(part, dim=1) for part in found]).sum(dim=0).sqrt()

    return norms


def library_norms(bank: Bank) -> dict[str, Norms]:
    """The libraries of the optional group `peers` that are installed."""
    found: dict[str, Norms] = {}
    if find_spec("opacus") is not None:
        found["Opacus, ghost norms"] = opacus_norms(bank, ghost=True)
        found["Opacus, per-sample gradients"] = opacus_norms(bank, ghost=False)
    if find_spec("backpack") is not None:
        found["BackPACK, BatchL2Grad"] = backpack_norms(bank)
    return found
