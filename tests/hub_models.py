"""Small stock mixture-of-experts models, one of every kind that the hub's tests need."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Glm4MoeForCausalLM,
    GptOssForCausalLM,
    MixtralForCausalLM,
    NemotronHForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

from onn.hub.experts import StockExperts, is_stock
from tests.support import normal

B, S, VOCABULARY = 2, 9, 31
COMMON: Mapping[str, object] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "head_dim": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
)
PLAIN: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 6, "intermediate_size": 24},
        "olmoe": {"intermediate_size": 12, "num_experts": 7, "head_dim": 4},
        # larger than any expert of a Hyper-SMoE
        "mixtral": {"intermediate_size": 100, "num_local_experts": 4},
        # a dense first layer, a shared expert in the others, and weights that do not sum to 1
        "glm4_moe": {
            "num_hidden_layers": 3,
            "moe_intermediate_size": 12,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "intermediate_size": 24,
        },
    }
)
"""Architectures whose experts are plain SwiGLU."""
UNUSUAL: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # interleaved, transposed, with biases and a clamped gate of its own
        "gpt_oss": {
            "intermediate_size": 12,
            "num_local_experts": 6,
            "swiglu_limit": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        # no gate, squared relu, a shared expert
        "nemotron_h": {
            "layers_block_type": ["full_attention", "moe", "full_attention", "moe"],
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 12,
            "n_routed_experts": 6,
            "n_group": 1,
            "topk_group": 1,
        },
    }
)
"""Architectures that the bank refuses."""
FAMILIES = MappingProxyType({**PLAIN, **UNUSUAL})
MODELS: Mapping[str, type[PreTrainedModel]] = MappingProxyType(
    {
        "qwen3_moe": Qwen3MoeForCausalLM,
        "olmoe": OlmoeForCausalLM,
        "mixtral": MixtralForCausalLM,
        "glm4_moe": Glm4MoeForCausalLM,
        "gpt_oss": GptOssForCausalLM,
        "nemotron_h": NemotronHForCausalLM,
    }
)


def random_model(family: str, implementation: str, *, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A stock model with parameters that depend on the architecture alone, norms and biases included."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    config._experts_implementation = implementation
    model = MODELS[family](config)
    for position, parameter in enumerate(model.parameters()):
        drawn = normal(position, *parameter.shape) * 0.2 + float(parameter.ndim == 1)
        parameter.data = drawn.to(dtype)
    return model


def random_batch(*, rows: int = B, length: int = S) -> dict[str, Tensor]:
    """Tokens with labels, of which some do not count."""
    source = torch.Generator().manual_seed(rows * length)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=source)
    counted = torch.rand(rows, length, generator=source) < 0.8
    return {"input_ids": tokens, "labels": torch.where(counted, tokens, -100)}


def experts_modules(model: nn.Module) -> dict[str, StockExperts]:
    return {name: module for name, module in model.named_modules() if is_stock(module)}
