"""What a model is, as values: the architecture of a Qwen3 and how its experts are cut, routed and taught."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from transformers import Qwen3Config as TransformersConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding

from onn import check
from onn.functional.kernels.backends import Bounded
from onn.functional.routing import Combine, Squash
from onn.tiling import backend_of

Route = Literal["threshold", "top_k"]

MAX_EXPERT_SIZE = 96
MIN_EXPERTS = 10


class Modules(NamedTuple):
    """transformers' own modules, without parameters."""

    attention: nn.Module
    norm: nn.Module
    rotary: nn.Module


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings"),
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
    backend: str
    """How the bank is computed: `auto`, `dense`, `grouped`, `loop`, `native`, a measured tiling as
    `loop:ENTRIES:SHARE` or `native:SHARE`, or `grouped:EXPERTS` or `auto:EXPERTS` with the most that a token has.
    Under `top_k` that is known.
    """

    def __post_init__(self) -> None:
        """Refuse what is not a Hyper-SMoE."""
        check.whole("MoeConfig", "num_experts", self.num_experts, MIN_EXPERTS, LARGEST_SIZE)
        for name in ("min_k", "fallback_k", "top_k"):
            check.whole("MoeConfig", name, getattr(self, name), 1, self.num_experts)
        for name, known in (("route", Route), ("squash", Squash), ("combine", Combine)):
            check.one_of("MoeConfig", name, getattr(self, name), get_args(known))
        check.instance("MoeConfig", "normalise", self.normalise, bool)
        check.positive("MoeConfig", "cosine_eps", self.cosine_eps)
        if isinstance(backend := backend_of(self.backend), Bounded):
            least = self.top_k if self.route == "top_k" else 1
            check.whole("MoeConfig", f"backend={self.backend!r}: experts", backend.per_token, least, self.num_experts)


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
