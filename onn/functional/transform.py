"""The transform that turns a loss into its gradient and the surprise of every bank inside, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from onn import check, tree
from onn.tree import Tree

Params = TypeVar("Params", bound=Tree)
Batch = TypeVar("Batch")
Aux = TypeVar("Aux", bound=Tree)
Taps = tuple[Mapping[str, Tensor], ...]


class SurpriseAndGrad(NamedTuple, Generic[Params, Aux]):
    """What one backward pass gives."""

    loss: Tensor
    aux: Aux
    grads: Params
    surprise: Taps
    """One mapping for each bank, with the names of its taps."""


def surprise_and_grad(
    loss: Callable[[Params, Batch, Taps], tuple[Tensor, Aux]], *, taps: Taps, engine: tree.Engine
) -> Callable[[Params, Batch], SurpriseAndGrad[Params, Aux]]:
    """Transform `loss(params, batch, taps) -> (scalar, aux)` into `(params, batch) -> SurpriseAndGrad`.

    Args:
        loss: hands each of its banks one of the taps, in order.
        taps: zeros, one mapping for each bank (`zero_taps`); what is named there is measured.
        engine: `autograd` needs the least memory; `func` also stands under `vmap` and other transforms. The numbers are
            the same.

    Returns:
        A pure function. Its loss and auxiliary tree are detached.

    Guarantee:
        The surprise of a bank is the norm of the gradient that each token position would give an untied copy of the
        expert's weights, with everything between the bank and the loss taken into account.

    Raises:
        ValueError: see `tree.value_and_grad`; or taps are no mapping for each bank.
    """
    check.function("surprise_and_grad", "loss", loss)
    check.instance("surprise_and_grad", "taps", taps, tuple)
    for bank in taps:
        check.instance("surprise_and_grad", "each of taps", bank, Mapping)

    def inner(differentiated: tuple[Params, Taps], batch: Batch) -> tuple[Tensor, Aux]:
        params, zeros = differentiated
        return loss(params, batch, zeros)

    transformed = tree.value_and_grad(inner, engine=engine)

    def surprised(params: Params, batch: Batch) -> SurpriseAndGrad[Params, Aux]:
        (value, aux), (grads, surprise) = transformed((params, taps), batch)
        return SurpriseAndGrad(loss=value, aux=aux, grads=grads, surprise=surprise)

    return surprised
