"""Trees that the functions of this package share.

Shape letters: T tokens (batch x sequence, flattened), H hidden, E experts of a layer, I expert intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onn import check


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


class Residuals(NamedTuple):
    """What the forward pass of a bank keeps for its backward pass: [T, E, I], or the rows of its pairs [., I]."""

    h1: Tensor
    """Pre-activation of the gate."""
    h3: Tensor
    """Up projection."""


class Local(NamedTuple):
    """What the backward pass of a SwiGLU bank knows of every (token, expert, neuron), each [T, E, I]."""

    c1: Tensor
    """Unit gradient of the gate's pre-activation."""
    c3: Tensor
    """Unit gradient of the up projection."""
    a: Tensor
    """Activation, without the combine weight."""


class Wanted(NamedTuple):
    """What the backward pass of a bank shall compute beside the gradient of the combine weights."""

    experts: bool
    x: bool
    surprise: bool
    bias: bool
    """What biases on the two pre-activations would learn."""
    squares: bool
    """Squared surprise by neuron and matrix."""


class RaggedGrads(NamedTuple):
    """What the backward pass of a bank's active pairs gives; a tensor without entries where it was not wanted.

    With N banks each has a dimension N before its own.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    x: Tensor
    """[T, H]: never masked."""
    weights: Tensor
    """[T, E]: 0 where the weight is 0, since nothing was computed there."""
    surprise: Tensor
    """[T, E]"""
    bias: Tensor
    """[2, E, I]: of the pairs that learn."""
    squares: Tensor
    """[3, E, I]"""


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax, loss and PI: float64 for float64, float32 for everything narrower.

    Raises:
        ValueError: no dtype.
    """
    check.instance("reduction_dtype", "dtype", dtype, torch.dtype)
    tiny = dtype.is_floating_point and dtype.itemsize == 1  # torch promotes none of these
    return torch.float32 if tiny else torch.promote_types(dtype, torch.float32)
