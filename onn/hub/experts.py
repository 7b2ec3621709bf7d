"""transformers' experts interface on our bank: `from_pretrained(..., experts_implementation="onn")`.

Importing this module registers the name; nothing of a model is imported for it.

Shape letters: T tokens, K experts of a token, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedConfig
from transformers.activations import SiLUActivation
from transformers.integrations import moe

import onn.functional as F
from onn import check
from onn.architecture import LARGEST_SIZE
from onn.tree import map1

IMPLEMENTATION = "onn"
_PLAIN = (
    ("has_gate", True),
    ("has_bias", False),
    ("is_transposed", False),
    ("is_concatenated", True),
    ("has_post_expert_norm", False),
    ("_is_expert_parallel", False),
)
"""How plain experts are set; not every version of transformers has every setting."""


class StockExperts(nn.Module):
    """What `use_experts_implementation` makes of the experts of a layer; never built here."""

    config: PreTrainedConfig
    gate_up_proj: Tensor
    """[E, 2I, H], or [E, H, 2I] where `is_transposed`; `up_proj` [E, I, H] stands for it without `has_gate`."""
    down_proj: Tensor
    """[E, H, I], or [E, I, H] where `is_transposed`."""
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    """Pre-activations [., 2I] to activations [., I]."""
    has_gate: bool
    has_bias: bool
    is_transposed: bool


def is_stock(module: nn.Module) -> TypeGuard[StockExperts]:
    """Whether the module is the experts of a layer under transformers' experts interface."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed", "down_proj"))


def dense_weights(index: Tensor, weights: Tensor, *, num_experts: int, dtype: torch.dtype) -> Tensor:
    """The combine weights of a top-k choice over all experts.

    Args:
        index: [T, K] integer.
        weights: [T, K].
        num_experts: E.
        dtype: of the result.

    Returns:
        [T, E], 0 where not chosen; the weights of an expert that a token names twice add.

    Raises:
        ValueError: shapes or dtypes do not fit; on a CPU also an index of no expert.
    """
    check.shapes("dense_weights", ("index", index, "integer T K"), ("weights", weights, "float T K"))
    check.between("dense_weights", "num_experts", num_experts, 1, LARGEST_SIZE)
    check.holds("dense_weights", "dtype", torch.empty((), dtype=dtype, device="meta"), "float")
    nothing = torch.zeros(len(index), num_experts, dtype=dtype, device=weights.device)
    try:
        return nothing.scatter_add(1, index.long(), weights.to(dtype))
    except RuntimeError as error:  # on a CPU, which looks before it writes
        if "out of bounds" not in str(error):
            raise
        raise ValueError(f"dense_weights: an index that is not below num_experts={num_experts}: {error}.") from error


def experts_of(module: StockExperts) -> F.Experts:
    """The module's experts, [E, I, H] each: views of its parameters.

    Raises:
        ValueError: they are no plain SwiGLU experts; the message names the setting.
    """
    check.require(
        is_stock(module), f"experts_of: {type(module).__name__} is not under transformers' experts interface."
    )
    _refuse_all_but_swiglu(module)
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    return F.Experts(gate=gate, up=up, down=module.down_proj.mT)


def bank_experts(module: StockExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer as `onn.functional.bank`; called by transformers.

    Args:
        module: with plain SwiGLU experts of any size.
        hidden_states: [T, H].
        top_k_index: [T, K]; an expert named twice by a token counts twice.
        top_k_weights: [T, K].

    Returns:
        [T, H] in the dtype of `hidden_states`, computed in that of the experts, under autocast too, by the `auto`
        backend of `onn.functional.bank`, which is told that a token has at most K experts. Where the tokens are so few
        (as in generation) that their choices are fewer than the experts, a bank of the experts chosen is gathered. An
        activation that overflows (float16) may be NaN for its token even in an expert that the token did not choose. A
        combine weight that is exactly 0 gets no gradient.

    Raises:
        ValueError: another activation or layout, where the message names the setting; shapes or dtypes do not fit; on a
            CPU also an index of no expert.
    """
    experts = experts_of(module)
    check.shapes(
        "bank_experts",
        ("hidden_states", hidden_states, "float T H"),
        ("top_k_index", top_k_index, "integer T K"),
        ("top_k_weights", top_k_weights, "float T K"),
        ("gate", experts.gate, "float E I H"),
    )
    E, dtype = len(experts.gate), experts.gate.dtype
    if top_k_index.numel() < E:
        chosen = top_k_index.flatten().long()
        try:
            experts = map1(lambda w: w.index_select(0, chosen), experts)
        except IndexError as error:  # on a CPU, which looks before it reads
            raise ValueError(f"bank_experts: a top_k_index that is not below {E} experts: {error}.") from error
        weights = _own_choices(top_k_weights.to(dtype))
    else:
        weights = dense_weights(top_k_index, top_k_weights, num_experts=E, dtype=dtype)
    chosen_from = weights.shape[1]
    known = F.Bounded("auto", min(top_k_index.shape[1], chosen_from))
    y = F.bank(experts, hidden_states.to(dtype), weights, {}, min_k=chosen_from, backend=known)
    return y.to(hidden_states.dtype)


def _own_choices(weights: Tensor) -> Tensor:
    """The combine weights [T, T K] of a bank that holds one expert for each choice: a token uses its own K of them."""
    return torch.diag_embed(weights.mT).movedim(0, -1).flatten(1)


def _refuse_all_but_swiglu(module: StockExperts) -> None:
    for name, usual in _PLAIN:
        value = getattr(module, name, usual)
        if value != usual:
            raise ValueError(_refusal(module, f"{name}={value}"))
    if type(module)._apply_gate.__module__ != moe.__name__:
        raise ValueError(_refusal(module, "a gate of its own (_apply_gate)"))
    if not (module.act_fn is silu or isinstance(module.act_fn, nn.SiLU | SiLUActivation)):
        raise ValueError(_refusal(module, _activation(module)))


def _activation(module: StockExperts) -> str:
    names = [name for name in ("hidden_act", "hidden_activation") if hasattr(module.config, name)]
    return ", ".join(f"{name}={getattr(module.config, name)!r}" for name in names) or f"act_fn={module.act_fn}"


def _refusal(module: StockExperts, setting: str) -> str:
    return (
        f"experts_implementation={IMPLEMENTATION!r} computes plain SwiGLU experts (silu, no bias, gate over up, not "
        f"sharded), but {type(module).__name__} has {setting}. Leave experts_implementation at 'eager' or 'grouped_mm'."
    )


moe.ExpertsInterface.register(IMPLEMENTATION, bank_experts)
