"""The routers that `carving.py` compares, and the loss of a model whose experts they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, embedding, linear

import onn.functional as F
from onn import carve, optim, qwen3, tree
from onn.data import Batch
from onn.qwen3 import Mlp, Model, Qwen3Config

RouterName = Literal["oracle", "gate", "representative", "analytic", "trained"]
Choose = Callable[[int, Tensor], Tensor]
"""Which experts are active: `(layer, x [T, H]) -> bool [T, E]`."""

TEMPERATURE = 0.01
"""Margins are divided by it in the loss of the trained router."""
LEARNING_RATE = 0.01
COSINE_EPS = 1e-6


class Cut(NamedTuple):
    """The experts of every layer of a model, by one method."""

    experts: tuple[F.Experts, ...]
    speakers: tuple[Tensor, ...]
    """[E] each: the representative neuron of every expert."""
    shared: int
    """The first experts of a layer, which are always open."""


class Measured(NamedTuple):
    """Of held-out text."""

    loss: float
    active_fraction: float


def mlps(model: Model) -> list[Mlp]:
    """The MLPs of a dense model."""
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, Mlp)]


def forward(
    model: Model, tokens: Tensor, compute: Callable[[int, Mlp, Tensor], Tensor], *, config: Qwen3Config
) -> Tensor:
    """Logits [B, S, V] of a dense model whose MLPs are computed by `compute(layer, mlp, x [T, H])`."""
    x_BSH = embedding(tokens, model.embedding)
    positions = qwen3.rotary_positions(x_BSH, config)
    for position, (layer, mlp) in enumerate(zip(model.layers, mlps(model), strict=True)):
        normed = qwen3.apply_norm(layer.input_norm, x_BSH, config)
        x_BSH = x_BSH + qwen3.apply_attention(layer.attention, normed, positions, config)
        normed = qwen3.apply_norm(layer.post_attention_norm, x_BSH, config)
        x_BSH = x_BSH + compute(position, mlp, normed.flatten(0, 1)).unflatten(0, tokens.shape)
    return linear(qwen3.apply_norm(model.norm, x_BSH, config), model.head[0] if model.head else model.embedding)


@torch.no_grad()
def inputs(model: Model, tokens: Tensor, *, config: Qwen3Config) -> list[Tensor]:
    """What the MLP of every layer of a dense model reads on these tokens [B, S]: [T, H] each."""
    seen: list[list[Tensor]] = [[] for _ in model.layers]

    def watched(layer: int, mlp: Mlp, x: Tensor) -> Tensor:
        seen[layer].append(x)
        return qwen3.mlp_forward(mlp, x)

    for window in tokens.split(1):
        forward(model, window, watched, config=config)
    return [torch.cat(parts) for parts in seen]


class Routed(NamedTuple):
    """A cut model and who chooses among its experts."""

    cut: Cut
    choose: Choose


@torch.no_grad()
def evaluate(model: Model, batches: Sequence[Batch], routed: Routed | None, *, config: Qwen3Config) -> Measured:
    """The mean loss of a dense model, or of the same with only the chosen experts, and the share of these."""
    masks: list[Tensor] = []

    def compute(layer: int, mlp: Mlp, x: Tensor) -> Tensor:
        if routed is None:
            return qwen3.mlp_forward(mlp, x)
        masks.append(routed.choose(layer, x))
        return F.bank_forward(routed.cut.experts[layer], x, masks[-1].to(x.dtype))[0]

    total, targets = 0.0, 0
    for batch in batches:
        logits = forward(model, batch.tokens, compute, config=config)
        losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        total += float(losses.double() @ batch.mask.flatten().double())
        targets += int(batch.mask.sum())
    share = float(torch.cat(masks).double().mean()) if masks else 1.0
    return Measured(loss=total / targets, active_fraction=share)


def routers(
    model: Model, cut: Cut, seen: Sequence[Tensor], *, k: int, steps: int
) -> Iterator[tuple[RouterName, Choose]]:
    """The routers that open `k` experts, one after the other; with all experts open they are all the oracle.

    Args:
        model: dense.
        cut: its experts.
        seen: of `inputs`, on calibration text.
        k: active experts of a token; on average, for the routes by threshold.
        steps: of the trained router.
    """
    banks, shared, num_experts = cut.experts, cut.shared, len(cut.speakers[0])
    yield "oracle", lambda layer, x: carve.best_experts(banks[layer], x, k=k, shared=shared)
    if k == num_experts:
        return

    def open_for(found: F.Router, x: Tensor) -> F.Router:
        return carve.calibrated(found, x, share=k / num_experts, eps=COSINE_EPS)

    opened = [carve.open_router(bank, shared=shared) for bank in banks]
    yield "gate", by_threshold([open_for(*row) for row in zip(opened, seen, strict=True)])
    dense = mlps(model)

    def speak(layer: int, x: Tensor) -> Tensor:
        scores = carve.representative_scores(dense[layer], cut.speakers[layer], x)
        return carve.choose(scores, k=k, shared=shared)

    yield "representative", speak
    chosen = [carve.best_experts(bank, x, k=k, shared=shared) for bank, x in zip(banks, seen, strict=True)]
    analytic = [
        carve.analytic_router(*row, eps=COSINE_EPS, shared=shared) for row in zip(banks, seen, chosen, strict=True)
    ]
    yield "analytic", by_threshold(analytic)
    trained = [distilled(*row, steps=steps) for row in zip(analytic, seen, chosen, strict=True)]
    yield "trained", by_threshold([open_for(*row) for row in zip(trained, seen, strict=True)])


def by_threshold(found: Sequence[F.Router]) -> Choose:
    """The layer's own route, with one expert for a token that passes no threshold."""

    def choose(layer: int, x: Tensor) -> Tensor:
        return _route(found[layer], x).active

    return choose


def _route(router: F.Router, x: Tensor) -> F.Routing:
    affinity = F.cosine_affinity(x, router.prototypes, eps=COSINE_EPS)
    return F.threshold_route(affinity, router.thresholds, squash="sigmoid", fallback_k=1, combine="sum")


def distilled(router: F.Router, x: Tensor, chosen: Tensor, *, steps: int) -> F.Router:
    """The router after `steps` of Adam on the cross-entropy of its margins with a choice [T, E]; lengths are kept."""

    def loss(current: F.Router) -> tuple[Tensor, tuple[()]]:
        scores = _route(current, x).scores / TEMPERATURE
        return binary_cross_entropy_with_logits(scores, chosen.to(scores.dtype)), ()

    length = torch.linalg.vector_norm(router.prototypes, dim=-1, keepdim=True).clamp_min(COSINE_EPS)
    current = router._replace(prototypes=router.prototypes / length)
    learns = tree.map1(lambda leaf: torch.ones((), dtype=torch.bool), current)
    state, step = optim.adamw_init(current, learns), tree.value_and_grad(loss, engine="autograd")
    rate = torch.tensor(LEARNING_RATE)
    for _ in range(steps):
        _, grads = step(current)
        current, state = optim.adamw(
            current, grads, state, learns, (), lr=rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
        )
    return current._replace(prototypes=current.prototypes * length)
