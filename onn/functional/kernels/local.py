"""The local gradients of experts: what every form of surprise and every parameter gradient is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

from onn.functional.types import Local, Residuals, reduction_dtype


def unit_gradients(residuals: Residuals, u: Tensor) -> Local:
    """The unit gradients from what the forward pass kept and `u = down_e g_t`, all of one shape [..., I]."""
    h1, h3 = residuals
    gated = silu(h1)
    return Local(c1=torch.ops.aten.silu_backward(u * h3, h1), c3=u * gated, a=gated * h3)


def unit_norms(local: Local) -> tuple[Tensor, Tensor]:
    """`sqrt(||c1||^2 + ||c3||^2)` and `||a||` over the neurons: [..., I] to [...], float32 at least."""
    first, second, outer = (vector_norm(rows, dim=-1, dtype=reduction_dtype(rows.dtype)) for rows in local)
    return torch.hypot(first, second), outer


def matrix_squares(local: Local, inner: Tensor, outer: Tensor) -> Iterator[Tensor]:
    """`c1^2 inner^2`, `c3^2 inner^2`, `a^2 outer^2`, where `inner` and `outer` [..., 1] are `w ||x||` and `w ||g||`."""
    return ((rows.to(norm.dtype) * norm) ** 2 for rows, norm in zip(local, (inner, inner, outer), strict=True))
