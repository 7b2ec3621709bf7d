"""The definition of surprise, with attention in the model: the gradient of an untied copy of the weights per position.

The oracle is transformers' own Qwen3 whose MLPs are replaced by banks in which no two positions share a weight.

Shape letters: B batch, S sequence, T = B S tokens, L layers, E experts, I expert intermediate size, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import onn.functional as F
from onn import carve, qwen3, tree
from onn.functional.routing import Combine
from onn.functional.transform import Taps
from onn.objective import carved_layers, zero_taps
from onn.qwen3 import Model, MoeConfig
from tests.support import (
    BOUND,
    assert_close,
    assert_same,
    kept_sum,
    least_pairs,
    normal,
    pair_norms,
    untied,
    untied_forward,
)
from tests.test_qwen3 import MOE, config, parameters, random_tokens, reference

ARCHITECTURE = config()
B, S = 2, 5
ENGINES: tuple[tree.Engine, ...] = get_args(tree.Engine)
COMBINES: tuple[Combine, ...] = get_args(Combine)


class Untied(nn.Module):
    """A routed bank with a copy of every expert for each position."""

    def __init__(self, experts: F.Experts, router: F.Router, settings: MoeConfig) -> None:
        super().__init__()
        self.experts = tree.map1(lambda w: w.requires_grad_(), untied(experts, tokens=B * S))
        self.router, self.settings = router, settings
        self.weights = torch.empty(0)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x = x_BSH.flatten(0, 1)
        routing = F.threshold_route(
            F.cosine_affinity(x, self.router.prototypes, eps=self.settings.cosine_eps),
            self.router.thresholds,
            squash=self.settings.squash,
            fallback_k=self.settings.fallback_k,
            combine=self.settings.combine,
        )
        self.weights = routing.weights.detach()
        return untied_forward(self.experts, x, routing.weights).view_as(x_BSH)


class Oracle(NamedTuple):
    """What stock autograd says."""

    losses: Tensor
    """[B, S]: the loss of every position."""
    pairs: list[F.Experts]
    """[T, E, I, H] each, for every layer: the gradient of the summed loss with respect to the untied copies."""
    weights: list[Tensor]
    """[T, E] combine weights of every layer."""
    modules: list[Untied]


def carved(combine: Combine) -> tuple[Model, Model, MoeConfig]:
    """A dense model, the model carved from it with about half of its experts open, and its routing."""
    dense = parameters(ARCHITECTURE)
    model = carve.carve(dense, num_experts=10)
    layers = []
    for position, layer in enumerate(model.layers):
        assert isinstance(layer.mlp, qwen3.Moe)
        router = layer.mlp.router._replace(thresholds=normal(position, 10) * 0.2)
        layers.append(layer._replace(mlp=layer.mlp._replace(router=router)))
    return dense, model._replace(layers=tuple(layers)), replace(MOE, combine=combine)


def text() -> tuple[Tensor, Tensor]:
    tokens = random_tokens(ARCHITECTURE, B, S + 1)
    return tokens[:, :-1], tokens[:, 1:]


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def oracle(combine: Combine) -> Oracle:
    dense, model, settings = carved(combine)
    hub = reference(dense, ARCHITECTURE)
    modules = [Untied(layer.experts, layer.router, settings) for layer in carved_layers(model)]
    for layer, module in zip(hub.model.layers, modules, strict=True):
        layer.mlp = module
    tokens, targets = text()
    losses = losses_of(hub(tokens, use_cache=False).logits, targets)
    copies = [leaf for module in modules for leaf in module.experts]
    grads = torch.autograd.grad(losses.sum(), copies, retain_graph=True)
    pairs = [F.Experts(*grads[at : at + 3]) for at in range(0, len(grads), 3)]
    return Oracle(losses=losses, pairs=pairs, weights=[module.weights for module in modules], modules=modules)


def summed_loss(settings: MoeConfig, model: Model, batch: tuple[Tensor, Tensor], taps: Taps) -> tuple[Tensor, Tensor]:
    tokens, targets = batch
    output = qwen3.forward(model, tokens, taps, config=ARCHITECTURE, moe=settings)
    losses = losses_of(output.logits, targets)
    return losses.sum(), losses


def ours(combine: Combine, *, min_k: int, engine: tree.Engine) -> F.SurpriseAndGrad[Model, Tensor]:
    _, model, settings = carved(combine)
    settings = replace(settings, min_k=min_k)

    def loss(model: Model, batch: tuple[Tensor, Tensor], taps: Taps) -> tuple[Tensor, Tensor]:
        return summed_loss(settings, model, batch, taps)

    taps = zero_taps(model, B * S, names=("surprise",))
    return F.surprise_and_grad(loss, taps=taps, engine=engine)(model, text())


def without_experts(model: Model) -> Model:
    """Everything but the experts, whose place is taken by zeros."""
    layers = []
    for layer in model.layers:
        assert isinstance(layer.mlp, qwen3.Moe)
        layers.append(layer._replace(mlp=layer.mlp._replace(experts=tree.zeros_like(layer.mlp.experts))))
    return model._replace(layers=tuple(layers))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("combine", COMBINES)
def test_surprise_is_the_norm_of_the_gradient_of_each_positions_untied_copy(
    combine: Combine, engine: tree.Engine
) -> None:
    expected, got = oracle(combine), ours(combine, min_k=10, engine=engine)
    assert_close(got.aux, expected.losses, bound=BOUND)
    for tap, pairs, weights in zip(got.surprise, expected.pairs, expected.weights, strict=True):
        active = weights != 0
        assert 0.2 < float(active.double().mean()) < 0.8
        assert_close(tap["surprise"], pair_norms(pairs), bound=BOUND)
        assert torch.equal(tap["surprise"] != 0, active)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("min_k", [1, 2, 3, 10])
def test_smk_in_a_model_sums_the_untied_gradients_of_the_pairs_that_it_keeps(min_k: int, engine: tree.Engine) -> None:
    expected, got = oracle("sum"), ours("sum", min_k=min_k, engine=engine)
    for layer, pairs, weights in zip(carved_layers(got.grads), expected.pairs, expected.weights, strict=True):
        keep = least_pairs(pair_norms(pairs), weights, min_k=min_k)
        assert bool(keep.any())
        assert (min_k == 10) == torch.equal(keep, weights != 0)
        assert_close(layer.experts, kept_sum(pairs, keep), bound=BOUND)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("combine", COMBINES)
def test_smk_in_a_model_changes_the_experts_gradients_alone_bit_for_bit(combine: Combine, engine: tree.Engine) -> None:
    plain, masked = (ours(combine, min_k=min_k, engine=engine) for min_k in (10, 1))
    assert_same(without_experts(masked.grads), without_experts(plain.grads))
    assert_same((masked.loss, masked.aux, masked.surprise), (plain.loss, plain.aux, plain.surprise))
    for one, all_ in zip(carved_layers(masked.grads), carved_layers(plain.grads), strict=True):
        assert not torch.equal(one.experts.down, all_.experts.down)


def test_surprise_is_not_the_gradient_of_a_tokens_own_loss_except_in_the_last_layer() -> None:
    expected = oracle("sum")
    copies = [leaf for module in expected.modules for leaf in module.experts]
    rows = []
    for loss in expected.losses.flatten():
        grads = [grad.sum(dim=0) for grad in torch.autograd.grad(loss, copies, retain_graph=True)]
        rows.append(torch.stack([F.expert_norms(F.Experts(*grads[at : at + 3])) for at in range(0, len(grads), 3)]))
    own_LTE = torch.stack(rows, dim=1)
    below, last = (pair_norms(pairs) for pairs in expected.pairs)
    assert_close(own_LTE[1], last, bound=BOUND)
    active = expected.weights[0] != 0
    assert float((own_LTE[0][active] / below[active] - 1).abs().median()) > 0.05
