"""Cutting the dense MLPs of a Qwen3 into experts, without adding or losing a parameter, and routers without training.

`onn.partition` groups the neurons. What a function below calls `x` are the inputs of one MLP on calibration text: of a
model carved by `carve`, `onn.qwen3.forward(...).carved[layer].x`.

Shape letters: M dense intermediate size, H hidden, E experts, I expert intermediate size (M = E I), T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

import onn.functional as F
from onn import check
from onn.functional.types import Experts, Router
from onn.partition import check_partition
from onn.qwen3 import MAX_EXPERT_SIZE, MIN_EXPERTS, Layer, Mlp, Model, Moe

OPEN_THRESHOLD = -1.5
"""Below every cosine: under the `sigmoid` squash an expert with this threshold is active on every token."""
SHARED_THRESHOLD = -math.inf
"""Of a shared expert: like `OPEN_THRESHOLD`, and no gradient and no shift of all thresholds ever closes it."""


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
    sizes = _check_mlp("split_mlp", mlp)
    check.at_least("split_mlp", "num_experts", num_experts, MIN_EXPERTS)
    size, rest = divmod(sizes["M"], num_experts)
    check.require(rest == 0, f"split_mlp: {sizes['M']} neurons do not divide into num_experts={num_experts}.")
    _check_sizes("split_mlp", num_experts, size)
    gate, up, down = (w.unflatten(0, (num_experts, size)) for w in (mlp.gate, mlp.up, mlp.down.mT))
    return Experts(gate=gate, up=up, down=down.contiguous())


def split_by(mlp: Mlp, partition: Tensor) -> Experts:
    """Cut a dense SwiGLU into the experts of a partition.

    Args:
        mlp: gate and up [M, H], down [H, M].
        partition: [E, I] int64 of `onn.partition`; E at least 10, I at most 96.

    Returns:
        Experts [E, I, H]: neuron `i` of expert `e` is neuron `partition[e, i]` of the MLP, bit for bit. The sum of all
        experts is the MLP.

    Raises:
        ValueError: a neuron is missing or occurs twice, or the result would not be a Hyper-SMoE.
    """
    sizes = _check_mlp("split_by", mlp)
    check_partition("split_by", partition)
    check.require(
        partition.numel() == sizes["M"],
        f"split_by: a partition {list(partition.shape)} does not fit {sizes['M']} neurons.",
    )
    _check_sizes("split_by", *partition.shape)
    return Experts(gate=mlp.gate[partition], up=mlp.up[partition], down=mlp.down.mT[partition])


def _check_mlp(where: str, mlp: Mlp, *others: tuple[str, Tensor, str]) -> dict[str, int]:
    own = (("gate", mlp.gate, "float M H"), ("up", mlp.up, "float M H"), ("down", mlp.down, "float H M"))
    return check.shapes(where, *own, *others)


def _check_experts(where: str, experts: Experts, *others: tuple[str, Tensor, str]) -> dict[str, int]:
    own = ((name, weight, "float E I H") for name, weight in zip(Experts._fields, experts, strict=True))
    return check.shapes(where, *own, *others)


def _check_sizes(where: str, num_experts: int, size: int) -> None:
    check.at_least(where, "num_experts", num_experts, MIN_EXPERTS)
    check.require(
        size <= MAX_EXPERT_SIZE,
        f"{where}: expected experts of at most {MAX_EXPERT_SIZE} neurons, num_experts={num_experts} gives {size}; "
        f"take at least {-(-num_experts * size // MAX_EXPERT_SIZE)}.",
    )


def merge_experts(experts: Experts) -> Mlp:
    """The dense SwiGLU that the sum of all experts is: the inverse of `split_mlp`, and of `split_by` up to the order of
    the neurons.

    Args:
        experts: [E, I, H] each.

    Returns:
        `Mlp` of E I neurons.
    """
    _check_experts("merge_experts", experts)
    gate, up, down = (w.flatten(0, 1) for w in experts)
    return Mlp(gate=gate, up=up, down=down.mT.contiguous())


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
    return _carved("carve", model, lambda mlp, _: _open(split_mlp(mlp, num_experts=num_experts), shared=0))


def carve_by(model: Model, partitions: Sequence[Tensor], *, shared: int = 0) -> Model:
    """Carve every dense MLP of a model by a partition of its neurons; prototypes and thresholds as in `carve`.

    Args:
        model: parameters with dense MLPs.
        partitions: [E, I] for each layer.
        shared: how many experts, the first ones of every layer, stay open whatever happens to their thresholds.

    Returns:
        A model of `Moe` layers that computes what the dense model computes, whatever the partitions, on the terms of
        `carve`.

    Raises:
        ValueError: a layer is carved already, another number of partitions than layers, `shared` out of range, or what
            `split_by` refuses.
    """
    check.require(
        len(partitions) == len(model.layers),
        f"carve_by: expected a partition for each of {len(model.layers)} layers, got {len(partitions)}.",
    )
    return _carved("carve_by", model, lambda mlp, layer: _open(split_by(mlp, partitions[layer]), shared=shared))


def _carved(where: str, model: Model, cut: Callable[[Mlp, int], Moe]) -> Model:
    def one(position: int, layer: Layer) -> Layer:
        check.require(
            isinstance(layer.mlp, Mlp), f"{where}: expected dense MLPs, found a layer that is carved already."
        )
        assert isinstance(layer.mlp, Mlp)
        return layer._replace(mlp=cut(layer.mlp, position))

    return model._replace(layers=tuple(one(*row) for row in enumerate(model.layers)))


def _open(experts: Experts, *, shared: int) -> Moe:
    return Moe(experts=experts, router=open_router(experts, shared=shared))


def open_router(experts: Experts, *, shared: int = 0) -> Router:
    """The router of a model just carved: `gate_prototypes`, and thresholds that hold nothing back.

    Args:
        experts: [E, I, H] each.
        shared: see `with_shared`.

    Returns:
        `Router`; prototypes in the experts' dtype, thresholds float32 (float64 for float64 experts).
    """
    _check_experts("open_router", experts)
    gate = experts.gate
    thresholds = torch.full((len(gate),), OPEN_THRESHOLD, dtype=F.reduction_dtype(gate.dtype), device=gate.device)
    return Router(prototypes=gate_prototypes(experts), thresholds=with_shared(thresholds, shared=shared))


def with_shared(thresholds: Tensor, *, shared: int) -> Tensor:
    """The thresholds [E] with those of the first `shared` experts such that, under squash `sigmoid`, they never close:
    -inf, which passes every token, has gradient 0, and stays what it is under `share_threshold_shift` and AdamW.
    """
    sizes = check.shapes("with_shared", ("thresholds", thresholds, "float E"))
    check.between("with_shared", "shared", shared, 0, sizes["E"])
    first = torch.arange(len(thresholds), device=thresholds.device) < shared
    return thresholds.masked_fill(first, SHARED_THRESHOLD)


def neuron_norms(mlp: Mlp, x: Tensor) -> Tensor:
    """The norm of what each neuron writes: `|silu(gate_m x_t) (up_m x_t)| ||down_m||`.

    Args:
        mlp: gate and up [M, H], down [H, M].
        x: [T, H].

    Returns:
        [T, M], float32 (float64 for float64 inputs).
    """
    _check_mlp("neuron_norms", mlp, ("x", x, "float T H"))
    check.one_dtype("neuron_norms", **mlp._asdict(), x=x)
    written = silu(linear(x, mlp.gate)) * linear(x, mlp.up)
    dtype = F.reduction_dtype(x.dtype)
    norms: Tensor = torch.linalg.vector_norm(mlp.down, dim=0, dtype=dtype)
    return written.to(dtype).abs() * norms


def contributions(experts: Experts, x: Tensor) -> Tensor:
    """The norm of what each expert writes, `||o_te||`: what a token loses, at most, without it.

    Args:
        experts: [E, I, H] each.
        x: [T, H].

    Returns:
        [T, E], float32 (float64 for float64 inputs).
    """
    _check_experts("contributions", experts, ("x", x, "float T H"))
    check.one_dtype("contributions", **experts._asdict(), x=x)
    dtype = F.reduction_dtype(x.dtype)

    def norm(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        written: Tensor = torch.linalg.vector_norm((silu(linear(x, gate)) * linear(x, up)) @ down, dim=-1, dtype=dtype)
        return written

    return torch.stack([norm(*row) for row in zip(*(w.unbind(0) for w in experts), strict=True)], dim=1)


def best_experts(experts: Experts, x: Tensor, *, k: int, shared: int = 0) -> Tensor:
    """The oracle's choice: of every token the `k` experts that contribute most.

    Args:
        experts: [E, I, H] each.
        x: [T, H].
        k: from 1 to E.
        shared: the first experts, which are among the `k` of every token; at most `k`.

    Returns:
        bool [T, E], `k` in each row; ties go to the lowest index.
    """
    check.between("best_experts", "k", k, 1, _check_experts("best_experts", experts)["E"])
    return choose(contributions(experts, x), k=k, shared=shared)


def choose(scores: Tensor, *, k: int, shared: int = 0) -> Tensor:
    """The first `shared` experts and, of the rest, those with the highest scores [T, E]: bool with `k` in each row."""
    sizes = check.shapes("choose", ("scores", scores, "float T E"))
    check.between("choose", "k", k, 1, sizes["E"])
    check.between("choose", "shared", shared, 0, k)
    first = torch.arange(scores.shape[1], device=scores.device) < shared
    return F.first_k(-scores.masked_fill(first, torch.inf), k=k)


def gate_prototypes(experts: Experts) -> Tensor:
    """The mean gate row of every expert: tokens along it open the expert's gates, so it needs no data.

    Args:
        experts: [E, I, H] each.

    Returns:
        [E, H] in the experts' dtype.
    """
    _check_experts("gate_prototypes", experts)
    return experts.gate.mean(dim=1, dtype=torch.promote_types(experts.gate.dtype, torch.float32)).to(experts.gate.dtype)


def token_prototypes(x: Tensor, chosen: Tensor, *, ridge: float) -> Tensor:
    """The direction that tells best, of all linear ones, the tokens of an expert from the other tokens.

    Of unit tokens `u` with covariance C: `(C + ridge mean(diag C) I)^-1 (mean of u over its tokens - mean of all u)`,
    Fisher's discriminant. As `ridge` grows it becomes the difference of the means alone, which needs fewer tokens.

    Args:
        x: [T, H].
        chosen: [T, E] bool: which tokens belong to an expert, such as `best_experts`.
        ridge: above 0.

    Returns:
        [E, H], float32 (float64 for float64 inputs): unit vectors, 0 for an expert of no token or of all.
    """
    sizes = check.shapes("token_prototypes", ("x", x, "float T H"), ("chosen", chosen, "bool T E"))
    check.require(sizes["T"] > 0, "token_prototypes: x and chosen have no tokens.")
    check.require(0 < ridge <= check.LARGEST, f"token_prototypes: expected ridge={ridge!r} > 0, and finite.")
    dtype = F.reduction_dtype(x.dtype)
    unit = normalize(x.to(dtype), dim=-1)
    centred = unit - unit.mean(dim=0)
    covariance = centred.mT @ centred / sizes["T"]
    scale = covariance.diagonal().mean()
    damped = covariance / scale.clamp_min(torch.finfo(dtype).tiny)
    damped = damped + ridge * torch.eye(sizes["H"], dtype=dtype, device=x.device)
    counts = chosen.sum(dim=0)
    apart = chosen.to(dtype).mT @ centred / counts.clamp_min(1)[:, None]
    found = normalize(torch.linalg.solve(damped, apart.mT).mT, dim=-1)
    return torch.where(((counts > 0) & (counts < sizes["T"]))[:, None], found, 0)


def matched_thresholds(affinity: Tensor, chosen: Tensor) -> Tensor:
    """Thresholds under which every expert is active, by its affinity, on as many tokens as chose it.

    Args:
        affinity: [T, E], a cosine.
        chosen: [T, E] bool.

    Returns:
        [E] for squash `sigmoid`, halfway between the last affinity that passes and the first that does not; the range
        is taken to end at +-1.5, beyond every cosine. Ties of affinity may cost an expert its count.
    """
    check.shapes("matched_thresholds", ("affinity", affinity, "float T E"), ("chosen", chosen, "bool T E"))
    ranked = torch.sort(affinity.detach(), dim=0, descending=True).values
    bottom = torch.full_like(ranked[:1], OPEN_THRESHOLD)
    ranked, count = torch.cat([-bottom, ranked, bottom]), chosen.sum(dim=0)[None]
    return (ranked.gather(0, count) + ranked.gather(0, count + 1))[0] / 2


def calibrated(router: Router, x: Tensor, *, share: float, eps: float) -> Router:
    """The router with all thresholds moved together until a share of all pairs of token and expert is active.

    Args:
        router: prototypes [E, H], thresholds [E]; those of shared experts stay -inf, and their pairs count.
        x: [T, H].
        share: in (0, 1], above the share of shared experts.
        eps: of the cosine.

    Raises:
        ValueError: no share, or less than that of the shared experts.
    """
    check.shapes(
        "calibrated", *zip(Router._fields, router, ("float E H", "float E"), strict=True), ("x", x, "float T H")
    )
    check.require(len(x) > 0 and 0 < share <= 1, f"calibrated: expected tokens in x, and 0 < share={share!r} <= 1.")
    affinity = F.cosine_affinity(x, router.prototypes, eps=eps)
    target = torch.tensor(share, dtype=affinity.dtype, device=affinity.device)
    shift = F.share_threshold_shift(affinity, router.thresholds, squash="sigmoid", target=target)
    always = int(torch.isneginf(router.thresholds).sum())
    check.require(
        bool(torch.isfinite(shift)),
        f"calibrated: expected share={share!r} above that of the {always} shared of {len(router.thresholds)} experts.",
    )
    moved = (router.thresholds.to(affinity.dtype) + shift).to(router.thresholds.dtype)
    return router._replace(thresholds=moved)


def analytic_router(
    experts: Experts, x: Tensor, chosen: Tensor, *, eps: float, shared: int = 0, ridge: float = 0.1
) -> Router:
    """A router without training: discriminants of the tokens that chose each expert, thresholds that match how many.

    Args:
        experts: [E, I, H] each.
        x: [T, H].
        chosen: [T, E] bool, such as `best_experts`; their share is the router's density.
        eps: of the cosine.
        shared: experts, the first ones, that shall always be open.
        ridge: of `token_prototypes`.

    Returns:
        `Router` in the dtypes of `open_router`. A prototype is as long as the expert's mean gate row, so that learning
        rates mean what they mean after `carve`; it is that row for an expert of no token or of all.
    """
    _check_experts("analytic_router", experts, ("x", x, "float T H"), ("chosen", chosen, "bool T E"))
    by_gate = gate_prototypes(experts).to(F.reduction_dtype(x.dtype))
    by_token = token_prototypes(x, chosen, ridge=ridge)
    length = torch.linalg.vector_norm(by_gate, dim=-1, keepdim=True)
    prototypes = torch.where(by_token.any(dim=-1, keepdim=True), by_token * length, by_gate).to(experts.gate.dtype)
    thresholds = matched_thresholds(F.cosine_affinity(x, prototypes, eps=eps), chosen)
    return Router(prototypes=prototypes, thresholds=with_shared(thresholds, shared=shared))


def representative_scores(mlp: Mlp, neurons: Tensor, x: Tensor) -> Tensor:
    """CMoE's router: an expert scores what its representative neuron does with the token, rows at unit length.

    `|silu(gate_r x / ||gate_r||) (up_r x / ||up_r||)|` for `r = neurons[e]`. No cosine with a prototype computes it, so
    it stands here to be compared with.

    Args:
        mlp: gate and up [M, H].
        neurons: [E] of `onn.partition.representatives`.
        x: [T, H].

    Returns:
        [T, E], at least 0, in the dtype of `x`.

    References:
        CMoE (Pei et al., 2502.04416).
    """
    sizes = _check_mlp("representative_scores", mlp, ("neurons", neurons, "integer E"), ("x", x, "float T H"))
    check.one_dtype("representative_scores", gate=mlp.gate, up=mlp.up, x=x)
    check.require(
        neurons.dtype in (torch.int32, torch.int64), f"representative_scores: got neurons of {neurons.dtype}."
    )
    low, high = (int(value) for value in torch.aminmax(neurons)) if neurons.numel() else (0, -1)
    check.require(
        low >= 0 and high < sizes["M"],
        f"representative_scores: neurons from {low} to {high} are not among {sizes['M']}.",
    )
    gate, up = (normalize(w[neurons], dim=-1) for w in (mlp.gate, mlp.up))
    return (silu(linear(x, gate)) * linear(x, up)).abs()
