"""What routers and experts make of the surprise of one backward pass.

Shape letters: T tokens, E experts, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import onn.functional as F
from onn import check, optim, qwen3, tree
from onn.objective import ConsolidationConfig, MoeTraining
from onn.qwen3 import Carved


def router_objective(
    router: F.Router, seen: Carved, taps: Mapping[str, Tensor], mix: Tensor, *, config: MoeTraining
) -> tuple[Tensor, tuple[()]]:
    """What a router is taught beside the main loss, from inputs and surprise that are constants.

    Args:
        router: of one carved layer.
        seen: what this layer saw and decided in the pass that measured the surprise.
        taps: its own; normalised here by their mean over the pairs that count.
        mix: `adaptive_mix`: the share of load balance against surprise.
        config: weights and temperature.

    Returns:
        A scalar, of which a model's routers minimise the mean, and nothing else.

    Raises:
        ValueError: the tap that the target needs is missing, or what is given does not fit one another.
    """
    teach = config.router
    name = "counterfactual" if teach.target == "counterfactual" else "surprise"
    check.require(
        name in taps, f"router_objective: target={teach.target!r} needs the tap {name!r}, got {sorted(taps)}."
    )
    _, routing = qwen3.route(router, seen.x.detach(), config=config.moe)
    rows = (("scores", routing.scores, "float T E"), (f"tap {name}", taps[name], "float T E"))
    check.shapes("router_objective", *rows, ("mix", mix, "float"))
    scores = routing.scores / teach.temperature
    values = taps[name].detach()
    if teach.target == "normalised":
        values = F.normalised_surprise(values, routing.weights.detach())
    active = routing.active & (routing.weights != 0)
    candidates = torch.ones_like(active) if teach.target == "counterfactual" else active
    counted = candidates & torch.isfinite(values) & (values > 0).any(dim=-1, keepdim=True)
    typical = torch.where(counted, values, 0).sum() / counted.sum().clamp_min(1)
    relative = values / torch.where(typical > 0, typical, 1)
    by_surprise = F.router_loss(scores, relative, counted, w_ce=teach.w_ce, w_kl=teach.w_kl)
    by_balance = F.load_balance_loss(scores, routing.active)
    loss = (
        (1 - mix) * by_surprise
        + mix * by_balance
        + teach.w_diversity * F.diversity_loss(router.prototypes, eps=config.moe.cosine_eps)
        + teach.w_simplicity * F.simplicity_loss(router.prototypes)
    )
    return teach.weight * loss, ()


def router_lesson(
    router: F.Router, seen: Carved, taps: Mapping[str, Tensor], mix: Tensor, *, config: MoeTraining
) -> F.Router:
    """The gradient of `router_objective`, whose arguments it takes, with respect to the router."""
    gradient = tree.value_and_grad(router_objective, engine="func")
    return gradient(router, seen, taps, mix, config=config)[1]


def expert_lesson(
    grads: F.Experts, importance: Tensor, seen: Carved, taps: Mapping[str, Tensor], *, config: ConsolidationConfig
) -> tuple[F.Experts, Tensor]:
    """`onn.optim.consolidation` of one carved layer, from the gradient of the mean loss.

    Args:
        grads: of its experts.
        importance: [E, I], in squared surprise of the summed loss.
        seen: what this layer saw and decided in the same pass.
        taps: `matrix` of the summed loss, `bias` of the mean one.
        config: damping and eps.

    Returns:
        See `onn.optim.consolidation`; descend along it by the rate times the targets that count.

    Raises:
        ValueError: a tap is missing, or what is given does not fit one another.
    """
    missing = [name for name in ("matrix", "bias") if name not in taps]
    check.require(not missing, f"expert_lesson: needs the taps 'matrix' and 'bias', got {sorted(taps)}.")
    check.shapes(
        "expert_lesson", ("tap matrix", taps["matrix"], "float 3 E I"), ("tap bias", taps["bias"], "float 2 E I")
    )
    return optim.consolidation(
        grads,
        importance,
        seen.x,
        seen.routing.weights,
        squares=taps["matrix"],
        biases=taps["bias"],
        damping=config.damping,
        eps=config.eps,
    )
