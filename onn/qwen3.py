"""Qwen3 as pure functions: configuration, parameter trees and the forward pass.

Attention, norms and rotary embedding are transformers' own modules, built on `meta` and called with
`torch.func.functional_call`; the expert bank stands in the place of the MLP.

Shape letters: B batch, S sequence, T = B S tokens, H hidden, M dense intermediate, E experts, I expert intermediate,
V vocabulary, N query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear, silu
from transformers import Qwen3Config as TransformersConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding

from onn import check
from onn.functional.experts import Backend, bank
from onn.functional.routing import Combine, Squash, cosine_affinity, threshold_route, top_k_route
from onn.functional.types import Experts, Router, Routing
from onn.region import Region, inline
from onn.tree import detach, map1

Route = Literal["threshold", "top_k"]

MAX_EXPERT_SIZE = 96
MIN_EXPERTS = 10


class Modules(NamedTuple):
    """transformers' own modules, without parameters."""

    attention: nn.Module
    norm: nn.Module
    rotary: nn.Module


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
LARGEST_SIZE = 2**22
MOST_LAYERS = 1024
"""Larger ones are a damaged file; what they describe would not fit any machine."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Architecture of a Qwen3 language model, under the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        """Refuse sizes that no Qwen3 can have."""
        for name in _SIZES:
            check.between("Qwen3Config", name, getattr(self, name), 1, LARGEST_SIZE)
        check.between("Qwen3Config", "num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        check.between("Qwen3Config", "initializer_range", self.initializer_range, 0, 1e3)
        for name in ("rope_theta", "rms_norm_eps"):
            check.positive("Qwen3Config", name, getattr(self, name))
        check.require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"Qwen3Config: num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}.",
        )
        check.require(self.head_dim % 2 == 0, f"Qwen3Config: head_dim={self.head_dim} is odd; rotary needs pairs.")
        _ = self.modules

    @cached_property
    def modules(self) -> Modules:
        """Built with the configuration, so that a compiled function finds them instead of tracing their making."""
        reference = transformers_config(self)
        rotary = Qwen3RotaryEmbedding(reference)
        with torch.device("meta"):
            attention = Qwen3Attention(reference, layer_idx=0).eval()
            norm = Qwen3RMSNorm(self.hidden_size, eps=self.rms_norm_eps)
        return Modules(attention=attention, norm=norm, rotary=rotary)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """How the experts of a Hyper-SMoE are cut, routed and taught."""

    num_experts: int
    """Experts a layer; at least 10, and small enough that each has at most 96 neurons."""
    route: Route
    """`threshold`: the experts whose threshold a token's cosine passes; `top_k`: exactly Qwen3-MoE's gate."""
    top_k: int
    """Experts of every token under `top_k`."""
    normalise: bool
    """Under `top_k`, scale the weights of a token's experts to sum 1: Qwen3-MoE's `norm_topk_prob`."""
    squash: Squash
    """Under `threshold`, what stands between the cosine and the sigmoid of the threshold."""
    combine: Combine
    """Under `threshold`; `sum` keeps a carved model equal to its dense origin while every expert is open."""
    fallback_k: int
    """Under `threshold`, experts of a token that passes none."""
    cosine_eps: float
    """Floor of the norms in the cosine."""
    min_k: int
    """SMK: how many of a token's active experts learn from it; `num_experts` keeps all."""
    backend: Backend
    """How the bank is computed."""

    def __post_init__(self) -> None:
        """Refuse what is not a Hyper-SMoE."""
        check.at_least("MoeConfig", "num_experts", self.num_experts, MIN_EXPERTS)
        for name in ("min_k", "fallback_k", "top_k"):
            check.between("MoeConfig", name, getattr(self, name), 1, self.num_experts)
        check.one_of("MoeConfig", "route", self.route, get_args(Route))


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


def transformers_config(config: Qwen3Config) -> TransformersConfig:
    """The same architecture as transformers' own configuration."""
    reference = TransformersConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    reference._attn_implementation = "sdpa"
    return reference


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


def init(noise: Model, *, config: Qwen3Config, dtype: torch.dtype) -> Model:
    """Initial parameters of a dense model: `initializer_range` times standard normal `noise`, norms at one."""

    def scaled(leaf: Tensor) -> Tensor:
        return torch.ones_like(leaf, dtype=dtype) if leaf.ndim == 1 else (leaf * config.initializer_range).to(dtype)

    return map1(scaled, noise)


def apply_norm(weight: Tensor, x: Tensor, config: Qwen3Config) -> Tensor:
    """transformers' RMS norm with `weight` [H] on `x` [..., H]."""
    return cast("Tensor", functional_call(config.modules.norm, {"weight": weight}, (x,)))


def apply_attention(attention: Attention, x: Tensor, positions: tuple[Tensor, Tensor], config: Qwen3Config) -> Tensor:
    """transformers' causal attention on `x` [B, S, H], with the cosines and sines of `rotary_positions`."""
    weights: Mapping[str, Tensor] = {
        "q_proj.weight": attention.q,
        "k_proj.weight": attention.k,
        "v_proj.weight": attention.v,
        "o_proj.weight": attention.o,
        "q_norm.weight": attention.q_norm,
        "k_norm.weight": attention.k_norm,
    }
    arguments = {"hidden_states": x, "position_embeddings": positions, "attention_mask": None}
    output, _ = functional_call(config.modules.attention, dict(weights), (), arguments)
    return cast("Tensor", output)


def rotary_positions(x: Tensor, config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """The cosines and sines [1, S, D] of the rotary embedding, in the dtype of `x` [B, S, H]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return cast("tuple[Tensor, Tensor]", config.modules.rotary(x, positions))


def mlp_forward(mlp: Mlp, x: Tensor) -> Tensor:
    """Dense SwiGLU: [..., H] to [..., H]."""
    return linear(silu(linear(x, mlp.gate)) * linear(x, mlp.up), mlp.down)


def route(router: Router, x: Tensor, *, config: MoeConfig) -> tuple[Tensor, Routing]:
    """The affinity [T, E] of the tokens `x` [T, H] with each expert, and the experts that this gives them."""
    if config.route == "top_k":
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
    y = bank(moe.experts, x, routing.weights.to(x.dtype), taps, min_k=config.min_k, backend=config.backend)
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
    x_BSH = embedding(tokens, model.embedding)
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
        ValueError: a carved layer without `moe`, or another number of taps than carved layers.
    """
    x_BSH, carved = hidden_states(model, tokens, taps, config=config, moe=moe, region=region)
    return Output(logits=readout(model.norm, output_weight(model), x_BSH, config=config), carved=carved)


def output_weight(model: Model) -> Tensor:
    """The head [V, H], which is the embedding where the two are tied."""
    return model.head[0] if model.head else model.embedding
