"""Qwen3 as pure functions: configuration, parameter trees and the forward pass.

Attention, norms and rotary embedding are transformers' own modules, built on `meta` and called with
`torch.func.functional_call`; the expert bank stands in the place of the MLP.

Shape letters: B batch, S sequence, T = B S tokens, H hidden, M dense intermediate, E experts, I expert intermediate,
V vocabulary, N query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import embedding, linear, silu

from onn import check
from onn.architecture import LARGEST_SIZE as LARGEST_SIZE
from onn.architecture import MAX_EXPERT_SIZE as MAX_EXPERT_SIZE
from onn.architecture import MIN_EXPERTS as MIN_EXPERTS
from onn.architecture import MOST_LAYERS as MOST_LAYERS
from onn.architecture import Modules as Modules
from onn.architecture import MoeConfig as MoeConfig
from onn.architecture import Qwen3Config as Qwen3Config
from onn.architecture import Route as Route
from onn.architecture import transformers_config as transformers_config
from onn.functional.experts import bank
from onn.functional.kernels.backends import bounded
from onn.functional.routing import cosine_affinity, threshold_route, top_k_route
from onn.functional.types import Experts, Router, Routing
from onn.region import Region, inline
from onn.tiling import backend_of
from onn.tree import detach, leaves, map1, shapes

_LEAVES = (
    *(("embedding", "float V H"), ("head.0", "float V H"), ("norm", "float H"), ("input_norm", "float H")),
    *(("attention.q", "float Q H"), ("attention.k", "float K H"), ("attention.v", "float K H")),
    *(("attention.o", "float H Q"), ("q_norm", "float D"), ("k_norm", "float D"), ("post_attention_norm", "float H")),
    *(("mlp.gate", "float M H"), ("mlp.up", "float M H"), ("mlp.down", "float H M")),
    *(("experts.gate", "float E I H"), ("experts.up", "float E I H"), ("experts.down", "float E I H")),
    *(("prototypes", "float E H"), ("thresholds", "float E")),
)
"""What each parameter is, by the end of its path; Q = N D, and K stands for K D."""


class Attention(NamedTuple):
    """Projections and per-head norms of one attention."""

    q: Tensor
    """[N D, H]"""
    k: Tensor
    """[K D, H]"""
    v: Tensor
    """[K D, H]"""
    o: Tensor
    """[H, N D]"""
    q_norm: Tensor
    """[D]"""
    k_norm: Tensor
    """[D]"""


class Mlp(NamedTuple):
    """The dense SwiGLU of one layer, in the layout of `torch.nn.Linear`."""

    gate: Tensor
    """[M, H]"""
    up: Tensor
    """[M, H]"""
    down: Tensor
    """[H, M]"""


class Moe(NamedTuple):
    """The expert bank of one layer and its router."""

    experts: Experts
    router: Router


class Layer(NamedTuple):
    """One transformer layer, dense or carved."""

    input_norm: Tensor
    """[H]"""
    attention: Attention
    post_attention_norm: Tensor
    """[H]"""
    mlp: Mlp | Moe


class Model(NamedTuple):
    """All parameters of a Qwen3 language model."""

    embedding: Tensor
    """[V, H]"""
    layers: tuple[Layer, ...]
    norm: Tensor
    """[H]"""
    head: tuple[Tensor, ...]
    """Empty when tied to the embedding, else one [V, H]."""


class Carved(NamedTuple):
    """What a carved layer saw and decided; constants in what `forward` returns."""

    x: Tensor
    """[T, H]: the input of the router and the bank."""
    affinity: Tensor
    """[T, E]: the cosine with each prototype, or under `top_k` the logit."""
    routing: Routing


class Output(NamedTuple):
    """What `forward` returns."""

    logits: Tensor
    """[B, S, V]"""
    carved: tuple[Carved, ...]
    """One entry for each carved layer, in order; empty for a dense model."""


def abstract(config: Qwen3Config) -> Model:
    """The parameter tree of the dense model with shapes alone, on `meta`: a template for initialising and loading."""
    H, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D

    def of(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    layer = Layer(
        input_norm=of(H),
        attention=Attention(
            q=of(queries, H), k=of(keys, H), v=of(keys, H), o=of(H, queries), q_norm=of(D), k_norm=of(D)
        ),
        post_attention_norm=of(H),
        mlp=Mlp(gate=of(M, H), up=of(M, H), down=of(H, M)),
    )
    head = () if config.tie_word_embeddings else (of(config.vocab_size, H),)
    return Model(embedding=of(config.vocab_size, H), layers=(layer,) * config.num_hidden_layers, norm=of(H), head=head)


def check_model(where: str, model: Model, *, config: Qwen3Config, moe: MoeConfig | None) -> None:
    """Raise `ValueError` unless the parameters, dense or carved, have the shapes of a configuration and one dtype."""
    check_structure(where, model)
    D, queries = config.head_dim, config.num_attention_heads * config.head_dim
    expected = {"V": config.vocab_size, "H": config.hidden_size, "M": config.intermediate_size, "D": D}
    expected |= {"Q": queries, "K": config.num_key_value_heads * D} | ({} if moe is None else {"E": moe.num_experts})
    found, layers = len(model.layers), config.num_hidden_layers
    check.require(found == layers, f"{where}: the model has {found} layers, the configuration {layers}.")
    heads, tied = len(model.head), config.tie_word_embeddings
    check.require(int(not tied) <= heads <= 1, f"{where}: the model has {heads} heads, tie_word_embeddings={tied}.")
    for part, sizes in check_layers(where, model).items():
        for letter, size in sizes.items():
            fits = expected.get(letter, size)
            check.require(size == fits, f"{part}: the model has {letter}={size}, the configuration {letter}={fits}.")


def check_structure(where: str, model: Model) -> None:
    """Raise `ValueError` unless a model consists of layers, each with a dense MLP or a bank and its router."""
    check.require(isinstance(model, Model), f"{where}: expected a Model, got {type(model).__name__}.")
    for position, layer in enumerate(model.layers):
        found = type(layer.mlp if isinstance(layer, Layer) else layer)
        check.require(
            found in (Mlp, Moe) and isinstance(layer, Layer),
            f"{where}, layer {position}: expected a Layer with an Mlp or a Moe, found {found.__name__}.",
        )


def check_layers(where: str, model: Model) -> dict[str, dict[str, int]]:
    """The sizes of every layer, by where it stands.

    Raises:
        ValueError: see `check_structure`; or shapes do not fit one another, or dtypes or devices differ. Routers may be
            of another dtype.
    """
    check_structure(where, model)
    found = {}
    for position, layer in enumerate(model.layers):
        part = f"{where}, layer {position}"
        found[part] = shapes(part, model._replace(layers=(layer,)), dict(_LEAVES))
        own = layer.mlp.experts if isinstance(layer.mlp, Moe) else layer.mlp
        parts = (layer.input_norm, layer.attention, layer.post_attention_norm, own, model.norm, model.head)
        weights = {leaf.dtype for leaf in leaves(parts)}
        check.require(
            weights == {model.embedding.dtype}, f"{part}: dtypes {weights}, embedding of {model.embedding.dtype}."
        )
    return found


def init(noise: Model, *, config: Qwen3Config, dtype: torch.dtype) -> Model:
    """Initial parameters of a dense model: `initializer_range` times standard normal `noise`, norms at one."""
    check.holds("init", "dtype", torch.empty((), dtype=dtype, device="meta"), "float")
    check_model("init", noise, config=config, moe=None)

    def scaled(leaf: Tensor) -> Tensor:
        return torch.ones_like(leaf, dtype=dtype) if leaf.ndim == 1 else (leaf * config.initializer_range).to(dtype)

    return map1(scaled, noise)


def _check_last(where: str, x: Tensor, name: str, weight: Tensor) -> None:
    check.holds(where, "x", x, "float")
    check.holds(where, name, weight, "float")
    check.require(
        x.ndim > 0 and weight.shape[-1:] == x.shape[-1:] and weight.device == x.device,
        f"{where}: {name} {list(weight.shape)} on {weight.device} does not fit x {list(x.shape)} on {x.device}.",
    )


def apply_norm(weight: Tensor, x: Tensor, config: Qwen3Config) -> Tensor:
    """transformers' RMS norm with `weight` [H] on `x` [..., H]."""
    check.shapes("apply_norm", ("weight", weight, "float H"))
    _check_last("apply_norm", x, "weight", weight)
    return cast("Tensor", functional_call(config.modules.norm, {"weight": weight}, (x,)))


def apply_attention(attention: Attention, x: Tensor, positions: tuple[Tensor, Tensor], config: Qwen3Config) -> Tensor:
    """transformers' causal attention on `x` [B, S, H], with the cosines and sines of `rotary_positions`."""
    D = config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    dims = (f"{queries} H", f"{keys} H", f"{keys} H", f"H {queries}", f"{D}", f"{D}", f"1 S {D}", f"1 S {D}")
    parts = attention._asdict() | dict(zip(("cosines", "sines"), positions, strict=True))
    rows = ((name, part, f"float {own}") for (name, part), own in zip(parts.items(), dims, strict=True))
    check.shapes("apply_attention", ("x", x, "float B S H"), *rows)
    check.one_dtype("apply_attention", x=x, **parts)
    check.require(x.numel() > 0, f"apply_attention: x {list(x.shape)} holds no token.")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    weights = {f"{name}.weight": weight for name, weight in zip(names, attention, strict=True)}
    arguments = {"hidden_states": x, "position_embeddings": positions, "attention_mask": None}
    output, _ = functional_call(config.modules.attention, weights, (), arguments)
    return cast("Tensor", output)


def rotary_positions(x: Tensor, config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """The cosines and sines [1, S, D] of the rotary embedding, in the dtype of `x` [B, S, H]."""
    check.shapes("rotary_positions", ("x", x, "float B S H"))
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return cast("tuple[Tensor, Tensor]", config.modules.rotary(x, positions))


def mlp_forward(mlp: Mlp, x: Tensor) -> Tensor:
    """Dense SwiGLU: [..., H] to [..., H]."""
    shapes("mlp_forward", mlp, {"gate": "float M H", "up": "float M H", "down": "float H M"})
    _check_last("mlp_forward", x, "gate", mlp.gate)
    check.one_dtype("mlp_forward", **mlp._asdict(), x=x)
    return linear(silu(linear(x, mlp.gate)) * linear(x, mlp.up), mlp.down)


def route(router: Router, x: Tensor, *, config: MoeConfig) -> tuple[Tensor, Routing]:
    """The affinity [T, E] of the tokens `x` [T, H] with each expert, and the experts that this gives them."""
    rows = zip(Router._fields, router, ("float E H", "float E"), strict=True)
    sizes = check.shapes("route", *rows, ("x", x, "float T H"))
    E = config.num_experts
    check.require(sizes["E"] == E, f"route: the router has {sizes['E']} prototypes, the configuration num_experts={E}.")
    if config.route == "top_k":
        check.one_dtype("route", prototypes=router.prototypes, x=x)
        logits = linear(x, router.prototypes)
        return logits, top_k_route(logits, k=config.top_k, normalise=config.normalise)
    affinity = cosine_affinity(x, router.prototypes, eps=config.cosine_eps)
    routing = threshold_route(
        affinity, router.thresholds, squash=config.squash, fallback_k=config.fallback_k, combine=config.combine
    )
    return affinity, routing


def moe_forward(moe: Moe, x: Tensor, taps: Mapping[str, Tensor], *, config: MoeConfig) -> tuple[Tensor, Carved]:
    """Route and compute the tokens `x` [T, H]; `taps` names what the backward pass shall measure (`zero_taps`)."""
    affinity, routing = route(moe.router, x, config=config)
    backend = backend_of(config.backend)
    known = bounded(backend, per_token=config.top_k) if config.route == "top_k" else backend
    y = bank(moe.experts, x, routing.weights.to(x.dtype), taps, min_k=config.min_k, backend=known)
    return y, Carved(x=x, affinity=affinity, routing=routing)


def layer_forward(
    layer: Layer,
    x_BSH: Tensor,
    positions: tuple[Tensor, Tensor],
    taps: Mapping[str, Tensor],
    *,
    config: Qwen3Config,
    moe: MoeConfig | None,
) -> tuple[Tensor, tuple[Carved, ...]]:
    """One transformer layer on `x` [B, S, H]; beside its output what a carved layer saw and decided, detached.

    Raises:
        ValueError: a carved layer without `moe`.
    """
    check.shapes(
        "layer_forward",
        ("x", x_BSH, "float B S H"),
        ("input_norm", layer.input_norm, "float H"),
        ("post_attention_norm", layer.post_attention_norm, "float H"),
    )
    normed = apply_norm(layer.input_norm, x_BSH, config)
    x_BSH = x_BSH + apply_attention(layer.attention, normed, positions, config)
    normed = apply_norm(layer.post_attention_norm, x_BSH, config)
    if isinstance(layer.mlp, Mlp):
        return x_BSH + mlp_forward(layer.mlp, normed), ()
    if moe is None:
        raise ValueError("forward: the model has carved layers, expected moe=MoeConfig(...).")
    y_TH, seen = moe_forward(layer.mlp, normed.flatten(0, 1), taps, config=moe)
    return x_BSH + y_TH.unflatten(0, x_BSH.shape[:2]), (detach(seen),)


def hidden_states(
    model: Model,
    tokens: Tensor,
    taps: tuple[Mapping[str, Tensor], ...],
    *,
    config: Qwen3Config,
    moe: MoeConfig | None,
    region: Region,
) -> tuple[Tensor, tuple[Carved, ...]]:
    """What the last layer gives [B, S, H], and what each carved layer decided; see `forward`."""
    carved_layers = sum(isinstance(layer.mlp, Moe) for layer in model.layers)
    check.require(
        len(taps) == carved_layers,
        f"forward: expected one mapping of taps for each of {carved_layers} carved layers, got {len(taps)}.",
    )
    check.shapes("forward", ("tokens", tokens, "integer B S"), ("embedding", model.embedding, "float V H"))
    check.require(tokens.dtype in (torch.int32, torch.int64), f"forward: expected int64 tokens, got {tokens.dtype}.")
    check.require(tokens.numel() > 0, f"forward: tokens {list(tokens.shape)} are none.")
    check_model("forward", model, config=config, moe=moe)
    try:
        x_BSH = embedding(tokens, model.embedding)
    except IndexError as error:  # on a CPU, which looks before it reads
        raise ValueError(f"forward: tokens that are not below vocab_size={config.vocab_size}: {error}.") from error
    positions = rotary_positions(x_BSH, config)
    apply = region(layer_forward, kind="layer")
    carved: tuple[Carved, ...] = ()
    for layer in model.layers:
        own = taps[len(carved)] if isinstance(layer.mlp, Moe) else {}
        x_BSH, seen = apply(layer, x_BSH, positions, own, config=config, moe=moe)
        carved += seen
    return x_BSH, carved


def readout(norm: Tensor, head: Tensor, x_BSH: Tensor, *, config: Qwen3Config) -> Tensor:
    """The logits [B, S, V] of what the last layer gave."""
    check.shapes("readout", ("x", x_BSH, "float B S H"), ("norm", norm, "float H"), ("head", head, "float V H"))
    check.one_dtype("readout", x=x_BSH, norm=norm, head=head)
    return linear(apply_norm(norm, x_BSH, config), head)


def forward(
    model: Model,
    tokens: Tensor,
    taps: tuple[Mapping[str, Tensor], ...],
    *,
    config: Qwen3Config,
    moe: MoeConfig | None,
    region: Region = inline,
) -> Output:
    """Logits of every position, causal; what each carved layer decided beside them.

    Args:
        model: parameters, dense or carved (a mixture of both is allowed).
        tokens: [B, S] integer.
        taps: one mapping for each carved layer, in order (see `onn.functional.zero_taps`); empty mappings measure
            nothing. A dense model takes `()`.
        config: architecture.
        moe: routing of the carved layers; `None` for a dense model.
        region: how each layer is carried out.

    Raises:
        ValueError: a carved layer without `moe`, another number of taps than carved layers, or a model of another
            architecture; on a CPU also a token outside the vocabulary (see `onn.data.check_batch`).
    """
    x_BSH, carved = hidden_states(model, tokens, taps, config=config, moe=moe, region=region)
    return Output(logits=readout(model.norm, output_weight(model), x_BSH, config=config), carved=carved)


def output_weight(model: Model) -> Tensor:
    """The head [V, H], which is the embedding where the two are tied."""
    return model.head[0] if model.head else model.embedding
