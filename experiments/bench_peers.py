"""Other ways to compute a bank of SwiGLU experts, forward and backward: transformers', a plain loop, GPU libraries.

All take the same experts and routing as `bench_cases.bank_layer`. Their routing is a list of experts for each token,
made from our weights [T, E] before the clock runs.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, k active experts of a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from experiments.bench_cases import Bank, Gradients, differentiated, leaf
from experiments.compiling import compiled
from experiments.measure import Run

STOCK = ("eager", "batched_mm", "grouped_mm")
GATHERED_LIMIT = 2**30
"""Bytes of weights that `batched_mm` may copy, once for each (token, expert); it holds about three times as many."""
ZEROS_LIMIT = 24 * 2**30
"""Bytes of zeros that the backward of `eager` may write: a whole bank for each expert, since it indexes `W[e]`."""
LOOP = "per-expert loop"


class Route(NamedTuple):
    """The routing of a bank as other libraries take it."""

    chosen: Tensor
    """[T, k] int64."""
    weights: Tensor
    """[T, k]."""


def route_of(bank: Bank, *, k: int) -> Route:
    """The `k` experts of each token with the largest weights: all that are active under a top-k route."""
    weights, chosen = bank.weights.topk(k)
    return Route(chosen=chosen, weights=weights)


def stock_layer(bank: Bank, *, k: int, implementation: str, eager: bool) -> Callable[[], Gradients]:
    """transformers' own experts under one of its implementations."""
    module = stock_experts(bank, k=k, implementation=implementation)
    layer = module if eager else compiled(module)
    route = route_of(bank, k=k)
    x, weights = leaf(bank.x), leaf(route.weights)
    inputs = [x, weights, module.gate_up_proj, module.down_proj]
    return lambda: differentiated(layer(x, route.chosen, weights), inputs, bank.dy)


def stock_experts(bank: Bank, *, k: int, implementation: str) -> Qwen3MoeExperts:
    """A stock Qwen3-MoE's experts with the bank's weights."""
    E, I, H = bank.experts.gate.shape
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(torch.cat([bank.experts.gate, bank.experts.up], dim=1))
    module.down_proj = nn.Parameter(bank.experts.down.mT.contiguous())
    return module


def loop_layer(bank: Bank, *, k: int) -> Callable[[], Gradients]:
    """The loop that everybody writes first: matrices of their own for each expert, which computes its tokens."""
    route = route_of(bank, k=k)
    x, weights = leaf(bank.x), leaf(route.weights)
    gates, ups, downs = ([leaf(w) for w in part] for part in bank.experts)

    def forward() -> Tensor:
        y = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True)):
            token, slot = torch.where(route.chosen == expert)
            rows = x[token]
            part = (silu(linear(rows, gate)) * linear(rows, up)) @ down
            y = y.index_add(0, token, part * weights[token, slot, None])
        return y

    return lambda: differentiated(forward(), [x, weights, *gates, *ups, *downs], bank.dy)


def floor(bank: Bank, *, k: int) -> Run:
    """A dense pair of matrix products of the same FLOPs, forward and backward, and nothing else: the limit.

    Nine products of T rows with k I neurons, without gather, activation or autograd.
    """
    _, I, H = bank.experts.gate.shape
    source = torch.Generator().manual_seed(0)
    up, down = (torch.randn(n, H, generator=source).to(bank.x) / H**0.5 for n in (2 * k * I, k * I))
    x, dy = bank.x, bank.dy

    def products() -> tuple[Tensor, ...]:
        hidden = x @ up.mT
        half = hidden[:, : k * I]
        return half @ down, dy @ down.mT, half.mT @ dy, hidden @ up, hidden.mT @ x

    return products


def refusal(bank: Bank, *, k: int, implementation: str) -> str:
    """Why an implementation of transformers is not run on a bank; empty where it is."""
    total = sum(w.numel() * w.element_size() for w in bank.experts)
    E = len(bank.experts.gate)
    gathered, zeros = len(bank.x) * k * (total // E), E * total
    if implementation == "batched_mm" and gathered > GATHERED_LIMIT:
        return f"skipped: copies {gathered / 2**30:.1f} GiB of weights, and their gradients"
    if implementation == "eager" and zeros > ZEROS_LIMIT:
        return f"skipped: its backward writes {zeros / 2**30:.0f} GiB of zeros"
    return ""


def peers(bank: Bank, *, k: int) -> tuple[dict[str, Run], dict[str, str]]:
    """Every peer that can be had here by name, and why others are not run."""
    runs: dict[str, Run] = {LOOP: loop_layer(bank, k=k)}
    skipped = {"eager, compiled": "skipped: its loop over experts breaks the graph at each"}
    for name in STOCK:
        why = refusal(bank, k=k, implementation=name)
        if why:
            skipped |= {name: why} | ({} if name == "eager" else {f"{name}, compiled": why})
            continue
        runs[name] = stock_layer(bank, k=k, implementation=name, eager=True)
        if name != "eager":
            runs[f"{name}, compiled"] = stock_layer(bank, k=k, implementation=name, eager=False)
    return runs | gpu_peers(bank, k=k), skipped


def gpu_peers(bank: Bank, *, k: int) -> dict[str, Run]:
    """Libraries for a GPU, where there is one and they are installed: none is needed, and none was tried here so far.

    SonicMoE is transformers' own adapter to it, which runs where the package `kernels` has it.
    """
    if not torch.cuda.is_available():
        return {}
    runs: dict[str, Run] = {}
    if find_spec("scattermoe") is not None:
        runs["ScatterMoE"] = scatter_layer(importlib.import_module("scattermoe.mlp"), bank, k=k)
    if find_spec("kernels") is not None and find_spec("cutlass") is not None:
        runs["SonicMoE"] = stock_layer(bank, k=k, implementation="sonicmoe", eager=True)
    return runs


def scatter_layer(library: ModuleType, bank: Bank, *, k: int) -> Callable[[], Gradients]:
    """ScatterMoE's gated MLP: `up` before `gate` in its first matrix."""
    E, I, H = bank.experts.gate.shape
    module: nn.Module = library.GLUMLP(input_size=H, hidden_size=I, num_experts=E, top_k=k).to(bank.x)
    matrices = (torch.cat([bank.experts.up, bank.experts.gate], dim=1), bank.experts.down.mT.contiguous())
    parameters = list(module.parameters())
    for parameter, matrix in zip(parameters, matrices, strict=True):
        parameter.data = matrix
    route = route_of(bank, k=k)
    x, weights = leaf(bank.x), leaf(route.weights)
    return lambda: differentiated(module(x, weights, route.chosen), [x, weights, *parameters], bank.dy)
