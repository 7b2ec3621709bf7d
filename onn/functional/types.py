"""Trees that the functions of this package share.

Shape letters: T tokens (batch x sequence, flattened), H hidden, E experts of a layer, I expert intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Experts(NamedTuple):
    """A bank of SwiGLU experts; the same memory serves dense and grouped computation."""

    gate: Tensor
    """[E, I, H]"""
    up: Tensor
    """[E, I, H]"""
    down: Tensor
    """[E, I, H]: row `i` is what neuron `i` writes to the hidden state."""


class Router(NamedTuple):
    """Prototypes and thresholds of the threshold route."""

    prototypes: Tensor
    """[E, H]"""
    thresholds: Tensor
    """[E], before the sigmoid"""


class Routing(NamedTuple):
    """Which experts compute a token, and how much each counts."""

    scores: Tensor
    """[T, E]: differentiable; larger means preferred."""
    active: Tensor
    """[T, E] bool"""
    weights: Tensor
    """[T, E]: combine weights, 0 where inactive."""


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax, loss and PI: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)
