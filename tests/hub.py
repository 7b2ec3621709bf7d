"""What the tests of `onn.hub` share: random small models, carved, of every kind that the library knows."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import torch
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import carve, qwen3
from onn.hub import OnnForCausalLM, to_module
from onn.qwen3 import Model, Moe, MoeConfig, Qwen3Config
from tests.support import normal
from tests.test_qwen3 import MOE, configs, parameters

TOP_K = replace(MOE, route="top_k", top_k=3, normalise=True)
SELECTIVE = replace(MOE, combine="softmax", fallback_k=2)


class Tiny(NamedTuple):
    """A carved model, and what is needed to run it."""

    model: Model
    config: Qwen3Config
    moe: MoeConfig

    def logits(self, tokens: Tensor) -> Tensor:
        """By the functions."""
        return qwen3.forward(self.model, tokens, self.taps, config=self.config, moe=self.moe).logits

    @property
    def taps(self) -> tuple[dict[str, Tensor], ...]:
        """Of every carved layer, empty."""
        return tuple({} for layer in self.model.layers if isinstance(layer.mlp, Moe))

    def module(self) -> OnnForCausalLM:
        """In the same memory."""
        return to_module(self.model, config=self.config, moe=self.moe)


def make_tiny(
    architecture: Qwen3Config,
    moe: MoeConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dense_layers: tuple[int, ...] = (),
) -> Tiny:
    """Random parameters and routers that choose: about half of the experts pass their thresholds."""
    dense = parameters(architecture, dtype=dtype, seed=seed)
    carved = carve.carve(dense, num_experts=moe.num_experts)

    def layer(index: int) -> qwen3.Layer:
        chosen = carved.layers[index]
        if index in dense_layers or not isinstance(chosen.mlp, Moe):
            return dense.layers[index]
        router = F.Router(
            prototypes=normal(seed + index, *chosen.mlp.router.prototypes.shape, dtype=dtype),
            thresholds=normal(seed - index, moe.num_experts, dtype=chosen.mlp.router.thresholds.dtype) / 8,
        )
        return chosen._replace(mlp=chosen.mlp._replace(router=router))

    model = carved._replace(layers=tuple(layer(index) for index in range(len(dense.layers))))
    return Tiny(model=model, config=architecture, moe=moe)


def moes() -> st.SearchStrategy[MoeConfig]:
    """Every route and way to combine, with 10 experts that all learn."""
    by_threshold = st.builds(
        lambda squash, combine, k: replace(MOE, squash=squash, combine=combine, fallback_k=k),
        st.sampled_from(["identity", "sigmoid"]),
        st.sampled_from(["softmax", "uniform", "sum"]),
        st.integers(1, 10),
    )
    by_rank = st.builds(
        lambda k, normalise: replace(TOP_K, top_k=k, normalise=normalise), st.integers(1, 10), st.booleans()
    )
    return by_threshold | by_rank


@st.composite
def tinies(draw: st.DrawFn, *, dtype: torch.dtype) -> Tiny:
    """Models of every small size, tied or not, some of whose layers may be dense."""
    architecture = draw(configs())
    layers = range(architecture.num_hidden_layers)
    dense = draw(st.sets(st.sampled_from(layers), max_size=len(layers) - 1)) if len(layers) > 1 else set[int]()
    return make_tiny(architecture, draw(moes()), seed=draw(st.integers(0, 99)), dtype=dtype, dense_layers=tuple(dense))


class _Generates(Protocol):
    def generate(self, inputs: Tensor, **settings: object) -> Tensor: ...


def generated(model: object, tokens: Tensor, *, length: int, **settings: object) -> Tensor:
    """The tokens and the likeliest ones that follow."""
    default = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": length, "do_sample": False}
    return cast("_Generates", model).generate(tokens, **default | settings)


def prompts(tiny: Tiny, *shape: int, seed: int = 1) -> Tensor:
    """Random tokens of its vocabulary."""
    return torch.randint(tiny.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
