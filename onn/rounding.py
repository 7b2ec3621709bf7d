"""Rounding to bfloat16 that loses no small update."""

from __future__ import annotations

import torch
from torch import Tensor

from onn import check


def narrow(x: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """Round to `dtype`: stochastically to bfloat16, to the nearest otherwise.

    Raises:
        ValueError: bfloat16 without noise.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    if bits is None:
        raise ValueError("narrow: bfloat16 parameters need noise, uniform int16 of the shapes of params; got none.")
    return stochastic_round(x, bits)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the expectation exact.

    Args:
        x: float32.
        bits: int16, uniform over all 65,536 values, the shape of `x`.

    Returns:
        bfloat16: one of the two neighbours of `x`, `x` itself where it is representable; NaN and infinities are kept.

    References:
        Zamirai et al., 2010.06192.
    """
    check.require(x.dtype == torch.float32, f"stochastic_round: expected float32, got x of {x.dtype}.")
    check.require(bits.dtype == torch.int16, f"stochastic_round: expected int16 noise, got bits of {bits.dtype}.")
    check.require(
        x.shape == bits.shape and x.device == bits.device,
        f"stochastic_round: bits {list(bits.shape)} on {bits.device} do not fit x {list(x.shape)} on {x.device}.",
    )
    noisy = (x.view(torch.int32) + (bits.to(torch.int32) & 0xFFFF)) & -0x10000
    return torch.where(torch.isfinite(x), noisy.view(torch.float32), x).to(torch.bfloat16)
