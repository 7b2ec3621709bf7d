"""Randomness at the edge: noise as tensors, from one generator a run."""

from __future__ import annotations

import torch
from torch import Tensor

from onn import tree
from onn.qwen3 import Model


def generator(seed: int) -> torch.Generator:
    """A CPU generator, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(seed)


def normal_like(template: Model, source: torch.Generator) -> Model:
    """Standard normal float32 noise in the structure and shapes of a model."""
    return tree.map1(lambda leaf: torch.randn(leaf.shape, generator=source), template)


def rounding_bits(model: Model, source: torch.Generator) -> Model | tuple[()]:
    """Uniform int16 noise for the stochastic rounding of a bfloat16 model; nothing for wider ones."""
    if model.embedding.dtype != torch.bfloat16:
        return ()

    def bits(leaf: Tensor) -> Tensor:
        drawn = torch.randint(-(2**15), 2**15, leaf.shape, generator=source, dtype=torch.int16)
        return drawn.to(leaf.device)

    return tree.map1(bits, model)
