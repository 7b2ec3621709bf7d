"""Cutting the dense MLPs of a Qwen3 into experts, without adding or losing a parameter.

Shape letters: M dense intermediate size, H hidden, E experts, I expert intermediate size (M = E I).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onn import check
from onn.functional.types import Experts, Router, reduction_dtype
from onn.qwen3 import MAX_EXPERT_SIZE, MIN_EXPERTS, Mlp, Model, Moe

OPEN_THRESHOLD = -1.5
"""Below every cosine: under the `sigmoid` squash an expert with this threshold is active on every token."""


def split_mlp(mlp: Mlp, *, num_experts: int) -> Experts:
    """Cut a dense SwiGLU into experts of adjacent neurons.

    Args:
        mlp: gate and up [M, H], down [H, M].
        num_experts: E, at least 10 and a divisor of M, with M / E at most 96.

    Returns:
        Experts [E, M / E, H]; gate and up are views of the same memory. The sum of all experts is the MLP.

    Raises:
        ValueError: the result would not be a Hyper-SMoE.
    """
    sizes = check.shapes("split_mlp", ("gate", mlp.gate, "M H"), ("up", mlp.up, "M H"), ("down", mlp.down, "H M"))
    size, rest = divmod(sizes["M"], num_experts)
    check.require(rest == 0, f"split_mlp: {sizes['M']} neurons do not divide into num_experts={num_experts}.")
    check.at_least("split_mlp", "num_experts", num_experts, MIN_EXPERTS)
    check.require(
        size <= MAX_EXPERT_SIZE,
        f"split_mlp: expected experts of at most {MAX_EXPERT_SIZE} neurons, num_experts={num_experts} gives {size}; "
        f"take at least {-(-sizes['M'] // MAX_EXPERT_SIZE)}.",
    )
    gate, up, down = (w.unflatten(0, (num_experts, size)) for w in (mlp.gate, mlp.up, mlp.down.mT))
    return Experts(gate=gate, up=up, down=down.contiguous())


def merge_experts(experts: Experts) -> Mlp:
    """The dense SwiGLU that the sum of all experts is: the inverse of `split_mlp`.

    Args:
        experts: [E, I, H] each.

    Returns:
        `Mlp` of E I neurons.
    """
    gate, up, down = (w.flatten(0, 1) for w in experts)
    return Mlp(gate=gate, up=up, down=down.mT.contiguous())


def gate_prototypes(experts: Experts) -> Tensor:
    """The mean gate row of every expert: tokens along it open the expert's gates, so it needs no data.

    Args:
        experts: [E, I, H] each.

    Returns:
        [E, H] in the experts' dtype.
    """
    return experts.gate.mean(dim=1, dtype=torch.promote_types(experts.gate.dtype, torch.float32)).to(experts.gate.dtype)


def carve(model: Model, *, num_experts: int) -> Model:
    """Carve every dense MLP of a model: contiguous experts, prototypes from their gates, all thresholds open.

    Thresholds are float32 whatever the model is: the small moves of a controller would be lost to bfloat16.

    Args:
        model: parameters with dense MLPs.
        num_experts: E of every layer.

    Returns:
        A model of `Moe` layers. Under squash `sigmoid` and combine `sum` it computes what the dense model computes, up
        to the order of summation.

    Raises:
        ValueError: a layer is carved already, or the sizes are not those of a Hyper-SMoE.
    """

    def carved(mlp: Mlp | Moe) -> Moe:
        check.require(isinstance(mlp, Mlp), "carve: expected dense MLPs, found a layer that is carved already.")
        assert isinstance(mlp, Mlp)
        experts = split_mlp(mlp, num_experts=num_experts)
        gate = experts.gate
        thresholds = torch.full((num_experts,), OPEN_THRESHOLD, dtype=reduction_dtype(gate.dtype), device=gate.device)
        return Moe(experts=experts, router=Router(prototypes=gate_prototypes(experts), thresholds=thresholds))

    return model._replace(layers=tuple(layer._replace(mlp=carved(layer.mlp)) for layer in model.layers))
