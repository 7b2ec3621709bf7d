"""How finely the entries of a model take part in a step: experts one by one, all else whole."""

from __future__ import annotations

import torch
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.objective import ExpertOptimizer, Regime, carved_layers
from onn.qwen3 import Model, Moe


def with_mlps(model: Model, mlps: list[Moe]) -> Model:
    """The model with these in the place of its carved layers, in order."""
    carved = iter(mlps)
    return model._replace(
        layers=tuple(
            layer._replace(mlp=next(carved)) if isinstance(layer.mlp, Moe) else layer for layer in model.layers
        )
    )


def banks_alone(model: Model) -> Model:
    """The same tree with nothing but experts and routers: all other leaves hold no entry."""
    return with_mlps(tree.map1(lambda leaf: leaf.new_empty(0), model), carved_layers(model))


def adamw_part(model: Model, *, experts: ExpertOptimizer, regime: Regime) -> Model:
    """The same tree with nothing in what AdamW does not train: leaves without entries."""
    part = model if regime == "everything" else banks_alone(model)
    if experts == "adamw":
        return part

    def nothing(matrix: Tensor) -> Tensor:
        return matrix.new_empty(len(matrix), 0, 0)

    layers = carved_layers(model)
    return with_mlps(part, [layer._replace(experts=tree.map1(nothing, layer.experts)) for layer in layers])


def entry_norms(grads: Model) -> Model:
    """The norm of every gradient, in the shapes of `grain_of`: those of the experts one by one."""

    def norm(g: Tensor, grain: Tensor) -> Tensor:
        dims = tuple(range(1, g.ndim)) if grain.ndim else None
        found: Tensor = torch.linalg.vector_norm(g, dim=dims, dtype=F.reduction_dtype(g.dtype), keepdim=grain.ndim > 0)
        return found

    return tree.map2(norm, grads, grain_of(grads))


def grain_of(model: Model) -> Model:
    """Zeros that say how finely entries may skip a step: [E, 1, 1] for the matrices of a bank, else a scalar."""
    scalars = tree.map1(lambda leaf: torch.zeros((), dtype=torch.int64, device=leaf.device), model)
    mlps = [
        Moe(experts=tree.map1(lambda g: torch.zeros_like(g[:, :1, :1], dtype=torch.int64), own.experts), router=router)
        for own, router in zip(carved_layers(model), (layer.router for layer in carved_layers(scalars)), strict=True)
    ]
    return with_mlps(scalars, mlps)


def that_learn(norms: Model, finite: Tensor) -> Model:
    """Which entries take part in a step: where all is finite everything but experts without any gradient."""
    mlps = []
    for mlp in carved_layers(norms):
        learns = finite & torch.stack([norm != 0 for norm in mlp.experts]).any(dim=0)
        router = tree.map1(lambda _: finite, mlp.router)
        mlps.append(Moe(experts=F.Experts(learns, learns, learns), router=router))
    return with_mlps(tree.map1(lambda _: finite, norms), mlps)
